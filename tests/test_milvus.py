"""A library on a real Milvus server of its own, which is killed and started again while a library is indexed.

Skipped without the server: pip install milvus==2.3.5 (Linux, x86_64; 58 MB, nothing else comes with it).
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("pymilvus", reason="pip install -r requirements-search.txt")
pytest.importorskip("milvus", reason="pip install milvus==2.3.5")

import milvus
import test_library
import test_search
from pymilvus import MilvusException
from test_library import ABOUT, assert_same, sentence
from test_search import CLIPS, copy_videos

import search
from engine.indexing import IndexConfig
from engine.library import Library
from engine.milvus import CLIPS as COLLECTION
from engine.milvus import Milvus
from search import CheckConfig

checkpoint, rendered, indexed = test_search.checkpoint, test_search.rendered, test_search.indexed  # fixtures


class Server:
    """`milvus-server` on a free port, with its data in a folder."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self.folder = f"http://127.0.0.1:{port}", folder
        config = milvus.MilvusServerConfig(data_dir=str(folder), proxy_port=port)
        config.resolve()  # finds free ports for everything else, and writes the configuration
        milvus._initialize_data_files(str(folder))
        self.health = config.resolve_port(9091)
        self.health[1].close()

    def start(self) -> None:
        own = dict(
            DEPLOY_MODE="STANDALONE", METRICS_PORT=str(self.health[0]), MILVUS_RUN_DIR=str(self.folder)
        )
        own["LD_LIBRARY_PATH"] = str(self.folder / "bin")
        log = (self.folder / "log").open("ab")
        how = dict(cwd=self.folder, env={**os.environ, **own}, stdout=log, stderr=log)
        self.process = subprocess.Popen([str(self.folder / "bin" / "milvus"), "run", "standalone"], **how)
        for _ in range(1200):
            try:
                if b"OK" in urllib.request.urlopen(f"http://127.0.0.1:{self.health[0]}/healthz").read():
                    return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("milvus"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def fresh(server):
    """The server, without a library."""
    client = Milvus(server.address).client
    if client.has_collection(COLLECTION):
        client.drop_collection(COLLECTION)
    return server


@pytest.fixture
def library(fresh, tmp_path) -> Library:
    """The library of test_library.py, whose tests on rows run here again, on the server."""
    made = Library(fresh.address, True, tmp_path / "features")
    made.describe({**ABOUT, "folder": str(tmp_path)})
    return test_library.fill(made)


test_rows = test_library.test_a_library_returns_the_rows_that_were_added
test_shortlist = test_library.test_a_shortlist_holds_the_largest_cosines_first
test_unfinished = (
    test_library.test_a_file_is_unfinished_until_it_is_written_and_loses_its_clips_when_it_is_read_again
)
test_finished_again = test_library.test_a_file_that_is_finished_again_without_clips_keeps_those_it_has
test_not_finite = test_library.test_features_that_are_not_finite_are_refused_and_nothing_is_written
test_gone = test_library.test_the_row_of_a_file_that_another_process_removed_is_no_file


def on(server: Server, folder: Path, **options):
    """Runs `index` on the server."""
    config = dict(library=server.address, features=folder.parent / "features", batch=2) | options
    return search.index(IndexConfig(folder, **config))


def assert_equal(server: Server, features: Path, local: str) -> None:
    """The library on the server holds the same as a local one, and the server finds the same."""
    there, here = Library(server.address, features=features), Library(local)
    assert_same(there, here)
    assert there.server.count() == len(here)
    text = here.nearest(next(here.batches())[1][0].mean(dim=0), 1)[1][0].mean(dim=0)
    assert there.nearest_ids(text, 5) == here.nearest_ids(text, 5)


def test_indexing_and_queries_are_those_of_a_local_library(
    fresh, rendered, checkpoint, indexed, tmp_path, capsys
):
    folder, features = copy_videos(tmp_path / "videos", rendered), tmp_path / "features"
    assert on(fresh, folder, checkpoint=checkpoint) == 0
    assert_equal(fresh, features, indexed[0])
    assert "0 new, 0 read again, 0 removed, 7 unchanged" in (on(fresh, folder), capsys.readouterr().out)[1]
    here = test_search.searching(indexed[0]).search("a ring", CLIPS)
    searcher = test_search.searching(fresh.address, features=features)
    hits = searcher.search("a ring", CLIPS)
    assert [(hit.file, hit.score) for hit in hits] == [
        (hit.file, pytest.approx(hit.score, abs=1e-3)) for hit in here
    ]
    short = test_search.searching(fresh.address, features=features, shortlist=2)
    nearest = short.library.nearest_ids(short.text(["a ring"])[0], 2)
    assert {hit.id for hit in short.search("a ring", 2)} == {*nearest}
    check = CheckConfig(fresh.address, queries=2, features=features, tune=True)
    assert search.check(check) == 0 and Library(fresh.address, features=features).about["shortlist"] >= 1
    (folder / "b.mp4").unlink()
    (folder / "A.MP4").rename(folder / "new.mp4")
    assert on(fresh, folder) == 0
    assert search.index(IndexConfig(folder, str(tmp_path / "local.db"), checkpoint)) == 0
    assert_equal(fresh, features, str(tmp_path / "local.db"))


@pytest.mark.parametrize("how", ["comes back", "comes back later"])
def test_a_server_that_is_killed_while_a_library_is_indexed_loses_nothing(
    how, fresh, rendered, checkpoint, indexed, tmp_path, monkeypatch
):
    folder, real, calls = copy_videos(tmp_path / "videos", rendered), Library.finish, []
    again = threading.Timer(0.5, fresh.start)

    def kill_at_the_second(library, rows):
        calls.append(rows)
        if len(calls) == 2:
            fresh.kill()
            if how == "comes back later":  # index was stopped before it could say what it had committed
                raise KeyboardInterrupt
            again.start()
        return real(library, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Library, "finish", kill_at_the_second)
        with contextlib.suppress(KeyboardInterrupt, MilvusException):
            on(fresh, folder, checkpoint=checkpoint)
    if how == "comes back":
        again.join()
    else:
        fresh.start()
    assert on(fresh, folder) == 0
    assert_equal(fresh, tmp_path / "features", indexed[0])


def test_three_processes_at_once_make_the_library_that_one_makes(
    fresh, rendered, checkpoint, indexed, tmp_path
):
    folder, features = copy_videos(tmp_path / "videos", rendered), tmp_path / "features"
    command = [sys.executable, "search.py", "index", str(folder), "--library", fresh.address]
    command += ["--features", str(features), "--checkpoint", str(checkpoint), "--batch", "1"]
    environments = [{**os.environ, "RANK": str(n), "WORLD_SIZE": "3"} for n in range(3)]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment) for environment in environments]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert_equal(fresh, features, indexed[0])


def test_another_server_gets_the_vectors_of_the_library_and_nothing_is_encoded_again(
    fresh, rendered, checkpoint, indexed, tmp_path, monkeypatch
):
    folder = copy_videos(tmp_path / "videos", rendered)
    local = str(tmp_path / "library.db")
    assert search.index(IndexConfig(folder, local, checkpoint)) == 0
    monkeypatch.setattr("engine.indexing.read_clip", None)
    assert on(fresh, folder, features=Path(local)) == 0  # the local library's own folder
    assert_equal(fresh, Path(local), indexed[0])
    Milvus(fresh.address).client.drop_collection(COLLECTION)
    assert on(fresh, folder, features=Path(local)) == 0
    assert_equal(fresh, Path(local), indexed[0])


def test_the_library_of_an_older_version_on_the_server_is_refused(fresh, tmp_path):
    client = Milvus(fresh.address).client
    client.create_collection(COLLECTION, 4, id_type="str", max_length=64, vector_field_name="content")
    library = Library(fresh.address, True, tmp_path / "features")
    assert "older version" in sentence(library.describe, ABOUT)
    assert "needs --features DIR" in sentence(Library, fresh.address, True)

"""The library of search.py: its rows, vectors, file names and errors (test_search.py indexes folders)."""

import errno
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randn, random_model
from torch import nn

pytest.importorskip("pymilvus", reason="pip install -r requirements-search.txt")
pytest.importorskip("milvus_lite", reason="pip install -r requirements-search.txt")

import model as model_file
from engine.files import DataError, ModelError
from engine.library import Library, filmstrip, identity, overall, span, stamp
from model import MeanPool, XPool

FRAMES, DIM = 4, 24
ABOUT = {"folder": "/videos", "source": {}, "model": "none", "cut": "whole", "dim": DIM}


def contents(library: Library) -> dict[tuple[str, float], bytes]:
    """The features of each clip of a library, by file and start."""
    rows, frames = [], []
    for some, features in library.batches():
        rows, frames = rows + some, [*frames, *features]
    names = library.names([row["id"] for row in rows])
    assert {*library.thumbnails([row["id"] for row in rows])} == {row["id"] for row in rows}
    return {(name, row["start"]): f.numpy().tobytes() for name, row, f in zip(names, rows, frames)}


def assert_same(library: Library, other: Library) -> None:
    """The same clips and features. Batches of other sizes differ in float16's last bit."""
    found, expected = contents(library), contents(other)
    assert found.keys() == expected.keys()
    for clip in found:
        features = [np.frombuffer(each[clip], np.float32) for each in (found, expected)]
        np.testing.assert_allclose(*features, rtol=2e-3, atol=1e-4)


def sentence(function, *arguments, **options) -> str:
    """The one sentence of the error that a call raises."""
    with pytest.raises((DataError, ModelError)) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


class LastFrame(nn.Module):
    """An unknown psi: the frame nearest to the text, and the text itself. Its `attention` is only a layer."""

    def __init__(self, dim: int, heads: int = 1, dropout: float = 0.0):
        super().__init__()
        self.attention = nn.Linear(dim, dim)

    def forward(self, text, frames):
        best = (text[:, None, None] * frames).sum(-1).argmax(dim=-1)  # (texts, videos)
        chosen = frames[torch.arange(len(frames)), best]
        return self.attention(chosen) + text[:, None]


class OddXPool(XPool):
    """A subclass of XPool that pools in another way."""

    def forward(self, text, frames):
        return super().forward(text.roll(1, -1), frames) - 2 * frames[:, 0]


@pytest.fixture
def toys(monkeypatch) -> None:
    """Registers both as --fusion last and --fusion odd."""
    monkeypatch.setitem(model_file.FUSIONS, "last", LastFrame)
    monkeypatch.setitem(model_file.FUSIONS, "odd", OddXPool)


# ---- rows


@pytest.fixture
def library(tmp_path) -> Library:
    """A library of two files: "a" has three clips, "b" one."""
    made = Library(str(tmp_path / "library.db"), create=True)
    made.describe({**ABOUT, "folder": str(tmp_path)})
    made.begin(["a", "b"], {})
    for file, count in (("a", 3), ("b", 1)):
        ids = [(f"{made.key(file)}-{n}", float(n), n + 1.0 if n < count - 1 else None) for n in range(count)]
        frames = randn(count, FRAMES, DIM, seed=count)
        made.add(ids, frames.mean(dim=1), frames, [f"{file}{n}".encode() for n in range(count)])
        made.finish({file: {"stamp": "stamp", "clips": count, "error": None}})
    return made


def test_a_library_returns_the_rows_that_were_added(library):
    assert len(library) == 4
    rows, frames = library.clips_of("a")
    assert [(row["start"], row["end"]) for row in rows] == [(0, 1), (1, 2), (2, None)]
    assert torch.equal(frames, randn(3, FRAMES, DIM, seed=3).half().float())
    ids = [row["id"] for row in rows]
    assert library.names(ids) == ["a"] * 3
    assert library.thumbnails(ids) == {id: f"a{n}".encode() for n, id in enumerate(ids)}
    row, own = library.clip(ids[1])
    assert row == rows[1] and torch.equal(own, frames[1:2]) and library.clip("0" * 24 + "-0") is None
    assert contents(library) == contents(Library(library.where))


def test_a_shortlist_holds_the_largest_cosines_first(library):
    text = randn(DIM)
    rows, frames = (list(column) for column in zip(*library.batches()))
    ids = [row["id"] for row in rows[0]]
    cosines = torch.nn.functional.cosine_similarity(frames[0].mean(dim=1), text, dim=-1)
    expected = [ids[n] for n in cosines.argsort(descending=True)]
    for count in (1, 3, 4, 9):
        near, features = library.nearest(text, count)
        assert [row["id"] for row in near] == library.nearest_ids(text, count) == expected[:count]
        assert torch.equal(features, frames[0][[ids.index(row["id"]) for row in near]])


def test_a_file_is_unfinished_until_its_clips_are_written_and_loses_them_when_it_is_read_again(library):
    finished = {"stamp": "stamp", "clips": 1, "error": None}
    assert library.files()["b"] == finished
    library.begin(["b", "new"], library.files())
    unfinished = {"stamp": "", "clips": 0, "error": None, "mount": None}
    assert library.files() == {"a": {**finished, "clips": 3}, "b": unfinished, "new": unfinished}
    assert len(library) == 3 and library.clips_of("b")[0] == []
    library.drop(["a"])
    assert {*library.files()} == {"b", "new"} and len(library) == 0


def test_clips_that_do_not_fit_a_row_are_refused(library):
    frames = torch.zeros(1, 1100, DIM)  # 52,800 bytes, 70,400 characters of base64
    assert "1100 frames of 24 numbers" in sentence(
        library.add, [("x-0", 0.0, None)], randn(1, DIM), frames, [b""]
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])  # 1e5 is infinite in half precision
@pytest.mark.parametrize("where", ["frames", "vectors"])
def test_features_that_are_not_finite_are_refused_and_nothing_is_written(library, value, where):
    frames, before = randn(1, FRAMES, DIM), contents(library)
    vectors = frames.mean(dim=1)
    {"frames": frames, "vectors": vectors}[where].view(-1)[3] = value
    if where == "vectors" and value == 1e5:
        return library.add([("x-0", 0.0, None)], vectors, frames, [b""])  # vectors have full precision
    assert "not finite" in sentence(library.add, [("x-0", 0.0, None)], vectors, frames, [b""])
    assert contents(library) == before


@pytest.mark.parametrize("name", ["files", "thumbnails", "clips"])
@pytest.mark.parametrize("step", ["create_collection", "create_index", "load_collection"])
def test_a_library_whose_creation_was_stopped_is_created_anew(step, name, tmp_path, monkeypatch):
    broken, real = Library(str(tmp_path / "broken.db"), create=True), None

    def stop(collection, *arguments, **options):
        if collection != f"tmass_{name}":
            return real(collection, *arguments, **options)
        if step == "create_collection":  # a full disk leaves this
            (tmp_path / "broken.db" / "collections" / collection).mkdir()
        raise KeyboardInterrupt

    real = getattr(broken.client, step)
    monkeypatch.setattr(broken.client, step, stop)
    with pytest.raises(KeyboardInterrupt):
        broken.describe(ABOUT)
    shutil.copytree(tmp_path / "broken.db", tmp_path / "copy.db")  # as after kill -9
    assert "holds no library" in sentence(Library, str(tmp_path / "copy.db"))
    library, frames = Library(str(tmp_path / "copy.db"), create=True), randn(2, FRAMES, DIM)
    library.describe(ABOUT)
    library.add([("x-0", 0.0, None), ("x-1", 1.0, None)], frames.mean(dim=1), frames, [b"", b""])
    assert library.nearest_ids(frames[1].mean(dim=0), 1) == ["x-1"] and len(library) == 2
    for collection in ("files", "thumbnails", "clips"):
        assert library.client.list_indexes(f"tmass_{collection}") == ["vector"]


def test_rows_of_older_libraries_are_read(library):
    assert library.files()["a"]["stamp"] == "stamp"
    library._put_files({"a": {"source": "older", "clips": 3, "error": None}})
    assert library.files()["a"] == {"stamp": "older", "clips": 3, "error": None}
    assert library.file_rows([f"{library.key('a')}-0"])[0] == {"file": "a", **library.files()["a"]}


def test_the_row_of_a_file_that_another_process_removed_is_no_file(library):
    (row,) = library.file_rows([f"{library.key('gone')}-0"])
    assert row["stamp"] == "" and not library.path(row["file"]).exists()


def test_a_name_in_the_library_that_leads_out_of_the_folder_is_refused(library, tmp_path):
    assert library.path("deep/a.mp4") == tmp_path / "deep" / "a.mp4"
    for name in ("../secret.txt", "/etc/passwd", "deep/../../secret.txt"):
        assert "is not a name below" in sentence(library.path, name)


def test_a_filmstrip_fits_a_row_of_the_library_whatever_the_frames():
    noise = np.random.default_rng(0).integers(256, size=(16, 90, 300, 3), dtype=np.uint8)
    for frames in (noise, noise[:, :1], noise[:, :, :1]):
        assert len(filmstrip([*frames])) <= 48_000 and len(filmstrip([*frames], most=9000)) <= 9000


def test_spans_are_printed_in_seconds():
    assert [span(0.0, None), span(0.0, 10.0), span(2.25, 3.5), span(7.0, None)] == [
        "whole file", "0-10 s", "2.2-3.5 s", "7 s-end",
    ]  # fmt: skip


def test_the_stamp_of_a_file_changes_with_its_bytes_and_with_how_it_is_cut(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"one")
    stamps = [stamp(path, "whole"), stamp(path, "window 10")]
    path.write_bytes(b"three")
    assert len({*stamps, stamp(path, "whole")}) == 3


# ---- the model's part: identity and vectors


def test_the_identity_of_a_model_is_that_which_older_libraries_hold():
    model = random_model(frames=FRAMES, radius="joint")
    for number, (_, value) in enumerate(sorted(model.state_dict().items())):
        value.fill_(number)
    assert identity(model) == "0d0c1fc701e552cb-4"  # computed before the code was divided into engine/
    assert identity(random_model(frames=FRAMES)) != identity(random_model(frames=FRAMES, seed=1))


def test_the_vector_of_a_clip_is_v_where_attention_is_even():
    model, frames = random_model(frames=FRAMES), randn(3, 1, DIM).expand(-1, FRAMES, -1)
    v = model.fusion(randn(2, DIM, seed=1), frames)  # with equal frames, any attention gives the same v
    assert torch.allclose(overall(model, frames), nn.functional.normalize(v[0], dim=-1), atol=1e-5)


def test_the_vector_of_a_clip_is_the_mean_of_its_unit_frames_under_mean_pooling():
    for radius in ("none", "linear"):
        model, frames = random_model(frames=FRAMES, fusion="mean", radius=radius), randn(3, FRAMES, DIM)
        assert type(model.fusion) is MeanPool
        mean = nn.functional.normalize(frames, dim=-1).mean(dim=1)
        assert torch.allclose(overall(model, frames), nn.functional.normalize(mean, dim=-1), atol=1e-6)


@pytest.mark.parametrize("fusion", ["last", "odd"])
def test_the_vector_of_a_clip_under_an_unknown_psi_is_v_for_its_mean_frame(fusion, toys):
    model, frames = random_model(frames=FRAMES, fusion=fusion), randn(3, FRAMES, DIM)
    own = [model.fusion(one.mean(dim=0)[None], one[None])[0, 0] for one in frames]
    expected = nn.functional.normalize(torch.stack(own), dim=-1)
    assert torch.allclose(overall(model, frames), expected, atol=1e-5)
    for k in range(3):  # no clip depends on its neighbours
        assert torch.allclose(overall(model, frames[k : k + 1])[0], expected[k], atol=1e-5)


# ---- errors


def test_a_library_that_is_missing_or_misnamed_gives_one_sentence(tmp_path):
    assert "not found: create it" in sentence(Library, str(tmp_path / "none.db"))
    assert "ends in .db" in sentence(Library, str(tmp_path / "none.sqlite"))
    assert "no Milvus server answers" in sentence(Library, "http://127.0.0.1:1")
    assert Library(str(tmp_path / "deep" / "empty.db"), create=True).about == {}
    assert "holds no library" in sentence(Library, str(tmp_path / "deep" / "empty.db"))


def test_a_library_is_a_folder_also_with_a_slash_at_its_end(library, tmp_path):
    assert (tmp_path / "library.db").is_dir() and len(Library(f"{library.where}/")) == 4


def test_a_place_where_no_library_can_be_gives_its_own_sentence(tmp_path):
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "old.db").write_bytes(b"SQLite format 3")
    (tmp_path / "photos.db").mkdir()
    (tmp_path / "photos.db" / "a.jpg").touch()
    places = [
        ("clip.mp4/x.db", "clip.mp4 is not a folder"),
        ("old.db", "is a file, not the folder of a library"),
    ]
    places += [("photos.db", "is a folder that holds no library"), ("n" * 300 + ".db", "File name too long")]
    for name, reason in places:
        message = sentence(Library, str(tmp_path / name), create=True)
        assert name in message and reason in message and "name another one with --library" in message
    if Path("/proc").is_dir():
        assert "/proc/nothere" in sentence(Library, "/proc/nothere/x.db", create=True)
    for name in ("clip.mp4/x.db", "photos.db"):  # without create
        assert "create it with" in sentence(Library, str(tmp_path / name))
    assert [path.name for path in (tmp_path / "photos.db").iterdir()] == ["a.jpg"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "x.db/LOCK"),
            "x.db/LOCK may not be written, and",
        ),
        (OSError(errno.EROFS, "Read-only file system", "x.db/LOCK"), "x.db/LOCK may not be written, and"),
        (OSError(errno.ENOSPC, "No space left on device", "x.db"), "x.db: No space left on device"),
        (BlockingIOError(errno.EAGAIN, "again"), "another process has it open"),
        (OSError(errno.ENOLCK, "No locks available"), "its file system cannot lock files"),
        (ValueError("Expecting value"), "it is damaged, index into a new one"),
    ],
)
def test_a_library_that_cannot_be_opened_says_why(error, reason, tmp_path, monkeypatch):
    import milvus_lite

    def acquire(_):
        if error.errno in (errno.EAGAIN, errno.ENOLCK) if isinstance(error, OSError) else False:
            raise milvus_lite.DataDirLockedError("another process holds the lock") from error
        raise error

    monkeypatch.setattr(milvus_lite.MilvusLite, "_acquire_lock", acquire)
    message = sentence(Library, str(tmp_path / "x.db"), create=True)
    assert reason in message and ("another process" in message) == (reason == "another process has it open")


def test_a_damaged_library_is_not_said_to_be_open_elsewhere(library, tmp_path):
    for number, (name, damage) in enumerate([("schema.json", b"{"), ("manifest.json", b"[]")]):
        copy = tmp_path / f"{number}.db"
        shutil.copytree(library.where, copy)
        for path in copy.glob(f"collections/tmass_files/{name}*"):
            path.write_bytes(damage)
        message = sentence(Library, str(copy))
        assert "damaged" in message and "another process" not in message


def test_a_library_of_which_a_part_is_read_only_is_not_said_to_be_damaged(library, tmp_path, monkeypatch):
    def refuse(client, name):
        raise pymilvus.MilvusException(1, f"[Errno 13] Permission denied: '{name}/x.idx'")

    import pymilvus

    shutil.copytree(library.where, tmp_path / "copy.db")
    monkeypatch.setattr(pymilvus.MilvusClient, "load_collection", refuse)
    message = sentence(Library, str(tmp_path / "copy.db"))
    assert (
        "a part of it may not be written" in message and "clips/x.idx" in message and "damaged" not in message
    )


@pytest.mark.parametrize("names", [("http_proxy",), ("https_proxy", "grpc_proxy", "all_proxy")])
def test_a_local_library_is_not_opened_through_a_proxy(names, tmp_path, monkeypatch):
    for name in names:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert os.environ[names[0]] and Library(str(tmp_path / "x.db"), create=True).about == {}


@pytest.mark.parametrize("where", ["http://[bad", "http://host:port", "ftp://host", "http://127.0.0.1:1"])
def test_an_address_of_no_server_gives_one_sentence(where):
    assert f"{where} cannot be opened: no Milvus server answers there (" in sentence(Library, where)


def test_without_milvus_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    assert "pip install -r requirements-search.txt" in sentence(Library, str(tmp_path / "x.db"), create=True)

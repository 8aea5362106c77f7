"""Searching one's own videos: a library equals its folder whatever happens, its scores are evaluate.py's, and its page serves nothing else."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import ffmpeg
import imageio_ffmpeg
import pytest
import torch
from conftest import ROOT, random_model

pytest.importorskip("pymilvus", reason="pip install -r requirements-search.txt")
pytest.importorskip("milvus_lite", reason="pip install -r requirements-search.txt")
pytest.importorskip("tornado", reason="pip install -r requirements-search.txt")

import search
import shapes
from data import Clip, DataError, duration
from evaluate import noise_bank, scores
from model import ModelError, save_checkpoint
from search import Library, Searcher, Source, filmstrip, overall, read_clip, recall, spans

FRAMES, CLIPS = 4, 7
NAMES = ["-dash.mp4", "трое в лодке.mp4", "deep/er/quote'\"%s[1]<b>.mp4", "26292851@N04.", "A.MP4", "b.mp4", "c d.mp4"]
assert len(NAMES) == CLIPS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best.pt"
    save_checkpoint(path, random_model(frames=FRAMES, radius="joint"))
    return path


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("rendered")
    shapes._render_clips((folder, 0, range(CLIPS + 1)))
    return sorted(folder.iterdir())


@pytest.fixture
def folder(tmp_path, rendered) -> Path:
    for name, path in zip(NAMES, rendered):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, tmp_path / "videos" / name)
    return tmp_path / "videos"


@pytest.fixture
def index(folder, checkpoint, tmp_path, capsys):
    """Runs index with some options; returns what it prints."""

    def run(**options) -> str:
        code = search.index(folder, **{"library": str(tmp_path / "library.db"), "checkpoint": checkpoint, "batch": 3} | options)
        out = capsys.readouterr().out
        assert code == (1 if ": 0 clips" in out else 0)
        return out

    return run


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, rendered, checkpoint) -> tuple[str, Path]:
    """A library that tests only read, and its folder."""
    place = tmp_path_factory.mktemp("indexed")
    for name, path in zip(NAMES, rendered):
        (place / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place / "videos" / name)
    assert search.index(place / "videos", str(place / "library.db"), checkpoint) == 0
    return str(place / "library.db"), place / "videos"


def contents(library: Library) -> dict[tuple[str, float], bytes]:
    """What a library holds: the features of each clip, by file and start."""
    rows, frames = [], []
    for some, features in library.batches():
        rows, frames = rows + some, [*frames, *features]
    names = library.names([row["id"] for row in rows])
    assert {*library.thumbnails([row["id"] for row in rows])} == {row["id"] for row in rows}
    return {(name, row["start"]): f.numpy().tobytes() for name, row, f in zip(names, rows, frames)}


def sentence(function, *arguments, **options) -> str:
    """The one sentence of the error that a call raises."""
    with pytest.raises((DataError, ModelError)) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------- the library


def test_a_library_holds_each_file_under_its_own_name_with_the_features_of_its_own_frames(indexed, checkpoint):
    library, (model, _) = Library(indexed[0]), Source(str(checkpoint)).open(torch.device("cpu"))
    assert {name for name, _ in contents(library)} == {*NAMES}
    for name in NAMES:
        (row,), frames = library.clips_of(name)
        images, _ = read_clip(Clip(name, indexed[1] / name, (), ""), FRAMES, model.resolution)
        assert torch.equal(frames, search.encode(model, [images]).half().float())
        assert row["start"] == 0 and row["end"] is None and library.path(name).samefile(indexed[1] / name)


def test_indexing_again_reads_only_what_is_new_or_changed_and_drops_what_is_gone(index, folder, tmp_path, rendered, monkeypatch):
    assert f"{CLIPS} clips of {CLIPS} files; {CLIPS} new, 0 read again, 0 removed, 0 unchanged, 0 broken" in index()
    with monkeypatch.context() as patch:
        patch.setattr(search, "read_clip", None)  # nothing is decoded
        assert f"0 new, 0 read again, 0 removed, {CLIPS} unchanged" in index()
    (folder / "b.mp4").unlink()
    shutil.copy(rendered[-1], folder / "c d.mp4")
    (folder / "A.MP4").rename(folder / "new.mp4")
    assert f"{CLIPS - 1} clips of {CLIPS - 1} files; 1 new, 1 read again, 2 removed, {CLIPS - 3} unchanged, 0 broken" in index()
    assert f"{CLIPS - 1} clips" in index(library=str(tmp_path / "fresh.db"))
    assert contents(Library(str(tmp_path / "library.db"))) == contents(Library(str(tmp_path / "fresh.db")))


@pytest.mark.parametrize("step", ["begin", "add", "finish"])
def test_index_goes_on_after_it_was_stopped_at_any_step(step, index, folder, indexed, tmp_path, monkeypatch):
    calls, real = [], getattr(Library, step)

    def stop_at_the_second(*arguments):
        calls.append(step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Library, step, stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            index()
    library = Library(str(tmp_path / "library.db"))
    unfinished = [name for name, row in library.files().items() if not row["source"]]
    assert len(unfinished) == (0 if step == "begin" else 3)
    assert f"; {CLIPS - 3 - len(unfinished)} new, {len(unfinished)} read again, 0 removed, 3 unchanged" in index()
    assert contents(library) == contents(Library(indexed[0]))


def test_index_goes_on_after_kill_9(index, folder, checkpoint, indexed, tmp_path):
    command = [sys.executable, "search.py", "index", str(folder), "--library", str(tmp_path / "library.db"), "--checkpoint", str(checkpoint)]
    process = subprocess.Popen([*command, "--batch", "1"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "library.db" / "collections" / "tmass_clips" / "wal"
    while process.poll() is None and sum(path.stat().st_size for path in log.glob("*")) < 4000:  # some clips are there
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(Library(str(tmp_path / "library.db")))
    assert f"{CLIPS} clips of {CLIPS} files" in index()
    assert contents(Library(str(tmp_path / "library.db"))) == contents(Library(indexed[0]))


def test_broken_files_are_listed_and_read_again_when_they_change_or_when_asked(index, folder, rendered):
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.webm").touch()
    (folder / "notes.txt").write_text("not looked at")
    out = index()
    assert f"{CLIPS} clips of {CLIPS + 2} files" in out and "2 broken" in out
    assert len(re.findall(r"^broken: .*(text\.mp4|empty\.webm) holds no readable video.*$", out, re.M)) == 2
    assert f"0 read again, 0 removed, {CLIPS + 2} unchanged, 2 broken" in index()
    assert f"2 read again, 0 removed, {CLIPS} unchanged, 2 broken" in index(retry=True)
    shutil.copy(rendered[-1], folder / "text.mp4")
    assert f"{CLIPS + 1} clips of {CLIPS + 2} files; 0 new, 1 read again, 0 removed, {CLIPS + 1} unchanged, 1 broken" in index()


def test_a_folder_of_broken_files_makes_an_empty_library_that_says_so(index, folder, tmp_path):
    for name in NAMES:
        (folder / name).write_bytes(b"")
    assert f": 0 clips of {CLIPS} files" in index()
    searcher = Searcher(Library(str(tmp_path / "library.db")))
    assert "holds no clip: index a folder of videos first" in sentence(searcher.search, "a ring")
    assert "holds no clip" in sentence(recall, searcher, ["a ring"], [1])


def test_a_name_that_is_no_utf8_is_listed_as_broken(index, folder, rendered):
    try:
        shutil.copy(rendered[0], os.fsencode(folder) + b"/caf\xe9.mp4")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    out = index()
    assert f"{CLIPS} clips of {CLIPS + 1} files" in out and re.search(r"^broken: .*caf\\xe9.mp4' is a name that is no UTF-8", out, re.M)


def test_windows_divide_a_file_and_stay_the_librarys_way_until_another_is_named(index, folder, tmp_path, rendered):
    assert abs(duration(rendered[0]) - shapes.FRAMES / shapes.FPS) < 2 / shapes.FPS
    assert spans(rendered[0], "window 1") == [(0.0, 1.0), (1.0, 2.0), (2.0, None)]
    assert spans(rendered[0], "window 60") == spans(rendered[0], "whole") == [(0.0, None)]
    assert f"{3 * CLIPS} clips of {CLIPS} files" in index(window=1.0)
    assert f"0 read again, 0 removed, {CLIPS} unchanged" in index()
    rows, frames = Library(str(tmp_path / "library.db")).clips_of("b.mp4")
    assert [(row["start"], row["end"]) for row in rows] == [(0, 1), (1, 2), (2, None)] and not torch.equal(frames[0], frames[2])
    assert f"{CLIPS} clips of {CLIPS} files; 0 new, {CLIPS} read again" in index(window=0.0)
    assert "not beside --scenes" in sentence(index, window=1.0, scenes=True) and "0 or more" in sentence(index, window=-1.0)


def test_scenes_are_cut_where_the_picture_changes(tmp_path):
    pytest.importorskip("scenedetect", reason="pip install -r requirements-search.txt")
    colours = [ffmpeg.input(f"color={colour}:size=64x64:rate=25:duration={seconds}", f="lavfi") for colour, seconds in [("red", 2), ("blue", 3)]]
    ffmpeg.concat(*colours).output(str(tmp_path / "film.mkv")).run(cmd=imageio_ffmpeg.get_ffmpeg_exe(), quiet=True)
    assert spans(tmp_path / "film.mkv", "scenes") == [(0.0, 2.0), (2.0, None)]
    assert spans(tmp_path / "film.mkv", "window 2") == [(0.0, 2.0), (2.0, None)]
    (tmp_path / "bad.mkv").write_bytes(b"bad")
    assert "holds no readable video" in sentence(spans, tmp_path / "bad.mkv", "scenes")


def test_one_folder_and_one_model_a_library(index, folder, checkpoint, tmp_path):
    index()
    save_checkpoint(tmp_path / "other.pt", random_model(frames=FRAMES, seed=1))
    assert "was made by another model" in sentence(index, checkpoint=tmp_path / "other.pt")
    library = Library(str(tmp_path / "library.db"))
    assert "was made by another model" in sentence(Searcher, library, Source(str(tmp_path / "other.pt")))
    folder.rename(tmp_path / "elsewhere")
    assert "is the library of" in sentence(search.index, tmp_path / "elsewhere", library.where)
    assert search.index(tmp_path / "elsewhere", library.where, moved=True) == 0
    assert Library(library.where).path("b.mp4").is_file()


def test_a_filmstrip_fits_a_row_of_the_library_whatever_the_frames():
    noise = torch.randint(256, (16, 90, 300, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for frames in (noise, noise[:, :1], noise[:, :, :1]):
        assert len(filmstrip([*frames])) <= 48_000 and len(filmstrip([*frames], most=9000)) <= 9000


def test_bad_input_gives_one_sentence(tmp_path, folder, checkpoint, monkeypatch):
    (tmp_path / "none").mkdir()
    db = str(tmp_path / "x.db")
    assert "holds no video" in sentence(search.index, tmp_path / "none", db, checkpoint)
    assert "is not a folder" in sentence(search.index, tmp_path / "missing", db, checkpoint)
    assert "is random without --weights" in sentence(search.index, folder, db, arch="tiny")
    assert not Path(db).exists() or not Library(db, create=True).about
    assert "not found: make it first" in sentence(search.query, "a ring", str(tmp_path / "y.db"))
    assert "ends in .db" in sentence(search.query, "a ring", str(tmp_path / "y.sqlite"))
    assert "the query is empty" in sentence(search.query, "  ")
    assert "1 or more" in sentence(search.query, "a ring", k=0)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/ffmpeg")
    assert "no ffmpeg that runs" in sentence(search.index, folder, db, checkpoint)


def test_without_milvus_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    assert "pip install -r requirements-search.txt" in sentence(search.query, "a ring")


def test_a_library_that_another_process_has_open_is_refused_in_one_sentence(indexed):
    Library(indexed[0])
    code = f"import search; search.main(['query', 'a ring', '--library', {indexed[0]!r}])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and re.fullmatch(r"error: .*another process has it open.*\n", ended.stderr)


# --------------------------------------------------------------------------------------------------------------------------- scores


def test_scores_of_the_library_are_those_of_evaluate(indexed, checkpoint, M=5):
    searcher = Searcher(Library(indexed[0]), M=M, seed=3)
    (rows, frames), text = searcher.whole, searcher.text(["a red ring grows"])
    expected = scores(searcher.model, text, frames, noise_bank(M, frames.shape[-1], 3))[0]
    hits = searcher.search("a red ring grows", CLIPS)
    assert [hit.score for hit in hits] == sorted(expected.tolist(), reverse=True) and [hit.rank for hit in hits] == [*range(1, CLIPS + 1)]
    assert {hit.id: hit.score for hit in hits} == dict(zip((row["id"] for row in rows), expected.tolist()))
    exact = torch.cat([search.encode(searcher.model, [read_clip(Clip("", indexed[1] / hit.file, (), ""), FRAMES, 32)[0]]) for hit in hits])
    unrounded = scores(searcher.model, text, exact, noise_bank(M, frames.shape[-1], 3))[0]
    assert (unrounded - torch.tensor([hit.score for hit in hits])).abs().max() < 1e-3  # features are kept in half precision
    model, best = searcher.model, hits[0]
    own = searcher.library.clip(best.id)[1]
    assert best.radius == pytest.approx(model.radius(text, own, model.fusion(text, own)).mean().item(), rel=1e-5)
    assert best.attention == pytest.approx(model.fusion.attention(text, own)[0, 0, 0].tolist(), rel=1e-4)


def test_a_small_library_is_scored_whole_and_a_shortlist_holds_the_nearest(indexed):
    library = Library(indexed[0])
    whole, short, all_of_it = (Searcher(library, shortlist=size) for size in (4, 3, CLIPS))
    assert whole.whole is not None and short.whole is None  # 7 clips: at most 2 x 4, more than 2 x 3
    text = short.text(["a ring"])
    vectors = {row["id"]: overall(short.model, f[None])[0] for rows, frames in library.batches() for row, f in zip(rows, frames)}
    nearest = sorted(vectors, key=lambda id: -(vectors[id] @ text[0]).item())[:3]
    assert [row["id"] for row in library.nearest(text[0], 3)[0]] == nearest
    assert {hit.id for hit in short.search("a ring", CLIPS)} == {*nearest}
    ranked = [hit.id for hit in whole.search("a ring", CLIPS)]
    assert [hit.id for hit in short.search("a ring")] == [id for id in ranked if id in nearest]
    assert all_of_it.search("a ring") == whole.search("a ring")


def test_recall_counts_the_best_clips_that_the_shortlist_holds(indexed):
    searcher = Searcher(Library(indexed[0]))
    captions = ["a ring", "a blue square falls", "a star in space"]
    measured = recall(searcher, captions, [1, 3, CLIPS], k=2)
    expected = dict.fromkeys([1, 3, CLIPS], 0)
    for caption in captions:
        best = {hit.id for hit in searcher.search(caption, 2)}
        near = [row["id"] for row in searcher.library.nearest(searcher.text([caption])[0], CLIPS)[0]]
        for size in expected:
            expected[size] += len(best & {*near[:size]}) / 2 / len(captions)
    assert measured == pytest.approx(expected) and measured[CLIPS] == 1


def test_the_vector_of_a_clip_is_v_where_attention_is_even():
    model, frames = random_model(frames=FRAMES), torch.randn(3, 1, 24, generator=torch.Generator().manual_seed(0)).expand(-1, FRAMES, -1)
    v = model.fusion(torch.randn(2, 24), frames)  # frames that are all alike: every attention is as good as an even one
    assert torch.allclose(overall(model, frames), torch.nn.functional.normalize(v[0], dim=-1), atol=1e-5)


@pytest.mark.parametrize("query", ["ring", "word " * 200, "кольцо в пустыне", "赤い輪", "<b>'\" \\ %", "🙂"])
def test_any_query_is_answered(indexed, query):
    searcher = Searcher(Library(indexed[0]))
    assert len(searcher.search(query, 3)) == 3
    notes = " ".join(searcher.notes(query))
    assert ("reads the first 20" in notes) == (len(query) > 100) and ("English" in notes) == (query[0] in "к赤")


def test_zero_shot_scores_by_mean_pooling(folder, weights, tmp_path, capsys):
    search.index(folder, str(tmp_path / "zero.db"), arch="ViT-B/32", weights=weights, num_frames=3)
    search.query("a ring", str(tmp_path / "zero.db"), k=CLIPS)
    assert "zero-shot" in capsys.readouterr().err
    searcher = Searcher(Library(str(tmp_path / "zero.db")))
    text, (rows, frames) = searcher.text(["a ring"]), searcher.whole
    cosines = torch.nn.functional.cosine_similarity(text, torch.nn.functional.normalize(frames, dim=-1).mean(dim=1))
    assert {hit.id: pytest.approx(hit.score, abs=1e-5) for hit in searcher.search("a ring", CLIPS)} == dict(
        zip((row["id"] for row in rows), cosines.tolist())
    )


def test_captions_of_a_clip_rank_by_the_same_score_for_files_in_and_out_of_the_library(indexed, tmp_path, rendered, capsys):
    captions = tmp_path / "captions.txt"
    captions.write_text("a ring\nun carré\n\na blue star falls\n")
    scored = {}
    shutil.copy(rendered[0], tmp_path / "outside.mp4")
    for video in (NAMES[0], str(tmp_path / "outside.mp4")):  # the same clip
        search.query(library=indexed[0], video=video, captions=captions, json_=True)
        (answer,) = json.loads(capsys.readouterr().out)
        scored[video] = {one["caption"]: one["score"] for one in answer["captions"]}
        assert [one["score"] for one in answer["captions"]] == sorted(scored[video].values(), reverse=True) and len(scored[video]) == 3
    inside, outside = scored.values()
    assert inside == pytest.approx(outside, abs=1e-3)
    (hit,) = (hit for hit in Searcher(Library(indexed[0])).search("a ring", CLIPS) if hit.file == NAMES[0])
    assert inside["a ring"] == pytest.approx(hit.score, abs=1e-5)
    assert "neither a file of" in sentence(search.query, library=indexed[0], video="no.mp4")
    assert "a caption a line" in sentence(search.query, library=indexed[0], video=NAMES[0], captions=tmp_path / "no.txt")


def test_the_written_page_holds_all_but_the_videos_and_no_name_is_code(indexed, tmp_path):
    searcher = Searcher(Library(indexed[0]))
    search.write_page(tmp_path / "deep" / "out.html", searcher, "</script><b>", searcher.search("a ring", CLIPS))
    text = (tmp_path / "deep" / "out.html").read_text()
    assert text.count("</script>") == 1 and "http://" not in text and "https://" not in text
    content = json.loads(re.search(r"^const content = (.*);$", text, re.M)[1])
    assert content["query"] == "</script><b>" and {hit["file"] for hit in content["hits"]} == {*NAMES}
    for hit in content["hits"]:
        assert hit["strip"].startswith("data:image/jpeg;base64,/9j/")
        assert (tmp_path / "deep" / urllib.request.unquote(hit["video"])).samefile(indexed[1] / hit["file"])


# ----------------------------------------------------------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def server(tmp_path_factory, rendered, checkpoint):
    """The address of `search.py serve` as a process of its own, over a library of its own."""
    place = tmp_path_factory.mktemp("served")
    (place / "videos").mkdir()
    for name, path in zip(("a b.mp4", "<i>.mp4", "no.avi"), rendered):
        shutil.copy(path, place / "videos" / name)
    (place / "videos" / "no.avi").write_bytes((place / "videos" / "no.avi").read_bytes())
    (place / "videos" / "secret.txt").write_text("secret")
    shutil.copy(rendered[4], place / "videos" / "unlisted.mp4")
    (place / "captions.txt").write_text("a ring\na <u>square</u> falls\n")
    library = str(place / "library.db")
    code = f"""if True:
        import search, pathlib
        search.index(pathlib.Path({str(place / "videos")!r}), {library!r}, pathlib.Path({str(checkpoint)!r}))
        search.Library({library!r}).drop(["unlisted.mp4"])
        search.main(["serve", "--library", {library!r}, "--port", "0", "--captions", {str(place / "captions.txt")!r}])"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    line = next(line for line in process.stdout if line.startswith("serving"))
    yield re.search(r"http://127\.0\.0\.1:\d+", line)[0], place
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0


def get(url: str, **headers: str) -> tuple[int, bytes, dict]:
    with contextlib.ExitStack() as stack:
        try:
            answer = stack.enter_context(urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20))
        except urllib.error.HTTPError as error:
            answer = stack.enter_context(error)
        return answer.status, answer.read(), dict(answer.headers)


def test_the_server_answers_queries_and_sends_parts_of_videos(server):
    address, place = server
    hits = json.loads(get(f"{address}/search?q=a+ring&k=2")[1])["hits"]
    assert [hit["rank"] for hit in hits] == [1, 2]
    video = (place / "videos" / hits[0]["file"]).read_bytes()
    status, body, headers = get(f"{address}/{hits[0]['video']}")
    assert (status, body, headers["Accept-Ranges"]) == (200, video, "bytes")
    status, body, headers = get(f"{address}/{hits[0]['video']}", Range="bytes=100-199")
    assert (status, body, headers["Content-Range"]) == (206, video[100:200], f"bytes 100-199/{len(video)}")
    assert get(f"{address}/{hits[0]['strip']}")[1][:2] == b"\xff\xd8"
    captions = json.loads(get(f"{address}/captions/{hits[0]['id']}")[1])["captions"]
    assert {one["caption"] for one in captions} == {"a ring", "a <u>square</u> falls"} and captions[0]["score"] >= captions[1]["score"]
    status, body, _ = get(f"{address}/search?q=+")
    assert status == 400 and "query is empty" in json.loads(body)["error"]


def test_the_server_sends_nothing_that_is_not_a_clip_of_the_library(server):
    address, place = server
    unlisted = Library.key("unlisted.mp4")
    port = int(address.rsplit(":", 1)[1])
    known = json.loads(get(f"{address}/search?q=a")[1])["hits"][0]["id"]
    paths = ["secret.txt", "../secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt", str(place / "videos" / "secret.txt"), "unlisted.mp4", "a%20b.mp4",
             f"{unlisted}-0", f"{known}/../../secret.txt", f"{known}%00", "0" * 24 + "-0", "", "page.html"]  # fmt: skip
    for path in paths:
        for prefix in ("/clip/", "/", "/thumbnails/", "/clip//"):
            if not (prefix == "/" and not path):
                with socket.create_connection(("127.0.0.1", port)) as connection:  # no client in between tidies the path
                    connection.sendall(f"GET {prefix}{path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
                    answer = b"".join(iter(functools.partial(connection.recv, 65536), b""))
                assert re.match(rb"HTTP/1\.[01] (404|400|403)", answer) and b"secret" not in answer.split(b"\r\n\r\n", 1)[1], (prefix, path, answer)


def test_the_server_answers_only_to_its_own_name(server):
    assert get(server[0] + "/")[0] == 200
    assert get(server[0] + "/", Host="evil.example")[0] == 404  # a page elsewhere whose name was pointed here


def test_a_name_in_the_library_that_leads_out_of_the_folder_is_refused(indexed):
    library = Library(indexed[0])
    assert "is no name below" in sentence(library.path, "../secret.txt") and "is no name below" in sentence(library.path, "/etc/passwd")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


def test_in_a_browser_a_query_shows_clips_that_play_and_captions_that_fit(server, browser):
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(server[0])
    page.fill("input", "a <b>ring</b>")
    page.press("input", "Enter")
    page.wait_for_selector(".hit >> nth=2")
    assert page.locator(".hit").count() == 3 and page.locator(".hit .title span:first-of-type").all_inner_texts().count("<i>.mp4") == 1
    assert page.locator(".bars span").count() == 3 * FRAMES
    page.wait_for_function("() => [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    page.hover(".hit:first-child .screen")
    page.wait_for_function("() => document.querySelector('.hit:first-child video').currentTime > 0.1")
    page.click(".hit:first-child .fit button")
    page.wait_for_selector(".fit li")
    assert "a <u>square</u> falls" in page.locator(".hit:first-child .fit").inner_text()
    page.fill("input", " ")
    page.press("input", "Enter")
    page.wait_for_function("() => document.querySelector('#status').textContent.includes('query is empty')")
    assert page.locator(".hit").count() == 0 and not errors


def test_in_a_browser_what_cannot_play_is_said_and_the_written_page_works_from_disk(indexed, browser, tmp_path):
    searcher = Searcher(Library(indexed[0]))
    hits = searcher.search("a ring", 2)
    shutil.copytree(indexed[1], tmp_path / "videos")
    (tmp_path / "videos" / hits[1].file).write_text("no longer a video")
    search.write_page(tmp_path / "out.html", searcher, "a ring", hits)
    text = (tmp_path / "out.html").read_text()
    for hit in hits:  # links lead to the copy
        old = urllib.request.quote(os.path.relpath(indexed[1] / hit.file, tmp_path))
        text = text.replace(old, urllib.request.quote(f"videos/{hit.file}"))
    (tmp_path / "out.html").write_text(text)
    page = browser.new_page()
    page.goto((tmp_path / "out.html").as_uri())
    page.wait_for_selector("text=This browser cannot play the file")
    page.wait_for_function("() => document.querySelector('.hit:first-child video').readyState >= 2")
    assert page.locator("form").is_hidden() and page.locator("h1").inner_text() == "a ring" and page.locator(".strip img").count() == 2

"""search.py: a library equals its folder whatever happens, and its scores are those of evaluate.py."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_model

pytest.importorskip("pymilvus", reason="pip install -r requirements-search.txt")
pytest.importorskip("milvus_lite", reason="pip install -r requirements-search.txt")

import test_library
from test_library import assert_same, contents, sentence

import search
import shapes
from engine import indexing
from engine.checkpoint import save_checkpoint
from engine.datasets import Clip
from engine.indexing import IndexConfig
from engine.library import Library, overall
from engine.scoring import noise_bank, scores
from engine.searcher import Searcher, Source, encode, read_clip
from evaluate import scores_literal
from search import CheckConfig, QueryConfig, SearchConfig, recall

FRAMES, CLIPS = test_library.FRAMES, 7
NAMES = [
    "-dash.mp4",
    "трое в лодке.mp4",
    "deep/er/quote'\"%s[1]<b>.mp4",
    "26292851@N04.",
    "A.MP4",
    *("b.mp4", "c d.mp4"),
]
assert len(NAMES) == CLIPS

toys = test_library.toys  # a fixture: two psis that search.py does not know, "last" and "odd"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best.pt"
    save_checkpoint(path, random_model(frames=FRAMES, radius="joint"))
    return path


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> list[Path]:
    """Files of built-in clips, one more than NAMES."""
    folder = tmp_path_factory.mktemp("rendered")
    shapes._render_clips((folder, 0, range(CLIPS + 1)))
    return sorted(folder.iterdir())


def copy_videos(folder: Path, rendered: list[Path]) -> Path:
    """A folder with the clips under NAMES."""
    for name, path in zip(NAMES, rendered):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, folder / name)
    return folder


@pytest.fixture
def folder(tmp_path, rendered) -> Path:
    return copy_videos(tmp_path / "videos", rendered)


@pytest.fixture
def index(folder, checkpoint, tmp_path, capsys):
    """Runs index with some options; returns what it prints."""

    def run(code: int = 0, **options) -> str:
        own = {"library": str(tmp_path / "library.db"), "checkpoint": checkpoint, "batch": 3} | options
        ended, output = search.index(IndexConfig(folder, **own)), capsys.readouterr()
        assert ended == code
        return output.out + output.err

    return run


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, rendered, checkpoint) -> tuple[str, Path]:
    """A library that tests only read, and its folder."""
    place = tmp_path_factory.mktemp("indexed")
    library, folder = str(place / "library.db"), copy_videos(place / "videos", rendered)
    assert search.index(IndexConfig(folder, library, checkpoint)) == 0
    return library, folder


def searching(library: str, **options) -> Searcher:
    return Searcher(SearchConfig(library, **options))


# ---- index


def test_a_library_holds_each_file_under_its_own_name_with_the_features_of_its_own_frames(
    indexed, checkpoint
):
    library, (model, _) = Library(indexed[0]), Source(str(checkpoint)).open(torch.device("cpu"))
    assert {name for name, _ in contents(library)} == {*NAMES}
    for name in NAMES:
        (row,), frames = library.clips_of(name)
        images, _ = read_clip(Clip(name, indexed[1] / name, (), ""), FRAMES, model.resolution)
        expected = encode(model, images[None]).half().float()
        torch.testing.assert_close(frames, expected, rtol=2e-3, atol=1e-4)  # another batch size: the last bit
        assert row["start"] == 0 and row["end"] is None
        assert library.path(name).samefile(indexed[1] / name)


def test_indexing_again_reads_only_what_is_new_or_changed_and_drops_what_is_gone(
    index, folder, tmp_path, rendered, monkeypatch
):
    nothing = "0 read again, 0 removed, 0 unchanged, 0 broken"
    assert f"{CLIPS} clips of {CLIPS} files; {CLIPS} new, {nothing}" in index()
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "read_clip", None)  # nothing is decoded
        assert f"0 new, 0 read again, 0 removed, {CLIPS} unchanged" in index()
    (folder / "b.mp4").unlink()
    shutil.copy(rendered[-1], folder / "c d.mp4")
    (folder / "A.MP4").rename(folder / "new.mp4")
    changes = f"1 new, 1 read again, 2 removed, {CLIPS - 3} unchanged, 0 broken"
    assert f"{CLIPS - 1} clips of {CLIPS - 1} files; {changes}" in index()
    assert f"{CLIPS - 1} clips" in index(library=str(tmp_path / "fresh.db"))
    assert_same(Library(str(tmp_path / "library.db")), Library(str(tmp_path / "fresh.db")))


@pytest.mark.parametrize("step", ["begin", "add", "finish"])
def test_index_continues_after_it_was_stopped_at_any_step(
    step, index, folder, indexed, tmp_path, monkeypatch
):
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
    unfinished = [name for name, row in library.files().items() if not row["stamp"]]
    assert len(unfinished) == (0 if step == "begin" else 3)
    assert (
        f"; {CLIPS - 3 - len(unfinished)} new, {len(unfinished)} read again, 0 removed, 3 unchanged"
        in index()
    )
    assert_same(library, Library(indexed[0]))


def test_index_continues_after_kill_9(index, folder, checkpoint, indexed, tmp_path):
    library = tmp_path / "library.db"
    command = [sys.executable, "search.py", "index", str(folder), "--library", str(library), "--batch", "1"]
    command += ["--checkpoint", str(checkpoint)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and sum(p.stat().st_size for p in library.glob("*.journal")) < 500:
        time.sleep(0.002)  # until some clips are committed
    process.kill()
    process.wait()
    assert 0 < len(Library(str(library)))
    assert f"{CLIPS} clips of {CLIPS} files" in index()
    assert_same(Library(str(library)), Library(indexed[0]))


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
    changes = f"0 new, 1 read again, 0 removed, {CLIPS + 1} unchanged, 1 broken"
    assert f"{CLIPS + 1} clips of {CLIPS + 2} files; {changes}" in index()


def test_a_folder_of_broken_files_makes_an_empty_library_that_says_so(index, folder, tmp_path):
    for name in NAMES:
        (folder / name).write_bytes(b"")
    assert f": 0 clips of {CLIPS} files" in index(code=1)
    searcher = searching(str(tmp_path / "library.db"))
    assert "holds no clip: index a folder of videos first" in sentence(searcher.search, "a ring")
    assert "holds no clip" in sentence(recall, searcher, ["a ring"], [1])


def test_a_name_that_is_not_utf8_is_indexed_and_printed(index, folder, tmp_path, rendered, capsys):
    try:
        shutil.copy(rendered[0], os.fsencode(folder) + b"/caf\xe9.mp4")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    assert f"{CLIPS + 1} clips of {CLIPS + 1} files" in index()
    search.query(QueryConfig(str(tmp_path / "library.db"), text="a ring", k=9))
    assert "caf?.mp4" in capsys.readouterr().out


def reindex(index, code: int, **options) -> tuple[str, list[str]]:
    """The summary and the other lines of an index run that ends with `code`."""
    out = index(code=code, **options)
    return re.search(r"^.*clips of.*$", out, re.M)[0], [
        line for line in out.splitlines() if "clips of" not in line
    ]


def test_what_cannot_be_reached_is_kept_with_a_warning_until_it_is_really_gone(
    index, folder, tmp_path, monkeypatch
):
    disk = folder / "deep"
    index()
    real = os.scandir

    def refuse(path):
        if os.fspath(path) == str(disk / "er"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    unchanged = f"0 new, 0 read again, 0 removed, {CLIPS - 1} unchanged, 0 broken, 1 kept"
    kept = f"{CLIPS} clips of {CLIPS} files; {unchanged}"
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        summary, lines = reindex(index, 1)
    reason = f"{disk / 'er'} cannot be read (Permission denied)"
    assert kept in summary and f"warning: {reason}: 1 files of the library are kept." in lines
    away = disk.rename(tmp_path / "disk")
    disk.symlink_to(away)
    assert "0 removed" in reindex(index, 0)[0]  # the same files, through a link
    away.rename(tmp_path / "unplugged")
    summary, lines = reindex(index, 1)
    assert kept in summary and any(
        "which is not there: 1 files of the library are kept" in line for line in lines
    )
    disk.unlink()
    assert f"{CLIPS - 1} clips of {CLIPS - 1} files; 0 new, 0 read again, 1 removed" in reindex(index, 0)[0]


def test_a_broken_link_stops_no_update(index, folder):
    (folder / "broken.mp4").symlink_to("nothing")
    summary, lines = reindex(index, 0)
    assert f"{CLIPS} clips of {CLIPS} files; {CLIPS} new" in summary
    assert (
        f"warning: {folder / 'broken.mp4'} is a link to nothing, which is not there: it is passed over."
        in lines
    )


def test_what_is_in_the_trash_is_found_no_more(index, folder, tmp_path, rendered):
    for name in (".Trash-1000/files/d.mp4", "#recycle/e.mp4"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(rendered[-1], folder / name)
    left_out = "left out: 2 videos in hidden, trash or thumbnail folders (--hidden takes them)"
    assert f"{CLIPS + 2} clips" in reindex(index, 0, hidden=True)[0]  # as libraries were made before
    summary, lines = reindex(index, 0)
    assert f"{CLIPS} clips of {CLIPS} files; 0 new, 0 read again, 2 removed" in summary and left_out in lines
    assert {name for name, _ in contents(Library(str(tmp_path / "library.db")))} == {*NAMES}


def test_the_last_video_is_removed_from_a_library_too(index, folder, tmp_path):
    index()
    for name in NAMES:
        (folder / name).unlink()
    library = Library(str(tmp_path / "library.db"))
    library.finish({NAMES[0]: library.files()[NAMES[0]] | {"mount": None}})  # as in an older library
    summary, _ = reindex(index, 1)
    assert (
        f"1 clips of 1 files; 0 new, 0 read again, {CLIPS - 1} removed, 0 unchanged, 0 broken, 1 kept"
        in summary
    )
    library.finish({NAMES[0]: library.files()[NAMES[0]] | {"mount": "/"}})
    assert ": 0 clips of 0 files" in reindex(index, 1)[0]


def test_the_library_of_an_older_version_is_refused_in_one_sentence(index, tmp_path):
    (tmp_path / "library.db" / "collections").mkdir(parents=True)  # of milvus-lite, before there were shards
    for call in (index, lambda: searching(str(tmp_path / "library.db"))):
        message = sentence(call)
        assert "older version" in message and "index FOLDER builds a new one" in message


def test_a_file_that_vanishes_while_it_is_read_is_tried_again(index, folder, tmp_path, monkeypatch):
    real = indexing.read_clip

    def vanish(clip, *sizes):
        if clip.path.name == "b.mp4":
            clip.path.unlink()
        return real(clip, *sizes)

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "read_clip", vanish)
        assert f"{CLIPS - 1} clips of {CLIPS} files" in index()
    assert Library(str(tmp_path / "library.db")).files()["b.mp4"]["stamp"] == ""
    shutil.copy(folder / "c d.mp4", folder / "b.mp4")
    assert f"{CLIPS} clips of {CLIPS} files; 0 new, 1 read again" in index()


def test_features_that_are_not_finite_end_the_run_and_keep_what_was_indexed(index, tmp_path, monkeypatch):
    real, calls = indexing.encode, []

    def damaged(model, images):
        calls.append(len(images))
        return real(model, images) * (float("nan") if len(calls) > 1 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "encode", damaged)
        assert "features that are not finite numbers" in sentence(index)
    library = Library(str(tmp_path / "library.db"))
    assert len(library) == 3 and all(torch.isfinite(frames).all() for _, frames in library.batches())
    assert f"{CLIPS - 3 - 3} new, 3 read again, 0 removed, 3 unchanged" in index()


def test_windows_divide_a_file_and_are_kept_until_others_are_asked_for(index, folder, tmp_path, rendered):
    assert f"{3 * CLIPS} clips of {CLIPS} files" in index(window=1.0)
    assert f"0 read again, 0 removed, {CLIPS} unchanged" in index()
    rows, frames = Library(str(tmp_path / "library.db")).clips_of("b.mp4")
    assert [(row["start"], row["end"]) for row in rows] == [(0, 1), (1, 2), (2, None)]
    assert not torch.equal(frames[0], frames[2])
    assert f"{CLIPS} clips of {CLIPS} files; 0 new, {CLIPS} read again" in index(window=0.0)
    assert "not beside --scenes" in sentence(index, window=1.0, scenes=True)
    assert "0 or more" in sentence(index, window=-1.0)


def test_a_library_belongs_to_one_folder_and_one_model(index, folder, checkpoint, tmp_path):
    index()
    other = tmp_path / "other.pt"
    save_checkpoint(other, random_model(frames=FRAMES, seed=1))
    assert "was made by another model" in sentence(index, checkpoint=other)
    where = str(tmp_path / "library.db")
    assert "was made by another model" in sentence(searching, where, checkpoint=other)
    shutil.copy(checkpoint, tmp_path / "moved.pt")
    assert searching(where, checkpoint=tmp_path / "moved.pt").name == str(tmp_path / "moved.pt")
    elsewhere = folder.rename(tmp_path / "elsewhere")
    assert "is the library of" in sentence(search.index, IndexConfig(elsewhere, where))
    assert search.index(IndexConfig(elsewhere, where, moved=True)) == 0
    assert Library(where).path("b.mp4").is_file()


def test_bad_input_gives_one_sentence(tmp_path, folder, checkpoint, monkeypatch):
    (tmp_path / "none").mkdir()
    db = str(tmp_path / "x.db")
    assert "holds no video" in sentence(search.index, IndexConfig(tmp_path / "none", db, checkpoint))
    assert "is not a folder" in sentence(search.index, IndexConfig(tmp_path / "missing", db, checkpoint))
    assert not Path(db).exists() or not Library(db, create=True).about
    assert "not found: create it" in sentence(
        search.query, QueryConfig(str(tmp_path / "y.db"), text="a ring")
    )
    assert "the query is empty" in sentence(search.query, QueryConfig(text="  "))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/ffmpeg")
    assert "no working ffmpeg" in sentence(search.index, IndexConfig(folder, db, checkpoint))


@pytest.mark.parametrize(
    ("command", "config", "message"),
    [
        (search.query, QueryConfig("x.db", text="a ring", k=0), "-k must be 1 or more."),
        (search.query, QueryConfig("x.db", text="a ring", M=-1), "--M must be 0 or more, at most 10000."),
        (search.query, QueryConfig("x.db", text="a ring", M=10**9), "--M must be 0 or more, at most 10000."),
        (search.check, CheckConfig("x.db", shortlist=0), "--shortlist must be 1 or more."),
        (search.check, CheckConfig("x.db", queries=0), "--queries must be 1 or more."),
        (search.serve, search.ServeConfig("x.db", port=99_999), "--port must be 0 or more, at most 65535."),
        (search.serve, search.ServeConfig("x.db", seed=-1), "--seed must be 0 or more"),
        (search.index, IndexConfig(Path("x"), batch=0), "--batch must be 1 or more, at most 10000."),
        (search.index, IndexConfig(Path("x"), batch=-1), "--batch must be 1 or more, at most 10000."),
        (
            search.index,
            IndexConfig(Path("x"), num_frames=10**9),
            "--num-frames must be 1 or more, at most 1000.",
        ),
    ],
)
def test_a_number_out_of_range_gives_one_sentence(command, config, message):
    assert message in sentence(command, config)


def test_a_terminal_that_is_not_utf8_shows_every_name(indexed, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as ended:
        search.main(["query", "a ring", "--library", indexed[0], "-k", str(CLIPS)])
    terminal.flush()
    shown = terminal.buffer.getvalue().decode("ascii")
    assert ended.value.code == 0 and NAMES[1].encode("ascii", "backslashreplace").decode() in shown


def test_an_error_of_the_operating_system_gives_one_sentence(indexed, monkeypatch):
    monkeypatch.setattr(search, "Searcher", lambda _: open("/no/such/file"))
    with pytest.raises(SystemExit) as ended:
        search.main(["query", "a ring"])
    assert ended.value.code == "error: /no/such/file cannot be used (No such file or directory)."


def test_a_library_answers_in_several_processes_while_it_is_indexed(index, folder, tmp_path, monkeypatch):
    where, answers, real = str(tmp_path / "library.db"), [], Library.finish
    command = [sys.executable, "search.py", "query", "a ring", "--library", where, "-k", "9", "--json"]

    def ask_meanwhile(library, rows):
        real(library, rows)
        if len(library) in (3, CLIPS):  # in another process, and in this one
            asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            answers.append([hit["file"] for hit in json.loads(asked.stdout)])
            assert sorted(answers[-1]) == sorted(hit.file for hit in searching(where).search("a ring", 9))

    monkeypatch.setattr(Library, "finish", ask_meanwhile)
    index()
    assert [len(answer) for answer in answers] == [3, CLIPS]


def test_the_command_line_takes_its_flags_in_any_order_and_ends_with_one_sentence(indexed, tmp_path, capsys):
    for flags in (["a ring", "-k", "2"], ["--k", "2", "--json", "a ring"]):
        with pytest.raises(SystemExit) as ended:
            search.main(["query", "--library", indexed[0], "--M", "3", *flags])
        assert ended.value.code == 0
    table, answer = capsys.readouterr().out.split("[", 1)
    hits = json.loads("[" + answer)
    assert [hit["file"] in line for hit, line in zip(hits, table.splitlines()[1:])] == [True, True]
    with pytest.raises(SystemExit) as ended:
        search.main(["query", "a ring", "--library", str(tmp_path / "none.db")])
    assert re.fullmatch(r"error: .*none\.db not found: .*", ended.value.code)


# ---- query


@pytest.mark.parametrize("part", ["text", "frames"])
def test_scores_that_are_not_finite_are_refused(part, indexed, monkeypatch):
    searcher = searching(indexed[0])
    if part == "text":
        real = searcher.model.encode_text
        monkeypatch.setattr(searcher.model, "encode_text", lambda tokens: real(tokens) * float("nan"))
    else:
        searcher.whole[1][3] = float("inf")  # as an older version stored them
    assert "are not finite numbers: its weights are damaged" in sentence(searcher.search, "a ring")


def test_a_query_that_is_too_long_gives_one_sentence(indexed):
    searcher, query = searching(indexed[0]), "x" * 100_000  # its tokens would take minutes
    assert "has 100000 characters: use at most 2000" in sentence(searcher.search, query)
    assert len(searcher.notes(query)) == 1


def test_scores_of_the_library_are_those_of_evaluate(indexed, checkpoint, M=5):
    searcher = searching(indexed[0], M=M, seed=3)
    (rows, frames), text = searcher.whole, searcher.text(["a red ring grows"])
    noise = noise_bank(M, frames.shape[-1], 3)
    expected = scores(searcher.model, text, frames, noise)[0]
    hits = searcher.search("a red ring grows", CLIPS)
    assert [hit.score for hit in hits] == sorted(expected.tolist(), reverse=True)
    assert [hit.rank for hit in hits] == [*range(1, CLIPS + 1)]
    assert {hit.id: hit.score for hit in hits} == dict(zip((row["id"] for row in rows), expected.tolist()))
    images = [read_clip(Clip("", indexed[1] / hit.file, (), ""), FRAMES, 32)[0] for hit in hits]
    exact = torch.cat([encode(searcher.model, one[None]) for one in images])
    unrounded = scores(searcher.model, text, exact, noise)[0]
    found = torch.tensor([hit.score for hit in hits])
    assert (unrounded - found).abs().max() < 1e-3  # the library holds features in half precision
    model, best = searcher.model, hits[0]
    own = searcher.library.clip(best.id)[1]
    radius = model.radius(text, own, model.fusion(text, own))
    assert best.radius == pytest.approx(radius.mean().item(), rel=1e-5)
    assert best.attention == pytest.approx(model.fusion.attention(text, own)[0, 0, 0].tolist(), rel=1e-4)


def test_a_small_library_is_scored_in_full_and_a_shortlist_holds_the_nearest(indexed):
    library = Library(indexed[0])
    whole, short, all_of_it = (searching(indexed[0], shortlist=size) for size in (4, 3, CLIPS))
    assert whole.whole is not None and short.whole is None  # 7 clips: at most 2 x 4, more than 2 x 3
    text, vectors = short.text(["a ring"]), {}
    for rows, frames in library.batches():
        vectors |= {row["id"]: overall(short.model, f[None])[0] for row, f in zip(rows, frames)}
    nearest = sorted(vectors, key=lambda id: -(vectors[id] @ text[0]).item())[:3]
    assert [row["id"] for row in library.nearest(text[0], 3)[0]] == nearest
    assert {hit.id for hit in short.search("a ring", CLIPS)} == {*nearest}
    ranked = [hit.id for hit in whole.search("a ring", CLIPS)]
    assert [hit.id for hit in short.search("a ring")] == [id for id in ranked if id in nearest]
    assert all_of_it.search("a ring") == whole.search("a ring")


@pytest.mark.parametrize("query", ["ring", "word " * 200, "кольцо в пустыне", "赤い輪", "<b>'\" \\ %", "🙂"])
def test_any_query_is_answered(indexed, query):
    searcher = searching(indexed[0])
    assert len(searcher.search(query, 3)) == 3
    notes = " ".join(searcher.notes(query))
    assert ("reads the first 20" in notes) == (len(query) > 100) and ("English" in notes) == (
        query[0] in "к赤"
    )


def test_zero_shot_scores_by_mean_pooling(folder, weights, tmp_path, capsys):
    where = str(tmp_path / "zero.db")
    search.index(IndexConfig(folder, where, arch="ViT-B/32", weights=weights, num_frames=3))
    search.query(QueryConfig(where, text="a ring", k=CLIPS))
    output = capsys.readouterr()
    assert "note: ViT-B/32, zero-shot" in output.err
    searcher = searching(where)
    text, (rows, frames) = searcher.text(["a ring"]), searcher.whole
    pooled = torch.nn.functional.normalize(frames, dim=-1).mean(dim=1)
    cosines = torch.nn.functional.cosine_similarity(text, pooled).tolist()
    hits = searcher.search("a ring", CLIPS)
    assert {hit.id: pytest.approx(hit.score, abs=1e-5) for hit in hits} == dict(
        zip((row["id"] for row in rows), cosines)
    )
    assert all(hit.radius is None and hit.attention == pytest.approx([1 / 3] * 3) for hit in hits)
    row = "{:>4}  {:.3f}       -  {:.1f} s  {}  whole file".format
    lines = output.out.split("rank  score  radius   best  file\n")[1].splitlines()
    assert lines == [row(h.rank, h.score, h.time, h.file) for h in hits]


@pytest.mark.parametrize("fusion", ["mean", "last", "odd"])
def test_any_psi_is_scored_as_itself_and_never_as_another(fusion, toys, folder, tmp_path, M=3):
    path, where = tmp_path / "toy.pt", str(tmp_path / "toy.db")
    save_checkpoint(path, random_model(frames=FRAMES, fusion=fusion, radius="linear"))
    assert search.index(IndexConfig(folder, where, path)) == 0
    searcher = searching(where, M=M)
    text, (rows, frames), model = searcher.text(["a ring"]), searcher.whole, searcher.model
    expected = scores_literal(model, text, frames, noise_bank(M, frames.shape[-1], 0))[0].tolist()
    hits = {hit.id: hit for hit in searcher.search("a ring", CLIPS)}
    R = model.radius(text, frames, model.fusion(text, frames))[0].mean(dim=-1).tolist()
    for number, row in enumerate(rows):
        hit = hits[row["id"]]
        assert hit.score == pytest.approx(expected[number], abs=1e-5)
        assert hit.radius == pytest.approx(R[number], rel=1e-5)
        attention = [1 / FRAMES] * FRAMES
        if fusion == "odd":  # a subclass of XPool: it has an attention
            attention = model.fusion.attention(text, frames[number : number + 1])[0, 0, 0].tolist()
        assert hit.attention == pytest.approx(attention, rel=1e-4)
    vectors = torch.cat([overall(model, one[None]) for one in frames])
    cosines = dict(zip((row["id"] for row in rows), (vectors @ text[0] / text.norm()).tolist()))
    near = [cosines[id] for id in searcher.library.nearest_ids(text[0], CLIPS)]
    assert near == pytest.approx(sorted(cosines.values(), reverse=True), abs=1e-3)  # features are rounded


def test_captions_of_a_clip_rank_by_the_same_score_for_files_in_and_out_of_the_library(
    indexed, tmp_path, rendered, capsys
):
    captions = tmp_path / "captions.txt"
    captions.write_text("a ring\nun carré\n\na blue star falls\n")
    shutil.copy(rendered[0], tmp_path / "outside.mp4")
    scored = []
    for video in (NAMES[0], str(tmp_path / "outside.mp4")):  # the same clip
        search.query(QueryConfig(indexed[0], video=video, captions=captions, json=True))
        (answer,) = json.loads(capsys.readouterr().out)
        assert (answer["file"], answer["start"], answer["end"]) == (video, 0, None)
        scored.append({one["caption"]: one["score"] for one in answer["captions"]})
        assert [one["score"] for one in answer["captions"]] == sorted(scored[-1].values(), reverse=True)
        assert {*scored[-1]} == {"a ring", "un carré", "a blue star falls"}
    inside, outside = scored
    assert inside == pytest.approx(outside, abs=1e-3)
    (hit,) = (hit for hit in searching(indexed[0]).search("a ring", CLIPS) if hit.file == NAMES[0])
    assert inside["a ring"] == pytest.approx(hit.score, abs=1e-5)
    search.query(QueryConfig(indexed[0], video=NAMES[0], captions=captions, k=1))
    best = max(inside, key=inside.get)
    assert capsys.readouterr().out == f"{NAMES[0]}  whole file\n   1  {inside[best]:.3f}  {best}\n"
    assert "neither a file of" in sentence(search.query, QueryConfig(indexed[0], video="no.mp4"))
    missing = QueryConfig(indexed[0], video=NAMES[0], captions=tmp_path / "no.txt")
    assert "one caption per line" in sentence(search.query, missing)


def test_a_file_is_found_by_its_name_in_either_normal_form_of_unicode(index, folder, tmp_path, capsys):
    names = [unicodedata.normalize(form, "café.mp4") for form in ("NFC", "NFD")]
    (folder / "b.mp4").rename(folder / names[1])
    index()
    for name in names:
        search.query(QueryConfig(str(tmp_path / "library.db"), video=name, k=1))
        assert name in capsys.readouterr().out


# ---- check


def test_recall_counts_the_best_clips_that_the_shortlist_holds(indexed):
    searcher = searching(indexed[0])
    captions = ["a ring", "a blue square falls", "a star in space"]
    expected = dict.fromkeys([1, 3, CLIPS], 0)
    for caption in captions:
        best = {hit.id for hit in searcher.search(caption, 2)}
        near = searcher.library.nearest_ids(searcher.text([caption])[0], CLIPS)
        for size in expected:
            expected[size] += len(best & {*near[:size]}) / 2 / len(captions)
    measured = recall(searcher, captions, [1, 3, CLIPS], k=2)
    assert measured == pytest.approx(expected) and measured[CLIPS] == 1


def test_check_fails_below_the_floor_where_a_shortlist_is_used(indexed, capsys):
    assert search.check(CheckConfig(indexed[0], queries=2, shortlist=3)) == 1  # 3 of the 7 best clips
    output = capsys.readouterr()
    assert "      3 clips  0.429\n" in output.out and "0.429 is below --floor 0.95" in output.err
    assert search.check(CheckConfig(indexed[0], queries=2, shortlist=3, floor=0.4)) == 0
    assert search.check(CheckConfig(indexed[0], queries=2, shortlist=4)) == 0
    assert "(a query scores all 7 clips: the shortlist is used above 8)" in capsys.readouterr().out

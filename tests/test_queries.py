"""What is asked of a library: weights, pictures, filters; near-duplicates, bad fits, and clips cut out."""

import datetime
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import message
from PIL import Image

pytest.importorskip("pymilvus", reason="pip install -r requirements-search.txt")
pytest.importorskip("milvus_lite", reason="pip install -r requirements-search.txt")

import test_search
from test_search import CLIPS, FRAMES, NAMES, searching

import search
from engine import searcher as engine_searcher
from engine.cutting import cut
from engine.ffmpeg import check_ffmpeg
from engine.frames import decode_frames, duration
from engine.indexing import IndexConfig
from engine.library import filmstrip
from engine.queries import (
    LOW,
    NOT,
    SAME,
    build_query,
    difference,
    fold,
    small_frames,
    split_time,
    timestamp,
    unfit,
)
from engine.scoring import scores
from engine.searcher import calibrate, random_best
from search import QueryConfig

checkpoint, rendered, indexed = test_search.checkpoint, test_search.rendered, test_search.indexed  # fixtures


@pytest.fixture(scope="module")
def searcher(indexed):
    return searching(indexed[0], M=5)


@pytest.fixture(scope="module")
def windows(tmp_path_factory, rendered, checkpoint) -> tuple[str, Path]:
    """A library of three files, each cut into clips of a second; one file is a smaller copy of another."""
    place = tmp_path_factory.mktemp("windows")
    folder = place / "videos"
    (folder / "sub").mkdir(parents=True)
    shutil.copy2(rendered[0], folder / "a.mp4")
    shutil.copy2(rendered[1], folder / "sub" / "b.mp4")
    small = ["-vf", "scale=64:64", "-crf", "30", str(folder / "copy of a.mp4")]
    subprocess.run([check_ffmpeg(), "-v", "error", "-i", str(rendered[0]), *small], check=True)
    assert search.index(IndexConfig(folder, str(place / "library.db"), checkpoint, window=1.0)) == 0
    return str(place / "library.db"), folder


def ranked(searcher, query) -> dict[str, float]:
    """The score of every clip that a query finds, best first, by file and start."""
    return {(hit.file, hit.start): hit.score for hit in searcher.search(query, 1000)}


def ask(text="", **more):
    return build_query(text, all=True, **more)


# ---- the score


@pytest.mark.parametrize("shortlist", [None, 1])  # 1: the library does not count as small
def test_a_score_is_the_sum_of_weight_times_exact_score_or_similarity(indexed, shortlist):
    searcher = searching(indexed[0], M=5, **({"shortlist": shortlist} if shortlist else {}))
    captions, weights = ["a red ring", "at sea", "a star", "snow"], [1.0, 0.5, -2.0, NOT]
    rows, frames = zip(*searcher.library.batches())
    rows, frames = [row for some in rows for row in some], torch.cat(frames)
    own = frames[3, 1:3]
    text = scores(searcher.model, searcher.text(captions), frames, searcher.noise)
    expected = {}
    for n, row in enumerate(rows):
        like = [max(F.cosine_similarity(f, g, dim=0) for g in frames[n]) for f in own]
        expected[row["id"]] = sum(w * s for w, s in zip(weights, text[:, n])) + sum(like) / 2
    query = ask(captions[0], also=[(0.5, "at sea"), (-2.0, "a star")], unlike=["snow"], pictures=[own])
    hits = searcher.search(query, CLIPS if shortlist is None else 1)
    best = sorted(expected, key=expected.get, reverse=True)
    assert [hit.id for hit in hits] == best[: len(hits)]
    for hit in hits:
        assert hit.score == pytest.approx(expected[hit.id].item(), abs=1e-5)
        assert sum(hit.attention) == pytest.approx(1, abs=1e-5)


def test_a_picture_is_compared_with_every_frame_and_a_clip_is_not_like_itself(searcher, indexed, tmp_path):
    frame = decode_frames(indexed[1] / "b.mp4", FRAMES)[2]
    Image.fromarray(frame).save(tmp_path / "picture.png")
    own = searcher.picture(tmp_path / "picture.png")
    (row,), frames = searcher.library.clips_of("b.mp4")
    torch.testing.assert_close(own[0], frames[0, 2], rtol=2e-3, atol=1e-4)  # the library holds float16
    (hit,) = (hit for hit in searcher.search(ask(pictures=[own]), CLIPS) if hit.id == row["id"])
    assert (hit.best, hit.attention) == (2, [0, 0, 1, 0])
    assert hit.score == pytest.approx(1, abs=1e-3) and hit.radius is None
    assert torch.equal(own, searcher.picture_of((tmp_path / "picture.png").read_bytes()))
    at, _ = searcher.like(f"b.mp4@{hit.time}")  # the best frame is on screen at the time that is told
    torch.testing.assert_close(at, own, rtol=1e-4, atol=1e-5)
    inside, same = searcher.like("b.mp4")
    outside, none = searcher.like(str(indexed[1] / "b.mp4"))
    assert F.cosine_similarity(inside, outside).min() > 0.999 and same == {hit.id} and not none
    found = searcher.search(build_query("", pictures=[inside], without=same, all=True), CLIPS)
    assert len(found) == CLIPS - 1 and hit.id not in {one.id for one in found}


def test_the_time_of_the_best_frame_lies_in_its_part_of_the_clip(windows):
    searcher = searching(windows[0])
    for hit in searcher.search(ask("a ring"), 9):
        end = duration(windows[1] / hit.file) if hit.end is None else hit.end
        assert hit.time == pytest.approx(hit.start + (hit.best + 0.5) / FRAMES * (end - hit.start))
        assert hit.best == max(range(FRAMES), key=hit.attention.__getitem__)
    (windows[1] / "a.mp4").rename(windows[1] / "away")
    try:
        times = {(hit.file, hit.start): hit.time for hit in searching(windows[0]).search(ask("a ring"), 9)}
    finally:
        (windows[1] / "away").rename(windows[1] / "a.mp4")
    assert [start for (_, start), time in times.items() if time is None] == [2.0]  # its end is not known


# ---- filters


@pytest.mark.parametrize("shortlist", [1000, 1])
@pytest.mark.parametrize("pictures", [0, 1])
def test_filters_leave_exactly_the_clips_that_an_unfiltered_query_has_of_those_files(
    windows, shortlist, pictures
):
    whole, searcher = searching(windows[0]), searching(windows[0], shortlist=shortlist)
    own = [next(searcher.library.batches())[1][0]] * pictures
    dates = {"a.mp4": 2020, "sub/b.mp4": 2021, "copy of a.mp4": 2022}
    try:
        rows = searcher.library.files()
        for name, year in dates.items():
            size, _, *how = rows[name]["stamp"].split(" ")
            time = int(datetime.datetime(year, 6, 1).timestamp() * 1e9)
            rows[name] = {**rows[name], "stamp": " ".join([size, str(time), *how])}
        searcher.library.files = lambda: rows
        every = ranked(whole, ask("a ring", pictures=own))
        for where, names in [
            ({"inside": "sub"}, {"sub/b.mp4"}),
            ({"inside": str(windows[1] / "sub")}, {"sub/b.mp4"}),
            ({"inside": "./sub/"}, {"sub/b.mp4"}),
            ({"newer": "2021-01-31"}, {"sub/b.mp4", "copy of a.mp4"}),
            ({"older": "2021-06-01"}, {"a.mp4"}),
            ({"newer": "2021-06-01", "older": "2021-06-01T00:00:01"}, {"sub/b.mp4"}),
        ]:
            found = ranked(searcher, ask("a ring", pictures=own, **where))
            expected = {clip: score for clip, score in every.items() if clip[0] in names}
            first = list(expected)[: len(found)]  # with a shortlist of 1, the best one at least
            assert len(found) >= min(shortlist, len(expected)) and list(found) == first
            assert list(found.values()) == pytest.approx([expected[clip] for clip in first], abs=1e-5)
        for where in ({"inside": "su"}, {"inside": ".."}, {"inside": "/"}, {"newer": "2023-01-01"}):
            assert message(searcher.search, ask("a ring", **where)).endswith(".")
    finally:
        del searcher.library.files


# ---- near-duplicates


def test_a_copy_is_listed_with_the_better_clip_and_shown_alone_when_asked(windows):
    searcher = searching(windows[0])
    every = searcher.search(ask("a ring"), 9)
    hits = searcher.search(build_query("a ring"), 9)
    clips = [(one.file, one.start) for hit in hits for one in [hit]]
    copies = [(one["file"], one["start"]) for hit in hits for one in hit.copies]
    assert len(every) == 9 and {*clips, *copies} == {(hit.file, hit.start) for hit in every}
    pairs = [{hit.file, *(one["file"] for one in hit.copies)} for hit in hits if hit.start < 9 and hit.copies]
    assert pairs and all(pair == {"a.mp4", "copy of a.mp4"} for pair in pairs)
    score = {(hit.file, hit.start): hit.score for hit in every}
    for hit in hits:
        assert hit.score == score[hit.file, hit.start]
        assert all(one["score"] == score[one["file"], one["start"]] <= hit.score for one in hit.copies)
    assert [hit.rank for hit in hits] == [*range(1, len(hits) + 1)]


def test_recompression_is_no_difference_and_other_clips_are_one(rendered):
    frames = [decode_frames(path, 5) for path in rendered]
    small = [small_frames(filmstrip(one), 5) for one in frames]
    again = [small_frames(filmstrip([frame[::2, ::2] for frame in one], most=6000), 5) for one in frames]
    for n, one in enumerate(small):
        assert difference(one, one) == 0 and difference(one, again[n]) < SAME / 2
        assert all(difference(one, other) > SAME for m, other in enumerate(small) if m != n)


def test_folding_keeps_the_best_of_each_group_and_counts_k_groups():
    kinds = [0, 1, 0, 2, 1, 0, 3, 0]
    looks = [np.random.default_rng(kind).uniform(0, 255, (3, 8, 8, 3)).astype(np.float32) for kind in kinds]
    assert fold(8, 9, looks.__getitem__) == [[0, 2, 5, 7], [1, 4], [3], [6]]
    assert fold(8, 2, looks.__getitem__) == [[0, 2], [1]]  # the third group ends it
    assert fold(0, 2, looks.__getitem__) == [] and fold(3, 3, lambda n: None) == [[0], [1], [2]]


# ---- what fits nothing


def test_the_note_comes_where_random_captions_find_better_clips(searcher, monkeypatch):
    best = random_best(searcher, search.read_captions(None, {})[::5])
    noted = [unfit(score, best) is not None for score in best]
    assert best == sorted(best) and sum(noted) == pytest.approx(LOW * len(best), abs=2)
    assert noted == sorted(noted, reverse=True)  # the lower ones
    assert unfit(0.1, []) is None and f"{len(best)} of {len(best)} random captions" in unfit(-1.0, best)
    full = searching(searcher.library.where)
    hits = full.search("a ring", 1)
    for best, expected in (([hits[0].score + 1] * 9, True), ([hits[0].score - 1] * 9, False)):
        monkeypatch.setitem(full.library.about, "fit", {"M": 20, "best": best})
        assert ("nothing fits well" in " ".join(full.notes("a ring", hits))) == expected
        assert "nothing fits" not in " ".join(searcher.notes("a ring", hits))  # M = 5 has other scores
        assert "nothing fits" not in " ".join(full.notes(ask("a ring", unlike=["a star"]), hits))


def test_calibration_is_stored_and_kept_while_the_library_hardly_changes(windows, monkeypatch):
    searcher, stored = searching(windows[0]), []
    monkeypatch.setattr(searcher.library, "describe", lambda about: stored.append(about["fit"]))
    monkeypatch.setitem(searcher.library.about, "fit", {})  # as before the first index
    calibrate(searcher.library, searcher.model, {})
    captions = search.read_captions(None, {})
    best = searcher.score(searcher.text(captions), searcher.whole[1]).amax(dim=1).tolist()
    (fit,) = stored
    assert (fit["clips"], fit["M"], len(fit["best"])) == (9, 20, 50)
    assert all(min(abs(score - one) for one in best) < 1e-3 for score in fit["best"])
    for clips, again in ((9, False), (10, False), (5, True)):
        monkeypatch.setitem(searcher.library.about, "fit", {**fit, "clips": clips})
        stored.clear()
        calibrate(searcher.library, searcher.model, {})
        assert len(stored) == again


def test_a_large_library_is_calibrated_by_the_queries_themselves(windows, monkeypatch):
    whole, searcher = searching(windows[0]), searching(windows[0], shortlist=1)
    captions = ["a ring", "at sea", "a star"]
    best = random_best(whole, captions)
    assert random_best(searcher, captions) == best
    monkeypatch.setattr(engine_searcher, "EXACT", 1)
    own = sorted(searcher.search(caption, 1)[0].score for caption in captions)
    assert random_best(searcher, captions) == pytest.approx(own, abs=1e-4)
    assert random_best(whole, captions) == pytest.approx(best, abs=1e-4)


# ---- cut-out clips


def test_an_exported_clip_holds_the_frames_of_its_window_and_nothing_is_overwritten(
    windows, tmp_path, capsys
):
    config = QueryConfig(windows[0], text="a ring", k=9, all=True, export=tmp_path / "out", json=True)
    assert search.query(config) == 0
    hits = json.loads(capsys.readouterr().out)
    assert len(hits) == len(list((tmp_path / "out").iterdir())) == 9
    for hit in hits:
        (made,) = (tmp_path / "out").glob(f"{hit['rank']:02d} *")
        source = windows[1] / hit["file"]
        assert made.suffix == ".mp4" and made.stem[3:].startswith(source.stem)
        part = decode_frames(source, 4, hit["start"], hit["end"])
        own = decode_frames(made, 24)  # it may begin earlier, with a key frame
        assert all(any(np.array_equal(one, other) for other in own) for one in part)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert search.query(config) == 1 and capsys.readouterr().err.count("is there already") == 9
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_whole_file_is_copied_and_a_file_that_cannot_be_cut_leaves_nothing(rendered, tmp_path):
    cut(rendered[0], tmp_path / "whole.mp4", 0.0, None)
    assert (tmp_path / "whole.mp4").read_bytes() == rendered[0].read_bytes()
    (tmp_path / "text.mp4").write_text("no video")
    there = {*tmp_path.iterdir()}
    assert "cannot be cut" in message(cut, tmp_path / "text.mp4", tmp_path / "out.mp4", 1.0, 2.0)
    assert "not found" in message(cut, tmp_path / "none.mp4", tmp_path / "out.mp4", 1.0, 2.0)
    assert "could not be written" in message(cut, rendered[0], tmp_path / "text.mp4" / "a.mp4", 0.0, None)
    assert {*tmp_path.iterdir()} == there


def test_a_file_that_changed_since_it_was_indexed_is_not_cut(windows, tmp_path, capsys):
    path = windows[1] / "sub" / "b.mp4"
    times = os.stat(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    try:
        config = QueryConfig(windows[0], text="a ring", inside="sub", export=tmp_path / "out")
        assert search.query(config) == 1 and "has changed since it was indexed" in capsys.readouterr().err
    finally:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


# ---- what is asked


def test_a_time_is_split_from_a_name_that_may_hold_an_at():
    assert split_time("clip.mp4@12.5") == ("clip.mp4", 12.5) and split_time("a@b@3") == ("a@b", 3)
    for name in ("clip.mp4", "26292851@N04.", "a@-1", "a@nan", "@3", "a@"):
        assert split_time(name) == (name, None)


def test_a_date_is_that_of_this_machine():
    assert timestamp("2024-01-31") == datetime.datetime(2024, 1, 31).timestamp()
    assert timestamp("2024-01-31T18:30") - timestamp("2024-01-31") == 18.5 * 3600


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"text": "a", "newer": "today"}, "'today' is not a date"),
        ({"text": "a", "newer": "2024-02-01", "older": "2024-02-01"}, "no file is newer"),
        ({"text": "a", "also": ((0.0, "b"),)}, "weight of 'b' is 0"),
        ({"text": "a", "also": ((float("nan"), "b"),)}, "weight of 'b' is nan"),
        ({"text": "a", "also": ((1.0, " "),)}, "empty part"),
        ({"text": "a", "unlike": ("",)}, "empty part"),
        ({"text": "a", "unlike": ("b",) * 20}, "has 21 parts: use at most 20"),
        ({"unlike": ("b",)}, "nothing is looked for"),
        ({"inside": "sub"}, "the query is empty"),
        ({"video": "a.mp4", "text": "a"}, "cannot stand beside a text"),
        ({"video": "a.mp4", "unlike": ("b",)}, "cannot stand beside --not"),
        ({"video": "a.mp4", "export": Path("out")}, "cannot stand beside --export"),
        ({"text": "a", "captions": Path("c.txt")}, "name it with --video"),
        ({"image": Path("none.png")}, "none.png not found: name a picture"),
    ],
)
def test_what_makes_no_sense_gives_one_sentence_before_a_library_is_opened(asked, said):
    assert said in message(search.query, QueryConfig("none.db", **asked))


def test_a_picture_or_clip_that_is_none_gives_one_sentence(searcher, windows, tmp_path, rendered):
    (tmp_path / "text.png").write_text("no picture")
    assert message(searcher.picture, tmp_path / "text.png").endswith("that can be read: replace it.")
    assert message(searcher.picture_of, b"no picture").startswith("the picture is not a picture")
    assert message(searcher.picture, rendered[0]).endswith("is a video: name it with --like.")
    assert "neither a file of" in message(searcher.like, "none.mp4@2")
    assert "ends at 3 s: name an earlier time" in message(searcher.like, "b.mp4@3")
    assert "has 3 clips: add a time" in message(searching(windows[0]).like, "a.mp4")


def test_the_command_line_takes_weights_and_repeated_parts(indexed, capsys):
    flags = ["--and", "0.5", "at sea", "--not", "snow", "--and", "-0.2", "a star", "--not", "night", "--all"]
    with pytest.raises(SystemExit) as ended:
        search.main(["query", "a ring", *flags, "--library", indexed[0], "--json", "-k", str(CLIPS)])
    hits, searcher = json.loads(capsys.readouterr().out), searching(indexed[0])
    query = ask("a ring", also=[(0.5, "at sea"), (-0.2, "a star")], unlike=["snow", "night"])
    assert ended.value.code == 0 and {hit["file"] for hit in hits} == {*NAMES}
    assert {(hit["file"], hit["start"]): hit["score"] for hit in hits} == ranked(searcher, query)

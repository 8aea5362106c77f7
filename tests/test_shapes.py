"""The built-in data set: its captions, its pictures, its files."""

import csv
import itertools
import shutil

import imageio_ffmpeg
import numpy as np
import pytest

import shapes
from engine.datasets import Clip
from engine.frames import FrameCache, decode_frames
from shapes import ATTRIBUTES, FRAMES, SIZE, make_clip, perfect_retriever

CLIPS = [make_clip(0, number) for number in range(200)]


def test_a_clip_is_three_scenes_that_fill_its_frames():
    for clip in CLIPS:
        assert len(clip.scenes) == 3 and sum(clip.lengths) == FRAMES and min(clip.lengths) >= FRAMES // 4


def test_clips_of_one_to_five_scenes_fill_their_frames_too():
    scenes = shapes.TEST_SETS["shapes-scenes"]["scenes"]
    for number, clip in enumerate(make_clip(2, number, scenes) for number in range(100)):
        assert len(clip.scenes) == len(clip.lengths) == 1 + number % 5
        assert sum(clip.lengths) == FRAMES and min(clip.lengths) >= FRAMES // 6
        assert all(fits(caption, clip) for caption in clip.captions)


def fits(caption: shapes.Caption, clip: shapes.ShapesClip) -> bool:
    """Whether the caption is true of the clip: its mentions are found in the scenes, in time order."""
    for scenes in itertools.combinations(clip.scenes, len(caption.mentions)):
        pairs = zip(scenes, caption.mentions)
        if all(getattr(scene, name) == value for scene, m in pairs for name, value in m.items()):
            return True
    return False


def test_captions_are_true_and_tell_only_part_of_their_clip():
    for clip in CLIPS:
        for caption in clip.captions:
            assert fits(caption, clip) and len(caption.mentions) < 3
            assert all(len(mention) >= 2 for mention in caption.mentions)


def test_captions_contain_a_word_for_each_value_they_mention():
    for caption in itertools.chain.from_iterable(clip.captions for clip in CLIPS):
        for name, value in itertools.chain.from_iterable(mention.items() for mention in caption.mentions):
            assert any(word in caption.text for word in ATTRIBUTES[name][value])


def test_seeds_and_numbers_give_different_clips():
    assert make_clip(0, 1) == make_clip(0, 1) != make_clip(0, 2) != make_clip(1, 2)


def test_relevance_is_whether_a_caption_is_true_of_a_clip():
    clips, names = CLIPS[:40], [f"clip{number:05d}" for number in range(40)]
    relevant = shapes.relevance(names, [[caption.text for caption in clip.captions] for clip in clips])
    captions = [caption for clip in clips for caption in clip.captions]
    assert relevant.tolist() == [[fits(caption, clip) for clip in clips] for caption in captions]
    assert relevant.sum() > len(captions)  # other clips than a caption's own fit, too


def test_relevance_of_clips_of_different_numbers_of_scenes_equals_its_loops():
    scenes = (1, 2, 3, 4, 5)
    clips, names = [make_clip(2, n, scenes) for n in range(60)], [f"clip{n:05d}" for n in range(60)]
    said = [[caption.text for caption in clip.captions] for clip in clips]
    captions = [caption for clip in clips for caption in clip.captions]
    relevant = shapes.relevance(names, said, 2, scenes)
    assert relevant.tolist() == [[fits(caption, clip) for clip in clips] for caption in captions]
    assert relevant[:, ::5].any() and not np.array_equal(relevant.any(axis=1), relevant[:, ::5].any(axis=1))
    assert shapes.relevance(names, said, 1, scenes) is None  # these are the captions of another seed


def test_relevance_is_unknown_for_other_captions():
    assert shapes.relevance(["clip00000"], [["a dog in the snow"]]) is None


def test_perfect_retriever_equals_its_loops(monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 3, "val": 5, "test": 60})
    gallery = [make_clip(0, number) for number in range(8, 68)]
    n = np.array(
        [sum(fits(caption, clip) for clip in gallery) for own in gallery for caption in own.captions]
    )
    score = perfect_retriever(0, "test")
    assert n.min() >= 1
    assert score["R@1"] == pytest.approx((1 / n).mean() * 100)
    assert score["R@5"] == pytest.approx(np.minimum(1, 5 / n).mean() * 100)
    assert score["MnR"] == pytest.approx(((n + 1) / 2).mean())


def test_files_are_h264_videos_of_the_drawn_frames(clips_folder):
    path = clips_folder / "clips" / "clip00005.mp4"
    about = next(imageio_ffmpeg.read_frames(path))
    assert (about["codec"], about["size"]) == ("h264", (SIZE, SIZE))
    assert (about["fps"], about["duration"]) == (8.0, 3.0)
    for drawn, decoded in zip(shapes.draw_clip(make_clip(0, 5)), decode_frames(path, FRAMES), strict=True):
        assert np.abs(np.asarray(drawn, dtype=float) - decoded).mean() < 4  # of 255: the loss of H.264


def test_many_files_are_decoded_at_once_to_the_same_frames(clips_folder, tmp_path):
    paths = [clips_folder / "clips" / f"clip{number:05d}.mp4" for number in (3, 17, 4)]
    for path, frames in zip(paths, shapes.decode(paths), strict=True):
        assert np.array_equal(frames, decode_frames(path, FRAMES))
    (tmp_path / "cut.mp4").write_bytes(paths[0].read_bytes()[:-500])
    with pytest.raises(ValueError):
        shapes.decode([paths[1], tmp_path / "cut.mp4"])


def test_the_cache_holds_the_same_bytes_however_built_in_clips_are_decoded(
    clips_folder, tmp_path, monkeypatch
):
    (tmp_path / "clips").mkdir()
    for number in range(4):
        shutil.copy2(clips_folder / "clips" / f"clip{number:05d}.mp4", tmp_path / "clips")
    other = tmp_path / "clips" / "clip00003.mp4"
    other.write_bytes((clips_folder / "clips" / "clip00009.mp4").read_bytes()[:3000])  # cut: refused
    clips = [Clip(path.name, path, ("a",), "train") for path in sorted((tmp_path / "clips").iterdir())]

    def content(name: str) -> dict[str, bytes]:
        cache = FrameCache(tmp_path / name, 5, 64)
        failures = cache.fill(clips)
        assert list(failures) == ["clip00003.mp4"]
        return {path.name: path.read_bytes() for path in cache.folder.iterdir()}

    one_by_one = content("one")
    (tmp_path / shapes.MARK).touch()
    calls = []
    monkeypatch.setattr(
        shapes, "decode", lambda paths, decode=shapes.decode: calls.append(1) or decode(paths)
    )
    assert content("many") == one_by_one and calls and len(one_by_one) == 3


def test_files_depend_on_the_seed_alone(tmp_path):
    def files(seed):
        shapes._render_clips((tmp_path, seed, range(5, 8)))
        return [path.read_bytes() for path in sorted(tmp_path.iterdir())]

    one, two, other = files(0), files(0), files(1)
    assert len(one) == 3 and one == two and all(a != b for a, b in zip(one, other))


def test_render_writes_a_complete_folder_once(monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 3, "val": 1, "test": 2})
    folder = shapes.render(tmp_path / "shapes")
    with (folder / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows[::5]] == ["train"] * 3 + ["val"] + ["test"] * 2
    assert len(list((folder / "clips").iterdir())) == 6
    assert list(tmp_path.iterdir()) == [folder]  # no leftovers beside it
    before = (folder / "clips.csv").stat().st_mtime_ns
    shapes.render(folder)
    assert (folder / "clips.csv").stat().st_mtime_ns == before
    shapes.render(folder, seed=1, splits={"test": 3}, scenes=(1, 5))  # other clips: rendered again
    with (folder / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    clips = [make_clip(1, number, (1, 5)) for number in range(3)]
    assert [row["caption"] for row in rows] == [c.text for clip in clips for c in clip.captions]
    assert {row["split"] for row in rows} == {"test"} and len(list((folder / "clips").iterdir())) == 3


def test_render_never_overwrites_a_folder_with_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        shapes.render(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"

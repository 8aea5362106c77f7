"""The cache never serves frames other than those of the video."""

import os
import random
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import torch
from conftest import message
from hypothesis import given
from hypothesis import strategies as st

from engine.datasets import Clip
from engine.frames import FrameCache, decode_frames, resize, segment_midpoints, stack


def test_cached_frames_are_the_decoded_ones_up_to_jpeg(clips, tmp_path):
    cache = FrameCache(tmp_path, 5, 64)
    expected = np.stack([resize(frame, 64) for frame in decode_frames(clips[0].path, 5)])
    first, second = cache.frames(clips[0]), cache.frames(clips[0])  # decoded, then from disk
    assert np.array_equal(first, second) and first.shape == expected.shape == (5, 64, 64, 3)
    assert np.abs(first.astype(int) - expected).mean() < 2  # of 255


def test_the_cache_holds_one_zip_file_a_clip(clips, tmp_path):
    cache = FrameCache(tmp_path, 5, 32)
    assert cache.fill(clips[:3]) == {}
    assert sorted(path.name for path in cache.folder.iterdir()) == [f"clip0000{k}.mp4.zip" for k in range(3)]
    with zipfile.ZipFile(cache.path(clips[0])) as file:
        assert file.namelist() == [f"{k:03d}.jpg" for k in range(5)] and file.testzip() is None


def test_a_changed_video_window_or_setting_is_decoded_again(clips, tmp_path):
    path = tmp_path / "clip.mp4"
    shutil.copy(clips[0].path, path)
    clip = Clip("clip", path, ("a caption",), "train")
    cache = FrameCache(tmp_path / "cache", 5, 32)
    before = cache.frames(clip)
    shutil.copy(clips[1].path, path)
    other = cache.frames(clip)
    assert not np.array_equal(other, before)
    assert not np.array_equal(cache.frames(replace(clip, end=1.0)), other)
    assert FrameCache(tmp_path / "cache", 6, 32).frames(clip).shape == (6, 32, 32, 3)
    assert FrameCache(tmp_path / "cache", 5, 48).frames(clip).shape == (5, 48, 48, 3)


def test_a_cached_video_may_be_removed(clips, tmp_path):
    clip = replace(clips[0], path=tmp_path / "clip.mp4")
    shutil.copy(clips[0].path, clip.path)
    cache = FrameCache(tmp_path / "cache", 5, 32)
    frames = cache.frames(clip)
    clip.path.unlink()
    assert cache.fill([clip]) == {} and np.array_equal(cache.frames(clip), frames)


def old_stamp(path):
    """As versions without a hash of the file's ends wrote it."""
    with zipfile.ZipFile(path, "a") as file:
        *start, _, rules = file.comment.split(b" ")
        file.comment = b" ".join([*start, rules])


def test_a_copied_video_is_not_decoded_again_and_a_changed_one_is(clips, tmp_path, monkeypatch):
    """`cp -r` changes the times of files. With another head or tail of the same size, it is another file."""
    clip, decoded = replace(clips[0], path=tmp_path / "clip.mp4"), []
    whole = clips[0].path.read_bytes()
    monkeypatch.setattr("engine.frames.ENDS", len(whole) // 3)
    monkeypatch.setattr("engine.frames.decode_frames", lambda *a: decoded.append(a) or decode_frames(*a))
    cache = FrameCache(tmp_path / "cache", 2, 16)

    def fill(content: bytes, time: int) -> int:
        """The number of videos that are decoded if this one has such a content and time of change."""
        clip.path.write_bytes(content)
        os.utime(clip.path, ns=(time, time))
        decoded.clear()
        assert cache.fill([clip]) == {}
        return len(decoded)

    assert [fill(whole, 1), fill(whole, 1), fill(whole, 2)] == [1, 0, 0]
    for place in (9, len(whole) - 1):  # in the head, and the last byte
        content = bytearray(whole)
        content[place] ^= 1
        assert [fill(bytes(content), 3), fill(whole, 4)] == [1, 1]
    assert fill(whole + b"1", 4) == 1  # another size at the same time
    assert fill(whole, 5) == 1
    old_stamp(cache.path(clip))
    assert [fill(whole, 5), fill(whole, 6)] == [0, 1]  # valid while the time is the same


def test_every_id_has_its_own_file(clips, tmp_path):
    ids = [
        "-dash_5_15",
        "a/b",
        "a%2Fb",
        "..",
        "26292851@N04_4253489686_265c3c8051.",
        "日本 clip",
        "q" * 300,
        "q" * 300 + "r",
        "x [0-10]",
    ]
    cache = FrameCache(tmp_path / "cache", 1, 8)
    named = [replace(clips[k], id=name) for k, name in enumerate(ids)]
    assert cache.fill(named) == {}
    assert len(list(cache.folder.iterdir())) == len(ids)
    assert all(
        np.array_equal(cache.frames(clip), FrameCache(tmp_path / "plain", 1, 8).frames(clips[k]))
        for k, clip in enumerate(named)
    )


def test_an_incomplete_or_damaged_cache_file_is_written_again(clips, tmp_path):
    cache = FrameCache(tmp_path, 5, 32)
    frames = cache.frames(clips[0])
    whole = cache.path(clips[0]).read_bytes()
    for part in (b"", whole[: len(whole) // 2], whole[:-1]):
        cache.path(clips[0]).write_bytes(part)
        assert np.array_equal(cache.frames(clips[0]), frames) and cache.path(clips[0]).read_bytes() == whole


def test_a_cache_file_with_changed_bytes_is_written_again(clips, tmp_path):
    """Any byte may change; frames are right, or decoded again. Without the video: one sentence."""
    cache, draw = FrameCache(tmp_path, 3, 16), random.Random(0)
    clip = replace(clips[0], path=tmp_path / "clip.mp4")
    shutil.copy2(clips[0].path, clip.path)
    frames, path = cache.frames(clip), cache.path(clip)
    whole = path.read_bytes()
    for place in [*range(5, len(whole), 199), *range(len(whole) - 240, len(whole), 11)]:
        content = bytearray(whole)
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        assert np.array_equal(cache.frames(clip), frames), place
    content = bytearray(whole)
    content[len(whole) // 3] ^= 255
    path.write_bytes(content)
    clip.path.unlink()
    assert "clip.mp4 not found" in message(cache.frames, clip)


def test_frames_of_different_shapes_become_the_squares_in_their_middles():
    wide = np.arange(4 * 10 * 3, dtype=np.uint8).reshape(4, 10, 3)
    tall = np.arange(7 * 4 * 3, dtype=np.uint8).reshape(7, 4, 3)
    assert np.array_equal(stack([wide, tall]), np.stack([wide[:, 3:7], tall[1:5]]))
    assert np.array_equal(stack([wide, wide]), np.stack([wide, wide]))


def test_fill_decodes_what_it_can_and_returns_the_failures(clips, tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    bad, gone = (Clip(name, tmp_path / f"{name}.mp4", ("a caption",), "train") for name in ("bad", "gone"))
    cache = FrameCache(tmp_path / "cache", 5, 32)
    failures = cache.fill([clips[0], bad, gone, clips[1]])
    assert list(failures) == ["bad", "gone"]
    assert "bad.mp4 holds no readable video" in failures["bad"] and "gone.mp4 not found" in failures["gone"]
    assert cache.path(clips[0]).exists() and cache.path(clips[1]).exists()


def test_a_full_disk_gives_one_sentence(clips, tmp_path, monkeypatch):
    def full(path, content, sync):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.frames.write_atomic", full)
    failures = FrameCache(tmp_path / "cache", 5, 32).fill([clips[0]])
    assert "could not be written (No space left on device)" in failures[clips[0].id]


def test_random_sampling_takes_a_frame_of_each_segment_and_uniform_sampling_its_middle(clips, tmp_path):
    """24 frames, 4 segments of 6: five choices a segment."""
    cache, plain = FrameCache(tmp_path, 4, 32, choices=5), FrameCache(tmp_path, 4, 32)
    assert np.array_equal(cache.frames(clips[0]), plain.frames(clips[0]))
    numbers = segment_midpoints(24, 20)
    kept = FrameCache(tmp_path, 20, 32).frames(clips[0])
    seen = set()
    for seed in range(40):
        drawn = cache.frames(clips[0], torch.Generator().manual_seed(seed))
        for segment, frame in enumerate(drawn):
            choices = [k for k in range(5 * segment, 5 * segment + 5) if np.array_equal(kept[k], frame)]
            assert choices, "the frame is from its own segment"
            assert all(6 * segment <= numbers[k] < 6 * segment + 6 for k in choices)
            seen.add((segment, choices[0]))
    assert len(seen) > 12


@given(st.integers(1, 400), st.integers(1, 16))
def test_the_middle_choice_of_a_segment_is_its_midpoint(count, num_frames):
    assert segment_midpoints(count, 5 * num_frames)[2::5] == segment_midpoints(count, num_frames)


def test_clips_shorter_than_the_frames_asked_for_can_be_sampled(clips, tmp_path):
    short = replace(clips[0], end=0.4)  # 4 frames
    cache = FrameCache(tmp_path, 12, 32, choices=5)
    assert cache.frames(short, torch.Generator().manual_seed(0)).shape == (12, 32, 32, 3)

"""Frames are exact: those of a full sequential decode. The cache never serves frames that are not."""

import hashlib
import re
import shutil
import subprocess
import zipfile
from dataclasses import replace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import message
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import engine.frames
from engine.datasets import Clip
from engine.frames import FrameCache, count_packets, decode_frames, duration, resize, segment_midpoints

# ---- decoding


def all_frames(path) -> list[str]:
    """The MD5 of every frame in order, by one sequential decode: the reference."""
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        f"file:{path}",
        "-map",
        "0:v:0",
        "-fps_mode",
        "passthrough",
    ]
    lines = subprocess.run(
        [*command, "-f", "framemd5", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True, text=True
    ).stdout
    return [line.split()[-1] for line in lines.splitlines() if not line.startswith("#")]


def md5(frame: np.ndarray) -> str:
    return hashlib.md5(frame.tobytes()).hexdigest()


def assert_exact(path, num_frames: int) -> None:
    """decode_frames gives the frames of a full sequential decode at the segments' midpoints."""
    whole = all_frames(path)
    assert [md5(frame) for frame in decode_frames(path, num_frames)] == [
        whole[n] for n in segment_midpoints(len(whole), num_frames)
    ], path.name


@given(st.integers(1, 5000), st.integers(1, 64))
def test_midpoints_are_the_middles_of_equal_segments(count, num_frames):
    numbers = segment_midpoints(count, num_frames)
    assert len(numbers) == num_frames and numbers == sorted(numbers)
    for k, n in enumerate(numbers):
        assert n <= (k + 0.5) * count / num_frames < n + 1 and 0 <= n < count


@pytest.mark.parametrize("num_frames", [1, 5, 12, 24, 40])
def test_frames_of_a_built_in_clip_are_exact(clips, num_frames):
    assert len(all_frames(clips[3].path)) == 24
    assert_exact(clips[3].path, num_frames)


def test_two_passes_give_the_same_frames_as_one(clips, monkeypatch):
    short = decode_frames(clips[3].path, 5)
    monkeypatch.setattr(engine.frames, "SHORT_FILE", 0)
    assert all(np.array_equal(a, b) for a, b in zip(short, decode_frames(clips[3].path, 5), strict=True))
    monkeypatch.setattr(engine.frames, "SHORT_FILE", 2**30)
    monkeypatch.setattr(engine.frames, "SHORT_PIPE", 10**5)  # the first pass stops early
    assert all(np.array_equal(a, b) for a, b in zip(short, decode_frames(clips[3].path, 5), strict=True))


def test_a_picture_is_a_clip_of_one_frame(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert all(np.array_equal(frame, pixels) for frame in decode_frames(tmp_path / "a.png", 3))


def test_real_clips_are_exact_to_the_frame(realdata):
    paths = sorted((realdata / "clips").iterdir())
    assert len(paths) == 26
    for path in paths:
        assert_exact(path, 12)


def test_broken_files_are_errors_and_odd_files_are_not(realdata):
    broken = {
        "audio_only.mp3": "holds no readable video",
        "corrupted.mp4": "damaged",
        "not_a_video.mp4": "holds no readable video",
        "truncated_faststart_half.mp4": "truncated",
        "zero_bytes.webm": "holds no readable video",
    }
    for path in sorted((realdata / "nasty").iterdir()):
        if path.name in broken:
            text = message(decode_frames, path, 12)
            assert broken[path.name] in text and path.name in text and text.count("\n") == 0
        else:
            assert_exact(path, 12)


def times(path) -> list[float]:
    """The time of each frame in seconds, by a full decode."""
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-nostdin",
        "-i",
        f"file:{path}",
        "-map",
        "0:v:0",
        "-vf",
        "showinfo",
        "-fps_mode",
        "passthrough",
    ]
    log = subprocess.run([*command, "-f", "null", "-"], capture_output=True, check=True, text=True).stderr
    return [float(time) for time in re.findall(r"pts_time:\s*([-0-9.]+)", log)]


def assert_window_exact(path, num_frames: int, start: float, end: float) -> None:
    whole = all_frames(path)
    inside = [frame for frame, time in zip(whole, times(path), strict=True) if start <= time < end]
    assert [md5(frame) for frame in decode_frames(path, num_frames, start, end)] == [
        inside[n] for n in segment_midpoints(len(inside), num_frames)
    ]


@pytest.mark.parametrize("start,end", [(0.0, 1.0), (1.0, 2.0), (0.5, 30.0), (2.05, 2.3)])
def test_frames_of_a_window_are_those_shown_in_it(clips, start, end):
    assert_window_exact(clips[3].path, 5, start, end)


def test_windows_of_real_clips_are_exact(realdata):
    for name in ("playing_guitar.mp4", "flipping_a_pancake.mkv", "mmaction_test.avi"):
        assert_window_exact(realdata / "clips" / name, 4, 1.0, 3.5)


def test_a_window_after_the_end_is_an_error(clips):
    assert "holds no frame from 60 s to 90 s" in message(decode_frames, clips[0].path, 4, 60.0, 90.0)


def test_a_clip_cut_short_is_an_error(clips, tmp_path):
    whole = clips[0].path.read_bytes()
    for name, content in {
        "empty.mp4": b"",
        "text.mp4": b"<html>404</html>",
        "cut.mp4": whole[: len(whole) // 2],
    }.items():
        (tmp_path / name).write_bytes(content)
        assert name in message(decode_frames, tmp_path / name, 4)
    assert "not found" in message(decode_frames, tmp_path / "gone.mp4", 4)


def test_packets_and_duration_of_a_built_in_clip(clips):
    """24 frames, 8 a second."""
    assert count_packets(clips[3].path) == 24 and duration(clips[3].path) == pytest.approx(3.0)


# ---- cache


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


def test_fill_decodes_what_it_can_and_returns_the_failures(clips, tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    bad, gone = (Clip(name, tmp_path / f"{name}.mp4", ("a caption",), "train") for name in ("bad", "gone"))
    cache = FrameCache(tmp_path / "cache", 5, 32)
    failures = cache.fill([clips[0], bad, gone, clips[1]])
    assert list(failures) == ["bad", "gone"]
    assert "bad.mp4 holds no readable video" in failures["bad"] and "gone.mp4 not found" in failures["gone"]
    assert cache.path(clips[0]).exists() and cache.path(clips[1]).exists()


def test_a_full_disk_gives_one_sentence_and_leaves_no_file(clips, tmp_path, monkeypatch):
    cache = FrameCache(tmp_path / "cache", 5, 32)

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.files.os.fsync", full)
    assert "could not be written (No space left on device)" in cache.fill([clips[0]])[clips[0].id]
    assert list(cache.folder.iterdir()) == []


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

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import ROOT, message
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
from data import (
    ClipDataset,
    DataError,
    FeatureCache,
    FrameCache,
    augment,
    center_crop,
    decode_frames,
    epoch_batches,
    normalise,
    resize,
    segment_midpoints,
)

# ------------------------------------------------------------------------------------------------------------------------ frames


def all_frames(path) -> list[str]:
    """The MD5 of every frame in turn, by one plain sequential ffmpeg call: the oracle."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", f"file:{path}", "-map", "0:v:0", "-fps_mode", "passthrough"]
    lines = subprocess.run([*command, "-f", "framemd5", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True, text=True).stdout
    return [line.split()[-1] for line in lines.splitlines() if not line.startswith("#")]


def md5(frame: np.ndarray) -> str:
    return hashlib.md5(frame.tobytes()).hexdigest()


def assert_exact(path, num_frames: int) -> None:
    """The frames of a file are those of a full sequential decode, at the segments' midpoints."""
    whole = all_frames(path)
    assert [md5(frame) for frame in decode_frames(path, num_frames)] == [whole[n] for n in segment_midpoints(len(whole), num_frames)], path.name


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


def test_long_files_take_the_same_frames_by_number(clips, monkeypatch):
    short = decode_frames(clips[3].path, 5)
    monkeypatch.setattr(data, "SHORT_FILE", 0)
    assert all(np.array_equal(a, b) for a, b in zip(short, decode_frames(clips[3].path, 5), strict=True))
    monkeypatch.setattr(data, "SHORT_FILE", 2**30)
    monkeypatch.setattr(data, "SHORT_PIPE", 10**5)  # the pipe ends early: counted and chosen by number after all
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
    """When each frame is shown, by a full decode."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-i", f"file:{path}", "-map", "0:v:0", "-vf", "showinfo", "-fps_mode", "passthrough"]
    log = subprocess.run([*command, "-f", "null", "-"], capture_output=True, check=True, text=True).stderr
    return [float(time) for time in re.findall(r"pts_time:\s*([-0-9.]+)", log)]


def assert_window_exact(path, num_frames: int, start: float, end: float) -> None:
    whole = all_frames(path)
    inside = [frame for frame, time in zip(whole, times(path), strict=True) if start <= time < end]
    assert [md5(frame) for frame in decode_frames(path, num_frames, start, end)] == [inside[n] for n in segment_midpoints(len(inside), num_frames)]


@pytest.mark.parametrize("start,end", [(0.0, 1.0), (1.0, 2.0), (0.5, 30.0), (2.05, 2.3)])
def test_frames_of_a_window_are_those_shown_in_it(clips, start, end):
    assert_window_exact(clips[3].path, 5, start, end)


def test_windows_of_real_clips_are_exact(realdata):
    for name in ("playing_guitar.mp4", "flipping_a_pancake.mkv", "mmaction_test.avi"):
        assert_window_exact(realdata / "clips" / name, 4, 1.0, 3.5)


def test_a_window_behind_the_end_is_an_error(clips):
    assert "holds no frame from 60 s to 90 s" in message(decode_frames, clips[0].path, 4, 60.0, 90.0)


def test_a_clip_cut_short_is_an_error(clips, tmp_path):
    whole = clips[0].path.read_bytes()
    for name, content in {"empty.mp4": b"", "text.mp4": b"<html>404</html>", "cut.mp4": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        assert name in message(decode_frames, tmp_path / name, 4)
    assert "not found" in message(decode_frames, tmp_path / "gone.mp4", 4)


# ----------------------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("height,width", [(96, 96), (48, 100), (101, 47), (33, 32)])
def test_preprocessing_equals_clips_own(height, width):
    _transform = data._import_clip().clip._transform

    frame = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    ours = normalise(center_crop(torch.from_numpy(resize(frame, 32).copy()).permute(2, 0, 1)[None], 32))[0]
    with warnings.catch_warnings(action="ignore"):
        theirs = _transform(32)(Image.fromarray(frame))
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_augmentation_is_one_crop_for_all_frames_of_a_clip():
    frame = torch.randint(0, 255, (1, 3, 40, 60), dtype=torch.uint8)
    out = augment(frame.expand(4, -1, -1, -1), 32, torch.Generator().manual_seed(0))
    assert out.shape == (4, 3, 32, 32) and out.dtype == torch.uint8 and (out == out[:1]).all()


def test_augmentation_keeps_half_of_the_picture_and_flips_half_of_the_time():
    ramp = torch.linspace(0, 255, 64).to(torch.uint8).expand(1, 3, 64, 64)
    outs = [augment(ramp, 32, torch.Generator().manual_seed(seed)) for seed in range(200)]
    spans = [abs(int(o[0, 0, 16, 31]) - int(o[0, 0, 16, 0])) / 255 for o in outs]
    assert min(spans) > 0.5 and max(spans) > 0.9  # widths of crops: area 0.5 to 1, ratio 3/4 to 4/3
    assert 70 < sum(bool(o[0, 0, 16, 0] > o[0, 0, 16, 31]) for o in outs) < 130


def test_augmentation_is_its_seed():
    frames = torch.randint(0, 255, (2, 3, 40, 60), dtype=torch.uint8)
    a, b, c = (augment(frames, 32, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_tokens_start_and_end_and_long_captions_are_cut():
    tokens = data.tokenize(["a red ring", "ring " * 200], 20)
    assert tokens.shape == (2, 20) and tokens[:, 0].tolist() == [49406] * 2
    assert tokens.argmax(1).tolist() == [4, 19] and tokens.max(1).values.tolist() == [49407] * 2


# ------------------------------------------------------------------------------------------------------------------------- cache


def test_cached_frames_are_the_decoded_ones_but_for_jpeg(clips, tmp_path):
    cache = FrameCache(tmp_path, 5, 64)
    expected = np.stack([resize(frame, 64) for frame in decode_frames(clips[0].path, 5)])
    first, second = cache.frames(clips[0]), cache.frames(clips[0])  # decoded, then from disk
    assert np.array_equal(first, second) and first.shape == expected.shape == (5, 64, 64, 3)
    assert np.abs(first.astype(int) - expected).mean() < 2  # of 255


def test_the_cache_holds_one_file_a_clip_that_any_zip_tool_opens(clips, tmp_path):
    cache = FrameCache(tmp_path, 5, 32)
    assert cache.fill(clips[:3]) == {}
    assert sorted(path.name for path in cache.folder.iterdir()) == [f"clip0000{k}.mp4.zip" for k in range(3)]
    with zipfile.ZipFile(cache.path(clips[0])) as file:
        assert file.namelist() == [f"{k:03d}.jpg" for k in range(5)] and file.testzip() is None


def test_cache_notices_a_changed_video_another_window_and_other_settings(clips, tmp_path):
    path = tmp_path / "clip.mp4"
    shutil.copy(clips[0].path, path)
    clip = data.Clip("clip", path, ("a caption",), "train")
    cache = FrameCache(tmp_path / "cache", 5, 32)
    before = cache.frames(clip)
    shutil.copy(clips[1].path, path)
    other = cache.frames(clip)
    assert not np.array_equal(other, before)
    assert not np.array_equal(cache.frames(replace(clip, end=1.0)), other)
    assert FrameCache(tmp_path / "cache", 6, 32).frames(clip).shape == (6, 32, 32, 3)
    assert FrameCache(tmp_path / "cache", 5, 48).frames(clip).shape == (5, 48, 48, 3)


def test_a_video_may_go_once_it_is_cached(clips, tmp_path):
    clip = replace(clips[0], path=tmp_path / "clip.mp4")
    shutil.copy(clips[0].path, clip.path)
    cache = FrameCache(tmp_path / "cache", 5, 32)
    frames = cache.frames(clip)
    clip.path.unlink()
    assert cache.fill([clip]) == {} and np.array_equal(cache.frames(clip), frames)


def test_any_id_is_a_file_of_its_own(clips, tmp_path):
    ids = ["-dash_5_15", "a/b", "a%2Fb", "..", "26292851@N04_4253489686_265c3c8051.", "日本 clip", "q" * 300, "q" * 300 + "r", "x [0-10]"]
    cache = FrameCache(tmp_path / "cache", 1, 8)
    named = [replace(clips[k], id=name) for k, name in enumerate(ids)]
    assert cache.fill(named) == {}
    assert len(list(cache.folder.iterdir())) == len(ids)
    assert all(np.array_equal(cache.frames(clip), FrameCache(tmp_path / "plain", 1, 8).frames(clips[k])) for k, clip in enumerate(named))


def test_a_half_written_or_damaged_cache_file_is_never_taken_for_whole(clips, tmp_path):
    cache = FrameCache(tmp_path, 5, 32)
    frames = cache.frames(clips[0])
    whole = cache.path(clips[0]).read_bytes()
    for part in (b"", whole[: len(whole) // 2], whole[:-1]):
        cache.path(clips[0]).write_bytes(part)
        assert np.array_equal(cache.frames(clips[0]), frames) and cache.path(clips[0]).read_bytes() == whole


def test_fill_keeps_what_it_can_and_says_what_failed(clips, tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    bad, gone = (data.Clip(name, tmp_path / f"{name}.mp4", ("a caption",), "train") for name in ("bad", "gone"))
    cache = FrameCache(tmp_path / "cache", 5, 32)
    failures = cache.fill([clips[0], bad, gone, clips[1]])
    assert list(failures) == ["bad", "gone"]
    assert "bad.mp4 holds no readable video" in failures["bad"] and "gone.mp4 not found" in failures["gone"]
    assert cache.path(clips[0]).exists() and cache.path(clips[1]).exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(clips, tmp_path, monkeypatch):
    cache = FrameCache(tmp_path / "cache", 5, 32)

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "cannot be written (No space left on device)" in cache.fill([clips[0]])[clips[0].id]
    assert list(cache.folder.iterdir()) == []


@pytest.mark.slow
def test_caching_killed_at_any_moment_and_resumed_is_byte_for_byte_the_same(clips_folder, tmp_path):
    flags = {"--annotations": clips_folder / "clips.csv", "--videos": clips_folder / "clips", "--num-frames": 3, "--size": 48}
    command = [sys.executable, ROOT / "data.py", "cache", "--dataset", "csv", *(str(x) for pair in flags.items() for x in pair)]

    def content(folder):
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    subprocess.run([*command, "--data", tmp_path / "whole"], check=True, capture_output=True)
    luck, kills = np.random.default_rng(0), []
    for _ in range(int(os.environ.get("TMASS_KILLS", 2))):  # TMASS_KILLS=10 pytest -s -k killed
        process = subprocess.Popen([*command, "--data", tmp_path / "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        there = len(content(tmp_path / "killed"))
        while process.poll() is None and len(content(tmp_path / "killed")) <= there:
            time.sleep(0.002)
        time.sleep(luck.uniform(0, 0.1))
        process.kill()
        process.wait()
        kills.append(len(content(tmp_path / "killed")))
    print("killed after so many of 24 clips:", kills)
    assert 0 < kills[0] < 24
    subprocess.run([*command, "--data", tmp_path / "killed"], check=True, capture_output=True)
    assert content(tmp_path / "killed") == content(tmp_path / "whole") and len(content(tmp_path / "whole")) == 24


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
            assert choices, "a frame of its own segment"
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


def test_features_are_kept_and_made_anew_when_the_video_changes(clips, tmp_path):
    clip = replace(clips[0], path=tmp_path / "clip.mp4")
    shutil.copy(clips[0].path, clip.path)
    cache = FrameCache(tmp_path / "cache", 3, 32)
    store, features = FeatureCache(cache, "abc"), torch.randn(3, 24)
    assert store.load(clip) is None
    cache.fill([clip])
    store.save(clip, features)
    assert torch.equal(store.load(clip), features) and FeatureCache(cache, "other weights").load(clip) is None
    clip.path.unlink()
    assert torch.equal(store.load(clip), features)  # neither video nor CLIP is needed any more
    shutil.copy(clips[1].path, clip.path)
    assert store.load(clip) is None
    store.path(clip).write_bytes(b"half a file")
    assert store.load(clip) is None


# ------------------------------------------------------------------------------------------------------------------------ loader


def test_an_epoch_shows_every_caption_once_and_no_clip_twice_in_a_batch(clips):
    batches = epoch_batches(clips, 8, seed=0, epoch=0)  # 24 clips: rounds of exactly 3 batches
    seen = Counter(item for batch in batches for item in batch)
    assert seen == Counter((c, k) for c, clip in enumerate(clips) for k in range(len(clip.captions)))
    assert all(len({clip for clip, _ in batch}) == len(batch) == 8 for batch in batches)


def test_batches_with_unequal_numbers_of_captions():
    clips = [data.Clip(str(k), Path(), ("c",) * (k + 1), "train") for k in range(5)]
    batches = epoch_batches(clips, 2, seed=0, epoch=0)
    assert all(len({clip for clip, _ in batch}) == len(batch) for batch in batches)
    assert {c for batch in epoch_batches(clips, 64, 0, 0) for c, _ in batch} == set(range(5))  # fewer clips than a batch


def test_order_is_the_seed_and_the_epoch(clips):
    a, b, c, d = (epoch_batches(clips, 8, seed, epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert a == b and a != c and a != d


@pytest.mark.parametrize("augmentation", [None, (0, 3)])
def test_batches_do_not_depend_on_the_number_of_workers(clips, tmp_path, augmentation):
    dataset = ClipDataset(clips, FrameCache(tmp_path, 3, 32), 20, augmentation)
    order = epoch_batches(clips, 8, 0, 3)[:4]
    for one, two in zip(data.batches(dataset, order, 0), data.batches(dataset, order, 2), strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
        assert one[0].shape == (8, 3, 3, 32, 32) and one[0].dtype == torch.uint8


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_the_one_sentence_that_it_is_elsewhere(clips, tmp_path, workers):
    gone = replace(clips[1], id="gone", path=tmp_path / "gone.mp4")
    loader = data.batches(ClipDataset([clips[0], gone], FrameCache(tmp_path, 3, 32), 20), [[0], [0, 1]], workers)
    assert next(loader)[0].shape[0] == 1
    with pytest.raises(DataError, match=r"^[^\n]*gone\.mp4 not found[^\n]*$"):
        next(loader)


def test_items_hold_the_frames_and_the_caption_asked_for(clips, tmp_path):
    cache = FrameCache(tmp_path, 3, 32)
    images, tokens = ClipDataset(clips, cache, 20)[4, 2]
    assert torch.equal(images, torch.from_numpy(cache.frames(clips[4])).permute(0, 3, 1, 2))
    assert torch.equal(tokens, data.tokenize([clips[4].captions[2]], 20)[0])
    assert not torch.equal(ClipDataset(clips, cache, 20, (0, 0))[4, 2][0], ClipDataset(clips, cache, 20, (0, 1))[4, 2][0])

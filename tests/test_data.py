import hashlib
import shutil
import subprocess
import warnings
from collections import Counter
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import message
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
from data import (
    ClipDataset,
    FrameCache,
    augment,
    center_crop,
    decode_frames,
    epoch_batches,
    normalise,
    read_clips,
    read_csv,
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


def test_a_clip_cut_short_is_an_error(clips, tmp_path):
    whole = clips[0].path.read_bytes()
    for name, content in {"empty.mp4": b"", "text.mp4": b"<html>404</html>", "cut.mp4": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        assert name in message(decode_frames, tmp_path / name, 4)
    assert "not found" in message(decode_frames, tmp_path / "gone.mp4", 4)


# ----------------------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("height,width", [(96, 96), (48, 100), (101, 47), (33, 32)])
def test_preprocessing_equals_clips_own(height, width):
    from clip.clip import _transform

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


def test_cached_frames_are_the_decoded_ones(clips, tmp_path):
    cache = FrameCache(tmp_path, 5, 32)
    expected = np.stack([resize(frame, 32) for frame in decode_frames(clips[0].path, 5)])
    for _ in range(2):  # decoded, then from disk
        assert np.array_equal(cache.frames(clips[0]), expected)


def test_cache_notices_a_changed_video_and_other_settings(clips, tmp_path):
    path = tmp_path / "clip.mp4"
    shutil.copy(clips[0].path, path)
    clip = data.Clip("clip", path, ("a caption",), "train")
    cache = FrameCache(tmp_path / "cache", 5, 32)
    before = cache.frames(clip)
    shutil.copy(clips[1].path, path)
    assert not np.array_equal(cache.frames(clip), before)
    assert FrameCache(tmp_path / "cache", 6, 32).frames(clip).shape == (6, 32, 32, 3)
    assert FrameCache(tmp_path / "cache", 5, 48).frames(clip).shape == (5, 48, 48, 3)


def test_a_half_written_cache_file_is_never_read(clips, tmp_path, monkeypatch):
    cache = FrameCache(tmp_path, 5, 32)

    def killed(file, frames):
        file.write(b"half a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(data.np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.frames(clips[0])
    monkeypatch.undo()
    assert not cache.path(clips[0]).exists() and cache.frames(clips[0]).shape == (5, 32, 32, 3)


def test_fill_keeps_what_it_can_and_names_what_failed(clips, tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    bad = data.Clip("bad", tmp_path / "bad.mp4", ("a caption",), "train")
    cache = FrameCache(tmp_path / "cache", 5, 32)
    assert "bad.mp4 holds no readable video" in message(cache.fill, [clips[0], bad, clips[1]])
    assert cache.path(clips[0]).exists() and cache.path(clips[1]).exists()


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


def test_items_hold_the_frames_and_the_caption_asked_for(clips, tmp_path):
    cache = FrameCache(tmp_path, 3, 32)
    images, tokens = ClipDataset(clips, cache, 20)[4, 2]
    assert torch.equal(images, torch.from_numpy(cache.frames(clips[4])).permute(0, 3, 1, 2))
    assert torch.equal(tokens, data.tokenize([clips[4].captions[2]], 20)[0])
    assert not torch.equal(ClipDataset(clips, cache, 20, (0, 0))[4, 2][0], ClipDataset(clips, cache, 20, (0, 1))[4, 2][0])


# ----------------------------------------------------------------------------------------------------------------------- readers


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_gathers_the_captions_of_a_video(clips_folder, tmp_path):
    rows = 'video,caption,split\nclip00001.mp4,"a, b",train\nclip00002.mp4,c,test\nclip00001.mp4,d,train\n'
    one, two = read_csv(write(tmp_path / "a.csv", "\ufeff" + rows.replace("\n", "\r\n")), clips_folder / "clips")
    assert (one.id, one.captions, one.split, two.split) == ("clip00001.mp4", ("a, b", "d"), "train", "test")
    assert one.path == clips_folder / "clips" / "clip00001.mp4"


def test_csv_names_may_lack_their_suffix(clips_folder, tmp_path):
    (clip,) = read_csv(write(tmp_path / "a.csv", "video,caption,split\nclip00001,c,train\n"), clips_folder / "clips")
    assert clip.path.name == "clip00001.mp4" and clip.id == "clip00001"


def test_csv_without_splits_is_cut_by_the_names_alone(clips_folder, tmp_path):
    names = [f"clip{k:05d}.mp4" for k in range(24)]
    forth, back = (
        {c.id: c.split for c in read_csv(write(tmp_path / "a.csv", "video,caption\n" + "".join(f"{n},c\n" for n in order)), clips_folder / "clips")}
        for order in (names, names[::-1])
    )
    assert forth == back and Counter(forth.values()) == {"train": 20, "val": 2, "test": 2}


@pytest.mark.parametrize(
    "rows,says",
    [
        ("clip,text\na,b\n", "needs the columns video,caption.*found: clip, text"),
        ("", "found: nothing"),
        ("video,caption,split\nclip00001.mp4,,train\n", "row 2: the caption is empty"),
        ("video,caption,split\nclip00001.mp4,a,train\nclip00001.mp4,b,test\n", "row 3: clip00001.mp4 is in two splits"),
        ("video,caption,split\nclip00001.mp4,a,dev\n", "must be train, val or test"),
        ("video,caption\nclip00001.mp4,a\nclip99999.mp4,b\n", "1 of 2 videos .* the first is clip99999.mp4"),
    ],
)
def test_csv_mistakes_are_named(clips_folder, tmp_path, rows, says):
    with pytest.raises(data.DataError, match=says):
        read_csv(write(tmp_path / "a.csv", rows), clips_folder / "clips")


def test_missing_files_and_foreign_encodings_are_named(clips_folder, tmp_path):
    assert "gone.csv not found" in message(read_csv, tmp_path / "gone.csv", clips_folder / "clips")
    assert "is not a folder" in message(read_csv, clips_folder / "clips.csv", tmp_path / "gone")
    (tmp_path / "latin.csv").write_bytes("video,caption\na,caf\xe9\n".encode("latin-1"))
    assert "UTF-8" in message(read_csv, tmp_path / "latin.csv", clips_folder / "clips")


@pytest.mark.parametrize("dataset,file", [("lsmdc", "LSMDC16_annos_training.csv"), ("msrvtt", "MSRVTT_data.json"), ("msvd", "captions_msvd.json")])
def test_data_sets_without_a_reader_say_what_is_missing(tmp_path, dataset, file):
    text = message(read_clips, dataset, tmp_path)
    assert file in text and "not written yet" in text and "--dataset csv" in text


def test_an_empty_split_and_an_unknown_data_set_are_named(clips, tmp_path):
    assert "no clip has split 'val'" in message(data.of_split, [c for c in clips if c.split != "val"], "val")
    assert "choose one of shapes, csv" in message(read_clips, "imagenet", tmp_path)
    assert "--annotations FILE" in message(read_clips, "csv", tmp_path)


def test_real_captions_file_is_read_whole(realdata):
    clips = read_csv(realdata / "captions.csv", realdata / "clips")
    assert len(clips) == 26 and {clip.split for clip in clips} == {"train", "val", "test"}

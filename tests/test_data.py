"""Preprocessing equals CLIP's own, batches follow from the seed, and the commands report and resume."""

import hashlib
import os
import pickle
import re
import shutil
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image

import data
from data import ClipDataset, augment, center_crop, epoch_batches, normalise
from engine.backbone import import_clip, tokenize
from engine.datasets import Clip
from engine.files import DataError
from engine.frames import FrameCache, resize

# ---- preprocessing


@pytest.mark.parametrize("height,width", [(96, 96), (48, 100), (101, 47), (33, 32)])
def test_preprocessing_equals_clips_own(height, width):
    _transform = import_clip().clip._transform

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


def test_augmentation_depends_on_the_generator_alone():
    frames = torch.randint(0, 255, (2, 3, 40, 60), dtype=torch.uint8)
    a, b, c = (augment(frames, 32, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---- loader


def test_an_epoch_shows_no_caption_twice_and_no_clip_twice_in_a_batch(clips):
    batches = epoch_batches(clips, 8, seed=0, epoch=0)  # 24 clips: rounds of 3 batches, all captions
    seen = Counter(item for batch in batches for item in batch)
    assert seen == Counter((c, k) for c, clip in enumerate(clips) for k in range(len(clip.captions)))
    assert all(len({clip for clip, _ in batch}) == len(batch) == 8 for batch in batches)


def of_counts(counts) -> list[Clip]:
    """Clips with these numbers of captions."""
    return [Clip(str(k), Path(), ("c",) * count, "train") for k, count in enumerate(counts)]


def test_a_batch_that_is_larger_than_the_data_holds_every_clip():
    one, two = epoch_batches(of_counts([2] * 5), 64, 0, 0)
    assert {c for c, _ in one} == {c for c, _ in two} == {*range(5)}


@pytest.mark.parametrize(
    "arguments,digest",
    [
        ((24, 5, 8, 0, 0), "3b18e56a05a62de1"),
        ((10, 3, 4, 1, 7), "86d16f11d8745fe7"),
        ((5, 2, 64, 0, 1), "45415a16e26952f8"),
    ],
)
def test_batches_of_equal_numbers_of_captions_are_those_of_older_runs(arguments, digest):
    """Such a run resumes where it stopped, whichever version wrote it."""
    clips, captions, batch_size, seed, epoch = arguments
    batches = epoch_batches(of_counts([captions] * clips), batch_size, seed, epoch)
    assert hashlib.sha256(repr(batches).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    "counts,batch_size,size,number",
    [
        ([60] + [1] * 9, 8, 8, 1),  # not 59 batches of one pair
        ([1, 60], 8, 2, 1),
        ([1] * 970 + [2] * 25 + [3] * 5, 32, 32, 32),
        ([5] * 29 + [1], 32, 29, 5),  # batches of 30: one
        ([100] * 20 + [1] * 20, 32, 20, 101),  # batches of 32: one
        ([3, 4, 5, 6, 7] * 6, 32, 28, 4),
        ([1, 2, 3, 4, 5], 1, 1, 15),
    ],
)
def test_batches_of_unequal_numbers_of_captions_have_one_size(counts, batch_size, size, number):
    for epoch in range(2):  # the number of steps is that of the first epoch
        batches = epoch_batches(of_counts(counts), batch_size, 0, epoch)
        assert (len(batches), {len(batch) for batch in batches}) == (number, {size})
        assert all(len({clip for clip, _ in batch}) == size for batch in batches)


def test_batches_of_unequal_numbers_of_captions_are_as_many_as_possible():
    rng = np.random.default_rng(0)
    for epoch in range(60):
        counts = rng.integers(1, rng.integers(3, 9), rng.integers(2, 30))
        batch_size = int(rng.integers(1, 33))
        if len({*counts}) == 1:
            continue
        batches = epoch_batches(of_counts(counts), batch_size, 0, epoch)
        pairs = [pair for batch in batches for pair in batch]
        size, number = len(batches[0]), len(batches)
        assert len({*pairs}) == len(pairs) and all(caption < counts[clip] for clip, caption in pairs)
        assert all(len({clip for clip, _ in batch}) == len(batch) == size for batch in batches)
        assert np.minimum(counts, number + 1).sum() < (number + 1) * size
        assert size <= batch_size and 2 * size >= min(batch_size, len(counts))


def test_every_caption_is_used_in_some_epoch_and_clips_meet_by_chance():
    counts = [9] * 3 + [4] * 30 + [1] * 7
    used, met = set(), Counter()
    for epoch in range(60):
        for batch in epoch_batches(of_counts(counts), 8, 0, epoch):
            used |= {*batch}
            met.update(other for other, _ in batch if any(clip == 20 for clip, _ in batch))
    assert len(used) == sum(counts)
    fours = [met[clip] for clip in range(3, 33) if clip != 20]
    assert min(fours) > 0.5 * np.mean(fours) and max(fours) < 1.6 * np.mean(fours)


def test_order_depends_on_the_seed_and_the_epoch(clips):
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
def test_an_error_in_a_worker_is_one_sentence(clips, tmp_path, workers):
    gone = replace(clips[1], id="gone", path=tmp_path / "gone.mp4")
    loader = data.batches(
        ClipDataset([clips[0], gone], FrameCache(tmp_path, 3, 32), 20), [[0], [0, 1]], workers
    )
    assert next(loader)[0].shape[0] == 1
    with pytest.raises(DataError, match=r"^[^\n]*gone\.mp4 not found[^\n]*$"):
        next(loader)


def test_items_hold_the_frames_and_the_caption_of_their_index(clips, tmp_path):
    cache = FrameCache(tmp_path, 3, 32)
    images, tokens = ClipDataset(clips, cache, 20)[4, 2]
    assert torch.equal(images, torch.from_numpy(cache.frames(clips[4])).permute(0, 3, 1, 2))
    assert torch.equal(tokens, tokenize([clips[4].captions[2]], 20)[0])
    assert not torch.equal(
        ClipDataset(clips, cache, 20, (0, 0))[4, 2][0], ClipDataset(clips, cache, 20, (0, 1))[4, 2][0]
    )


# ---- commands


@pytest.mark.slow
def test_caching_that_is_killed_and_continued_gives_the_same_bytes(clips_folder, tmp_path):
    flags = {"annotations": clips_folder / "clips.csv", "videos": clips_folder / "clips", "size": 48}
    command = ["cache", "--dataset=csv", "--num-frames=3"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def count() -> int:
        return len(list(killed.rglob("*.zip")))

    assert run(*command, f"--data={whole}") == 0
    random, kills = np.random.default_rng(0), []
    for _ in range(int(os.environ.get("TMASS_KILLS", 2))):  # TMASS_KILLS=10 pytest -s -k killed
        there = count()
        process = processes.start(data.main, [*command, f"--data={killed}"])
        while process.is_alive() and count() <= there:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.join()
        kills.append(count())
    print("killed after so many of 24 clips:", kills)
    assert 0 < kills[0] < 24
    assert run(*command, f"--data={killed}") == 0
    assert content(killed) == content(whole) and len(content(whole)) == 24


@pytest.fixture
def own(clips_folder, tmp_path):
    """A data set of our own with one video missing and one broken, and its flags."""
    shutil.copytree(clips_folder / "clips", tmp_path / "videos")
    (tmp_path / "videos" / "clip00003.mp4").unlink()
    (tmp_path / "videos" / "clip00004.mp4").write_text("no video")
    flags = {"annotations": clips_folder / "clips.csv", "videos": tmp_path / "videos"}
    return [
        "--dataset=csv",
        f"--data={tmp_path / 'data'}",
        *(f"--{name}={path}" for name, path in flags.items()),
    ]


def run(*arguments: str) -> int | str:
    with pytest.raises(SystemExit) as ended:
        data.main(arguments)
    return ended.value.code


def test_check_counts_each_split_and_names_the_first_problem(own, capsys):
    assert run("check", *own) == 0
    out = capsys.readouterr().out
    assert "csv: 23 of 24 videos found, 120 captions" in out
    assert re.search(r"^train +16 +1 +1 +80 .*\nval +4 +0 +0 +20 .*\ntest +4 +0 +0 +20 ", out, re.M)
    assert "clip00003.mp4 not found" in out and "training can start: it skips" in out
    assert run("check", *own, "--no-read") == 0
    assert re.search(r"^train +16 +1 +0 ", capsys.readouterr().out, re.M)


def test_check_says_that_training_cannot_start_without_a_readable_clip(own, tmp_path, capsys):
    for number in range(16, 20):
        (tmp_path / "videos" / f"clip{number:05d}.mp4").unlink()
    assert run("check", *own) == 1
    assert "training cannot start: no clip of split val can be read" in capsys.readouterr().out


def test_check_lists_the_annotation_files_that_a_data_set_needs(tmp_path, capsys):
    folder = tmp_path / "msvd"
    folder.mkdir()
    (folder / "raw-captions.pkl").write_bytes(pickle.dumps({name: [["one", "word"]] for name in "abc"}))
    for split, name in zip(("train", "val", "test"), "abc"):
        (folder / f"{split}_list.txt").write_text(name)
    assert run("check", "--dataset", "msvd", "--data", str(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "captions_msvd.json or raw-captions.pkl: " in out and "raw-captions.pkl\n" in out
    assert "error: unknown data set 'imagenet'" in str(run("check", "--dataset", "imagenet"))


def test_cache_reports_failures_by_its_exit_code(own, capsys):
    assert run("cache", *own, "--num-frames", "2", "--size", "32") == 1
    out = capsys.readouterr().out
    assert "22 of 24 clips are in" in out and out.count("failed: ") == 2


@pytest.mark.slow
def test_cache_features_runs_in_its_own_process_and_returns_its_exit_code(
    own, weights, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)  # relative paths start here; a folder "engine" that is here is not imported
    (tmp_path / "engine").mkdir()
    flags = ["--data=data", "--arch=tiny", f"--weights={weights}", "--num-frames=2", "--device=cpu"]
    assert run("cache", *own, "--features", *flags) == 1  # two clips cannot be read
    assert "22 of 24 clips are in data/cache/csv-" in capfd.readouterr().out
    files = list((tmp_path / "data").rglob("2frames-32px-jpeg95/features-*/*.npz"))
    assert len(files) == 22 and np.load(files[0])["features"].shape == (2, 24)

"""Building and updating a library: every clip of a folder is encoded once (search.py index)."""

import collections
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from tqdm.auto import tqdm

from engine import ffmpeg
from engine.checkpoint import latest_run
from engine.datasets import Clip
from engine.distributed import choose_device
from engine.files import DataError, printable
from engine.folder import Folder, scan
from engine.frames import in_parallel
from engine.library import Library, overall, stamp
from engine.parts import Part, part_of
from engine.scenes import spans
from engine.searcher import Source, calibrate, check_identity, check_limits, encode, read_clip
from model import TMASS


def _attempt(work: Callable, *arguments):
    """work(*arguments); a DataError is returned instead of raised."""
    try:
        return work(*arguments)
    except DataError as error:
        return error


def _read(groups: list[list[str]], files: dict[str, Path], cut: str, sizes: tuple[int, int], batch: int):
    """Cuts files into clips and decodes these. Yields (group, number of its clips, None), then for some clips
    of it (group, None, [(file, Clip, images and filmstrip, or a DataError)]), then (group, None, None).

    A file that cannot be cut is one entry with its DataError, and counts as one clip."""
    for group in groups:
        split = in_parallel(lambda file: _attempt(spans, files[file], cut), group, "splitting")
        clips: list[tuple[str, Clip]] = []
        for file, parts in zip(group, split):
            parts = [(0.0, None)] if (broken := isinstance(parts, DataError)) else parts
            own = [
                Clip(f"{Library.key(file)}-{n}", files[file], (), "", *part) for n, part in enumerate(parts)
            ]
            clips += [(file, None if broken else clip) for clip in own]
        errors = dict(zip(group, split))
        yield group, len(clips), None

        def decode(pair: tuple[str, Clip | None], errors: dict = errors):
            return errors[pair[0]] if pair[1] is None else _attempt(read_clip, pair[1], *sizes)

        for part in (clips[n : n + batch] for n in range(0, len(clips), batch)):
            read = in_parallel(decode, part, "decoding")
            yield group, None, [(*pair, result) for pair, result in zip(part, read)]
        yield group, None, None


def _ahead(items: Iterator, seconds: dict[str, float]) -> Iterator:
    """The items; while one is used, a thread computes the next three, of which one at least holds clips.
    Their times are added to `seconds`."""

    def following():
        started = time.perf_counter()
        item = next(items, None)
        seconds["decode"] += time.perf_counter() - started
        return item

    with ThreadPoolExecutor(1) as pool:
        futures = collections.deque(pool.submit(following) for _ in range(3))
        try:
            while (item := futures.popleft().result()) is not None:
                futures.append(pool.submit(following))
                yield item
        except BaseException:  # also if the items are used no longer
            with ffmpeg.stopped():
                pool.shutdown(cancel_futures=True)
            raise


def _add(db: Library, model: TMASS, read: list, rows: dict[str, dict], seconds: dict[str, float]) -> None:
    """Encodes and stores decoded clips. Their files' rows get the number of clips and the first error."""
    good = []
    for file, clip, result in read:
        if isinstance(result, DataError):
            _failed(rows[file], db.path(file), result)
        else:
            rows[file]["clips"] += 1
            good.append((clip, *result))
    if good:
        started = time.perf_counter()
        features = encode(model, torch.stack([images for _, images, _ in good])).cpu()
        vectors = overall(model, features.to(model.logit_scale.device))
        encoded = time.perf_counter()
        ids = [(clip.id, clip.start, clip.end) for clip, _, _ in good]
        db.add(ids, vectors, features, [strip for _, _, strip in good])
        seconds["encode"] += encoded - started
        seconds["write"] += time.perf_counter() - encoded


def _failed(row: dict, path: Path, error: DataError) -> None:
    """Notes the first error of a file in its row. A file that is gone meanwhile counts as unfinished."""
    row["error"] = row["error"] or str(error)
    if not path.is_file():
        row["stamp"] = ""


@dataclass(frozen=True)
class IndexConfig:
    """Which folder to index, with which model, and how files are split into clips."""

    folder: tyro.conf.Positional[Path]  # videos, at any depth
    library: str = "library.db"  # a folder that ends in .db, or a Milvus server, http://host:19530
    checkpoint: Path | None = None  # a run or checkpoint; default: the library's own, else the latest run
    arch: str | None = None  # instead: ViT-B/32 or another CLIP, zero-shot, with mean-pooled frames
    weights: Path | None = None  # with --arch: a file of CLIP weights
    num_frames: int = 12  # with --arch: frames per clip
    window: float | None = None  # seconds per clip, about; 0: whole files; default: as the library was split
    scenes: bool = False  # split files into scenes (scenedetect)
    moved: bool = False  # the library's folder was moved to this place
    retry: bool = False  # read broken files again, even if they have not changed
    max_pixels: int = ffmpeg.MAX_PIXELS  # of a frame; a video with larger frames is refused
    time_limit: float = ffmpeg.TIME_LIMIT  # seconds to read a file, plus 300 a MiB of it; longer: refused
    hidden: bool = False  # also take hidden, trash and thumbnail folders and hidden files
    batch: int = 16  # clips encoded at once
    device: str = "auto"  # auto, cpu, cuda
    part: str | None = None  # 3/16: only the third of 16 parts; default: as Slurm or torchrun say, else all
    features: Path | None = None  # with a server: the folder of the features, which every process sees


def index(config: IndexConfig) -> int:
    """Creates or updates the library of a folder: encodes new and changed files, drops removed ones.

    Broken files are listed. If index was stopped, run it again to continue. Files that cannot be reached now,
    in a folder without the right to read it or on a disk that is away, are kept and warned of.
    Exit code 1: there is no clip, or something cannot be reached."""
    folder = config.folder
    check_limits(config)
    part = part_of(config.part)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: name the folder of your videos.")
    if (config.scenes and config.window is not None) or not 0 <= (config.window or 0) < float("inf"):
        raise DataError("--window takes seconds, 0 or more, and not beside --scenes.")
    ffmpeg.check_ffmpeg()
    ffmpeg.set_limits(config.max_pixels, config.time_limit)
    found = scan(folder, config.hidden)
    if not found.videos and "://" not in config.library and not os.path.exists(config.library):
        raise DataError(found.nothing())
    db, place = Library(config.library, True, config.features), str(folder.resolve())
    if not found.videos and not db.about:
        raise DataError(found.nothing())
    if (old := db.about.get("folder", place)) != place and not config.moved:
        advice = f"name another --library, or add --moved if that folder is now {folder}."
        raise DataError(f"{db.where} is the library of {old}: {advice}")
    source = _source(config, db)
    model, trained = source.open(choose_device(config.device))
    about = {"folder": place, "source": asdict(source), "model": check_identity(db, model, source.name)}
    print(f"model: {source.name}", file=sys.stderr)
    cut = "scenes" if config.scenes else db.about.get("cut", "whole")
    if config.window is not None:
        cut = f"window {config.window:g}" if config.window else "whole"
    sizes = {"dim": model.clip.text_projection.shape[1], "frames": model.arguments["num_frames"]}
    db.describe({**db.about, **about, "cut": cut, **sizes})
    with contextlib.closing(db):  # a shard that is open is not sent or merged by others
        code = _update(db, model, found, config, part)
        if part.count == 1:
            calibrate(db, model, trained)
    return code


def _update(db: Library, model: TMASS, found: Folder, config: IndexConfig, part: Part) -> int:
    """Makes this part of the library equal to what was found; prints what changed. Returns the exit code."""
    started, batch, seconds = time.time(), config.batch, dict.fromkeys(("decode", "encode", "write"), 0.0)
    known = {file: row for file, row in db.files().items() if part.has(file)}
    cut, videos = db.about["cut"], part.of(found.videos)
    stamps = {file: stamp(found.videos[file], cut) for file in videos}
    same = {file for file, row in known.items() if row["stamp"] == stamps.get(file)}
    same -= {file for file in same if config.retry and known[file]["error"]}
    todo = [file for file in stamps if file not in same]
    away = {file: found.away(file, row.get("mount")) for file, row in known.items() if file not in stamps}
    gone = [file for file, where in away.items() if where is None]
    kept = collections.Counter(where for where in away.values() if where is not None)
    for note in found.notes():
        print(printable(note))
    for warning in found.warnings(kept):
        print(printable(f"warning: {warning}"), file=sys.stderr)
    db.drop(gone)
    groups = [todo[n : n + batch] for n in range(0, len(todo), batch)]
    paths = {file: config.folder / file for file in todo}
    read = _read(groups, paths, cut, (model.arguments["num_frames"], model.resolution), batch)
    bar = tqdm(total=len(todo), desc="clips", unit=" clips", disable=not todo)
    with bar, contextlib.closing(_ahead(read, seconds)) as steps:
        for group, count, clips in steps:
            if count is not None:
                db.begin(group, known)
                rows = {file: {"stamp": stamps[file], "clips": 0, "error": None} for file in group}
                rows = {file: {**row, "mount": found.mounts[file]} for file, row in rows.items()}
                bar.total += count - len(group)
            elif clips is not None:
                _add(db, model, clips, rows, seconds)
                bar.update(len(clips))
            else:
                db.finish(rows)
    if part.count == 1:
        db.merge()
    total, files, count = time.time() - started, db.files(), len(db)
    clips, new = sum(files[file]["clips"] for file in todo), sum(file not in known for file in todo)
    broken = [row["error"] for file, row in files.items() if row["error"] and part.has(file)]
    changes = f"{new} new, {len(todo) - new} read again, {len(gone)} removed, {len(same)} unchanged"
    changes += f", {len(broken)} broken" + (f", {kept.total()} kept" if kept else "")
    stages = ", ".join(f"{stage} {time:.1f} s" for stage, time in seconds.items())
    rate = f" ({clips / total:.1f} clips/s; {stages})" if clips else ""
    rate = f", {clips} clips encoded in {total:.1f} s{rate}" if clips else ""
    own = f"part {part}: " if part.count > 1 else ""
    print(f"{db.where}: {count} clips of {len(files)} files; {own}{changes}{rate}")
    for error in broken:
        print(printable(f"broken: {error}"))
    empty = not count and (part.count == 1 or stamps)
    return 1 if kept or found.unreadable or empty else 0


def _source(config: IndexConfig, db: Library) -> Source:
    """The model to index with: the one that is named, else the library's own, else the latest run."""
    if config.checkpoint or config.arch:
        checkpoint, weights = (path and str(path.resolve()) for path in (config.checkpoint, config.weights))
        return Source(checkpoint, config.arch, weights, config.num_frames)
    return Source(**db.about["source"]) if db.about else Source(str(latest_run().resolve()))

"""Building and updating a library: every clip of a folder is encoded once (search.py index)."""

import collections
import os
import sys
import time
from collections.abc import Callable
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
from engine.scenes import spans
from engine.searcher import Source, check_identity, check_limits, encode, read_clip
from model import TMASS


def _attempt(work: Callable, *arguments):
    """work(*arguments); a DataError is returned instead of raised."""
    try:
        return work(*arguments)
    except DataError as error:
        return error


def _add(db: Library, model: TMASS, files: dict[str, Path], rows: dict, batch: int, bar: tqdm) -> None:
    """Reads, encodes and stores the clips of files. Each file's row gets their number and the first error."""
    clips: list[tuple[str, Clip]] = []
    split = in_parallel(lambda file: _attempt(spans, files[file], db.about["cut"]), [*files], "splitting")
    for file, parts in zip(files, split):
        if isinstance(parts, DataError):
            _failed(rows[file], files[file], parts)
            parts = []
        bar.total += len(parts) - 1
        own = [Clip(f"{db.key(file)}-{n}", files[file], (), "", *part) for n, part in enumerate(parts)]
        clips += [(file, clip) for clip in own]
    sizes = model.arguments["num_frames"], model.resolution
    for part in (clips[n : n + batch] for n in range(0, len(clips), batch)):
        read, good = in_parallel(lambda pair: _attempt(read_clip, pair[1], *sizes), part, "decoding"), []
        for (file, clip), result in zip(part, read):
            if isinstance(result, DataError):
                _failed(rows[file], files[file], result)
            else:
                rows[file]["clips"] += 1
                good.append((clip, *result))
        if good:
            features = encode(model, torch.stack([images for _, images, _ in good]))
            ids = [(clip.id, clip.start, clip.end) for clip, _, _ in good]
            db.add(ids, overall(model, features), features, [strip for _, _, strip in good])
        bar.update(len(part))


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


def index(config: IndexConfig) -> int:
    """Creates or updates the library of a folder: encodes new and changed files, drops removed ones.

    Broken files are listed. If index was stopped, run it again to continue. Files that cannot be reached now,
    in a folder without the right to read it or on a disk that is away, are kept and warned of.
    Exit code 1: there is no clip, or something cannot be reached."""
    folder = config.folder
    check_limits(config)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: name the folder of your videos.")
    if (config.scenes and config.window is not None) or not 0 <= (config.window or 0) < float("inf"):
        raise DataError("--window takes seconds, 0 or more, and not beside --scenes.")
    ffmpeg.check_ffmpeg()
    ffmpeg.set_limits(config.max_pixels, config.time_limit)
    found = scan(folder, config.hidden)
    if not found.videos and "://" not in config.library and not os.path.exists(config.library):
        raise DataError(found.nothing())
    db, place = Library(config.library, create=True), str(folder.resolve())
    if not found.videos and not db.about:
        raise DataError(found.nothing())
    if (old := db.about.get("folder", place)) != place and not config.moved:
        advice = f"name another --library, or add --moved if that folder is now {folder}."
        raise DataError(f"{db.where} is the library of {old}: {advice}")
    source = _source(config, db)
    model, _ = source.open(choose_device(config.device))
    about = {"folder": place, "source": asdict(source), "model": check_identity(db, model, source.name)}
    print(f"model: {source.name}", file=sys.stderr)
    cut = "scenes" if config.scenes else db.about.get("cut", "whole")
    if config.window is not None:
        cut = f"window {config.window:g}" if config.window else "whole"
    db.describe({**about, "cut": cut, "dim": model.clip.text_projection.shape[1]})
    return _update(db, model, found, config)


def _update(db: Library, model: TMASS, found: Folder, config: IndexConfig) -> int:
    """Makes the library equal to what was found, and prints what changed. Returns the exit code."""
    known, started, batch = db.files(), time.time(), config.batch
    stamps = {file: stamp(status, db.about["cut"]) for file, status in found.videos.items()}
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
    with tqdm(total=len(todo), desc="clips", unit=" clips", disable=not todo) as bar:
        for group in (todo[n : n + batch] for n in range(0, len(todo), batch)):
            db.begin(group, known)
            rows = {file: {"stamp": stamps[file], "clips": 0, "error": None} for file in group}
            rows = {file: {**row, "mount": found.mounts[file]} for file, row in rows.items()}
            _add(db, model, {file: config.folder / file for file in group}, rows, batch, bar)
            db.finish(rows)
    seconds, files, count = time.time() - started, db.files(), len(db)
    clips, new = sum(files[file]["clips"] for file in todo), sum(file not in known for file in todo)
    broken = [row["error"] for row in files.values() if row["error"]]
    changes = f"{new} new, {len(todo) - new} read again, {len(gone)} removed, {len(same)} unchanged"
    changes += f", {len(broken)} broken" + (f", {kept.total()} kept" if kept else "")
    rate = f", {clips} clips encoded in {seconds:.1f} s ({clips / seconds:.1f} clips/s)" if clips else ""
    print(f"{db.where}: {count} clips of {len(files)} files; {changes}{rate}")
    for error in broken:
        print(printable(f"broken: {error}"))
    return 1 if kept or found.unreadable or not count else 0


def _source(config: IndexConfig, db: Library) -> Source:
    """The model to index with: the one that is named, else the library's own, else the latest run."""
    if config.checkpoint or config.arch:
        checkpoint, weights = (path and str(path.resolve()) for path in (config.checkpoint, config.weights))
        return Source(checkpoint, config.arch, weights, config.num_frames)
    return Source(**db.about["source"]) if db.about else Source(str(latest_run().resolve()))

"""Search your own videos with T-MASS ("Inference Pipeline"): clips for a text, or captions for a clip.

    python search.py index FOLDER                                    # encode every clip once, into library.db
    python search.py query "a red ring grows in the desert" --html found.html
    python search.py query --video clip.mp4 --captions captions.txt  # which captions fit a clip
    python search.py check                                           # what the shortlist misses
    python search.py serve                                           # a page on http://127.0.0.1:8000

A library is a local folder, or a Milvus server: --library http://host:19530. A query first finds a shortlist
by vector search, the text t against one vector per clip. The exact score then ranks the shortlist: the best
of M texts drawn for each text-video pair. A small library is scored in full. Needs requirements-search.txt.
"""

import contextlib
import functools
import io
import json
import os
import random
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm.auto import tqdm

from engine import server
from engine.datasets import Clip
from engine.files import DataError, printable
from engine.indexing import IndexConfig, index
from engine.library import span
from engine.searcher import SearchConfig, Searcher, check_limits, encode, read_captions, read_clip

__all__ = ["IndexConfig", "SearchConfig", "Searcher", "index", "main"]

# ------------------------------------------------------------------------------------------------------ query


@dataclass(frozen=True)
class QueryConfig(SearchConfig):
    """What to search for, and how to show what was found."""

    text: tyro.conf.Positional[str] = ""  # what to look for
    k: Annotated[int, tyro.conf.arg(aliases=("-k",))] = 5  # how many to show
    json: bool = False  # print JSON
    html: Path | None = None  # also write one page; it links to the videos and holds everything else
    video: str | None = None  # rank captions for a file of the library (name below its folder), or any video


def query(config: QueryConfig) -> int:
    """Finds the clips that fit a text, or with --video the captions that fit a clip."""
    check_limits(config)
    if not config.text.strip() and config.video is None:
        raise DataError('the query is empty: give a text, as in query "a dog runs", or a clip with --video.')
    searcher = Searcher(config)
    if config.video is not None:
        return _query_video(searcher, config)
    for note in [searcher.name] * searcher.zero_shot + searcher.notes(config.text):
        print(f"note: {note}", file=sys.stderr)
    hits = searcher.search(config.text, config.k)
    if config.html is not None:
        server.write_page(config.html, searcher, config.text, hits)
        print(f"written: {config.html}", file=sys.stderr)
    if config.json:
        print(json.dumps([asdict(hit) for hit in hits], indent=2))
        return 0
    print("rank  score  radius  file")
    for hit in hits:
        radius, part = "-" if hit.radius is None else f"{hit.radius:.3f}", span(hit.start, hit.end)
        print(printable(f"{hit.rank:>4}  {hit.score:.3f}  {radius:>6}  {hit.file}  {part}"))
    return 0


def _query_video(searcher: Searcher, config: QueryConfig) -> int:
    video, captions = config.video, read_captions(config.captions, searcher.trained)
    names = [video, *(unicodedata.normalize(form, video) for form in ("NFC", "NFD"))]  # macOS writes NFD
    known = (searcher.library.clips_of(name) for name in names)
    rows, frames = next(((rows, frames) for rows, frames in known if rows), ([], None))
    if not rows:
        if not os.path.isfile(video):
            raise DataError(f"{video} is neither a file of {config.library} nor another file: name a video.")
        clip = Clip(video, Path(video), (), "")
        images, _ = read_clip(clip, searcher.model.arguments["num_frames"], searcher.model.resolution)
        rows, frames = [{"start": 0.0, "end": None}], encode(searcher.model, images[None])
    best = [searcher.rank(captions, clip)[: config.k] for clip in frames.split(1)]
    parts = [{"file": video, "start": row["start"], "end": row["end"]} for row in rows]
    if config.json:
        print(json.dumps([{**part, "captions": own} for part, own in zip(parts, best)], indent=2))
        return 0
    for part, own in zip(parts, best):
        print(printable(f"{video}  {span(part['start'], part['end'])}"))
        for n, one in enumerate(own, start=1):
            print(printable(f"{n:>4}  {one['score']:.3f}  {one['caption']}"))
    return 0


# ------------------------------------------------------------------------------------------------------ check


@dataclass(frozen=True)
class CheckConfig(SearchConfig):
    """How to measure the shortlist."""

    queries: int = 100  # captions to search for, drawn with --seed
    floor: float = 0.95  # smallest recall@10 that passes


def recall(searcher: Searcher, captions: Sequence[str], sizes: list[int], k: int = 10) -> dict[int, float]:
    """For each size of the shortlist: the fraction of the library's k best clips that it holds, mean over
    captions. Raises DataError for an empty library."""
    text, ids, parts = searcher.text(captions), [], []
    for rows, frames in tqdm(searcher.library.batches(), "scoring everything", unit=" batches", leave=False):
        ids += [row["id"] for row in rows]
        parts.append(searcher.score(text, frames).cpu())
    if not ids:
        raise DataError(f"{searcher.library.where} holds no clip: index a folder of videos first.")
    best = torch.cat(parts, dim=1).topk(min(k, len(ids)), dim=1).indices.tolist()
    found = dict.fromkeys(sizes, 0)
    for t, own in zip(text, best):
        order = searcher.library.nearest_ids(t, max(sizes))
        for size in sizes:
            found[size] += len({ids[n] for n in own} & {*order[:size]})
    return {size: count / sum(map(len, best)) for size, count in found.items()}


def check(config: CheckConfig) -> int:
    """Measures what shortlists of several sizes miss: their recall@10 against scoring every clip.
    Exit code 1: that of --shortlist is below --floor."""
    searcher, size = Searcher(config), config.shortlist
    asked = read_captions(config.captions, searcher.trained)
    asked = random.Random(config.seed).sample(asked, min(config.queries, len(asked)))
    sizes = [smaller for smaller in (10, 30, 100, 300, 1000) if smaller < size] + [size]
    count, found = len(searcher.library), recall(searcher, asked, sizes)
    what = "recall@10 of the shortlist against scoring everything"
    print(f"{config.library}: {count} clips, {len(asked)} captions; {what}:")
    print("\n".join(f"{size:>7} clips  {value:.3f}" for size, value in found.items()))
    if count <= 2 * size:
        print(f"(a query scores all {count} clips: the shortlist is used above {2 * size})")
    elif found[size] < config.floor:
        advice = "use a larger --shortlist"
        print(f"error: {found[size]:.3f} is below --floor {config.floor:g}: {advice}.", file=sys.stderr)
        return 1
    return 0


# ------------------------------------------------------------------------------------------------------ serve


@dataclass(frozen=True)
class ServeConfig(SearchConfig):
    """Where to serve the page."""

    port: int = 8000  # port of the page; 0: any free one
    host: str = "127.0.0.1"  # address to listen on; any other shows the videos to whoever can reach it
    links: bool = False  # also play files that links lead to outside the library's folder


def serve(config: ServeConfig) -> int:
    """Serves a page: type a query, play the clips it finds, see which captions fit a clip. Ctrl-C ends it."""
    searcher = Searcher(config)
    searcher.whole  # noqa: B018  loads the clips now, and raises DataError for an empty library
    captions = read_captions(config.captions, searcher.trained)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve(searcher, captions, config.host, config.port, config.links)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Wrong input ends it with one sentence and exit code 1."""
    commands = {"index": index, "query": query, "check": check, "serve": serve}
    for stream in (sys.stdout, sys.stderr):  # as in engine/__init__.py, if they were replaced since
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    cli = functools.partial(tyro.extras.subcommand_cli_from_dict, config=(tyro.conf.OmitArgPrefixes,))
    try:
        sys.exit(cli(commands, args=arguments, description=__doc__))
    except ValueError as error:  # DataError, ModelError
        sys.exit(printable(f"error: {error}"))
    except KeyboardInterrupt:
        sys.exit("stopped: the same command continues from here.")
    except OSError as error:
        sys.exit(
            printable(f"error: {error.filename or 'a file'} cannot be used ({error.strerror or error}).")
        )
    except Exception as error:
        if not type(error).__module__.startswith("pymilvus"):
            raise
        reason = str(getattr(error, "message", error)).splitlines()[0]
        sys.exit(f"error: the library's database reports: {reason}; what it holds is kept.")


if __name__ == "__main__":
    main()

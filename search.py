"""Search your own videos with T-MASS ("Inference Pipeline"): clips for a text, or captions for a clip.

    python search.py index FOLDER                                    # encode every clip once, into library.db
    python search.py query "a red ring grows in the desert" --html found.html
    python search.py query "a dog" --and 0.5 "on a beach" --not snow --in holiday --newer 2024-01-31
    python search.py query --image picture.jpg                       # or --like clip.mp4@12.5
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm.auto import tqdm

from engine import server
from engine.cutting import cut, suffix_of
from engine.files import DataError, printable, stem
from engine.indexing import IndexConfig, index
from engine.library import span, stamp
from engine.queries import Hit, build_query
from engine.searcher import SearchConfig, Searcher, check_limits, read_captions

__all__ = ["IndexConfig", "SearchConfig", "Searcher", "index", "main"]

# ------------------------------------------------------------------------------------------------------ query


def flag(name: str) -> object:
    """The flag --NAME, for a field that cannot have this name; it may be repeated where it is a list."""
    return tyro.conf.arg(name=name)


Texts = tyro.conf.UseAppendAction[tuple[str, ...]]
Weighted = tyro.conf.UseAppendAction[tuple[tuple[float, str], ...]]


@dataclass(frozen=True)
class QueryConfig(SearchConfig):
    """What to search for, and how to show what was found."""

    text: tyro.conf.Positional[str] = ""  # what to look for
    also: Annotated[Weighted, flag("and")] = ()  # WEIGHT TEXT: also look for this; may be repeated
    unlike: Annotated[Texts, flag("not")] = ()  # what not to find, of weight -0.5; may be repeated
    image: Path | None = None  # look for clips like this picture
    like: str | None = None  # CLIP or CLIP@SECONDS: look for clips like this one, of the library or any video
    inside: Annotated[str, flag("in")] = ""  # only files in this folder, named below the library's folder
    newer: str | None = None  # only files changed since this date, such as 2024-01-31
    older: str | None = None  # only files changed before this date
    k: Annotated[int, tyro.conf.arg(aliases=("-k",))] = 5  # how many to show
    all: bool = False  # show near-duplicates as hits of their own
    json: bool = False  # print JSON
    html: Path | None = None  # also write one page; it links to the videos and holds everything else
    export: Path | None = None  # also cut the clips out of their files, into this folder
    video: str | None = None  # rank captions for a file of the library (name below its folder), or any video


def query(config: QueryConfig) -> int:
    """Finds the clips that fit what is asked for, or with --video the captions that fit a clip.
    Exit code 1: a clip could not be cut out with --export."""
    check_limits(config)
    _check_query(config)
    searcher = Searcher(config)
    if config.video is not None:
        return _query_video(searcher, config)
    pictures, own = [], frozenset()
    if config.image is not None:
        pictures.append(searcher.picture(config.image))
    if config.like is not None:
        frames, own = searcher.like(config.like)
        pictures.append(frames)
    where = {name: getattr(config, name) for name in ("inside", "newer", "older", "all")}
    asked = build_query(config.text, config.also, config.unlike, pictures, **where, without=own)
    hits = searcher.search(asked, config.k)
    notes = searcher.notes(asked, hits)
    for note in [searcher.name] * searcher.zero_shot + notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    if config.html is not None:
        server.write_page(config.html, searcher, _title(config), hits, notes)
        print(f"written: {config.html}", file=sys.stderr)
    if config.json:
        print(json.dumps([asdict(hit) for hit in hits], indent=2))
    else:
        print("rank  score  radius   best  file")
    for hit in [] if config.json else hits:
        radius = "-" if hit.radius is None else f"{hit.radius:.3f}"
        best, part = "-" if hit.time is None else f"{hit.time:.1f} s", span(hit.start, hit.end)
        same = f"  (+{len(hit.copies)} near-duplicate{'s' * (len(hit.copies) > 1)})" if hit.copies else ""
        print(printable(f"{hit.rank:>4}  {hit.score:.3f}  {radius:>6}  {best:>5}  {hit.file}  {part}{same}"))
    return _export(searcher, hits, config.export) if config.export is not None else 0


def _check_query(config: QueryConfig) -> None:
    """Raises DataError for flags that do not fit together, before a model is loaded."""
    clips = ("text", "also", "unlike", "image", "like", "inside", "newer", "older", "all", "html", "export")
    names = {"text": "a text", "also": "--and", "unlike": "--not", "inside": "--in"}
    if config.video is not None:
        if given := [names.get(name, f"--{name}") for name in clips if getattr(config, name)]:
            raise DataError(f"--video ranks captions for a clip, so it cannot stand beside {given[0]}.")
        return
    if config.captions is not None:
        raise DataError("--captions are ranked for a clip: name it with --video.")
    if config.image is not None and not config.image.is_file():
        raise DataError(f"{config.image} not found: name a picture with --image.")
    if not (config.image or config.like):  # else these stand beside the text
        build_query(config.text, config.also, config.unlike, newer=config.newer, older=config.older)


def _title(config: QueryConfig) -> str:
    """The query as a page shows it."""
    parts = [config.text.strip(), *(f"{weight:+g} {text}" for weight, text in config.also)]
    parts += [f"not {text}" for text in config.unlike]
    parts += [f"like {name}" for name in (config.image, config.like) if name]
    return " · ".join(filter(None, parts))


def _export(searcher: Searcher, hits: Sequence[Hit], folder: Path) -> int:
    """Cuts hits out of their files: "01 NAME 10-20 s.mp4" and so on. Exit code 1: one could not be cut."""
    code = 0
    for hit, row in zip(hits, searcher.library.file_rows([hit.id for hit in hits])):
        path, whole = searcher.library.path(hit.file), hit.end is None and not hit.start
        name = f"{hit.rank:02d} {stem(path.name)}" + ("" if whole else f" {span(hit.start, hit.end)}")
        target = folder / (name + suffix_of(path, hit.start, hit.end))
        try:
            if path.is_file() and not row["stamp"].startswith(stamp(path, "")):
                raise DataError(f"{path} has changed since it was indexed: index its folder again.")
            cut(path, target, hit.start, hit.end)
            print(printable(f"written: {target}"), file=sys.stderr)
        except DataError as error:
            code = 1
            print(printable(f"error: {error}"), file=sys.stderr)
    return code


def _query_video(searcher: Searcher, config: QueryConfig) -> int:
    video, captions = config.video, read_captions(config.captions, searcher.trained)
    rows, frames = searcher.clips_of(video)
    if not rows:
        if not os.path.isfile(video):
            raise DataError(f"{video} is neither a file of {config.library} nor another file: name a video.")
        rows, frames = [{"start": 0.0, "end": None}], searcher.outside(Path(video))
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
    """How to measure what a query misses."""

    queries: int = 100  # captions to search for, drawn with --seed
    floor: float = 0.95  # smallest recall@10 that passes
    tune: bool = False  # with a server: store the smallest shortlist that passes, for later queries


def recall(
    searcher: Searcher, captions: Sequence[str], sizes: Sequence[int], k: int = 10, look: bool = False
) -> dict[int, float]:
    """For each size of the shortlist: the fraction of the library's k best clips that it holds, mean over
    captions. look: also of the first look, as size 0. Raises DataError for an empty library."""
    text, best = searcher.text(captions), [[] for _ in captions]  # (score, id), best first
    for rows, frames in tqdm(searcher.library.batches(), "scoring everything", unit=" batches", leave=False):
        top = searcher.score(text, frames).topk(min(k, len(rows)), dim=1)
        for own, values, numbers in zip(best, top.values.tolist(), top.indices.tolist()):
            own += [(value, rows[n]["id"]) for value, n in zip(values, numbers)]
            own.sort(reverse=True)
            del own[k:]
    if not best[0]:
        raise DataError(f"{searcher.library.where} holds no clip: index a folder of videos first.")
    found = dict.fromkeys([*sizes, *[0] * look], 0)
    for t, pairs in zip(text, best):
        own, order = {id for _, id in pairs}, searcher.library.nearest_ids(t, max(sizes))
        for size in sizes:
            found[size] += len(own & {*order[:size]})
        if look:
            found[0] += len(own & {row["id"] for rows, _ in searcher.first(t[None]) for row in rows})
    return {size: count / sum(map(len, best)) for size, count in found.items()}


def check(config: CheckConfig) -> int:
    """Measures what a query misses: the recall@10 of shortlists of several sizes, and of the first look at a
    large local library, against scoring every clip. Exit code 1: that of a query is below --floor."""
    searcher = Searcher(config)
    if config.tune and not searcher.library.server:
        raise DataError(
            f"--tune chooses the shortlist of a server: {config.library} is looked through whole."
        )
    count, size, look = len(searcher.library), searcher.shortlist, not searcher.by_vectors
    asked = read_captions(config.captions, searcher.trained)
    asked = random.Random(config.seed).sample(asked, min(config.queries, len(asked)))
    sizes = [smaller for smaller in (10, 30, 100, 300, 1000) if smaller < size] + [size]
    if config.tune:
        sizes = [100 * 2**n for n in range(8)]
    found = recall(searcher, asked, sizes, look=look)
    print(f"{config.library}: {count} clips, {len(asked)} captions; recall@10 against scoring everything:")
    for each, value in found.items():
        print(f"{each:>7} clips  {value:.3f}" if each else f"     first look  {value:.3f}")
    if config.tune:
        size = next((each for each in sizes if found[each] >= config.floor), max(sizes))
        searcher.library.describe({**searcher.library.about, "shortlist": size})
        print(f"stored: a query scores the {size} clips of the shortlist exactly")
    if count <= 2 * size:
        print(f"(a query scores all {count} clips: the shortlist is used above {2 * size})")
    elif (reached := found[0 if look else size]) < config.floor:
        advice = "name a --shortlist" if look else "use a larger --shortlist"
        print(f"error: {reached:.3f} is below --floor {config.floor:g}: {advice}.", file=sys.stderr)
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

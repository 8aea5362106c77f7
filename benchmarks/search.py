"""How fast a library answers, what a query misses, and how fast clips are indexed.

    python benchmarks/search.py            # 10^3 to 10^5 synthetic clips, and indexing: about 6 minutes
    python benchmarks/search.py --sizes    # indexing alone
    python benchmarks/search.py --sizes 1000000 --queries 5 --no-index    # 16 GB of disk and of memory
    python benchmarks/search.py --sizes --no-index    # prints the lines of docs/search.md from the JSON

Synthetic clips stand in for a large library. A clip has three scenes; each is one of 2,000 topics plus noise.
A query is a topic plus noise. psi and R are their initial values plus noise; M = 20. The library is a local
one, written by Library.add; a separate process opens it, and asks when its files are in the page cache. The
floor is the larger of two times: the bytes of all features by the speed of reading them, and the operations
of the first look by the speed of a matrix product, both measured in the same run; plus the operations of the
exact scores. Indexing is that of built-in clips, of which decoding, encoding and writing overlap. Rows of the
same sizes are replaced in benchmarks/search.json; other rows stay. A row names its machine and the load
(running processes) of the minute before it.
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import search  # noqa: E402
import shapes  # noqa: E402
from benchmarks.own_process import in_own_process  # noqa: E402
from engine import firstpass  # noqa: E402
from engine.backbone import TINY, import_clip  # noqa: E402
from engine.checkpoint import save_checkpoint  # noqa: E402
from engine.library import Library, identity, overall  # noqa: E402
from engine.searcher import EXACT, SearchConfig, Searcher  # noqa: E402
from model import TMASS  # noqa: E402
from search import IndexConfig, recall  # noqa: E402

TOPICS, QUERIES, OF_FILE = 2000, 20, 100
JSON = ROOT / "benchmarks" / "search.json"


def random_model(dim: int, frames: int) -> TMASS:
    """A T-MASS with a tiny, random CLIP; psi and R are their initial values plus noise."""
    torch.manual_seed(0)
    clip = import_clip().model.CLIP(**{**TINY, "embed_dim": dim}).float()
    model = TMASS(clip, fusion="xpool", radius="linear", num_frames=frames)
    for parameter in (*model.fusion.parameters(), *model.radius.parameters()):
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def scenes(frames: int, topics: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Frames of ten scenes of each topic, (scenes, frames, dim), in half precision."""
    drawn = (torch.randn(TOPICS, frames, topics.shape[1], generator=generator) for _ in range(10))
    return torch.cat([(topics[:, None] + 0.3 * noise).half() for noise in drawn])


def synthetic(count: int, scenes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Features (count, frames, dim) of clips of three scenes, each clip with a noise of its own."""
    frame = torch.arange(scenes.shape[1])
    chosen = torch.randint(len(scenes), (count, 3), generator=generator)[:, frame * 3 // len(frame)]
    return scenes[chosen, frame] + 0.3 * torch.randn(count, 1, scenes.shape[2], generator=generator)


def fill(where: str, clips: int, dim: int, frames: int, folder: str) -> float:
    """Creates a library of synthetic clips, 100 a file; returns the clips written per second."""
    model, generator = random_model(dim, frames), torch.Generator().manual_seed(1)
    checkpoint = Path(folder) / f"{dim}-{frames}.pt"
    save_checkpoint(checkpoint, model)
    pool = scenes(frames, 0.45 * torch.randn(TOPICS, dim, generator=generator), generator)
    library, source = Library(where, create=True), {"checkpoint": str(checkpoint)}
    about = {"folder": folder, "source": source, "model": identity(model), "cut": "whole", "dim": dim}
    library.describe({**about, "frames": frames})
    seconds, group = 0.0, 20 * OF_FILE
    for first in range(0, clips, group):
        features = synthetic(min(group, clips - first), pool, generator)
        with torch.no_grad():
            vectors, files = overall(model, features), range(first, first + len(features), OF_FILE)
        started = time.perf_counter()
        for n, part, own in zip(files, features.split(OF_FILE), vectors.split(OF_FILE)):
            key = library.key(f"{n:08}.mp4")
            ids = [(f"{key}-{k}", float(k), float(k + 1)) for k in range(len(part))]
            library.add(ids, own, part, [b""] * len(part))
        library.finish({f"{n:08}.mp4": {"stamp": "none", "clips": OF_FILE, "error": None} for n in files})
        seconds += time.perf_counter() - started
    return clips / seconds


def opened(where: str, dim: int) -> tuple[Searcher, list[str]]:
    """A searcher whose texts are synthetic, and the names of these."""
    searcher, generator = Searcher(SearchConfig(where)), torch.Generator().manual_seed(1)
    topics = 0.45 * torch.randn(TOPICS, dim, generator=generator)
    queries = topics[:QUERIES] + 0.3 * torch.randn(QUERIES, dim, generator=generator)
    searcher.text = lambda captions: torch.stack([queries[int(caption)] for caption in captions])
    return searcher, [str(n) for n in range(QUERIES)]


def ask(where: str, dim: int, frames: int, queries: int, realtime: bool) -> dict:
    """Opens a library and queries it. Times are medians over the queries, in seconds."""
    if realtime:  # other work waits meanwhile
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    started = time.perf_counter()
    searcher, names = opened(where, dim)
    count, names = len(searcher.library), names[:queries]
    row = {"open": time.perf_counter() - started}
    state, stop, most = searcher.library.state, threading.Event(), []
    started = time.perf_counter()
    for shard in state.shards:  # from the disk to the page cache
        shard.frames.view("i4").max()
    row["reading it once"] = time.perf_counter() - started
    searcher.search(names[0])  # warm up
    before = anonymous()
    watch = threading.Thread(
        target=lambda: [most.append(anonymous()) for _ in iter(lambda: stop.wait(0.01), 1)]
    )
    watch.start()
    row |= timed("query", lambda name: searcher.search(name), names)
    stop.set()
    watch.join()
    row |= {"GiB": max(most, default=before) / 2**30}
    if count > EXACT:
        row |= timed("first", lambda name: list(searcher.first(searcher.text([name]))), names)
    row |= timed(
        "shortlist", lambda name: searcher.library.nearest_ids(searcher.text([name])[0], 1000), names
    )
    return row | floor(searcher, dim, frames, count)


def timed(what: str, function: Callable, names: list[str]) -> dict:
    """The median and the longest time of a function over the queries."""
    times = []
    for name in names:
        started = time.perf_counter()
        function(name)
        times.append(time.perf_counter() - started)
    return {what: statistics.median(times), f"{what}, slowest": max(times)}


def anonymous() -> int:
    """The bytes of memory of this process that are not of files."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def floor(searcher: Searcher, dim: int, frames: int, count: int) -> dict:
    """The time that a query takes at least, from speeds measured here."""
    a = torch.randn(2048, 2048)
    flops = 2 * 2048**3 / min(timed("", lambda _: a @ a, ["", "", ""]).values())
    shard = torch.from_numpy(max((s.frames for s in searcher.library.state.shards), key=len)).view(
        torch.float32
    )
    speed = 4 * shard.numel() / min(timed("", lambda _: shard.sum(), ["", "", ""]).values())
    exact, size = min(count, EXACT) * 6 * dim**2 / flops, count * frames * dim * 2
    look = (
        count * (4 * frames * dim + 2 * dim * (20 + firstpass.EIGENVECTORS)) / flops if count > EXACT else 0
    )
    floor = max(size / speed, look) + exact
    return {"floor": floor, "GB/s": speed / 1e9, "GFLOP/s": flops / 1e9}


def misses(where: str, dim: int, queries: int) -> dict:
    """recall@10 of the first look and of shortlists, and the time of scoring everything."""
    searcher, names = opened(where, dim)
    names, started = names[:queries], time.perf_counter()
    found = recall(searcher, names, [100, 1000], look=True)
    row = {"recall@10": found[0], "shortlist 100": found[100], "shortlist 1000": found[1000]}
    return row | {"queries": queries, "everything, a query": (time.perf_counter() - started) / queries}


def index(folder: Path, clips: int, arch: str) -> dict:
    """What `search.py index` says of its speed: clips a second, and the seconds of each stage."""
    if arch == "tiny":
        save_checkpoint(folder / "tiny.pt", random_model(256, 12))
        options = {"checkpoint": folder / "tiny.pt"}
    else:
        torch.manual_seed(0)
        sizes = dict(
            embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=32
        )
        sizes |= dict(context_length=77, vocab_size=49408)
        sizes |= dict(transformer_width=512, transformer_heads=8, transformer_layers=12)
        torch.save(import_clip().model.CLIP(**sizes).state_dict(), folder / "vit.pt")
        options = {"arch": "ViT-B/32", "weights": folder / "vit.pt"}
    (folder / arch[:3]).mkdir()
    shapes._render_clips((folder / arch[:3], 0, range(clips)))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        search.index(IndexConfig(folder / arch[:3], str(folder / f"{arch[:3]}.db"), **options))
    said = re.search(
        r"in ([\d.]+) s \(([\d.]+) clips/s; decode ([\d.]+) s, encode ([\d.]+) s, write ([\d.]+) s",
        out.getvalue(),
    )
    names = ("seconds", "clips/s", "decode", "encode", "write")
    found = dict(zip(names, map(float, said.groups())))
    return {"clips": clips, **found, "clips a core-second": found["clips/s"] / os.cpu_count()}


def machine() -> dict:
    """The cores, the processor and the load of this machine."""
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1].replace("(R)", "")
    return {"machine": f"{torch.get_num_threads()} x {name}", "load": round(os.getloadavg()[0], 1)}


def growth(rows: list[dict]) -> float:
    """The exponent of query seconds against clips: the slope of a line through the logarithms."""
    x, y = ([math.log(row[name]) for row in rows] for name in ("clips", "query"))
    return statistics.linear_regression(x, y).slope


def tables(content: dict) -> list[str]:
    """The lines of Markdown that docs/search.md holds: queries, their growth, indexing."""
    columns = ["clips", "machine", "load", "queries", "open", "query", "floor", "recall@10"]
    columns += ["of a shortlist of 100", "of 1,000", "everything, a query", "memory", "disk"]
    lines = [f"| {' | '.join(columns)} |", f"|---:|---|{'---:|' * (len(columns) - 2)}"]
    for row in content["rows"]:
        cells = [f"{row['clips']:,}", row["machine"], f"{row['load']}", f"{row['queries']}"]
        cells += [f"{row[name]:.2f} s" for name in ("open", "query", "floor")]
        cells += [f"{row[name]:.3f}" for name in ("recall@10", "shortlist 100", "shortlist 1000")]
        cells += [f"{row['everything, a query']:.2f} s"]
        cells += [f"{row[name]:.2f} GiB" for name in ("GiB", "disk GiB")]
        lines.append(f"| {' | '.join(cells)} |")
    alike = [row for row in content["rows"] if row["machine"] == content["rows"][0]["machine"]]
    if len(alike) > 1:
        span = f"{alike[0]['clips']:,} to {alike[-1]['clips']:,} clips"
        lines.append(f"From {span}, a query's seconds grow as clips to the power of {growth(alike):.2f}.")
    columns = ["clips", "seconds", "decode", "encode", "write", "clips/s", "clips a core-second"]
    lines.append(f"| model | machine | load | {' | '.join(columns)} |")
    lines.append(f"|---|---|---:|{'---:|' * len(columns)}")
    for arch, row in content["index"].items():
        cells = [arch, row["machine"], f"{row['load']}", *(f"{row[name]:.4g}" for name in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def run(function, *arguments):
    """The result of a function in a separate process. Ends the program if it failed."""
    answer, code = in_own_process(function, *arguments)
    if answer is None:
        sys.exit(f"{function.__name__}{arguments}: failed, exit code {code}")
    return answer


def main() -> None:
    """Runs the cases, prints the tables, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[10**3, 10**4, 10**5])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--queries", type=int, default=QUERIES, help="at most 20")
    parser.add_argument("--folder", type=Path, help="where to write the libraries; default: a temporary one")
    parser.add_argument("--realtime", action="store_true", help="other work waits while queries are timed")
    parser.add_argument("--no-index", action="store_true")
    args = parser.parse_args()
    content = json.loads(JSON.read_text()) if JSON.is_file() else {"rows": [], "index": {}}
    for clips in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            where = str(Path(folder) / "library.db")
            row = {"clips": clips, "dim": args.dim, "frames": args.frames, "realtime": args.realtime}
            row |= machine() | {"written a second": run(fill, where, clips, args.dim, args.frames, folder)}
            row |= run(ask, where, args.dim, args.frames, args.queries, args.realtime)
            row |= run(misses, where, args.dim, args.queries)
            files = [file for file in Path(where).rglob("*") if file.is_file()]
            row["disk GiB"] = sum(file.stat().st_size for file in files) / 2**30
        same = ("clips", "dim", "frames")
        rows = [row, *(old for old in content["rows"] if any(old[name] != row[name] for name in same))]
        content["rows"] = sorted(rows, key=lambda row: row["clips"])
        JSON.write_text(json.dumps(content, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    for arch, clips in (("tiny", 400), ("ViT-B/32", 60)) if not args.no_index else ():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            content["index"][arch] = machine() | run(index, Path(folder), clips, arch)
        JSON.write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(tables(content)))


if __name__ == "__main__":
    main()

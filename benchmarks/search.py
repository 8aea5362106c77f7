"""How fast a library answers, what its shortlist misses, and how fast clips are indexed.

    python benchmarks/search.py     # 10^3 to 10^5 synthetic clips, and indexing: about 15 minutes on 2 cores
    python benchmarks/search.py --sizes 1000000 --dim 128 --frames 4    # smaller clips, to fit in memory

Synthetic clips stand in for a large library. A clip has three scenes; each is one of 2,000 topics plus noise.
A query is a topic plus noise. psi and R are their initial values plus noise; M = 20. The library is a local
file, which milvus-lite keeps in memory; a separate process opens it. Rows of the same sizes are replaced in
benchmarks/search.json; other rows stay.
"""

import argparse
import contextlib
import io
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import search  # noqa: E402
import shapes  # noqa: E402
from benchmarks.own_process import in_own_process  # noqa: E402
from engine.backbone import TINY, import_clip  # noqa: E402
from engine.checkpoint import save_checkpoint  # noqa: E402
from engine.library import Library, identity, overall  # noqa: E402
from engine.searcher import SHORTLIST, SearchConfig, Searcher  # noqa: E402
from model import TMASS  # noqa: E402
from search import IndexConfig, recall  # noqa: E402

TOPICS, QUERIES = 2000, 20


def random_model(dim: int, frames: int) -> TMASS:
    """A T-MASS with a tiny, random CLIP; psi and R are their initial values plus noise."""
    torch.manual_seed(0)
    clip = import_clip().model.CLIP(**{**TINY, "embed_dim": dim}).float()
    model = TMASS(clip, fusion="xpool", radius="linear", num_frames=frames)
    for parameter in (*model.fusion.parameters(), *model.radius.parameters()):
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def synthetic(count: int, frames: int, topics: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Features (count, frames, dim) of clips of three scenes."""
    scenes = torch.randint(TOPICS, (count, 3), generator=generator)[:, torch.arange(frames) * 3 // frames]
    dim = topics.shape[1]
    of_clip = torch.randn(count, 1, dim, generator=generator)
    of_frame = torch.randn(count, frames, dim, generator=generator)
    return topics[scenes] + 0.3 * of_clip + 0.3 * of_frame


def fill(where: str, clips: int, dim: int, frames: int, folder: str) -> float:
    """Creates a library of synthetic clips; returns the clips written per second."""
    model, generator = random_model(dim, frames), torch.Generator().manual_seed(1)
    checkpoint = Path(folder) / f"{dim}-{frames}.pt"
    save_checkpoint(checkpoint, model)
    topics = 0.45 * torch.randn(TOPICS, dim, generator=generator)
    library, source = Library(where, create=True), {"checkpoint": str(checkpoint)}
    about = {"folder": folder, "source": source, "model": identity(model), "cut": "whole", "dim": dim}
    library.describe(about)
    library.finish({"synthetic.mp4": {"stamp": "none", "clips": clips, "error": None}})
    key, seconds = library.key("synthetic.mp4"), 0.0
    for first in range(0, clips, 1000):
        ids = [(f"{key}-{n}", float(n), float(n + 1)) for n in range(first, min(first + 1000, clips))]
        features = synthetic(len(ids), frames, topics, generator)
        started = time.perf_counter()
        library.add(ids, overall(model, features), features, [b""] * len(ids))
        seconds += time.perf_counter() - started
    return clips / seconds


def ask(where: str, dim: int) -> dict:
    """Opens a library and queries it. Times are medians over the queries, in seconds."""
    started = time.perf_counter()
    searcher = Searcher(SearchConfig(where))
    searcher.whole  # noqa: B018
    opened = time.perf_counter() - started
    generator = torch.Generator().manual_seed(1)
    topics = 0.45 * torch.randn(TOPICS, dim, generator=generator)
    queries = topics[:QUERIES] + 0.3 * torch.randn(QUERIES, dim, generator=generator)
    searcher.text = lambda captions: torch.stack([queries[int(caption)] for caption in captions])
    names, times = [str(n) for n in range(QUERIES)], {"query": [], "shortlist": []}
    searcher.search("0"), searcher.library.nearest_ids(queries[0], SHORTLIST)  # warm up
    for n, name in enumerate(names):
        started = time.perf_counter()
        searcher.search(name)
        times["query"].append(time.perf_counter() - started)
        started = time.perf_counter()
        searcher.library.nearest_ids(queries[n], SHORTLIST)
        times["shortlist"].append(time.perf_counter() - started)
    whole = searcher.whole is not None
    started = time.perf_counter()
    found = recall(searcher, names, [100, SHORTLIST])
    return {
        "open": opened,
        **{name: statistics.median(seconds) for name, seconds in times.items()},
        "slowest query": max(times["query"]),
        "scored whole": whole,
        "recall@10, shortlist 100": found[100],
        "recall@10, shortlist 1000": found[SHORTLIST],
        "scoring everything, a query": (time.perf_counter() - started) / QUERIES,
        "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def index(folder: Path, clips: int, arch: str) -> float:
    """The clips per second that `search.py index` encodes; the clips are built-in ones."""
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
    return float(out.getvalue().split("(")[1].split(" clips/s")[0])


def run(function, *arguments):
    """The result of a function in a separate process. Ends the program if it failed."""
    answer, code = in_own_process(function, *arguments)
    if answer is None:
        sys.exit(f"{function.__name__}{arguments}: failed, exit code {code}")
    return answer


def main() -> None:
    """Runs the cases, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[10**3, 10**4, 10**5])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--no-index", action="store_true")
    args = parser.parse_args()
    path = ROOT / "benchmarks" / "search.json"
    content = json.loads(path.read_text()) if path.is_file() else {"rows": [], "index": {}}
    content["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    for clips in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            where = str(Path(folder) / "library.db")
            row = {"clips": clips, "dim": args.dim, "frames": args.frames}
            row["written a second"] = run(fill, where, clips, args.dim, args.frames, folder)
            row |= run(ask, where, args.dim)
            files = [file for file in Path(where).rglob("*") if file.is_file()]
            row["disk GiB"] = sum(file.stat().st_size for file in files) / 2**30
        same = ("clips", "dim", "frames")
        rows = [row, *(old for old in content["rows"] if any(old[name] != row[name] for name in same))]
        content["rows"] = sorted(rows, key=lambda row: row["clips"])
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    if not args.no_index:
        for arch, clips in (("tiny", 400), ("ViT-B/32", 60)):
            with tempfile.TemporaryDirectory() as folder:
                content["index"][arch] = run(index, Path(folder), clips, arch)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"index, clips/s: {content['index']}")
    columns = ["clips", "T' x d", "open", "query", "of it, shortlist", "everything (of 20 at once)"]
    columns += ["recall@10 of 100", "of 1,000", "memory", "disk"]
    print(f"\n| {' | '.join(columns)} |\n|{'---:|' * len(columns)}")
    for row in content["rows"]:
        shortlist = "-" if row["scored whole"] else f"{row['shortlist'] * 1000:.0f} ms"
        cells = [f"{row['clips']:,}", f"{row['frames']} x {row['dim']}", f"{row['open']:.1f} s"]
        cells += [f"{row['query'] * 1000:.0f} ms", shortlist, f"{row['scoring everything, a query']:.2f} s"]
        cells += [f"{row[f'recall@10, shortlist {size}']:.3f}" for size in (100, 1000)]
        cells += [f"{row['GiB']:.1f} GiB", f"{row['disk GiB']:.2f} GiB"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

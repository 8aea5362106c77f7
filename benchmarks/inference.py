"""Time and memory of scoring all pairs: the fast form, the literal form, and the matrix products alone.

    python benchmarks/inference.py            # N x N pairs: about 7 minutes on 2 cores
    python benchmarks/inference.py --large    # also full test sets; one query for 10^6 videos (13 GB)
    python benchmarks/inference.py --turns    # the ratios alone; other figures of the JSON are kept

d = 512, T' = 12, M = 20, float32, random features of CLIP's scale, one head in psi. Each case runs in its own
process. Memory is the growth of its peak beyond features and scores. Between processes the speed of a machine
varies by a fifth, so the ratios to bare products and to the square case are of one process, where the cases
take turns. Writes benchmarks/inference.json and assets/inference.png; prints the table of docs/inference.md.
"""

import argparse
import functools
import json
import platform
import resource
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.own_process import in_own_process  # noqa: E402
from engine.metrics import retrieval_metrics  # noqa: E402
from engine.scoring import default_block, in_threads, noise_bank, scores  # noqa: E402
from evaluate import scores_literal  # noqa: E402
from model import RADII, TMASS, XPool  # noqa: E402

DIM, FRAMES, M = 512, 12, 20
GROWTH_AT = 512  # texts and videos of the cases that vary M and T'
FEW = [(n, 10**6 // n) for n in (32, 128, 10**6 // 128, 10**6 // 32)]  # texts, videos: a million pairs
SQUARE = 1000  # texts and videos of the cases that take turns


class Heads(TMASS):
    """psi and R with random weights: the parts of a model that scoring uses. It has no CLIP."""

    def __init__(self, radius: str = "linear", frames: int = FRAMES) -> None:
        torch.nn.Module.__init__(self)
        torch.manual_seed(0)
        self.fusion, self.radius = XPool(DIM), RADII[radius](frames, DIM)
        for parameter in self.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        self.eval().requires_grad_(False)


def literal_blocked(model, text, frames, noise, side: int = 24, own_draws: bool = False) -> torch.Tensor:
    """The literal form in blocks of side x side pairs, to fit memory (24 was the fastest of 8 to 128)."""

    def block(t, f):
        if not own_draws:
            return scores_literal(model, t, f, noise)
        shape = (M, len(t), len(f), DIM)
        return scores_literal(model, t, f, torch.randn(shape, dtype=t.dtype, device=t.device))

    return torch.cat([torch.cat([block(t, f) for f in frames.split(side)], dim=1) for t in text.split(side)])


def literal_drawn(model, text, frames, noise) -> torch.Tensor:
    """The same with M new draws for every pair, as in the paper and in the released code."""
    return literal_blocked(model, text, frames, noise, own_draws=True)


def floor(model, text, frames, noise) -> torch.Tensor:
    """The matrix products of the fast form alone: all of them, in its order, blocks, threads and memory.

    Their numbers are random. Sizes are those of scores: the last rows and columns of blocks are smaller. Only
    R (t E)' of a text is not one product for each text here, which would take a little longer."""
    side, k = int(default_block(DIM, text.device) ** 0.5), FRAMES + 2
    randn = functools.partial(torch.randn, device=text.device)
    W, t, e, memory = randn(DIM, DIM), randn(side, DIM), noise.T, threading.local()
    f, atoms, gram, w = randn(side * FRAMES, DIM), randn(side, k, DIM), randn(side, k, k), randn(k - 1, DIM)
    a = {n: randn(side, k, n) for n in (min(side, len(text)), len(text) % side)}  # by the number of texts
    s = randn(side * side, k - 1)
    W @ W, text @ W, text @ W  # W_o W_v, W_q, W_k

    def column(start: int) -> None:
        if not hasattr(memory, "block"):
            memory.block = W.new_empty(2, side * side, DIM)
        n = min(side, len(frames) - start)  # videos
        these, of, G = f[: n * FRAMES], atoms[:n], gram[:n]
        these @ W.T, these @ W.T, of @ of.mT, of @ of.mT, of @ of.mT  # y, z; Gram matrices of y, z and atoms
        for first in range(0, len(text), side):
            m = min(side, len(text) - first)  # texts
            v, log_r = memory.block[:, : n * m]
            these @ t[:m].T, these @ t[:m].T, of.flatten(0, 1) @ t[:m].T  # attention, S, t . v
            G @ a[m][:n], G @ a[m][:n], G @ a[m][:n]  # sigma, delta, |v|
            torch.bmm(a[m][:n].mT, of, out=v.view(n, m, DIM)), torch.mm(s[: n * m], w, out=log_r)
            v @ e, v @ e, log_r @ e  # M draws

    columns = range(0, len(frames), side)
    list(in_threads(column, columns) if text.device.type == "cpu" else map(column, columns))
    return torch.zeros(1)


FORMS = {
    "fast": scores,
    "fast, R of t and v": scores,  # the radius "joint"
    "bare products": floor,
    "literal, blocked": literal_blocked,
    "literal, blocked, own draws": literal_drawn,
    "literal": scores_literal,
}


def peak() -> float:
    """Peak memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def case(
    form: str, texts: int, videos: int, device: str, dtype: str, draws: int = M, per_video: int = FRAMES
) -> dict:
    """Runs a case in this process. Returns what it is, its seconds and its memory in GiB."""
    to = dict(device=device, dtype=getattr(torch, dtype))
    model = Heads("joint" if form == "fast, R of t and v" else "linear", per_video).to(**to)
    generator = torch.Generator().manual_seed(0)
    text = (0.45 * torch.randn(texts, DIM, generator=generator)).to(**to)
    frames = (0.45 * torch.randn(videos, per_video, DIM, generator=generator)).to(**to)
    noise = noise_bank(draws, DIM, 0).to(**to)
    with torch.no_grad():
        FORMS[form](model, text[:64], frames[:64], noise)  # warm up
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before, times = peak(), []
        while len(times) < 5 and sum(times) < 10:  # the median of at most five
            started = time.perf_counter()
            out = FORMS[form](model, text, frames, noise)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    if device == "cuda":
        gib = torch.cuda.max_memory_allocated() / 2**30
    else:
        gib = max(0.0, peak() - before - out.numel() * 4 / 2**30)
    row = dict(form=form, texts=texts, videos=videos, device=device, dtype=dtype, M=draws, frames=per_video)
    row.update(seconds=seconds, gib=gib)
    if texts == videos and form == "fast":
        row["R@1"] = retrieval_metrics(out.float(), torch.arange(texts, device=device))["t2v"]["R@1"]
    return row


def turns_case(rounds: int = 5, square: int = SQUARE, few: list[tuple[int, int]] = FEW) -> dict[str, float]:
    """Ratios of cases that take turns in this process, medians over rounds: of the fast form to its bare
    products, of R of t and v to that, and of a pair of few texts or few videos to one of the square case."""
    forms = "bare products", "fast", "fast, R of t and v"
    models = {form: Heads("joint" if form == forms[2] else "linear") for form in forms}
    cases, found = [*((form, square, square) for form in forms), *(("fast", *each) for each in few)], []
    noise, most = noise_bank(M, DIM, 0), max(max(case[1:]) for case in cases)
    text, frames = 0.45 * torch.randn(most, DIM), 0.45 * torch.randn(most, FRAMES, DIM)
    with torch.no_grad():
        for _ in range(rounds + 1):  # the first is not counted
            seconds = []
            for form, texts, videos in cases:
                started = time.perf_counter()
                FORMS[form](models[form], text[:texts], frames[:videos], noise)
                seconds.append((time.perf_counter() - started) / (texts * videos))
            products, fast, joint, *others = seconds
            found.append([fast / products, joint / fast, *(other / fast for other in others)])
    names = (
        "fast / bare products",
        "R joint / fast",
        *(f"{texts} x {videos} / square" for texts, videos in few),
    )
    return dict(zip(names, (statistics.median(ratios) for ratios in zip(*found[1:]))))


def query_case(videos: int, folder: str) -> dict:
    """Returns the seconds of one query against float16 features in a memory map."""
    path = Path(folder) / "frames.f16"
    part = (0.45 * torch.randn(10_000, FRAMES, DIM)).half().numpy()
    with path.open("wb") as file:
        for _ in range(videos // 10_000):
            file.write(part)
    frames = torch.from_numpy(np.memmap(path, np.float16, "r+", shape=(videos, FRAMES, DIM)))
    model, text, noise = Heads(), 0.45 * torch.randn(1, DIM), noise_bank(M, DIM, 0)
    scores(model, text, frames[:1000], noise)
    started = time.perf_counter()
    scores(model, text, frames, noise)
    about = dict(
        form="one query", texts=1, videos=videos, device="cpu", dtype="float16 map", M=M, frames=FRAMES
    )
    return dict(**about, seconds=time.perf_counter() - started, gib=None)


def run(function, *arguments) -> dict:
    """Runs a case in its own process and prints it. Returns its result, {"failed": exit code} without one."""
    row, code = in_own_process(function, *arguments)
    row = row or dict(failed=code)
    if "seconds" in row:
        pairs = row["texts"] * row["videos"]
        memory = "" if row["gib"] is None else f"{row['gib']:7.2f} GiB"
        speed = f"{row['seconds']:8.2f} s {pairs / row['seconds'] / 1e3:9.1f} k pairs/s"
        what = f"{row['form']:<27} {row['texts']:>6} x {row['videos']:<8} {row['dtype']:<12}"
        print(what, speed, memory, flush=True)
    else:
        print(f"{arguments}: did not finish, exit code {row['failed']}", flush=True)
    return row


def exponent(points: list[tuple[float, float]]) -> float | None:
    """p of seconds = c size^p, fitted to the three largest sizes (least squares of logarithms).

    points: (size, seconds). None for fewer than two."""
    if len(points) < 2:
        return None
    sizes, seconds = np.log(sorted(points)[-3:]).T
    return float(np.polyfit(sizes, seconds, 1)[0])


def growth(rows: list[dict]) -> dict[str, float]:
    """The exponents of all forms in the number of pairs, and of the fast form in M and in frames a video."""
    known = [row for row in rows if row.get("device") == "cpu" and row.get("dtype") == "float32"]
    square = [row for row in known if row["texts"] == row["videos"]]
    usual = [row for row in square if (row["M"], row["frames"]) == (M, FRAMES)]
    found = {}
    for form in FORMS:
        points = [(row["texts"] * row["videos"], row["seconds"]) for row in usual if row["form"] == form]
        found[f"{form}, in pairs"] = exponent(points)
    for size in ("M", "frames"):
        fast = [row for row in square if row["form"] == "fast" and row["texts"] == GROWTH_AT]
        others = [row for row in fast if row in usual or row[size] != {"M": M, "frames": FRAMES}[size]]
        found[f"fast, in {size}"] = exponent([(row[size], row["seconds"]) for row in others])
    return {name: power for name, power in found.items() if power is not None}


def markdown(content: dict) -> str:
    """The table of docs/inference.md, from the content of benchmarks/inference.json."""
    rows = [row for row in content["rows"] if row.get("device") == "cpu"]
    usual = [row for row in rows if row["dtype"] == "float32" and (row["M"], row["frames"]) == (M, FRAMES)]
    of = {(row["form"], row["texts"], row["videos"]): row for row in usual}
    forms = "fast", "fast, R of t and v", "bare products", "literal, blocked, own draws", "literal, blocked"
    names = "fast", "fast, `R joint`", "bare products", "as the paper reads", "shared draws"
    head = f"| texts × videos | {' | '.join(names)} | literal, in one piece | fast: peak memory |"
    lines = [head, "|---|" + "---:|" * 7]
    for _, texts, videos in (case for case in of if case[0] == "fast"):
        found = [of.get((form, texts, videos)) for form in (*forms, "literal")]
        cells = ["" if row is None else digits(row["seconds"]) + " s" for row in found]
        if found[-1] is not None:
            cells[-1] += f", {found[-1]['gib']:.1f} GiB"
        lines.append(f"| {texts:,} × {videos:,} | {' | '.join(cells)} | {found[0]['gib']:.2f} GiB |")
    for row in (row for row in rows if row["form"] == "one query"):
        lines.append(
            f"| 1 × {row['videos']:,} (float16 map on disk) | {digits(row['seconds'])} s |" + " |" * 6
        )
    return "\n".join(lines)


def digits(x: float) -> str:
    """A number with three digits, or all of those before the point."""
    return f"{x:.0f}" if x >= 100 else f"{x:.{2 - max(0, int(np.floor(np.log10(x))))}f}"


def plot(rows: list[dict], path: Path) -> None:
    """Draws seconds against pairs, log-log, one line for each form."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axis = figure.subplots()
    styles = {
        "literal": ("#d55e00", "s"),
        "literal, blocked, own draws": ("#cc79a7", "v"),
        "literal, blocked": ("#e69f00", "^"),
        "fast, R of t and v": ("#56b4e9", "D"),
        "fast": ("#0072b2", "o"),
        "bare products": ("0.5", "x"),
    }
    for form, (colour, marker) in styles.items():
        found = [row for row in rows if row.get("form") == form and row["device"] == "cpu"]
        found = [
            row for row in found if row["dtype"] == "float32" and row["M"] == M and row["frames"] == FRAMES
        ]
        found = [row for row in found if row["texts"] == row["videos"]]
        points = sorted((row["texts"] * row["videos"], row["seconds"]) for row in found)
        axis.plot(*zip(*points), color=colour, marker=marker, label=form)
    axis.set(
        xlabel="text-video pairs (d = 512, T' = 12, M = 20)", ylabel="seconds", xscale="log", yscale="log"
    )
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs the cases, prints their ratios, writes the JSON and the plot."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    large = "also the sizes of MSVD and MSR-VTT (full test), and one query against 10^6 videos"
    parser.add_argument("--large", action="store_true", help=large)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1000])
    parser.add_argument("--turns", action="store_true", help="the ratios alone; keep the other figures")
    args = parser.parse_args()
    path = ROOT / "benchmarks" / "inference.json"
    ratios, code = in_own_process(turns_case)
    if ratios is None:
        raise SystemExit(f"error: the cases in turns failed, exit code {code}: {path} is left as it is.")
    print(ratios)
    if args.turns:
        path.write_text(json.dumps({**json.loads(path.read_text()), "ratios": ratios}, indent=1) + "\n")
        return
    rows = []
    for form in FORMS:
        for n in args.sizes:
            if form == "literal" and n > 512:
                print(f"{form:<27} {n} x {n}: not run, t_s alone takes {M * n * n * DIM * 4 / 2**30:.0f} GiB")
                continue
            rows.append(run(case, form, n, n, "cpu", "float32"))
    rows += [run(case, "fast", texts, videos, "cpu", "float32") for texts, videos in FEW]
    rows += [run(case, "fast", GROWTH_AT, GROWTH_AT, "cpu", "float32", draws) for draws in (5, 80, 320)]
    rows += [run(case, "fast", GROWTH_AT, GROWTH_AT, "cpu", "float32", M, frames) for frames in (6, 24, 48)]
    if args.large:
        rows += [run(case, "fast", 10_000, videos, "cpu", "float32") for videos in (10, 100, 1000)]
        rows.append(run(case, "fast", 27_763, 670, "cpu", "float32"))
        rows.append(run(case, "fast", 59_800, 2_990, "cpu", "float32"))
        with tempfile.TemporaryDirectory() as folder:
            rows += [run(query_case, videos, folder) for videos in (10**4, 10**5, 10**6)]
    if torch.cuda.is_available():
        for n in (*args.sizes, 10_000):
            rows += [run(case, "fast", n, n, "cuda", dtype) for dtype in ("float32", "bfloat16")]
    else:
        print("CUDA: not run (no device)")

    usual = [row for row in rows if (row.get("M"), row.get("frames")) == (M, FRAMES)]
    square = [row for row in usual if row["device"] == "cpu" and row["texts"] == row["videos"]]
    seconds = {(row["form"], row["texts"]): row["seconds"] for row in square}
    for n in args.sizes:
        fast = seconds["fast", n]
        own, shared = (seconds[f"literal, blocked{draws}", n] / fast for draws in (", own draws", ""))
        literal = f"1/{own:.0f} of the literal blocked form's time with own draws for each pair (the paper)"
        print(f"N = {n}: fast takes {literal}, 1/{shared:.0f} with shared draws")
    powers = growth(rows)
    print("\n".join(f"{name}: time grows with the power {power:.2f}" for name, power in powers.items()))
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    about = dict(machine=f"{cpu}, torch {torch.__version__}", command=" ".join(sys.argv))
    content = {**about, "exponents": powers, "ratios": ratios, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(markdown(content))
    plot([row for row in rows if "seconds" in row], ROOT / "assets" / "inference.png")


if __name__ == "__main__":
    main()

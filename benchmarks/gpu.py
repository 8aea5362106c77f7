"""What a GPU does with this code, in one command: is it right, how fast is it, does a run survive a stop.

    python benchmarks/gpu.py                        # one card, under 10 minutes, no download
    python benchmarks/gpu.py --device cpu --toy     # every part at toy size, to see that the script runs

T-MASS with random weights, and the built-in clips. Each part runs in its own process, within its limit of
seconds (`parts_of`) and of what is left of TOTAL. A failure is recorded in one line, and the next part runs.
Prints one table a part. Writes benchmarks/gpu.json after each part (toy: into the folder of the run, which
also has gpu.log, with all that the parts print). Exit code 1 if anything failed.

A step takes 32 pairs of 12 frames. MFU: the FLOPs of the plain step (products and convolutions) in each
second, over those of a large product in the same number format on this card in this run. GiB: the peak that
torch allocated. The tolerances (benchmarks/agreement.py, APART) were set without a GPU.
"""

import argparse
import csv
import gc
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import evaluate  # noqa: E402
import shapes  # noqa: E402
import train  # noqa: E402
from benchmarks import inference, train_step  # noqa: E402
from benchmarks.agreement import agreement  # noqa: E402
from benchmarks.own_process import first_line, rows_of  # noqa: E402
from engine.datasets import read_csv  # noqa: E402
from engine.distributed import choose_device  # noqa: E402
from engine.experiment import git_commit, read_log  # noqa: E402
from engine.files import ModelError  # noqa: E402
from engine.frames import FrameCache  # noqa: E402
from engine.scoring import noise_bank, scores  # noqa: E402

TOTAL = 570  # seconds
APART = {"cpu": 0.0, "cuda": 0.1}  # of a resumed run's weights from those of a whole run, see short_training


@dataclass(frozen=True)
class Sizes:
    """The sizes of all parts."""

    archs: tuple[str, ...] = ("ViT-B/32", "ViT-B/16")
    batch: int = 32
    micro: tuple[int, int] = (8, 12)  # the second does not divide the batch
    seconds: float = 2.0  # that a step or product is timed for
    product: int = 8192
    pairs: tuple[tuple[int, int], ...] = ((1000, 1000), (10_000, 1000), (59_800, 2990))  # MSR-VTT, full
    videos: int = 10**6
    clips: tuple[int, int] = (96, 32)  # to train on; to validate and to test on
    training: tuple[int, int] = (24, 10)  # steps; the one in which SIGTERM comes
    workers: tuple[int, ...] = (0, 2, 8)
    batches: int = 20  # that the loader reads


TOY = Sizes(
    archs=("toy",), batch=3, micro=(2, 2), seconds=0.0, product=64, pairs=((20, 30),), videos=70,
    clips=(6, 4), training=(4, 2), workers=(0,), batches=2,
)  # fmt: skip

# ------------------------------------------------------- the parts, which yield the rows of their tables


def machine(device: str, sizes: Sizes) -> Iterator[dict]:
    """What it runs on."""
    about = dict(card=platform.processor() or platform.machine(), torch=torch.__version__)
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        found = (
            subprocess.run(command, capture_output=True, text=True).stdout if shutil.which(command[0]) else ""
        )
        about |= dict(card=card.name, GiB=card.total_memory / 2**30, driver=found.partition("\n")[0])
        about |= dict(cuda=torch.version.cuda, cudnn=str(torch.backends.cudnn.version()))
    yield {**about, "cores": os.cpu_count()}


def products(device: str, sizes: Sizes) -> Iterator[dict]:
    """The speed of a large matrix product in each number format."""
    for kind in ("float32", "bfloat16", "float16"):
        a, b = torch.randn(2, sizes.product, sizes.product, device=device, dtype=getattr(torch, kind))
        seconds = train_step.seconds_a_step(lambda a=a, b=b: a @ b, torch.device(device), 2, sizes.seconds)
        yield {"format": kind, "size": sizes.product, "TFLOP/s": 2e-12 * sizes.product**3 / seconds}


def tests(device: str, sizes: Sizes) -> Iterator[dict]:
    """The tests of the suite that use a GPU if there is one."""
    names = ["tests/test_cuda_path.py", "tests/test_scoring.py::test_scores_do_not_depend_on_the_device"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *names]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    lines = done.stdout.strip().splitlines() or ["no output"]
    yield {"tests": lines[-1].strip("= ")}
    if done.returncode:
        raise RuntimeError("; ".join(line for line in lines if line.startswith("FAILED")) or lines[-1])


def compared(device: str, sizes: Sizes) -> Iterator[dict]:
    """How far the device is from the CPU (benchmarks/agreement.py)."""
    yield from agreement(device, sizes.archs[0])


def steps(device: str, sizes: Sizes, arch: str, compiled: bool) -> Iterator[dict]:
    """train_step in each precision, and the plain step of the released code."""
    few, uneven = sizes.micro
    eager, on = dict(amp="bf16", compile="off"), dict(amp="bf16", compile="on")
    table = {"released way": None, "float32": eager | dict(amp="off"), "bf16": eager}
    table |= {
        "fp16": eager | dict(amp="fp16"),
        f"bf16, micro-batches of {few}": eager | dict(micro_batch=few),
    }
    if compiled:
        parts = f"bf16, compiled, micro-batches of {uneven}"
        table = {"bf16, compiled": on, parts: on | dict(micro_batch=uneven)}
    formats = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}
    for name, options in table.items():
        about = {"arch": arch, "step": name, "format": formats[options["amp"] if options else "off"]}
        yield guarded(about, a_step, device, sizes, arch, options)


def a_step(device: str, sizes: Sizes, arch: str, options: dict | None) -> dict:
    """The speed of one kind of step. "FLOP a clip" is that of the plain step, else None."""
    started, timing = time.perf_counter(), dict(seconds=sizes.seconds, each=4)
    name = "plain" if options is None else "train_step"
    row = train_step.case(arch, device, name, sizes.batch, timing, **(options or {}))
    found = {key: row[key] for key in ("batch", "steps/s", "clips/s")}
    found |= {"GiB": row["gib"] if device.startswith("cuda") else None}
    flops = row["flops"] and row["flops"] / row["batch"]
    return {**found, "FLOP a clip": flops, "seconds in all": time.perf_counter() - started}


def short_training(device: str, sizes: Sizes, folder: Path) -> Iterator[dict]:
    """train.py as it comes: a whole run; one that SIGTERM stops; the rest of it; evaluate.py.

    Raises ValueError if the resumed run ends elsewhere than the whole one: further than APART of the way that
    the whole one's CLIP took from its start. Sums on a GPU are not repeatable, so it may differ there."""
    table, videos = built_in_clips(folder, sizes)
    weights, (count, stop) = folder / "weights.pt", sizes.training
    torch.save(train_step.build(sizes.archs[0]).clip.state_dict(), weights)
    flags = ["--dataset", "csv", "--annotations", table, "--videos", videos, "--data", folder]
    flags += ["--device", device, "--arch", weights, "--epochs", 100, "--max-steps", count]
    flags += ["--batch", sizes.batch, "--workers", sizes.workers[-1]]

    def run(out: str, *more: str, stop_in: int = 0) -> dict:
        """Calls train.main. Returns its exit code, steps, last loss and seconds."""
        step, started, code = train.train_step, time.perf_counter(), 0

        def stopped(state, *arguments):
            if state.step + 1 == stop_in:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(state, *arguments)

        fresh()
        try:
            with mock.patch.object(train, "train_step", stopped):
                train.main([str(flag) for flag in (*flags, "--out", folder / out, *more)])
        except SystemExit as end:
            code = end.code
            if code != 130:
                raise ValueError(code) from None
        losses = [row["loss"] for row in read_log(folder / out) if "loss" in row]
        about = {"exit code": code, "steps": last(out)["step"], "loss": losses[-1] if losses else None}
        return {**about, "seconds": time.perf_counter() - started}

    def last(out: str) -> dict:
        return torch.load(folder / out / "last.pt", map_location="cpu", weights_only=True)

    yield {"run": "train.py", **run("whole")}
    yield {"run": f"train.py, SIGTERM in step {stop}", **run("parts", stop_in=stop)}
    row = {"run": "train.py --resume", **run("parts", "--resume")}
    whole, parts = last("whole")["model"], last("parts")["model"]
    start = torch.load(weights, weights_only=True)
    way = sum((whole[f"clip.{name}"] - value).square().sum() for name, value in start.items()).sqrt()
    apart = (sum((whole[name] - parts[name]).square().sum() for name in whole).sqrt() / way).item()
    yield {**row, "apart, of the way": apart}
    started = time.perf_counter()
    evaluate.main([f"--checkpoint={folder / 'parts'}", f"--data={folder}", f"--device={device}"])
    yield {"run": "evaluate.py", "seconds": time.perf_counter() - started}
    if row["steps"] != count or not apart <= APART[torch.device(device).type]:
        raise ValueError(
            f"the resumed run ended at step {row['steps']} of {count}, {apart:.2g} of the way apart"
        )


def inference_table(device: str, sizes: Sizes) -> Iterator[dict]:
    """Scores of all pairs, the best of 20 draws."""
    cases = [("fast", *pairs, kind) for pairs in sizes.pairs for kind in ("float32", "bfloat16")]
    cases += [(form, *sizes.pairs[0], "float32") for form in ("fast, R of t and v", "bare products")]
    for form, texts, videos, kind in cases:
        about = {"form": form, "texts": texts, "videos": videos, "format": kind}
        row = guarded(about, inference.case, form, texts, videos, torch.device(device).type, kind)
        if "seconds" in row:
            row["million pairs/s"] = texts * videos / row["seconds"] / 1e6
            row["GiB"] = row.pop("gib")
        yield {name: value for name, value in row.items() if name not in ("device", "dtype")}


def one_query(device: str, sizes: Sizes) -> Iterator[dict]:
    """One text against a large library of float16 features, which are on the device, or in host memory."""
    for name, place in (("device", device), ("host", "cpu")):
        about = {"videos": sizes.videos, "float16 features": name}
        yield guarded(about, a_query, torch.device(device), place, sizes.videos)


def a_query(device: torch.device, place: str, videos: int) -> dict:
    """The seconds of a query, the median of three after the first, and the peak of memory."""
    model, noise = inference.Heads().to(device), noise_bank(inference.M, inference.DIM, 0)
    text = 0.45 * torch.randn(1, inference.DIM, device=device)
    frames = torch.empty(videos, inference.FRAMES, inference.DIM, dtype=torch.float16, device=place)
    some = (0.45 * torch.randn(min(videos, 10_000), inference.FRAMES, inference.DIM)).half().to(place)
    for part in frames.split(len(some)):
        part.copy_(some[: len(part)])
    times = []
    for _ in range(4):
        started = time.perf_counter()
        scores(model, text, frames, noise)
        train_step.synchronize(device)
        times.append(time.perf_counter() - started)
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"seconds": statistics.median(times[1:]), "the first": times[0], "GiB": gib}


def loader(device: str, sizes: Sizes, folder: Path) -> Iterator[dict]:
    """Batches from the cache of frames, cropped and flipped, brought to the device."""
    clips = [clip for clip in read_csv(*built_in_clips(folder, sizes)) if clip.split == "train"]
    cache, where = FrameCache(folder / "cache", train_step.FRAMES, 224), torch.device(device)
    cache.fill(clips)
    dataset = data.ClipDataset(clips, cache, augmentation=(0, 0))
    order = [[(n % len(clips), 0) for n in range(k, k + sizes.batch)] for k in range(sizes.batches + 1)]
    for workers in sizes.workers:
        batches = data.batches(dataset, order, workers, pin_memory=where.type == "cuda")
        for number, (images, _) in enumerate(batches):
            images.to(where, non_blocking=True)
            if number == 0:  # the workers have started
                started = time.perf_counter()
        train_step.synchronize(where)
        speed = sizes.batches / (time.perf_counter() - started)
        yield {"workers": workers, "batches/s": speed, "clips/s": speed * sizes.batch}


# --------------------------------------------------------------------------------------- what the parts share


def built_in_clips(folder: Path, sizes: Sizes) -> tuple[Path, Path]:
    """Draws clips, once. Returns their table and their folder."""
    table, videos, (learn, rest) = folder / "clips.csv", folder / "clips", sizes.clips
    if not table.exists():
        videos.mkdir(exist_ok=True)
        shapes._render_clips((videos, 0, range(learn + rest)))
        with table.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["video", "caption", "split"])
            for n in range(learn + rest):
                split = "train" if n < learn else ("val", "test")[n % 2]
                captions = shapes.make_clip(0, n).captions
                rows.writerows([f"clip{n:05d}.mp4", caption.text, split] for caption in captions)
    return table, videos


def fresh() -> None:
    """Forgets the memory and the compiled graphs of what ran before."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def guarded(about: dict, function: Callable[..., dict], *arguments) -> dict:
    """Returns a row with what the function finds, or why it failed: the next row can still be measured."""
    fresh()
    try:
        return {**about, **function(*arguments)}
    except Exception as error:
        return {**about, "failed": first_line(error)}


# ---------------------------------------------------------------------------------------------- the command


def parts_of(sizes: Sizes, folder: Path) -> dict[str, tuple[float, Callable, tuple]]:
    """The parts in their order: limit in seconds, function, and its arguments after device and sizes."""
    first, *others = sizes.archs
    parts = {"machine": (40, machine, ()), "products": (40, products, ()), "tests": (100, tests, ())}
    parts["device against CPU"] = (60, compared, ())
    parts[f"steps, {first}"] = (90, steps, (first, False))
    parts[f"compiled steps, {first}"] = (120, steps, (first, True))
    parts["short training"] = (150, short_training, (folder,))
    parts["inference"] = (90, inference_table, ())
    parts["one query"] = (60, one_query, ())
    parts["loader"] = (60, loader, (folder,))
    for arch in others:
        parts[f"steps, {arch}"] = (90, steps, (arch, False))
        parts[f"compiled steps, {arch}"] = (120, steps, (arch, True))
    return parts


def finish(rows: list[dict], known: dict) -> None:
    """Adds what needs other parts: MFU and the ratio to the released way of a step; what a loader feeds."""
    for row in rows:
        if "TFLOP/s" in row:
            known[row["format"]] = 1e12 * row["TFLOP/s"]
        if flops := row.pop("FLOP a clip", None):
            known[row["arch"]] = flops, row["clips/s"]
        if "steps/s" in row:
            flops, plain = known.get(row["arch"], (None, None))
            row["ratio"] = row["clips/s"] / plain if plain else None
            peak = known.get(row["format"])
            row["MFU, %"] = 100 * flops * row["clips/s"] / peak if flops and peak else None
            known["fastest"] = max(known.get("fastest", 0.0), row["clips/s"])
        if "workers" in row:
            row["of the fastest step"] = row["clips/s"] / known["fastest"] if "fastest" in known else None


def show(name: str, rows: list[dict], failure: str, seconds: float) -> None:
    """Prints the table of a part in Markdown."""

    def cell(value: object) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    print(f"\n{name}, {seconds:.0f} s\n")
    if columns := list(dict.fromkeys(column for row in rows for column in row)):
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(cell(row.get(column)) for column in columns)} |")
    if failure:
        print(f"\nfailed: {failure}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Runs the parts, prints their tables, writes the JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--toy", action="store_true", help="toy sizes; their figures mean nothing")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the folder of the run goes")
    args = parser.parse_args(arguments)
    try:
        device = str(choose_device(args.device))
    except ModelError as error:
        sys.exit(f"error: {error}")
    folder = args.runs / time.strftime("gpu-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    path = folder / "gpu.json" if args.toy else ROOT / "benchmarks" / "gpu.json"
    sizes, known, began, failed = TOY if args.toy else Sizes(), {}, time.monotonic(), []
    result = dict(commit=git_commit(), device=device, toy=args.toy, machine={}, seconds=0, parts={})
    for name, (limit, function, more) in parts_of(sizes, folder).items():
        started = time.monotonic()
        limit, rows = min(limit, TOTAL - (started - began)), []
        failure = f"not run, the {TOTAL} s of all parts are over"
        if limit > 5:
            rows, failure = rows_of(function, device, sizes, *more, limit=limit, log=folder / "gpu.log")
        seconds = time.monotonic() - started
        finish(rows, known)
        show(name, rows, failure, seconds)
        failed += [name] if failure or any("failed" in row for row in rows) else []
        result["machine"] = rows[0] if name == "machine" and rows else result["machine"]
        result["parts"][name] = dict(seconds=round(seconds, 1), limit=limit, rows=rows, failed=failure)
        result["seconds"] = round(time.monotonic() - began)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{result['seconds']} s. Failed: {', '.join(failed) or 'nothing'}. {path}, {folder / 'gpu.log'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

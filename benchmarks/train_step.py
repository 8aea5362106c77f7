"""Time and memory of a training step: train.train_step, and a plain step of the same model; its stages.

A second part times a step of psi and R alone on the CPU, on fixed features, as the demo trains: literally as
train.forward is written, and by engine/fast_training.py, in turns; with 1 and 2 threads; and while another
process holds one of the cores. `--heads` measures this part alone.

    python benchmarks/train_step.py       # the tiny CLIP on the CPU; on CUDA also ViT-B/32 and ViT-B/16

T-MASS with random weights, all of it trained, 32 pairs of 12 frames. The plain step is that of the released
code: float32, eager, attention written out, unfused AdamW, the loss read back in each step. torch counts the
FLOPs (products and convolutions, forward and backward) on the plain step. FLOPs per second over the peak of
the device are its model-FLOP utilisation (MFU). The peak is the data sheet's for dense bf16 if PEAKS has the
GPU, else that of a large matrix product in this run.

Each case runs in its own process. Memory is the growth of the peak from before the first step on the CPU, and
the whole peak on CUDA. Ratios compare cases of one run. Writes benchmarks/train_step.json.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import shapes  # noqa: E402
import train  # noqa: E402
from benchmarks.own_process import in_own_process  # noqa: E402
from engine.backbone import import_clip, load_clip  # noqa: E402
from engine.config import Config, preset  # noqa: E402
from engine.datasets import Clip  # noqa: E402
from engine.frames import FrameCache  # noqa: E402
from engine.optim import TrainState, compile_encoders, train_mode  # noqa: E402
from model import TMASS  # noqa: E402

BATCH, FRAMES, MICRO = 32, 12, 8
SECONDS = 8  # a case is timed for about this long
HEADS = {"X-Pool": ("xpool", None), "T-MASS, paper": ("tmass", "paper"), "T-MASS, best": ("tmass", "best")}
WAITING = {"sleep": {"OMP_WAIT_POLICY": "passive"}, "spin": {"OMP_WAIT_POLICY": "active"}}  # of OpenMP
VIT = dict(
    embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, context_length=77,
    vocab_size=49408, transformer_width=512, transformer_heads=8, transformer_layers=12,
)  # fmt: skip
TOY = dict(embed_dim=32, image_resolution=32, vision_layers=1, vision_width=64, transformer_width=64)
TOY |= dict(transformer_heads=1, transformer_layers=1, vision_patch_size=16)  # to see that a script runs
# Dense bf16 products with float32 sums, FLOP/s, by the data sheets. The first name in the GPU's own counts.
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
    "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12,
}  # fmt: skip
# The steps that are compared, with their flags of train.py. Nothing is compiled on the CPU.
STEPS = {
    "plain": {},
    "train_step": {},
    "train_step --compile off": dict(compile="off"),
    f"train_step --micro-batch {MICRO}": dict(micro_batch=MICRO),
}


def build(arch: str) -> TMASS:
    """Returns T-MASS with random weights at the sizes of an arch."""
    torch.manual_seed(0)
    if arch == "tiny":
        return TMASS(load_clip("tiny"), num_frames=FRAMES)
    sizes = TOY if arch == "toy" else dict(vision_patch_size=int(arch.split("/")[1]))
    return TMASS(import_clip().model.CLIP(**{**VIT, **sizes}).float(), num_frames=FRAMES)


def config_of(arch: str, batch: int, **options) -> Config:
    """Returns the config of train.py for an arch, with the paper's recipe and all of CLIP trained."""
    base = preset("shapes" if arch == "tiny" else "msrvtt", "tmass", "paper")
    own = dict(arch=arch, batch=batch, num_frames=FRAMES, freeze="none", augment=True)
    return replace(base, **own, **options)


def random_batch(model: TMASS, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns images and tokens of a batch, on the device."""
    size, length = model.resolution, model.clip.context_length
    images = torch.randint(0, 256, (batch, FRAMES, 3, size, size), dtype=torch.uint8)
    return images.to(device), torch.randint(1, 49407, (batch, length)).to(device)


def plain_step(
    model: TMASS, optimizer: torch.optim.Optimizer, images: Tensor, tokens: Tensor, config: Config
) -> float:
    """Takes a step as the released code does. Returns the same loss as train_step."""
    literal = patch.object(train, "fast_symbols", return_value=None)
    with sdpa_kernel(SDPBackend.MATH), literal:
        text, frames = model.encode_text(tokens), model.encode_frames(data.normalise(images))
        loss, _ = train.forward(model, text, frames, config)
        optimizer.zero_grad()
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    optimizer.step()
    return loss.item()


def stepper(
    name: str, model: TMASS, config: Config, device: torch.device
) -> tuple[Callable[[Tensor, Tensor], object], TrainState | None]:
    """Returns a function that takes one step of a kind (of STEPS) on a batch, and its state (plain: None)."""
    train_mode(model, config)
    if name == "plain":
        options = dict(weight_decay=config.weight_decay, foreach=False, fused=False)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-6, **options)
        return lambda images, tokens: plain_step(model, optimizer, images, tokens, config), None
    compile_encoders(model, config.compile)
    state, encoder = TrainState(model, config, total=10_000), train.Encoder(model, config)

    def step(images: Tensor, tokens: Tensor) -> object:
        return train.train_step(state, encoder, images, tokens, config, len(tokens))

    return step, state


def synchronize(device: torch.device) -> None:
    """Waits until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_step(
    step: Callable[[], object], device: torch.device, warm_up: int, seconds: float = SECONDS, each: int = 10
) -> float:
    """Returns the median over rounds. A GPU is waited for only at the end of a round (`each` steps)."""
    for _ in range(warm_up):
        step()
    synchronize(device)
    each, rounds = each if device.type == "cuda" else 1, []
    while len(rounds) < 3 or sum(rounds) * each < seconds:
        started = time.perf_counter()
        for _ in range(each):
            step()
        synchronize(device)
        rounds.append((time.perf_counter() - started) / each)
    return statistics.median(rounds)


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Returns the peak FLOP/s of a device, and the source of the number."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return peak, f"{name}: {peak / 1e12:.0f} TFLOP/s dense bf16 by its data sheet"
    size, kind = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=kind)
    peak = 2 * size**3 / seconds_a_step(lambda: a @ b, device, 2, seconds=3)
    what = f"{size} x {size} {str(kind).removeprefix('torch.')} product"
    return peak, f"{device.type}: {peak / 1e12:.3g} TFLOP/s, measured, {what}"


def count_flops(step: Callable[[], object]) -> int:
    """Returns the FLOPs of the products and convolutions in one step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def resident(peak: bool) -> float:
    """Returns the memory of this process in GiB: its peak so far, or now."""
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def measure(arch: str, device: torch.device, name: str, batch: int, timing: dict, **options) -> dict:
    """Returns batch, steps/s, clips/s, memory in GiB and FLOPs of one kind of step.

    timing: arguments of seconds_a_step. options: flags of train.py besides those of STEPS."""
    model = build(arch).to(device)
    images, tokens = random_batch(model, batch, device)
    before = resident(peak=False)
    step, _ = stepper(name, model, config_of(arch, batch, **STEPS[name], **options), device)
    flops = count_flops(lambda: step(images, tokens)) if name == "plain" else None
    seconds = seconds_a_step(lambda: step(images, tokens), device, warm_up=2, **timing)
    cuda = device.type == "cuda"
    gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else resident(peak=True) - before
    return {"batch": batch, "steps/s": 1 / seconds, "clips/s": batch / seconds, "gib": gib, "flops": flops}


def case(
    arch: str, device: str, name: str, batch: int = BATCH, timing: dict | None = None, **options
) -> dict:
    """Returns what `measure` finds. Halves the batch until it fits the memory of the GPU."""
    found = None
    while found is None:
        try:
            found = measure(arch, torch.device(device), name, batch, timing or {}, **options)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        if found is None:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return dict(arch=arch, device=device, step=name, **found)


def peak_case(device: str) -> dict:
    """Returns the peak of a device, {"peak", "about"}."""
    return dict(zip(("peak", "about"), peak_flops(torch.device(device))))


STAGES = ("data", "encode text", "encode frames", "fuse", "loss", "backward", "optimizer", "other")


class StageClock:
    """Sums up the seconds of each stage; waits for the device before and after it."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(float)

    def timed(self, stage: str, function: Callable) -> Callable:
        """Returns the function, with its time added to a stage."""

        def run(*arguments, **keywords):
            started = self.now()
            out = function(*arguments, **keywords)
            self.seconds[stage] += self.now() - started
            return out

        return run

    def now(self) -> float:
        """Returns the time once the device is idle."""
        synchronize(self.device)
        return time.perf_counter()

    def watch(self, model: TMASS, state: TrainState) -> None:
        """Times the functions that train_step calls, so the measured step is that of train.py."""
        model.encode_text = self.timed("encode text", model.encode_text)
        model.encode_frames = self.timed("encode frames", model.encode_frames)
        for name, stage in {"fast_symbols": "fuse", "tmass_loss": "loss"}.items():
            setattr(train, name, self.timed(stage, getattr(train, name)))
        torch.Tensor.backward = self.timed("backward", torch.Tensor.backward)
        nn.utils.clip_grad_norm_ = self.timed("optimizer", nn.utils.clip_grad_norm_)
        methods = dict.fromkeys(("unscale_", "step", "update"), state.scaler)
        methods["after_backward"] = state.guard
        for name, part in methods.items():
            setattr(part, name, self.timed("optimizer", getattr(part, name)))


def stages_case(arch: str, device: str, folder: str) -> dict:
    """Returns {stage: milliseconds} of train_step, the median over steps.

    data: loading a batch of built-in clips from the cache, by one process."""
    where, config = torch.device(device), config_of(arch, BATCH)
    model, caption = build(arch).to(where), ("a red square rolls to the left",)
    clips = [Clip(path.name, path, caption, "train") for path in sorted(Path(folder).glob("*.mp4"))]
    cache = FrameCache(Path(folder) / "cache", FRAMES, model.resolution)
    assert cache.fill(clips) == {}
    dataset = data.ClipDataset(clips, cache, model.clip.context_length, augmentation=(0, 0))
    step, state = stepper("train_step", model, config, where)
    order = [[(clip, 0) for clip in range(BATCH)]]
    clock, steps = StageClock(where), []

    def load() -> tuple[Tensor, Tensor]:
        images, tokens = next(iter(data.batches(dataset, order, pin_memory=where.type == "cuda")))
        return images.to(where), tokens.to(where)

    for _ in range(3):
        step(*load())
    clock.watch(model, state)
    began = clock.now()
    while len(steps) < 3 or time.perf_counter() - began < SECONDS:
        clock.seconds.clear()
        started = clock.now()
        step(*clock.timed("data", load)())
        total = clock.now() - started
        steps.append({**clock.seconds, "other": total - sum(clock.seconds.values())})
    ms = {stage: 1e3 * statistics.median(step[stage] for step in steps) for stage in STAGES}
    return dict(arch=arch, device=device, ms=ms)


def head_step(method: str, recipe: str | None, batch: int) -> Callable[[], object]:
    """Returns a function that trains psi and R for one step on random features, as on the built-in clips."""
    config = replace(preset("shapes", method, recipe), batch=batch)
    torch.manual_seed(0)
    model = TMASS(load_clip("tiny"), config.fusion, config.radius, FRAMES)
    model.clip.requires_grad_(False)
    model.logit_scale.requires_grad_(True)
    train_mode(model, config)
    state, encoder = TrainState(model, config, total=10_000), train.Encoder(model, config)
    text, frames = torch.randn(batch, 256), torch.randn(batch, FRAMES, 256)
    return lambda: train.train_step(state, encoder, frames, text, config, batch)


def heads_case(name: str, batch: int) -> dict:
    """Returns milliseconds of a step of psi and R by each form, which take turns, and the ratio; by one
    thread, as the demo has for each of its runs."""
    torch.set_num_threads(1)
    step, seconds = head_step(*HEADS[name], batch), {"literal": [], "fast": []}
    while len(seconds["fast"]) < 23:
        for form, found in seconds.items():
            literal = patch.object(train, "fast_symbols", return_value=None)
            with literal if form == "literal" else nullcontext():
                started = time.perf_counter()
                step()
                found.append(1e3 * (time.perf_counter() - started))
    ms = {form: statistics.median(found[3:]) for form, found in seconds.items()}
    return dict(
        model=name, batch=batch, threads=torch.get_num_threads(), ms=ms, ratio=ms["literal"] / ms["fast"]
    )


def mean_ms(name: str, batch: int, seconds: float = 3) -> float:
    """Returns the mean milliseconds of a step of psi and R over about so many seconds."""
    step, count = head_step(*HEADS[name], batch), 0
    for _ in range(2):
        step()
    started = time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        step()
        count += 1
    return 1e3 * passed / count


def contention_case(name: str, batch: int) -> dict:
    """Returns ms of a step by threads, how OpenMP waits, and whether another process holds a core."""
    found = {}
    for load in ("free", "one core held"):
        other = subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) if load != "free" else None
        if other:
            os.sched_setaffinity(other.pid, {max(os.sched_getaffinity(0))})
        try:
            for threads, waiting in ((1, "sleep"), (2, "sleep"), (2, "spin")):
                code = f"from benchmarks.train_step import mean_ms; print(mean_ms({name!r}, {batch}))"
                env = {**os.environ, "OMP_NUM_THREADS": str(threads), **WAITING[waiting]}
                done = subprocess.run(
                    [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
                )
                found[f"{load}, {threads} threads, {waiting}"] = float(done.stdout.split()[-1])
        finally:
            if other:
                other.kill()
                other.wait()
    return dict(model=name, batch=batch, ms=found)


def heads() -> dict:
    """Measures and prints the steps of psi and R alone."""
    rows = [row for name in HEADS for batch in (32, 64) if (row := run(heads_case, name, batch))]
    found = dict(load=os.getloadavg()[0], rows=rows, contention=contention_case("X-Pool", 64))
    print("\n".join(("", heads_table(found), "", contention_table(found))))
    return found


def run(function: Callable, *arguments) -> dict | None:
    """Runs a case in its own process. Returns what it finds, None if it failed."""
    row, code = in_own_process(function, *arguments)
    if row is None:
        print(f"{function.__name__}{arguments}: failed, exit code {code}", flush=True)
    return row


def compare(arch: str, device: str, peak: float) -> list[dict]:
    """Returns and prints the steps of an arch.

    The plain step and ours take turns, twice, and the faster run counts: other load then affects both."""
    names = [name for name in STEPS if device == "cuda" or "compile" not in name]
    found = [row for row in (run(case, arch, device, name) for name in [*names[:2], *names]) if row]
    runs = {name: [row for row in found if row["step"] == name] for name in names}
    rows = [max(same, key=lambda row: row["clips/s"]) for same in runs.values() if same]
    plain = next((row for row in rows if row["step"] == "plain"), None)
    flops = plain["flops"] / plain["batch"] if plain else float("nan")
    for row in rows:
        row["ratio"] = row["clips/s"] / plain["clips/s"] if plain else None
        row["mfu"] = 100 * flops * row["clips/s"] / peak
    print(f"\n{arch} on {device}, {BATCH} x {FRAMES} frames, {flops * BATCH / 1e12:.3g} TFLOP a step\n")
    print(steps_table(rows), flush=True)
    return rows


# The tables of docs/training.md, from the content of benchmarks/train_step.json.


def steps_table(rows: list[dict]) -> str:
    """Steps of one model beside each other."""
    lines = [
        "| step | steps/s | clips/s | ratio | memory beyond weights, GiB | MFU, % |",
        "|---|" + "---:|" * 5,
    ]
    for row in rows:
        step = row["step"].replace("train_step --micro-batch 8", "train_step, `--micro-batch 8`")
        smaller = f", batch {row['batch']} (out of memory with more)" if row["batch"] < BATCH else ""
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        speed = f"{row['steps/s']:.2f} | {row['clips/s']:.1f} | {ratio}"
        lines.append(f"| {step}{smaller} | {speed} | {row['gib']:.2f} | {row['mfu']:.1f} |")
    return "\n".join(lines)


def stages_table(row: dict) -> str:
    """Milliseconds and percent of each stage of a step."""
    ms, total = row["ms"], sum(row["ms"].values())
    lines = ["| stage of a step | " + " | ".join(ms) + " |", "|---|" + "---:|" * len(ms)]
    lines.append("| ms | " + " | ".join(f"{x:.0f}" for x in ms.values()) + " |")
    lines.append("| % | " + " | ".join(f"{100 * x / total:.0f}" for x in ms.values()) + " |")
    return "\n".join(lines)


def heads_table(heads: dict) -> str:
    """Steps of psi and R alone, by both forms, and how the fast one grows from batch 32 to 64."""
    lines = ["| model | batch | literal, ms | fast, ms | ratio | fast grows with the batch to the power |"]
    lines.append("|---|" + "---:|" * 5)
    fast = {(row["model"], row["batch"]): row["ms"]["fast"] for row in heads["rows"]}
    for row in heads["rows"]:
        times = f"{row['ms']['literal']:.1f} | {row['ms']['fast']:.1f} | {row['ratio']:.2f}"
        half = fast.get((row["model"], row["batch"] // 2))
        power = "" if half is None else f"{math.log2(row['ms']['fast'] / half):.2f}"
        lines.append(f"| {row['model']} | {row['batch']} | {times} | {power} |")
    return "\n".join(lines)


def contention_table(heads: dict) -> str:
    """A step of psi and R alone by threads, with both cores free and with one held by another process."""
    ms = heads["contention"]["ms"]
    cases = {
        "1 thread": "1 threads, sleep",
        "2 threads, sleeping": "2 threads, sleep",
        "2 threads, spinning": "2 threads, spin",
    }
    lines = ["| ms a step | " + " | ".join(cases) + " |", "|---|" + "---:|" * len(cases)]
    for load in ("free", "one core held"):
        lines.append(
            f"| {load} | " + " | ".join(f"{ms[f'{load}, {case}']:.0f}" for case in cases.values()) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the tables, writes the JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--heads", action="store_true", help="time psi and R alone; keep the other figures")
    path = ROOT / "benchmarks" / "train_step.json"
    if parser.parse_args().heads:
        path.write_text(json.dumps({**json.loads(path.read_text()), "heads": heads()}, indent=1) + "\n")
        return
    devices = {"cpu": ("tiny",), "cuda": ("ViT-B/32", "ViT-B/16")}
    rows, stages, peaks = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        shapes._render_clips((Path(folder), 0, range(BATCH)))
        for device, archs in devices.items():
            if device == "cuda" and not torch.cuda.is_available():
                print("\nViT-B/32 and ViT-B/16 on CUDA: not run (no device)")
                continue
            peaks[device] = run(peak_case, device)
            print(f"\npeak of {peaks[device]['about']}", flush=True)
            for arch in archs:
                rows += compare(arch, device, peaks[device]["peak"])
                stages.append(run(stages_case, arch, device, folder))
    for row in filter(None, stages):
        print(f"\n{row['arch']} on {row['device']}, a step by stages\n\n{stages_table(row)}")
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    about = dict(machine=f"{cpu}, torch {torch.__version__}", command=" ".join(sys.argv), peaks=peaks)
    content = json.dumps({**about, "rows": rows, "stages": stages, "heads": heads()}, indent=1)
    path.write_text(content + "\n")


if __name__ == "__main__":
    main()

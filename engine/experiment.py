"""The files of a run, and how it is stopped: its folder, metrics.jsonl, data.json, checkpoints, Ctrl-C.

Only rank 0 writes.
"""

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from engine.checkpoint import load_state, save_checkpoint
from engine.config import Config, plain
from engine.datasets import Clip
from engine.distributed import any_rank, from_rank_zero, rank_and_world
from engine.files import ModelError, write_atomic, writing
from engine.plots import plot_losses
from model import TMASS

LOG_EVERY = 10  # steps between rows of metrics.jsonl; only there the CPU waits for the GPU
ADVICE = "free some space and continue with --resume, or name another --out."


# ---- the folder


def run_folder(config: Config) -> Path:
    """The default folder of a run: runs/DATASET-ARCH-METHOD."""
    arch = Path(config.arch).stem if Path(config.arch).is_file() else config.arch
    return Path("runs") / re.sub(r"[^a-z0-9-]+", "", f"{config.dataset}-{arch}-{config.method}".lower())


def open_run(config: Config) -> Path:
    """Creates the folder to write to: --out, or a new one under runs/. Never overwrites a run.

    Raises ModelError if --out holds a run and --resume is not given, or if the folder cannot be created."""
    out = config.out or run_folder(config)
    if (out / "metrics.jsonl").exists() and not config.resume:
        if config.out:
            advice = "add --resume to continue it, or name another folder by --out"
            raise ModelError(f"{out} holds a run: {advice}.")
        number = 2
        while (out.parent / f"{out.name}-{number}").exists():
            number += 1
        out = out.parent / f"{out.name}-{number}"
    with writing(out, ModelError, ADVICE):
        out.mkdir(parents=True, exist_ok=True)
    return out


def finished(out: Path) -> bool:
    """Whether the run in a folder has reached its last step."""
    return any(row.get("done") for row in read_log(out))


class Run:
    """The folder of a run, its checkpoints, log and progress bar. Raises ModelError if it cannot be written.

    clips, val_clips: the clips in use. skipped: the clips that cannot be read, each with the reason."""

    def __init__(self, config: Config, clips: list[Clip], val_clips: list[Clip], skipped: dict[str, str]):
        self.config, self.out = config, from_rank_zero(lambda: open_run(config))
        self.clips, self.val_clips, self.skipped = clips, val_clips, skipped
        captions = [(clip.id, clip.captions) for clip in [*clips, *val_clips]]
        fingerprint = hashlib.sha256(repr(captions).encode()).hexdigest()
        self.about = dict(config=plain(config), data=fingerprint, commit=git_commit())

    def last_state(self) -> dict | None:
        """The content of last.pt to resume from; None without --resume or last.pt. Raises ModelError."""
        path = self.out / "last.pt"
        if not self.config.resume or not from_rank_zero(path.exists):
            return None
        return load_state(path, self.config, self.about["data"])

    def start(self, name: str, device: torch.device, step: int, validated: int, total: int) -> None:
        """Opens the log and the progress bar at a step, and records and prints what is trained, on what."""
        rank, world = rank_and_world()
        self.log = Log(self.out, step, validated)
        record_data(self.out, self.clips, self.val_clips, self.skipped)
        pairs = min(self.config.batch, len(self.clips))
        what = f"{len(self.clips)} clips to train on, {len(self.val_clips)} to validate"
        machine = device if world == 1 else f"{world} processes on {device.type}"
        steps = f"{total} steps of {pairs} pairs on {machine}"
        say(f"{name} on {self.config.dataset}: {what}, {steps}, run {self.out}")
        bar = dict(initial=step, total=total, desc=self.config.method, unit=" steps", disable=rank > 0)
        self.bar = tqdm(**bar)

    def save(self, name: str, model: TMASS, **more) -> None:
        """Writes a checkpoint: the model, what identifies the run, and `more`. Raises ModelError."""
        if rank_and_world()[0] == 0:
            save_checkpoint(self.out / name, model, **self.about, **more)

    def finish(self, step: int) -> None:
        """Marks the run as finished and draws loss.png. Raises ModelError if the disk is full."""
        self.bar.close()
        if not finished(self.out):
            self.log.row(step=step, done=True)
        if rank_and_world()[0] == 0:
            with writing(self.out / "loss.png", ModelError, ADVICE):
                plot_losses(self.out / "loss.png", read_log(self.out))


def git_commit() -> str:
    """The commit of this code; "unknown" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- what is recorded


def record_data(out: Path, clips: Sequence[Clip], val_clips: Sequence[Clip], skipped: dict[str, str]) -> None:
    """Writes data.json: the number of training clips, the validation clips, and why others were skipped."""
    if rank_and_world()[0] > 0:
        return
    path = out / "data.json"
    content = dict(train=len(clips), val=[clip.id for clip in val_clips], skipped=skipped)
    with writing(path, ModelError, ADVICE):
        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    if skipped:
        what = f"{len(skipped)} clips cannot be read and are skipped, listed in {path}"
        say(f"{what}; the first: {next(iter(skipped.values()))}")


def say(text: str) -> None:
    """Prints a line on rank 0, above the progress bar if there is one."""
    if rank_and_world()[0] == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Log:
    """metrics.jsonl: one row per line.

    A resumed run repeats steps after `step` and validations after `validated`; their rows are dropped."""

    def __init__(self, out: Path, step: int = 0, validated: int = 0):
        self.path, self.started, rows = out / "metrics.jsonl", time.time(), []
        if rank_and_world()[0] == 0:
            if step > 0:
                rows = [row for row in read_log(out) if row["step"] <= (validated if "val" in row else step)]
            with writing(self.path, ModelError, ADVICE):
                write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def row(self, **values) -> None:
        """Appends a row, with the seconds since the log was opened. Raises ModelError if the disk is full."""
        if rank_and_world()[0] == 0:
            row = {**values, "seconds": round(time.time() - self.started, 2)}
            with writing(self.path, ModelError, ADVICE), self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def read_log(out: Path) -> list[dict]:
    """The rows of metrics.jsonl in a run's folder, without incomplete lines (left by a full disk)."""
    path, rows = out / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


# ---- interruption


class Interrupt:
    """A context in which the first Ctrl-C or SIGTERM only sets `asked`: the step can end and be saved.

    The second one kills. Under torchrun later signals are ignored: torchrun repeats a signal that the
    terminal has already sent to every process, and kills the processes itself after a while."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "Interrupt":
        self.asked = False
        self.before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def _ask(self, *_) -> None:
        self.asked = True
        if not dist.is_initialized():
            self.__exit__()

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_any_rank(self, device: torch.device, ask_others: bool) -> bool:
        """Whether any process was asked to stop; under torchrun False without `ask_others`, which waits for
        the GPU."""
        alone = rank_and_world()[1] == 1
        return self.asked if alone else ask_others and any_rank(self.asked, device)

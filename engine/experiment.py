"""The files of a run, and how it is stopped: its folder, metrics.jsonl, data.json, checkpoints, Ctrl-C.

Only rank 0 writes.
"""

import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from engine.checkpoint import load_state, save_checkpoint, to_record
from engine.config import Config
from engine.datasets import Clip
from engine.distributed import any_rank, from_rank_zero, rank_and_world
from engine.files import ModelError, remove_leftovers, write_atomic, writing
from engine.plots import plot_losses
from model import TMASS

LOG_EVERY = 10  # steps between rows of metrics.jsonl; only there the CPU waits for the GPU
ADVICE = "free some space and continue with --resume, or name another --out."


# ---- the folder


def run_folder(config: Config) -> Path:
    """The default folder of a run: runs/DATASET-ARCH-METHOD."""
    arch = Path(config.arch).stem if Path(config.arch).is_file() else config.arch
    return Path("runs") / re.sub(r"[^a-z0-9-]+", "", f"{config.dataset}-{arch}-{config.method}".lower())


def open_run(config: Config) -> tuple[Path, "Claim"]:
    """Creates the folder to write to: --out, or a new one under runs/. Never overwrites a run.

    Returns the folder and this process's claim to it; other processes take another one. Raises ModelError if
    --out holds a run and --resume is not given, if another process is training there, or if the folder cannot
    be created."""
    first = config.out or run_folder(config)
    for number in itertools.count(1):
        out = first if number == 1 else first.with_name(f"{first.name}-{number}")
        if number > 1 and out.exists():
            continue
        with writing(out, ModelError, ADVICE):
            out.mkdir(parents=True, exist_ok=True)
            claim = Claim.of(out)
        if claim and (config.resume or not (out / "metrics.jsonl").exists()):
            remove_leftovers(out)
            return out, claim
        if config.out or config.resume:
            what = f"{out} holds a run: add --resume to continue it"
            what = what if claim else f"another process is training in {out}: wait for its end"
            raise ModelError(f"{what}, or name another folder by --out.")
    raise AssertionError("the numbers do not end")


class Claim:
    """An exclusive lock on a folder, held by this process until no Run uses it or the process ends."""

    held: ClassVar = weakref.WeakValueDictionary()

    @classmethod
    def of(cls, folder: Path) -> "Claim | None":
        """The claim of this process to a folder, one for all its Runs; None if another process has one."""
        folder = folder.resolve()
        try:
            cls.held[folder] = claim = cls.held.get(folder) or cls(folder)
        except BlockingIOError:
            return None
        return claim

    def __init__(self, folder: Path):
        self.handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass

    def close(self) -> None:
        """Releases the folder."""
        handle, self.handle = getattr(self, "handle", None), None
        if handle is not None:
            os.close(handle)

    __del__ = close


def _close_claims() -> None:
    for claim in Claim.held.values():
        claim.close()


os.register_at_fork(after_in_child=_close_claims)  # a worker that outlives a killed run must not hold it


def finished(out: Path) -> bool:
    """Whether the run in a folder has reached its last step."""
    return any(row.get("done") for row in read_log(out))


class Run:
    """The folder of a run, its checkpoints, log and progress bar. Raises ModelError if it cannot be written.

    clips, val_clips: the clips in use. skipped: the clips that cannot be read, each with the reason."""

    def __init__(self, config: Config, clips: list[Clip], val_clips: list[Clip], skipped: dict[str, str]):
        self.config, self.out = config, from_rank_zero(lambda: self._open(config))
        self.clips, self.val_clips, self.skipped = clips, val_clips, skipped
        captions = [(clip.id, clip.captions) for clip in [*clips, *val_clips]]
        fingerprint = hashlib.sha256(repr(captions).encode()).hexdigest()
        machine = f"{platform.machine()}, torch {torch.__version__}"
        self.about = dict(config=to_record(config), data=fingerprint, commit=git_commit(), machine=machine)

    def _open(self, config: Config) -> Path:
        out, self.claim = open_run(config)
        return out

    def last_state(self) -> dict | None:
        """The content of last.pt to resume from; None without --resume or last.pt. Raises ModelError."""
        path = self.out / "last.pt"
        if not self.config.resume or not from_rank_zero(path.exists):
            return None
        return load_state(path, self.config, self.about["data"])

    def start(
        self, name: str, device: torch.device, step: int, validated: int, total: int, each: int, pairs: int
    ) -> None:
        """Opens the log and the progress bar at a step, and records and prints what is trained, on what.

        total, each: the steps of the run and of an epoch."""
        rank, world = rank_and_world()
        self.log = Log(self.out, step, validated)
        record_data(self.out, self.clips, self.val_clips, self.skipped)
        what = f"{len(self.clips)} clips to train on, {len(self.val_clips)} to validate"
        machine = device if world == 1 else f"{world} processes on {device.type}"
        steps = f"{total} steps of {pairs} pairs on {machine}"
        captions = sum(len(clip.captions) for clip in self.clips)
        if captions > each * pairs:
            steps += f" (an epoch leaves out {captions - each * pairs} of {captions} captions, chosen anew)"
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
            say(f"trained in {time.time() - self.log.started:.0f} s: {self.out}")
        if rank_and_world()[0] == 0:
            with writing(self.out / "loss.png", ModelError, ADVICE):
                plot_losses(self.out / "loss.png", read_log(self.out))


def git_commit() -> str:
    """The commit of this code; "unknown" outside its repository, such as for an installed copy."""
    root = Path(__file__).resolve().parent.parent
    commands = ["rev-parse", "--show-toplevel"], ["describe", "--always", "--dirty"]
    try:
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        top, commit = (run(["git", "-C", str(root), *command]).stdout.strip() for command in commands)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit if Path(top) == root else "unknown"


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


def say_noise(ratio: float | None, config: Config, first: bool) -> None:
    """Prints |R eps| / |t| of a validation; the first time also a warning if it is larger than 1."""
    if ratio is None:
        return
    say(f"  noise on matching pairs: |R eps| = {ratio:.2f} |t|")
    if first and ratio > 1:
        start = float(f"{0.3 * config.initial_radius / ratio:.1g}")
        advice = f"--initial-radius {start:g} starts it near 0.3 |t|"
        if config.radius not in ("linear", "joint"):
            advice = "--radius linear with a small --initial-radius starts it lower"
        say(f"  warning: the noise is larger than the text, and low rates hardly change it: {advice}.")


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Says what is going on now, and at its end how long it took."""
    say(f"{what} ...")
    started = time.time()
    yield
    say(f"{what}: {time.time() - started:.0f} s")


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
            with writing(self.path, ModelError, ADVICE), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read_log(out: Path) -> list[dict]:
    """The rows of metrics.jsonl in a run's folder, without incomplete lines (left by a full disk)."""
    path, rows = out / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


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

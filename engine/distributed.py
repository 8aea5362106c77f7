"""Several processes under torchrun: devices, shards of a batch, gathering with gradients, and who runs first.

Without torchrun this process is rank 0 of 1: gathering returns its input, and waiting does nothing.
"""

import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from engine.files import DataError, ModelError, first_line

T = TypeVar("T")

# Errors that torch raises for a device that it does not know, was not built for, or cannot reach.
NO_DEVICE = (RuntimeError, AssertionError, ImportError, AttributeError, ValueError, TypeError, OSError)
# Parts of the messages for a worker that was killed, or lacks memory, /dev/shm or open files.
WORKER_FAILED = [
    "exited unexpectedly", "killed by signal", "No space left on device", "shared memory", "ancdata",
    "unable to mmap", "unable to write", "unable to open", "Cannot allocate memory", "Too many open files",
    "Resource temporarily unavailable",
]  # fmt: skip


def choose_device(name: str) -> torch.device:
    """The device of --device; auto: CUDA if available, else the CPU. Raises ModelError for one that fails.

    The device is tried with one number, so the error comes before the work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        (torch.zeros(1, device=device) + 1).item()
    except NO_DEVICE as error:
        kinds = {"cuda": torch.cuda, "mps": torch.mps, "xpu": torch.xpu}
        found = [kind for kind, module in kinds.items() if module.is_available()]
        missing = name.partition(":")[0] in {*kinds} - {*found}
        reason = "it finds no such device on this machine" if missing else first_line(error)
        advice = f"choose {', '.join(['auto', 'cpu', *found])}"
        raise ModelError(f"--device {name}: torch cannot compute there ({reason:.100}); {advice}.") from None
    return device


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turns an error of torch for a lack of memory, on any device, into a ModelError with the advice."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; MPS and the CPU have none of their own
        known = ("out of memory", "can't allocate memory")
        if not isinstance(error, torch.OutOfMemoryError) and not any(part in str(error) for part in known):
            raise
        what = f"the memory of the device is too small ({first_line(error):.150})"
        raise ModelError(f"{what}: {advice}.") from None


def init_distributed(device: str) -> None:
    """Joins the processes of torchrun: NCCL and one GPU each on CUDA, else gloo. Raises ModelError.

    Does nothing without torchrun."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    advice = "start several processes by torchrun, or unset WORLD_SIZE for one"
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ModelError(f"WORLD_SIZE is set, but {missing[0]} is empty or not set: {advice}.")
    if device not in ("auto", "cpu", "cuda"):
        which = "choose cpu, or cuda, which gives each process its own GPU"
        raise ModelError(f"--device {device} is for one process: under torchrun {which}.")
    try:
        world, rank, local = (int(os.environ[name]) for name in names[:3])
        if not 0 <= rank < world:
            raise ValueError(f"RANK is {rank} and WORLD_SIZE {world}")
        gpus = 0 if device == "cpu" else torch.cuda.device_count()
        if 0 < gpus <= local:
            what = f"this machine has {gpus} GPUs and torchrun started more processes"
            raise ModelError(f"{what}: lower --nproc-per-node.")
        if gpus:
            torch.cuda.set_device(local)  # before anything is put on a GPU
        cuda = choose_device(device).type == "cuda"
        # A module of torch takes the group of this moment as a default argument. Imported later, by
        # transformers, it would keep the group, whose threads then abort a process that ends.
        importlib.import_module("torch.distributed.nn.functional")
        # The long timeout lets ranks wait while the first one decodes videos.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    except ModelError:
        raise
    except (ValueError, RuntimeError) as error:  # such as a port in use, or a rank that is no number
        raise ModelError(f"the processes could not be joined ({first_line(error):.150}): {advice}.") from None


def rank_and_world() -> tuple[int, int]:
    """The rank of this process and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# ---- data: each rank holds a shard


def shard(count: int) -> slice:
    """The items of this rank out of `count`. The shards of all ranks, in order, make up the whole."""
    rank, world = rank_and_world()
    return slice(count * rank // world, count * (rank + 1) // world)


def gather(x: Tensor) -> Tensor:
    """All-gather of rows, in the order of ranks, which may hold different numbers of rows. No gradient."""
    if not dist.is_initialized():
        return x
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, len(x))
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def gather_objects(own: dict) -> dict:
    """One dict with the items of all ranks."""
    if not dist.is_initialized():
        return own
    everyones: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    return {name: value for found in everyones for name, value in found.items()}


class _Gather(torch.autograd.Function):
    """All-gather with gradient. Every rank computes the loss of the whole batch, so the gradient of its own
    rows is complete. DDP divides gradients by the number of ranks; the factor cancels it."""

    @staticmethod
    def forward(ctx, own: Tensor, rows: slice, total: int) -> Tensor:
        ctx.rows = rows
        every = own.new_zeros(total, *own.shape[1:])
        every[rows] = own
        dist.all_reduce(every)
        return every

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.rows] * dist.get_world_size(), None, None


def gather_features(own: Float[Tensor, " n *rest"], total: int) -> Float[Tensor, " total *rest"]:
    """The rows of the whole batch, of which this rank holds shard(total). Passes exact gradients back."""
    return _Gather.apply(own, shard(total), total) if dist.is_initialized() else own


def wrap(encoder: nn.Module) -> nn.Module:
    """DistributedDataParallel of a module: averages the gradients of all its parameters over the ranks.

    This includes parameters used outside its forward pass, as long as each gets a gradient in every step."""
    if not dist.is_initialized():
        return encoder
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # newer torch renames the first
        return DistributedDataParallel(encoder, broadcast_buffers=False, gradient_as_bucket_view=True)


# ---- order: who waits for whom


def barrier() -> None:
    """Waits until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """The first process of each machine runs the block before the others, which then find its files."""
    first = not dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:
            barrier()


def from_rank_zero(function: Callable[[], T]) -> T:
    """Calls a function on rank 0 only. All ranks return its result, or raise its DataError or ModelError."""
    if not dist.is_initialized():
        return function()
    box: list = [None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (DataError, ModelError) as error:
            box[0] = error
    dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Waits for the device."""
    if dist.is_initialized():
        flags = torch.tensor(flag, dtype=torch.int32, device=device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        flag = bool(flags)
    return flag


# ---- the processes that load batches


def ignore_signals(worker: int) -> None:
    """For DataLoader's worker_init_fn: a Ctrl-C or SIGTERM for all processes is for the one that trains.

    The step can then end with its batches. A worker ends with its loader, or with the process of it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def loaded(loader: DataLoader) -> Iterator:
    """The batches of a DataLoader. Raises DataError if its workers were killed or lack a resource."""
    try:
        yield from loader
    except (RuntimeError, OSError, EOFError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if any(part in line for part in WORKER_FAILED)), "")
        in_a_worker = str(error).startswith("Caught ")  # an error of the data, unless it names a resource
        of_workers = isinstance(error, OSError | EOFError) and not in_a_worker
        if loader.num_workers == 0 or not (reason or of_workers):
            raise
        _forget(error)
        what = f"a process that loads batches failed ({reason or first_line(error):.150})"
        why = f"memory, or shared memory (/dev/shm), is too small for {loader.num_workers} of them"
        advice = "use --workers 0 or fewer, or give a container more (docker run --shm-size 8g)"
        raise DataError(f"{what}: {why}; {advice}.") from None


def _forget(error: Exception) -> None:
    """Deletes a DataLoader's iterator that failed while it was built: torch then prints an AttributeError."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    traceback.clear_frames(error.__traceback__)
    sys.unraisablehook = hook

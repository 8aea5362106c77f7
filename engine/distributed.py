"""Several processes under torchrun: devices, shards of a batch, gathering with gradients, and who runs first.

Without torchrun this process is rank 0 of 1: gathering returns its input, and waiting does nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.files import DataError, ModelError

T = TypeVar("T")


def choose_device(name: str) -> torch.device:
    """The device of --device; auto: CUDA if available, else the CPU. Raises ModelError for an unknown one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        advice = "leave the flag out to use the CPU"
        raise ModelError(f"--device {name}: torch finds no CUDA device on this machine; {advice}.")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ModelError(f"--device {name}: not a device; choose auto, cpu or cuda.") from None


def init_distributed(device: str) -> None:
    """Joins the processes of torchrun: NCCL and one GPU each on CUDA, else gloo. Raises ModelError.

    Does nothing without torchrun."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    cuda, local = choose_device(device).type == "cuda", int(os.environ["LOCAL_RANK"])
    if cuda and local >= (gpus := torch.cuda.device_count()):
        advice = "lower --nproc-per-node"
        raise ModelError(f"this machine has {gpus} GPUs and torchrun started more processes: {advice}.")
    if cuda:
        torch.cuda.set_device(local)
    # The long timeout lets ranks wait while the first one decodes videos.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))


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
    return DistributedDataParallel(encoder, broadcast_buffers=False, gradient_as_bucket_view=True)


# ---- order: who waits for whom


def barrier() -> None:
    """Waits until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """The first process of each machine runs the block before the others, which then find its files."""
    first = not dist.is_initialized() or os.environ["LOCAL_RANK"] == "0"
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

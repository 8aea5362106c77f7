"""AdamW, its schedule, the guard against non-finite steps, and the state of all these in last.pt."""

import math
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data import epoch_batches
from engine import distributed
from engine.backbone import activation_of, resolve_amp
from engine.config import Config
from engine.datasets import Clip
from engine.distributed import rank_and_world
from engine.files import ModelError, first_line
from engine.weights import MISMATCH
from model import TMASS

READS_FOUND_INF = ("cpu", "cuda")  # the devices whose fused AdamW skips a step by `found_inf`


def learning_rate(step: int, total: int, warmup: float) -> float:
    """The factor of the learning rate: linear warmup over a fraction of the steps, then cosine decay."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def parameter_groups(model: TMASS, config: Config) -> list[dict]:
    """AdamW's three groups: the trainable parameters of CLIP, psi and R, each with its learning rate."""
    clip = [parameter for parameter in model.clip.parameters() if parameter.requires_grad]
    added = getattr(model.fusion, "added", None)  # of a control: trained at the rate of R
    radius = [p for part in (model.radius, added) if part is not None for p in part.parameters()]
    psi = [p for name, p in model.fusion.named_parameters() if not name.startswith("added.")]
    radius_lr = config.head_lr if config.radius_lr is None else config.radius_lr
    return [
        {"params": clip, "lr": config.clip_lr},
        {"params": psi, "lr": config.head_lr},
        {"params": radius, "lr": radius_lr},
    ]


def batch_norms(model: TMASS) -> list[nn.Module]:
    """The BatchNorm layers of CLIP: a ResNet has them, a vision transformer has none."""
    return [module for module in model.clip.modules() if isinstance(module, nn.BatchNorm2d)]


def check_batches(config: Config, model: TMASS, clips: Sequence[Clip], validation: int) -> None:
    """Raises ModelError if the batches cannot be split over the processes. validation: how many clips."""
    _, world = distributed.rank_and_world()
    if config.method == "clip" and batch_norms(model) and (world > 1 or config.micro_batch):
        advice = "leave out --micro-batch and start one process"
        raise ModelError(f"--method clip trains the batch norm of this CLIP, on whole batches: {advice}.")
    if world > min(validation or world, *map(len, epoch_batches(clips, config.batch, config.seed, 0))):
        limit = "the pairs of a batch or the validation clips"
        raise ModelError(f"{world} processes are more than {limit}: start fewer.")


def train_mode(model: TMASS, config: Config) -> None:
    """Training mode, with BatchNorm in eval mode except for --method clip, which (pre)trains CLIP itself."""
    model.train()
    if config.method != "clip":
        for module in batch_norms(model):
            module.eval()


def compile_encoders(model: TMASS, choice: str) -> None:
    """--compile: compiles CLIP's two encoders at their first call. Parameter names stay the same.

    auto: on CUDA, if torch.compile has what it needs; otherwise a line says what is missing."""
    if choice == "off" or (choice == "auto" and not model.logit_scale.is_cuda):
        return
    if choice == "auto" and (missing := missing_for_triton()):
        if rank_and_world()[0] == 0:
            print(f"CLIP is not compiled: {missing}. Training is slower, its result the same.", flush=True)
        return
    model.clip.visual.compile()
    model.clip.transformer.compile()


def missing_for_triton() -> str:
    """Returns what torch.compile lacks on CUDA, or "": triton, which compiles C when it runs."""
    if not find_spec("triton"):
        return "the package triton is not installed"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as triton chooses
    if not compiler or not shutil.which(compiler):
        return f"triton needs a C compiler, and {compiler or 'gcc or clang'} is not found"
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        return f"triton needs Python.h, and {include} has none (package python3-dev or python-devel)"
    command = [compiler, "-I", include, "-x", "c", "-fsyntax-only", "-"]
    done = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    return f"{compiler} fails ({(lines or ['no reason given'])[0]:.150})" if done.returncode else ""


class TrainState:
    """The model with its optimizer, schedule, fp16 scaler and guard, and the progress of the run.

    step: steps taken; validated: step of the last validation; val: its metrics; best: the highest R@1 + R@5
    + R@10 on validation so far."""

    def __init__(self, model: TMASS, config: Config, total: int):
        device = model.logit_scale.device
        self.model, self.step, self.validated, self.best, self.val = model, 0, 0, -1.0, None
        groups = parameter_groups(model, config)
        more = dict(weight_decay=config.weight_decay, eps=config.adam_eps)
        self.optimizer = torch.optim.AdamW(groups, **more, fused=True)
        rate = partial(learning_rate, total=total, warmup=config.warmup)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.scaler = torch.amp.GradScaler(device.type, enabled=resolve_amp(device, config.amp) == "fp16")
        self.guard = Guard(model, config)

    def state_dict(self) -> dict:
        """Everything except the model, as plain values and tensors."""
        return dict(
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
            scaler=self.scaler.state_dict(),
            guard=self.guard.counts.tolist(),
            step=self.step,
            validated=self.validated,
            best=self.best,
            val=self.val,
        )

    def load(self, state: dict) -> None:
        """Restores the content of last.pt, model included. Raises ModelError if it does not fit."""
        try:
            own, arguments = activation_of(self.model.clip), state.get("arguments", {})
            if own != (other := arguments.get("activation", "quick_gelu")):
                raise ValueError(f"its activation is {other}, not {own}")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for parameter, moments in self.optimizer.state.items():
                for name in moments.keys() - {"step"}:  # with the strides of its parameter, which AdamW takes
                    moments[name] = torch.empty_like(parameter).copy_(moments[name])
            self.schedule.load_state_dict(state["schedule"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.guard.counts = self.guard.counts.new_tensor(state["guard"]).view(4)
            for name, kind in (("step", int), ("validated", int), ("best", float), ("val", dict | None)):
                if not isinstance(state[name], kind):
                    raise ValueError(f"its {name} is {state[name]!r:.40}")
                setattr(self, name, state[name])
        except MISMATCH as error:
            advice = "another version wrote it, or --arch has other weights now; name another --out"
            raise ModelError(f"last.pt does not fit this model ({first_line(error)}): {advice}.") from None


class Guard:
    """Skips and counts the steps whose loss or gradient is not finite. The CPU does not wait for a CUDA GPU.

    A skipped step leaves weights, BatchNorm statistics and AdamW's moments unchanged; the schedule and the
    batches go on. With fp16 it halves the loss scale, so a few skipped steps at the start are normal."""

    stop_after = 10  # skipped steps in a row that end the training

    def __init__(self, model: TMASS, config: Config):
        norms = batch_norms(model) if config.method == "clip" else []
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        # Steps skipped; skipped in a row now; the longest such row, and its last step.
        self.counts = torch.zeros(4, dtype=torch.long, device=model.logit_scale.device)

    def before_forward(self) -> None:
        """Keeps the BatchNorm statistics that the forward pass will change."""
        self.kept = [buffer.clone() for buffer in self.statistics]

    def after_backward(self, optimizer: torch.optim.Optimizer, norm: Float[Tensor, ""], step: int) -> None:
        """Makes the optimizer skip the step if the gradient norm is not finite.

        Fused AdamW reads `found_inf` on the device. A GradScaler sets it too. Some devices, such as MPS, do
        not read it: there the gradients are removed, so AdamW has nothing to do."""
        bad = ~norm.isfinite()
        optimizer.found_inf = bad.float()
        if bad.device.type not in READS_FOUND_INF and bad:
            optimizer.zero_grad(set_to_none=True)
        for buffer, old in zip(self.statistics, self.kept):
            buffer.copy_(torch.where(bad, old, buffer))
        skipped, row, longest, last = self.counts.unbind()
        row = (row + 1) * bad
        last = torch.where(row > longest, step, last)
        self.counts = torch.stack([skipped + bad, row, torch.maximum(longest, row), last])

    def read(self) -> tuple[int, int | None]:
        """Steps skipped so far, and the last of `stop_after` skipped in a row or None. Waits for the GPU."""
        skipped, _, longest, last = self.counts.tolist()
        return skipped, last if longest >= self.stop_after else None


def finite(value: Tensor) -> float | None:
    """The value as a float, or None if it is not finite: JSON has no NaN."""
    number = value.item()
    return number if math.isfinite(number) else None

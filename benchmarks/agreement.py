"""How far a device is from the CPU: features, losses, gradients and scores of the same numbers.

A part of benchmarks/gpu.py. The tolerances were set without a GPU: they are a guess until one was measured.
"""

from collections.abc import Iterator
from itertools import chain
from types import SimpleNamespace
from unittest import mock

import torch

import data
import train
from benchmarks import inference, train_step
from engine.backbone import autocast
from engine.config import preset
from engine.scoring import Delta, Expectation, noise_bank, scores
from model import sample_noise

# The largest difference from the CPU's float32: relative to the norm; of scores, which are cosines, absolute.
# cuDNN convolves in TF32, and CLIP cuts frames into patches by a convolution.
TOLERANCES = {
    "text features": 1e-4,
    "frame features": 5e-3,
    "frame features, bf16": 5e-2,
    "frame features, fp16": 1e-2,
    "loss": 1e-4,
    "gradient of psi and R": 1e-3,
    "scores": 2e-5,
    "scores, bf16": 3e-2,
}


def agreement(device: str, arch: str) -> Iterator[dict]:
    """Yields what is compared, its difference and tolerance. Raises ValueError last, if one is outside."""
    outside, where = [], torch.device(device)
    for what, case, difference in chain(of_features(where, arch), of_losses(where), of_scores(where)):
        if not difference <= TOLERANCES[what]:
            outside.append(f"{what} ({case})")
        yield {"what": what, "of": case, "difference": difference, "tolerance": TOLERANCES[what]}
    if outside:
        raise ValueError(f"outside the tolerance: {', '.join(outside)}")


def relative(far: torch.Tensor, exact: torch.Tensor) -> float:
    """|far - exact| / |exact|."""
    return ((far.cpu().double() - exact.double()).norm() / exact.double().norm()).item()


@torch.no_grad()
def of_features(device: torch.device, arch: str) -> Iterator[tuple[str, str, float]]:
    """CLIP's features of four pairs, with random weights."""
    model = train_step.build(arch).eval()
    images, tokens = train_step.random_batch(model, 4, torch.device("cpu"))
    text, frames = model.encode_text(tokens), model.encode_frames(data.normalise(images))
    model, images, tokens = model.to(device), images.to(device), tokens.to(device)
    yield "text features", arch, relative(model.encode_text(tokens), text)
    for amp, what in (("off", ""), ("bf16", ", bf16"), ("fp16", ", fp16")):
        with autocast(device, amp):
            far = model.encode_frames(data.normalise(images))
        yield f"frame features{what}", arch, relative(far, frames)


def features(texts: int, videos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random text and frame features of CLIP's scale, on the CPU."""
    random = torch.Generator().manual_seed(0)
    text = 0.45 * torch.randn(texts, inference.DIM, generator=random)
    return text, 0.45 * torch.randn(videos, inference.FRAMES, inference.DIM, generator=random)


def noise_of_cpu(*shape: int, device: torch.device | None = None, **more) -> torch.Tensor:
    """sample_noise, with the same numbers on every device."""
    return sample_noise(*shape, generator=torch.Generator().manual_seed(0), **more).to(device)


def of_losses(device: torch.device) -> Iterator[tuple[str, str, float]]:
    """The loss of each recipe and its gradient, from the same features and the same noise."""
    text, frames = features(7, 7)
    for recipe in ("paper", "best"):
        config, found = preset("msrvtt", "tmass", recipe), []
        for place in (torch.device("cpu"), device):
            heads = inference.Heads(config.radius).requires_grad_(True).to(place)
            heads.clip = SimpleNamespace(logit_scale=torch.tensor(3.0, device=place))
            with mock.patch.object(train, "sample_noise", noise_of_cpu):
                loss, _ = train.forward(heads, text.to(place), frames.to(place), config)
            loss.backward()
            gradients = [parameter.grad.flatten().cpu() for parameter in heads.parameters()]
            found.append((loss.detach().cpu(), torch.cat(gradients)))
        yield "loss", f"recipe {recipe}", relative(found[1][0], found[0][0])
        yield "gradient of psi and R", f"recipe {recipe}", relative(found[1][1], found[0][1])


def of_scores(device: torch.device) -> Iterator[tuple[str, str, float]]:
    """Scores of 40 x 30 pairs: the best of the same draws, the expected best, its delta form."""
    text, frames = features(40, 30)
    for radius in ("linear", "joint"):
        bank = noise_bank(inference.M, inference.DIM, 0)
        kinds = ("sampled", bank), ("expected", Expectation(inference.M)), ("delta", Delta(inference.M))
        for score, noise in kinds:
            exact = scores(inference.Heads(radius), text, frames, noise)
            for kind, what in ((torch.float32, "scores"), (torch.bfloat16, "scores, bf16")):
                heads, to = inference.Heads(radius).to(device, kind), dict(device=device, dtype=kind)
                far = scores(heads, text.to(**to), frames.to(**to), noise).cpu().float()
                yield what, f"R {radius}, {score}", (far - exact).abs().max().item()

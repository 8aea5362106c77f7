"""The steps that the benchmarks compare do the same work."""

import importlib.util
from dataclasses import replace

import torch
from conftest import ROOT, small_clip

from engine.config import preset
from model import TMASS

spec = importlib.util.spec_from_file_location("train_step", ROOT / "benchmarks" / "train_step.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

BATCH, DIM, CPU = 5, 24, torch.device("cpu")


def a_step(name: str) -> tuple[TMASS, object, tuple[torch.Tensor, torch.Tensor]]:
    """A model, a function that takes a step with it, and a batch."""
    torch.manual_seed(1)
    model = TMASS(small_clip("vit"), num_frames=benchmark.FRAMES, dropout=0.0)
    same = dict(batch=BATCH, num_frames=benchmark.FRAMES, prior_std=0.0)
    config = replace(preset("msrvtt", "tmass"), **same, **benchmark.STEPS[name])
    torch.manual_seed(2)
    return model, benchmark.stepper(name, model, config, CPU)[0], benchmark.random_batch(model, BATCH, CPU)


def test_plain_step_is_the_same_step():
    plain, ours = a_step("plain"), a_step("train_step --micro-batch 8")
    loss, (same_loss, _) = (step(*batch) for _, step, batch in (plain, ours))
    assert abs(loss - same_loss.item()) < 1e-5 * loss
    for (name, a), (_, b) in zip(plain[0].named_parameters(), ours[0].named_parameters()):
        assert (a.grad - b.grad).norm() <= 1e-4 * a.grad.norm() + 1e-8, name


def test_the_timed_step_is_the_papers():
    for arch in ("tiny", "ViT-B/32"):
        assert benchmark.config_of(arch, BATCH).recipe == "paper"


def test_flops_of_a_step_are_those_counted_by_hand():
    """Two for each multiplication of a matrix product. The backward pass costs twice the forward pass, except
    that images need no gradient."""

    def block(tokens, width):  # 12 width^2 weights a token, and two products of attention
        return 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width

    frames = BATCH * benchmark.FRAMES
    patches = 4 * 2 * (3 * 16**2) * 64
    vision = 2 * block(5, 64) + 2 * 64 * DIM
    text = block(20, 64) + 2 * 64 * DIM
    psi = 2 * DIM**2 * (BATCH + 2 * frames + 2 * BATCH**2)  # W_q; W_k and W_v; W_o and P
    psi += 2 * 2 * BATCH * frames * DIM  # a, and the sum of values
    radius = 2 * BATCH * frames * DIM + 2 * BATCH * frames * DIM  # S, and S W
    _, step, batch = a_step("plain")
    trained = frames * vision + BATCH * text + psi + radius
    assert benchmark.count_flops(lambda: step(*batch)) == 2 * frames * patches + 3 * trained

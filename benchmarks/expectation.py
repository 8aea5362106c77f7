"""How exact the expected best of 20 draws is, by each form, against 10^5 draws (docs/inference.md).

    python benchmarks/expectation.py     # about a minute on a core

dim 256, 8 pairs a case: cosines of t and v from -0.1 to 0.9, log R normal over channels with a given spread,
and three sizes of |R eps| / |t|. Errors are the largest of all pairs and sizes, in standard deviations of one
draw. Costs are those of 10^5 pairs, as a ratio to 20 draws. Writes benchmarks/expectation.json.
"""

import json
import platform
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from engine.fast_training import best_of_draws  # noqa: E402
from engine.files import write_atomic  # noqa: E402
from engine.scoring import Delta, Expectation, noise_bank  # noqa: E402

PAIRS, DIM, M, BANKS = 8, 256, 20, 5000
SPREADS, SIZES = (0.0, 0.2, 0.5, 0.7, 1.0, 1.5, 2.0), (0.1, 0.5, 2.0)
FORMS = {"expected": Expectation, "delta": Delta}


def pairs_of(spread: float, size: float, seed: int, count: int = PAIRS) -> tuple[torch.Tensor, ...]:
    """t, R and v of some pairs, (pairs, dim) each."""
    generator = torch.Generator().manual_seed(seed)
    t, v, log = torch.randn(3, count, DIM, generator=generator)
    v = 0.1 * v + torch.linspace(-0.01, 0.2, count)[:, None] * t
    radius = (spread * log).exp()
    return t, radius * (size * t.norm(dim=-1) / radius.norm(dim=-1))[:, None], v


def errors(spread: float, size: float) -> dict[str, float]:
    """The largest error of each form, of the mean of a draw by exact moments, and of the draws themselves."""
    t, radius, v = pairs_of(spread, size, seed=0)
    eps = noise_bank(M * BANKS, DIM, 1)
    dot = eps @ (radius * v).T + (t * v).sum(-1)
    squares = eps.square() @ radius.square().T + 2 * eps @ (radius * t).T + t.square().sum(-1)
    cosines = dot / squares.sqrt() / v.norm(dim=-1)
    draw, banks = cosines.std(0), cosines.unflatten(0, (BANKS, M)).amax(1)
    found = {name: form(M).of(t, radius, v) - banks.mean(0) for name, form in FORMS.items()}
    found["mean of a draw, exact moments"] = Expectation(1).of(t, radius, v) - cosines.mean(0)
    found["standard error of the reference"] = banks.std(0) / BANKS**0.5
    return {name: (error / draw).abs().max().item() for name, error in found.items()}


def costs() -> dict[str, float]:
    """Seconds of each form for 320 x 320 pairs, and their ratio to 20 draws."""
    t, radius, v = pairs_of(0.5, 0.5, seed=2, count=320)
    radius, v = (x[None].expand(320, -1, -1).contiguous() for x in (radius, v))
    ways = {name: lambda form=form: form(M).of(t[:, None], radius, v) for name, form in FORMS.items()}
    ways["20 draws"] = lambda: best_of_draws(t, radius, v, noise_bank(M, DIM, 0))
    seconds = {}
    for name, way in ways.items():
        way()
        started = time.perf_counter()
        way()
        seconds[name] = time.perf_counter() - started
    return {name: value / seconds["20 draws"] for name, value in seconds.items()}


def main() -> None:
    """Measures, prints the table, writes the JSON."""
    rows = []
    for spread in SPREADS:
        found = [errors(spread, size) for size in SIZES]
        rows.append({"std of log R": spread, **{name: max(one[name] for one in found) for name in found[0]}})
        print("  ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
    ratios = costs()
    print(
        "cost, as a ratio to 20 draws: " + ", ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items())
    )
    about = dict(
        dim=DIM, M=M, draws=M * BANKS, sizes=SIZES, machine=platform.processor() or platform.machine()
    )
    content = json.dumps({**about, "rows": rows, "cost, as a ratio to 20 draws": ratios}, indent=1)
    write_atomic(ROOT / "benchmarks/expectation.json", (content + "\n").encode())


if __name__ == "__main__":
    main()

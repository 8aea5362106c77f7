"""A registered psi, R or loss is used in training, validation, evaluate.py and search.py."""

import json

import pytest
import torch
from conftest import read_csv
from torch import nn

import evaluate
import search
import train
from engine.checkpoint import load_checkpoint
from engine.config import loss_weights
from engine.datasets import DATASETS, of_split
from engine.experiment import read_log
from engine.features import extract_features
from engine.frames import FrameCache
from engine.metrics import retrieval_metrics
from engine.scoring import noise_bank
from losses import LOSSES
from model import FUSIONS, RADII

FRAMES, M = 4, 3


class ToyFusion(nn.Module):
    """v = (1 + w) * (f_1 * t): unlike any psi that ships, and it depends on text and frames."""

    def __init__(self, dim, heads=1, dropout=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, text, frames):
        return (1 + self.weight) * text[:, None] * frames[:, 0]


class ToyRadius(nn.Module):
    """R = exp(w) |t_k f_1k|^(1/2): no Radius, so it has no fast form."""

    def __init__(self, frames, dim, initial=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, text, frames, video):
        return self.weight.exp() * (text[:, None] * frames[:, 0]).abs().sqrt()


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setitem(FUSIONS, "toy", ToyFusion)
    monkeypatch.setitem(RADII, "toy", ToyRadius)


@pytest.fixture
def flags(clips_folder, weights, tmp_path):
    """Two steps of training on the built-in clips as a CSV data set."""
    where = [
        "--annotations",
        clips_folder / "clips.csv",
        "--videos",
        clips_folder / "clips",
        "--data",
        tmp_path,
    ]
    size = [
        "--num-frames",
        FRAMES,
        "--batch",
        8,
        "--max-steps",
        2,
        "--M",
        M,
        "--head-lr",
        0.01,
        "--warmup",
        0,
    ]
    return list(map(str, ["--dataset", "csv", "--arch", "tiny", "--weights", weights, *where, *size]))


def features(model, clips_folder, split, tmp_path):
    clips = of_split(read_csv(clips_folder / "clips.csv", clips_folder / "clips"), split)
    return extract_features(model, clips, FrameCache(tmp_path / "again", FRAMES, model.resolution))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no fast form")
@pytest.mark.parametrize(
    "recipe, fusion, radius",
    [("paper", "toy", "toy"), ("best", "toy", "toy"), ("best", "toy", "joint"), ("paper", "toy", "none")],
)
def test_a_registered_psi_or_radius_is_used_everywhere(
    toys, flags, clips_folder, tmp_path, recipe, fusion, radius, capsys
):
    run, library = tmp_path / "run", tmp_path / "library.db"
    train.main([*flags, "--recipe", recipe, "--fusion", fusion, "--radius", radius, "--out", str(run)])
    model = load_checkpoint(run / "best.pt")
    assert isinstance(model.fusion, ToyFusion) and isinstance(model.radius, ToyRadius) == (radius == "toy")
    for toy in [model.fusion, *([model.radius] if radius == "toy" else [])]:
        assert toy.weight.abs().max() > 1e-3  # it learned

    found = features(model, clips_folder, "val", tmp_path)
    noise = noise_bank(M, found.text.shape[1], seed=0)
    literal = retrieval_metrics(evaluate.scores_literal(model, found.text, found.frames, noise), found.owner)
    validation = next(row["val"] for row in read_log(run) if "val" in row)
    assert all(validation[way] == pytest.approx(literal[way]) for way in literal)

    evaluate.main(["--checkpoint", str(run), "--M", str(M), "--data", str(tmp_path)])
    results, found = (
        json.loads((run / "results.json").read_text()),
        features(model, clips_folder, "test", tmp_path),
    )
    literal = retrieval_metrics(evaluate.scores_literal(model, found.text, found.frames, noise), found.owner)
    assert all(results["metrics"][way] == pytest.approx(literal[way]) for way in literal)
    assert (results["fusion"], results["radius"]) == (fusion, radius)
    assert "toy" in results["name"] and results["name"] in capsys.readouterr().out

    with pytest.raises(SystemExit) as ended:
        search.main(
            ["index", str(clips_folder / "clips"), "--library", str(library), "--checkpoint", str(run)]
        )
    assert ended.value.code == 0
    searcher = search.Searcher(search.SearchConfig(library=str(library)))
    hits = searcher.search("a red ring in the desert", k=3)
    (rows, frames), text = next(searcher.library.batches()), searcher.text(["a red ring in the desert"])
    literal = evaluate.scores_literal(searcher.model, text, frames, searcher.noise)[0]
    best = literal.topk(3)
    assert [hit.id for hit in hits] == [rows[n]["id"] for n in best.indices]
    assert [hit.score for hit in hits] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("options", [["--recipe", "paper"], ["--recipe", "best"], ["--method", "xpool"]])
def test_a_registered_loss_is_used_under_every_recipe(flags, tmp_path, monkeypatch, options):
    monkeypatch.setitem(LOSSES, "L_toy", lambda video, **_: video.square().mean())
    with pytest.raises(ValueError, match="differ in L_toy"):  # never left out silently
        train.main([*flags, *options, "--out", str(tmp_path / "none")])
    totals = {}
    for weight in (0.5, 2.0):
        monkeypatch.setattr(
            train, "loss_weights", lambda config, w=weight: {**loss_weights(config), "L_toy": w}
        )
        train.main([*flags, *options, "--max-steps", "1", "--out", str(tmp_path / str(weight))])
        row = next(row for row in read_log(tmp_path / str(weight)) if "loss" in row)
        totals[weight] = row["loss"], row["L_toy"]
    assert totals[0.5][1] == pytest.approx(totals[2.0][1])  # the same first step
    assert totals[2.0][0] - totals[0.5][0] == pytest.approx(1.5 * totals[2.0][1], rel=1e-4)


@pytest.mark.parametrize("flag", ["fusion", "radius", "dataset"])
def test_the_command_line_offers_what_is_registered(toys, flag, capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = "".join(capsys.readouterr().out.split())
    names = {"fusion": FUSIONS, "radius": [*RADII, "none"], "dataset": DATASETS}[flag]
    assert f"--{flag}{{{','.join(names)}}}" in shown.replace("│", "")

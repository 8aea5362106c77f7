"""The settings: presets, recipes, registries as choices, ranges, contradictions, older records."""

import math
from dataclasses import replace

import pytest
from torch import nn

from engine.config import (
    METHODS,
    PRESETS,
    RANGES,
    RECIPES,
    Config,
    EvaluationConfig,
    changes,
    check_config,
    label,
    loss_weights,
    method_of,
    parse,
    parse_evaluation,
    plain,
    preset,
    prior_of,
    upgrade_config,
)
from engine.datasets import DATASETS
from engine.files import ModelError
from losses import LOSSES
from model import FUSIONS, RADII

# -------------------------------------------------------------------------------------------------- presets


def test_a_flag_wins_over_a_preset_and_a_preset_over_the_defaults():
    assert parse([]).arch == "tiny" and parse(["--arch", "ViT-B/16"]).arch == "ViT-B/16"
    assert parse(["--dataset", "lsmdc"]).head_lr == PRESETS["lsmdc"]["head_lr"] != Config().head_lr
    flags = ["--dataset", "lsmdc", "--head-lr", "0.1", "--amp", "off"]
    assert parse(flags) == replace(preset("lsmdc", "tmass"), head_lr=0.1, amp="off")
    assert parse(["--dataset=msrvtt", "--method=xpool"]) == preset("msrvtt", "xpool")
    best = parse(["--recipe", "best", "--radius", "scalar"])
    assert (
        best == replace(preset("shapes", "tmass", "best"), radius="scalar")
        and best.ce == RECIPES["best"]["ce"]
    )


def test_defaults_do_not_change_unnoticed():
    c = Config()
    numbers = (c.batch, c.clip_lr, c.weight_decay, c.dropout, c.num_frames, c.epochs, c.warmup, c.grad_clip)
    assert numbers == (32, 1e-6, 0.2, 0.3, 12, 5, 0.1, 1.0)
    assert (c.alpha, c.ce, c.M, c.prior, c.prior_std) == (1.2, 0.0, 20, "normal", 1.0)
    assert (c.adam_eps, c.radius_start, c.val) == (1e-8, "random", "official")  # as before these were flags
    assert (c.method, c.fusion, c.radius, c.pairs) == ("tmass", "xpool", "linear", "matched")


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_is_trained_with_the_papers_recipe_unless_told_otherwise(dataset):
    config = parse(["--dataset", dataset])
    assert config.recipe == "paper" and config.method == "tmass"
    assert all(
        getattr(config, name) == getattr(Config(), name) for name in ("pairs", "alpha", "ce", "radius_lr")
    )
    assert (config.fusion, config.radius) == METHODS["tmass"]
    best = parse(["--dataset", dataset, "--method", "tmass", "--recipe", "best"])
    assert all(getattr(best, name) == value for name, value in RECIPES["best"].items())


def test_a_recipe_changes_nothing_of_the_baselines():
    for method in ("clip", "xpool"):
        assert replace(preset("shapes", method, "best"), recipe="paper") == preset("shapes", method)


@pytest.mark.parametrize("method, dataset, numbers", [
    ("tmass", "msrvtt", (3e-5, 0.3, 0.8, "uniform", 1.0)),
    ("tmass", "didemo", (1e-5, 0.4, 0, "uniform", 1.0)), ("tmass", "lsmdc", (1e-5, 0.3, 0, "normal", 0.003)),
    ("xpool", "msrvtt", (3e-5, 0.3)), ("xpool", "msrvtt-7k", (1e-5, 0.4)), ("xpool", "msvd", (1e-5, 0.4)),
    ("xpool", "lsmdc", (1e-5, 0.3)),
])  # fmt: skip
def test_the_released_recipe_has_the_numbers_of_the_released_commands(method, dataset, numbers):
    c = parse(["--dataset", dataset, "--method", method, "--recipe", "released"])
    check_config(c)
    found = (c.head_lr, c.dropout, c.alpha, c.prior, c.prior_std)
    assert found[: len(numbers)] == numbers
    assert (c.clip_lr, c.weight_decay, c.batch, c.epochs, c.warmup, c.M) == (1e-6, 0.2, 32, 5, 0.1, 20)
    assert c.adam_eps == 1e-6 and c.radius_start == ("identity" if method == "tmass" else "random")


def test_the_released_recipe_changes_the_mass_alone_on_data_sets_without_a_command():
    for dataset in ("shapes", "vatex"):
        paper, released = (preset(dataset, "tmass", recipe) for recipe in ("paper", "released"))
        assert replace(paper, recipe="released", **RECIPES["released"]) == released


@pytest.mark.parametrize("flags, says", [
    (["--method", "clip", "--recipe", "released"], "no command of mean pooling was released"),
    (["--radius", "scalar", "--recipe", "released"], "--radius scalar does not have: add --radius-start"),
    (["--val", "half"], "--val half: give none, official, or a number"),
    (["--val", "0"], "--val 0: give none, official, or a number of videos from 1 on"),
    (["--adam-eps", "0"], "--adam-eps 0.0: give a number from 1e-12 to 1"),
])  # fmt: skip
def test_settings_that_the_released_recipe_does_not_have_are_refused(flags, says):
    with pytest.raises(ModelError, match=says):
        check_config(parse(flags))


def test_validation_is_a_name_or_a_number():
    for value in ("none", "official", "25"):
        config = parse(["--val", value])
        check_config(config)
        assert config.val == value


@pytest.mark.parametrize("flags, dsl, M", [
    ([], "none", 20), (["--dsl"], "temperature", 20), (["--dsl", "--M", "3"], "temperature", 3),
    (["--dsl", "released", "--M", "3"], "released", 3), (["--M", "3", "--dsl", "none"], "none", 3),
])  # fmt: skip
def test_dsl_alone_is_at_the_temperature(flags, dsl, M):
    assert parse_evaluation(flags) == EvaluationConfig(dsl=dsl, M=M)


# --------------------------------------------------------------------------------------- registries, methods


class Toy(nn.Module):
    """Stands for a psi or R that a reader has registered."""


def test_registered_names_are_choices_of_the_command_line(monkeypatch, capsys):
    for flags in (["--fusion", "toy"], ["--radius", "toy"], ["--dataset", "toy"]):
        with pytest.raises(SystemExit):
            parse(flags)
    monkeypatch.setitem(FUSIONS, "toy", Toy)
    monkeypatch.setitem(RADII, "toy", Toy)
    monkeypatch.setitem(DATASETS, "toy", DATASETS["csv"])
    config = parse(["--fusion", "toy", "--radius", "toy", "--dataset", "toy"])
    assert (config.fusion, config.radius, config.dataset) == ("toy", "toy", "toy") and type(config) is Config
    check_config(config)
    assert parse_evaluation(["--dataset", "toy"]) == EvaluationConfig(dataset="toy")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        parse(["--help"], description="What this program does.")
    shown = "".join(line.strip(" │") + " " for line in capsys.readouterr().out.splitlines())
    assert ended.value.code == 0 and "What this program does." in shown
    choices = "".join(shown.split())  # long ones are wrapped
    assert all(f"{{{','.join(names)}}}" in choices for names in (FUSIONS, [*RADII, "none"]))
    assert "toy" in FUSIONS.keys() & RADII.keys()
    assert "psi, which pools the frames of a video" in shown and "attention heads of psi" in shown


def test_psi_and_R_are_chosen_apart():
    config = parse(["--fusion", "mean", "--radius", "joint"])
    assert (config.method, config.fusion, config.radius) == ("tmass", "mean", "joint")
    check_config(config)
    check_config(parse(["--radius", "none"]))


@pytest.mark.parametrize("method", ["clip", "xpool"])
def test_a_baseline_with_other_parts_is_refused(method):
    fusion, radius = METHODS[method]
    check_config(preset("msrvtt", method))
    for flags in (["--radius", "linear"], ["--fusion", {"mean": "xpool", "xpool": "mean"}[fusion]]):
        says = f"--method {method} means --fusion {fusion} --radius {radius}: leave out both, or use --method"
        with pytest.raises(ModelError, match=says):
            check_config(parse(["--method", method, *flags]))


def test_models_have_a_method_and_a_name():
    parts = [("mean", "none"), ("xpool", "none"), ("xpool", "linear"), ("xpool", "joint"), ("mean", "fixed")]
    names = [label(dict(fusion=fusion, radius=radius)) for fusion, radius in parts]
    assert names == ["mean pooling", "X-Pool", "T-MASS", "T-MASS, R joint", "psi mean, R fixed"]
    assert [method_of(*pair) for pair in parts] == ["clip", "xpool", "tmass", "tmass", "tmass"]
    assert (label(dict(fusion="toy", radius="none")), method_of("toy", "none")) == ("psi toy", "xpool")
    assert all(method_of(*parts) == method for method, parts in METHODS.items())


def test_every_loss_has_a_weight_in_every_recipe():
    for config in (preset("shapes", method, recipe) for method in METHODS for recipe in RECIPES):
        assert loss_weights(config).keys() == LOSSES.keys()
    assert loss_weights(Config()) == {"L_s": 1, "L_sup": 1.2, "L_ce": 0, "L_inc": 0}
    own = Config(alpha=0.5, ce=0.25, inclusion=0.1)
    assert loss_weights(own) == {"L_s": 1, "L_sup": 0.5, "L_ce": 0.25, "L_inc": 0.1}
    assert loss_weights(preset("shapes", "tmass", "best")) == {"L_s": 1, "L_sup": 0, "L_ce": 0.5, "L_inc": 0}
    for config in (preset("shapes", "clip"), preset("shapes", "xpool"), Config(radius="none", ce=0.5)):
        assert loss_weights(config) == {"L_s": 0, "L_sup": 0, "L_ce": 1, "L_inc": 0}


# --------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("mistake, says", [
    (dict(batch=0), "--batch 0: give a number from 1 on"), (dict(micro_batch=-1), "--micro-batch -1"),
    (dict(max_steps=0), "--max-steps 0"), (dict(dropout=1.5), "--dropout 1.5: give a number from 0 to 1"),
    (dict(clip_lr=math.nan), "--clip-lr nan"), (dict(seed=-1), "--seed -1"), (dict(epochs=0), "--epochs 0"),
    (dict(initial_radius=0.0), "--initial-radius 0"), (dict(num_frames=0), "--num-frames 0"),
    (dict(num_frames=10**9), "--num-frames 1000000000: give a number from 1 to 1000"),
    (dict(M=10**9), "--M 1000000000: give a number from 0 to 100000"), (dict(workers=10**6), "--workers 10"),
    (dict(seed=10**30), "--seed 1000000000000000000000000000000: give a number from 0"),
    (dict(prior="uniform", prior_std=0.5), "--prior-std is that of the normal prior: leave it out, or"),
    (dict(pairs="soft", M=0), "--M 0 leaves --pairs soft no draw"),
    (dict(dataset="nope"), "unknown --dataset nope: choose shapes, "),
    (dict(fusion="nope"), "unknown --fusion nope: choose mean, xpool"),
    (dict(radius="nope"), "unknown --radius nope: choose fixed, scalar, linear, joint, "),
    (dict(freeze="vision"), "--freeze vision .* add --no-augment"),
    (dict(freeze="clip", augment=False, sampling="random"), "--freeze clip .* keep --sampling uniform"),
])  # fmt: skip
def test_wrong_settings_give_one_sentence(mistake, says):
    check_config(Config())
    with pytest.raises(ModelError, match=says) as error:
        check_config(replace(Config(), **mistake))
    assert "\n" not in str(error.value)


def test_wrong_settings_of_an_evaluation_give_one_sentence():
    check_config(EvaluationConfig())
    prior = dict(prior="uniform", prior_std=1.0)  # given, though it is the default of training
    mistakes = (
        (dict(M=-1), "--M -1"),
        (dict(dataset="nope"), "unknown --dataset nope"),
        (prior, "--prior-std is"),
    )
    for mistake, says in mistakes:
        with pytest.raises(ModelError, match=says):
            check_config(EvaluationConfig(**mistake))


@pytest.mark.parametrize("trained, dataset", [
    ({"prior": "uniform", "prior_std": 1.0}, "csv"), ({"released": True}, "msrvtt"),
])  # fmt: skip
def test_a_standard_deviation_that_the_prior_of_a_run_does_not_have_is_refused(trained, dataset):
    says = (
        "--prior-std is that of the normal prior, and this checkpoint was trained with the uniform one: add"
    )
    with pytest.raises(ModelError, match=says):
        prior_of(EvaluationConfig(prior_std=0.5), trained, dataset)
    normal = dict(prior="normal", std=0.5)
    assert prior_of(EvaluationConfig(prior="normal", prior_std=0.5), trained, dataset) == normal
    assert prior_of(EvaluationConfig(prior_std=0.5), {"prior": "normal"}, dataset) == normal
    assert prior_of(EvaluationConfig(), trained, dataset) == dict(prior="uniform", std=1.0)


def test_a_run_of_an_earlier_version_with_both_flags_can_be_resumed():
    config = replace(preset("msrvtt", "tmass"), prior="uniform")
    assert changes(config, plain(replace(config, prior_std=0.5))) == []
    normal = plain(replace(config, prior="normal", prior_std=0.5))
    assert changes(config, normal) == ["prior normal -> uniform", "prior_std 0.5 -> 1.0"]


@pytest.mark.parametrize("kind", [Config, EvaluationConfig])
def test_every_number_of_a_config_has_a_range(kind):
    kinds = (int, float, int | None, float | None)
    assert {name for name, of in kind.__annotations__.items() if of in kinds} <= set(RANGES)
    assert set(RANGES) <= set(Config.__annotations__)


def test_presets_are_within_their_ranges():
    for dataset in DATASETS:
        for method in METHODS:
            for recipe in RECIPES if method == "tmass" else ["paper"]:
                check_config(preset(dataset, method, recipe))


@pytest.mark.parametrize("method", ["clip", "xpool"])
def test_a_recipe_of_the_mass_is_refused_without_a_mass(method):
    with pytest.raises(ModelError, match="--recipe best trains a mass"):
        check_config(preset("shapes", method, "best"))


# -------------------------------------------------------------------------------------------------- records


def test_runs_from_before_a_flag_existed_are_continued_with_its_default_and_no_other_value():
    config = preset("msvd", "tmass")
    older = {n: v for n, v in plain(config).items() if n not in ("adam_eps", "radius_start", "val")}
    assert changes(config, older) == []
    now = replace(config, adam_eps=1e-6, val="100")
    assert changes(now, older) == ["adam_eps 1e-08 -> 1e-06", "val official -> 100"]


@pytest.mark.parametrize("method, radius, parts", [
    ("clip", "linear", ("mean", "none")), ("xpool", "linear", ("xpool", "none")),
    ("tmass", "linear", ("xpool", "linear")), ("tmass", "joint", ("xpool", "joint")),
])  # fmt: skip
def test_older_records_are_read_by_their_method(method, radius, parts):
    now = plain(replace(preset("shapes", "tmass"), method=method, fusion=parts[0], radius=parts[1]))
    before = {**{name: value for name, value in now.items() if name != "fusion"}, "radius": radius}
    assert upgrade_config(before) == now and upgrade_config(now) == now and "fusion" not in before
    assert upgrade_config({"pairs": "expected"}) == {"pairs": "delta"}
    assert upgrade_config({}) == {} and upgrade_config({"released": True}) == {"released": True}

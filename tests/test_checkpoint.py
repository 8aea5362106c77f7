"""Checkpoints: ours, older ones, those of the released code, safetensors folders, registries, a full disk."""

import errno
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randn, random_model, small_clip
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import layer_norm

import engine.files
import evaluate
import model as model_module
from engine.backbone import import_clip, load_clip, tokenize
from engine.checkpoint import (
    checksum,
    latest_run,
    load_checkpoint,
    load_state,
    open_checkpoint,
    save_checkpoint,
    to_record,
)
from engine.config import EvaluationConfig, plain, preset, prior_of
from engine.files import ModelError
from engine.weights import load_file
from model import TMASS, LinearRadius, MeanPool, XPool

FRAMES, DIM = 3, 24


def equal_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same state dicts, bit for bit."""
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---------------------------------------------------------------------------------------- our own checkpoints


@pytest.mark.parametrize("options", [
    dict(fusion="mean", radius="none"), dict(radius="none", heads=2), dict(radius="fixed"),
    dict(radius="joint"), dict(frames=7), dict(fusion="mean"),
])  # fmt: skip
def test_checkpoint_gives_back_the_same_model(tmp_path, options):
    model = random_model(**options)
    save_checkpoint(tmp_path / "a" / "model.pt", model, step=3)
    loaded = load_checkpoint(tmp_path / "a" / "model.pt")
    assert loaded.arguments == model.arguments and not loaded.training and equal_weights(loaded, model)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["model.pt"]


def test_checkpoint_loads_strictly(tmp_path):
    save_checkpoint(tmp_path / "model.pt", random_model())
    content = load_file(tmp_path / "model.pt")
    del content["model"]["radius.linear.weight"]
    torch.save(content, tmp_path / "less.pt")
    with pytest.raises(ModelError, match=r"less\.pt is not a checkpoint of train\.py"):
        load_checkpoint(tmp_path / "less.pt")


def test_checkpoint_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    with (tmp_path / "harmful.pt").open("wb") as file:
        pickle.dump({"model": Harmful(), "arguments": {}}, file)
    with pytest.raises(ModelError):
        load_checkpoint(tmp_path / "harmful.pt")
    assert not (tmp_path / "harmed").exists()


def test_truncated_checkpoint_gives_one_sentence(tmp_path):
    save_checkpoint(tmp_path / "model.pt", random_model())
    whole = (tmp_path / "model.pt").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cut\.pt is not a file of weights, or is damaged"):
            load_checkpoint(tmp_path / "cut.pt")


@pytest.mark.parametrize("name, value", [
    ("text_projection", torch.ones(3)), ("ln_final.weight", torch.ones(32)), ("ln_final.weight", 3),
    ("visual.attnpool.positional_embedding", torch.ones(0, 3)),
])  # fmt: skip
def test_foreign_weights_give_one_sentence(tmp_path, name, value):
    """Sizes that no CLIP has, and values that are no tensors, in a file of weights and in a checkpoint."""
    state = {**small_clip().state_dict(), name: value}
    torch.save(state, tmp_path / "clip.pt")
    model = {f"clip.{key}": value for key, value in state.items()}
    torch.save({"model": model, "arguments": {}}, tmp_path / "ours.pt")
    for path in (tmp_path / "clip.pt", tmp_path / "ours.pt"):
        with pytest.raises(ModelError, match=rf"{path.name} is not a checkpoint of train\.py \(.+\): name"):
            load_checkpoint(path)


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoint_of_a_wrapped_model_opens(tmp_path, before):
    """A state of DataParallel, DistributedDataParallel or torch.compile."""
    model = random_model()
    state = {f"{before}{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state, "arguments": model.arguments}, tmp_path / "best.pt")
    assert equal_weights(load_checkpoint(tmp_path / "best.pt"), model)


def test_weights_of_clip_are_read_out_of_a_checkpoint(tmp_path):
    model = random_model()
    save_checkpoint(tmp_path / "best.pt", model)
    assert equal_weights(load_clip("tiny", tmp_path / "best.pt"), model.clip)


# ----------------------------------------------------------------------------------- damage and absurd values


@pytest.mark.parametrize("name", ["fusion.value.weight", "clip.visual.conv1.weight", "radius.linear.bias"])
def test_weights_that_are_not_finite_are_refused(tmp_path, name):
    model, config = random_model(), preset("shapes", "tmass")
    model.state_dict()[name].view(-1)[2] = float("nan")
    save_checkpoint(tmp_path / "best.pt", model)
    last_pt(tmp_path / "last.pt", to_record(config), model=model.state_dict())
    model.save_pretrained(tmp_path)
    says = rf"is damaged, or its training diverged: {name} holds NaN or infinite values; name another file"
    for path in (tmp_path / "best.pt", tmp_path / "model.safetensors"):
        with pytest.raises(ModelError, match=rf"{path.name} {says}"):
            open_checkpoint(path)
    with pytest.raises(ModelError, match=rf"last\.pt {says}"):
        load_state(tmp_path / "last.pt", config, "1234")


def flip(path: Path, place: int) -> None:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_anywhere_in_the_weights_is_found(tmp_path):
    model = random_model()
    save_checkpoint(tmp_path / "best.pt", model)
    weights = (tmp_path / "best.pt").read_bytes()
    for name in ("radius.linear.weight", "clip.ln_final.weight"):
        (tmp_path / "best.pt").write_bytes(weights)
        flip(tmp_path / "best.pt", weights.index(model.state_dict()[name].numpy().tobytes()) + 5)
        with pytest.raises(ModelError, match=r"best\.pt is damaged, .* does not match its checksum: copy it"):
            load_checkpoint(tmp_path / "best.pt")


@pytest.mark.parametrize(
    "name, text", [("model.safetensors", b""), ("config.json", b"1.0"), ("config.json", b"4,")]
)
def test_a_flipped_bit_in_a_folder_is_found(tmp_path, name, text):
    """In a weight, in the standard deviation of the noise, in the number of frames."""
    model = random_model(radius="fixed")  # the shapes of no weight tell the number of frames
    model.save_pretrained(tmp_path, config={"prior_std": 1.0})
    content = (tmp_path / name).read_bytes()
    flip(tmp_path / name, content.index(text or model.fusion.value.weight.detach().numpy().tobytes()))
    with pytest.raises(
        ModelError, match=r"or its config\.json is damaged: copy both .* remove its \"checksum\""
    ):
        TMASS.from_pretrained(tmp_path)


def test_a_folder_without_a_checksum_stays_readable(tmp_path):
    """As earlier versions wrote it, and as one that was changed by hand."""
    model = random_model()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert len(content.pop("checksum")) == 8
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert equal_weights(TMASS.from_pretrained(tmp_path), model)


def test_the_checksum_is_the_same_on_every_machine(tmp_path):
    config = {"arguments": {"dropout": 0.3, "heads": 1}, "config": {"videos": "é", "head_lr": 3e-05}}
    assert checksum(config, [b"weights"]) == checksum(config, iter([b"wei", b"ghts"])) == "a6ae9746"
    same = {name: config[name] for name in reversed(config)}
    assert checksum(json.loads(json.dumps(same)), [b"weights"]) == "a6ae9746"


@pytest.mark.parametrize("arguments", [
    dict(num_frames=10**9), dict(num_frames=0), dict(num_frames=True + 0.5), dict(num_frames=None),
    dict(heads=10**9), dict(heads="two"), dict(dropout=float("nan")), dict(dropout=2), dict(nothing=1),
    dict(initial_radius=-1.0), dict(initial_radius=10**400), dict(fusion=["xpool"]), dict(radius={}),
])  # fmt: skip
@pytest.mark.parametrize("radius", ["linear", "none"])
def test_absurd_arguments_give_one_sentence(tmp_path, arguments, radius):
    model = random_model(radius=radius)
    torch.save({"model": model.state_dict(), "arguments": model.arguments | arguments}, tmp_path / "best.pt")
    with pytest.raises(ModelError, match=r"best\.pt (cannot be opened: |is not a checkpoint)") as error:
        load_checkpoint(tmp_path / "best.pt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("content, says", [
    (dict(config=[1]), "a list, not a dict"), (dict(config=None), "a NoneType, not a dict"),
    (dict(config="csv"), "a str, not a dict"), (dict(config={"dataset": 3}), "dataset is 3"),
    (dict(config={"prior": "nrmal"}), "prior is 'nrmal'"), (dict(config={"method": "x"}), "method is 'x'"),
    (dict(config={"prior_std": "1"}), "prior_std is '1'"), (dict(config={"videos": [1]}), r"videos is \[1\]"),
    (dict(config={"prior_std": float("nan")}), "prior_std is nan"), (dict(config={"M": -1}), "M is -1"),
    (dict(config={"new": torch.ones(2)}), "new is tensor"), (dict(config={3: "x"}), "3 is 'x'"),
    (dict(config={"num_frames": 10**9}), "num_frames is 1000000000"),
    (dict(arguments=[1]), 'holds no dict "arguments"'), (dict(model=3), 'holds no dict "model"'),
])  # fmt: skip
def test_a_config_that_is_none_gives_one_sentence(tmp_path, content, says):
    model = random_model()
    whole = {"model": model.state_dict(), "arguments": model.arguments, "config": {"dataset": "csv"}}
    torch.save(whole | content, tmp_path / "best.pt")
    with pytest.raises(ModelError, match=rf"best\.pt .*{says}.*: name") as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    if "config" in content:
        last_pt(tmp_path / "last.pt", **content)
        with pytest.raises(
            ModelError, match=rf"last\.pt holds a config that train\.py does not write \({says}"
        ):
            load_state(tmp_path / "last.pt", preset("shapes", "tmass"), "1234")


@pytest.mark.parametrize("text", [
    "[" * 10**5, '{"a":' * 10**5, "[]", "3", "", "{", '{"arguments": {"num_frames": 9', "\udcff",
])  # fmt: skip
def test_json_that_is_no_config_gives_one_sentence(tmp_path, text):
    random_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json is damaged: copy both") as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_of_clip_alone_are_not_a_checkpoint(tmp_path):
    torch.save(small_clip().state_dict(), tmp_path / "clip.pt")
    with pytest.raises(ModelError, match=r'clip\.pt is not a checkpoint .* \(it holds no dict "model"\)'):
        load_checkpoint(tmp_path / "clip.pt")


def test_model_keeps_its_public_names():
    for name in ("load_clip", "load_file", "load_checkpoint", "save_checkpoint", "build_from_checkpoint"):
        assert callable(getattr(model_module, name))
    assert model_module.ModelError is ModelError


def test_latest_run_is_that_of_the_newest_best_pt(tmp_path):
    with pytest.raises(ModelError, match=r"no checkpoint under .*: train first"):
        latest_run(tmp_path)
    for name in ("b", "a/c"):
        save_checkpoint(tmp_path / name / "best.pt", random_model())
    assert latest_run(tmp_path) == tmp_path / "a" / "c"
    assert open_checkpoint(tmp_path / "b")[2] == tmp_path / "b" / "best.pt"
    with pytest.raises(ModelError, match=r"gone not found: train first"):
        open_checkpoint(tmp_path / "gone")


# ------------------------------------------------------------------------------------------ older checkpoints


@pytest.mark.parametrize("method, radius, parts", [
    ("clip", "linear", ("mean", "none")), ("xpool", "linear", ("xpool", "none")),
    ("tmass", "linear", ("xpool", "linear")), ("tmass", "joint", ("xpool", "joint")),
])  # fmt: skip
def test_checkpoint_that_names_a_method_opens_as_its_psi_and_radius(tmp_path, method, radius, parts):
    model = random_model(fusion=parts[0], radius=parts[1], heads=2)
    same = {k: x for k, x in model.arguments.items() if k not in ("fusion", "radius")}
    old = dict(method=method, radius=radius, **same)
    config = dict(dataset="csv", method=method, radius=radius)
    torch.save({"model": model.state_dict(), "arguments": old, "config": config}, tmp_path / "best.pt")
    loaded, trained, _ = open_checkpoint(tmp_path)
    assert loaded.arguments == model.arguments and equal_weights(loaded, model)
    assert trained == config | dict(fusion=parts[0], radius=parts[1])


def last_pt(path: Path, config: object, **more) -> Path:
    """Writes what load_state reads of a last.pt."""
    torch.save({"model": {}, "optimizer": {}, "config": config, "data": "1234", **more}, path)
    return path


@pytest.mark.parametrize("method", ["clip", "xpool", "tmass"])
def test_run_from_before_psi_and_radius_were_chosen_apart_can_be_resumed(tmp_path, method):
    config = preset("msrvtt", method)
    old = {name: value for name, value in plain(config).items() if name != "fusion"}
    path = last_pt(tmp_path / "last.pt", old | dict(radius="linear", workers=3))
    assert load_state(path, config, "1234")["data"] == "1234"
    with pytest.raises(
        ModelError, match=r"last\.pt was made with another config \(alpha 1.2 -> 0.5\): resume"
    ):
        load_state(path, replace(config, alpha=0.5), "1234")


def test_run_of_other_flags_or_data_is_not_resumed(tmp_path):
    config = preset("shapes", "tmass")
    path = last_pt(tmp_path / "last.pt", to_record(config))
    with pytest.raises(
        ModelError, match=r"another config \(--recipe paper, not best\): resume with the same flags"
    ):
        load_state(path, preset("shapes", "tmass", "best"), "1234")
    with pytest.raises(ModelError, match=r"another config \(fusion xpool -> mean\)"):
        load_state(path, replace(config, fusion="mean"), "1234")
    with pytest.raises(
        ModelError, match=r"last\.pt was trained on other clips or captions: resume with the same"
    ):
        load_state(path, config, "5678")
    save_checkpoint(tmp_path / "best.pt", random_model())
    with pytest.raises(ModelError, match=r"best\.pt is not a last\.pt of train\.py: nothing to resume from"):
        load_state(tmp_path / "best.pt", config, "1234")


# ------------------------------------------------------------------------------------------------- registries


class LastFrame(MeanPool):
    """A toy psi: the last frame."""

    def forward(self, text, frames):
        """v = f_T'."""
        return frames[:, -1].expand(len(text), -1, -1)


class HalfRadius(LinearRadius):
    """A toy R: half of the linear one."""

    def exponent(self, sims, text=None, video=None):
        """log R."""
        return super().exponent(sims, text, video) - torch.log(torch.tensor(2.0))


def test_registered_psi_and_radius_come_back_by_name_and_unknown_ones_say_what_to_do(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(model_module.FUSIONS, "last", LastFrame)
        patch.setitem(model_module.RADII, "half", HalfRadius)
        model = random_model(fusion="last", radius="half")
        save_checkpoint(tmp_path / "toy.pt", model)
        loaded = load_checkpoint(tmp_path / "toy.pt")
        assert isinstance(loaded.fusion, LastFrame) and isinstance(loaded.radius, HalfRadius)
        assert equal_weights(loaded, model)
        patch.delitem(model_module.RADII, "half")
        with pytest.raises(
            ModelError, match=r"toy\.pt cannot be opened: unknown radius 'half': .* in model\.py"
        ):
            load_checkpoint(tmp_path / "toy.pt")
    with pytest.raises(ModelError, match=r"toy\.pt cannot be opened: unknown fusion 'last': .* in model\.py"):
        load_checkpoint(tmp_path / "toy.pt")


# --------------------------------------------------------------------------------------- released checkpoints


@pytest.fixture(scope="module")
def hugging_face() -> nn.Module:
    """A small random CLIPModel of Hugging Face's: widths, depths and patches differ; the real vocabulary."""
    import_clip()  # first: it makes the torchvision importable that transformers imports
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1)
    text |= dict(max_position_embeddings=20, vocab_size=49408, eos_token_id=49407, bos_token_id=49406)
    vision = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2)
    vision |= dict(image_size=32, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)).float().eval()
    for k, parameter in enumerate(
        model.parameters()
    ):  # nothing at zero or one, where a wrong term would hide
        parameter.data += 0.1 * randn(*parameter.shape, seed=k)
    return model


@pytest.fixture(scope="module")
def released(hugging_face) -> dict:
    """{"epoch", "state_dict", "optimizer"} with all names of the released code."""
    state = {f"clip.{name}": value for name, value in hugging_face.state_dict().items()}
    state["clip.text_model.embeddings.position_ids"] = torch.arange(20)[None]
    state["clip.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    shapes = {f"cross_attn.{part}_proj": (DIM, DIM) for part in ("q", "k", "v", "out")}
    shapes |= {"linear_proj": (DIM, DIM), **{f"layer_norm{k}": (DIM,) for k in (1, 2, 3)}}
    shapes = {f"pool_frames.{name}": shape for name, shape in shapes.items()}
    shapes |= {"stochastic.std_branch.linear_proj": (DIM, FRAMES)}
    for k, (name, shape) in enumerate(shapes.items()):
        state[f"{name}.weight"] = 0.3 * randn(*shape, seed=k)
        state[f"{name}.bias"] = 0.3 * randn(shape[0], seed=100 + k)
    state["stochastic.std_branch.learnable_scalar"] = torch.tensor(
        [float("nan")]
    )  # the released code sets none
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    return {"epoch": 5, "state_dict": state, "optimizer": optimizer.state_dict()}


def released_psi(text, frames, state):
    """psi and R of one text and one video by the released names, written without model.py."""
    w = {name.removeprefix("pool_frames."): value for name, value in state.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        return layer_norm(x, (DIM,), w[f"{name}.weight"], w[f"{name}.bias"])

    t, f = norm("layer_norm1", text), norm("layer_norm1", frames)
    a = (linear("cross_attn.k_proj", f) @ linear("cross_attn.q_proj", t) / DIM**0.5).softmax(0)
    o = norm("layer_norm2", linear("cross_attn.out_proj", a @ linear("cross_attn.v_proj", f)))
    video = norm("layer_norm3", o + linear("linear_proj", o))
    sims = torch.stack([torch.cosine_similarity(text, frame, dim=0) for frame in frames])
    return video, linear("stochastic.std_branch.linear_proj", sims).exp()


def test_features_of_a_released_checkpoint_equal_hugging_faces(hugging_face, released, tmp_path):
    torch.save(released, tmp_path / "model_best.pth")
    model = load_checkpoint(tmp_path / "model_best.pth")
    assert model.resolution == 32 and not model.training
    assert (model.arguments["num_frames"], model.arguments["radius"]) == (FRAMES, "linear")
    tokens = tokenize(["a red square", "a blue circle rolls to the left and back again", "x"], 20)
    images = randn(2, FRAMES, 3, 32, 32)
    padded = tokens.where(
        tokens > 0, 49407
    )  # the released code pads with the end mark, OpenAI's tokenizer with 0
    with torch.no_grad():
        text = hugging_face.text_projection(hugging_face.text_model(input_ids=padded).pooler_output)
        pooled = hugging_face.vision_model(pixel_values=images.flatten(0, 1)).pooler_output
        frames = hugging_face.visual_projection(pooled)
        assert text.std() > 0.5 and frames.std() > 0.5
        assert torch.allclose(model.encode_text(tokens), text, rtol=0, atol=1e-5)
        assert torch.allclose(model.encode_frames(images).flatten(0, 1), frames, rtol=0, atol=1e-5)
    assert torch.equal(model.logit_scale, hugging_face.logit_scale)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_of_hugging_face_are_read(hugging_face, released, tmp_path, name):
    """The same CLIP as in the released checkpoint, whose features the test above compares."""
    hugging_face.config.save_pretrained(tmp_path)
    state = hugging_face.state_dict()
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    torch.save(released, tmp_path / "model_best.pth")
    assert equal_weights(load_clip(str(tmp_path / name)), load_checkpoint(tmp_path / "model_best.pth").clip)


def test_released_checkpoint_of_a_wrapped_model_opens(released, tmp_path):
    torch.save(released, tmp_path / "one.pth")
    state = {f"module.{name}": value for name, value in released["state_dict"].items()}
    torch.save({**released, "state_dict": state}, tmp_path / "wrapped.pth")
    assert equal_weights(load_checkpoint(tmp_path / "wrapped.pth"), load_checkpoint(tmp_path / "one.pth"))


def test_psi_and_R_of_a_released_checkpoint_equal_their_equations(released, tmp_path):
    torch.save(released, tmp_path / "model_best.pth")
    model = load_checkpoint(tmp_path / "model_best.pth")
    text, frames = randn(5, DIM), randn(2, FRAMES, DIM, seed=1)
    for i, j in ((0, 0), (4, 1)):
        video, radius = released_psi(text[i], frames[j], released["state_dict"])
        assert torch.allclose(model.fusion(text, frames)[i, j], video, atol=1e-5)
        assert torch.allclose(model.radius(text, frames)[i, j], radius, atol=1e-5)


def test_released_xpool_checkpoint_opens_without_a_mass(released, tmp_path):
    state = {name: x for name, x in released["state_dict"].items() if not name.startswith("stochastic.")}
    torch.save({**released, "state_dict": state}, tmp_path / "model_best.pth")
    model, trained, _ = open_checkpoint(tmp_path / "model_best.pth")
    assert model.radius is None and isinstance(model.fusion, XPool) and model.arguments["num_frames"] == 12
    assert torch.equal(model.fusion.value.weight, state["pool_frames.cross_attn.v_proj.weight"])
    assert trained == {"released": True}


@pytest.mark.parametrize("spoil, says", [
    (lambda state: state.pop("clip.text_model.encoder.layers.1.self_attn.v_proj.bias"), "v_proj.bias"),
    (lambda state: state.pop("pool_frames.layer_norm2.weight"), "Error"),
    (lambda state: state.update(extra=torch.zeros(2)), "Error"),
    (lambda state: [state.pop(k) for k in [*state] if k.startswith("pool_frames")], "no pool_frames"),
])  # fmt: skip
def test_released_checkpoint_loads_strictly(released, tmp_path, spoil, says):
    state = dict(released["state_dict"])
    spoil(state)
    torch.save({**released, "state_dict": state}, tmp_path / "model_best.pth")
    sentence = rf"model_best\.pth is not a checkpoint of train\.py .*{says}.*or a released checkpoint"
    with pytest.raises(ModelError, match=sentence):
        load_checkpoint(tmp_path / "model_best.pth")


def test_file_with_other_python_objects_gives_one_sentence_and_runs_nothing(released, tmp_path):
    torch.save({**released, "config": TMASS}, tmp_path / "model_best.pth")
    with pytest.raises(
        ModelError, match=r"model_best\.pth holds Python objects .* keep its \"state_dict\" alone"
    ):
        load_checkpoint(tmp_path / "model_best.pth")


def test_evaluate_scores_a_released_checkpoint(released, clips_folder, tmp_path, monkeypatch, capsys):
    """As `python evaluate.py --checkpoint model_best.pth`, by the paper's and by the released protocol."""
    monkeypatch.chdir(tmp_path)
    name = "clip.text_model.embeddings.position_embedding.weight"  # built-in captions exceed 20 tokens
    state = {**released["state_dict"], name: released["state_dict"][name].repeat(3, 1)}
    torch.save({**released, "state_dict": state}, "model_best.pth")
    videos = ["--annotations", str(clips_folder / "clips.csv"), "--videos", str(clips_folder / "clips")]
    flags = ["--checkpoint", "model_best.pth", *videos]
    evaluate.main([*flags, "--dataset", "csv", "--captions", "first"])
    honest = json.loads(Path("results.json").read_text())
    assert honest["prior"] == {"prior": "uniform", "std": 1.0}
    assert (honest["texts"], honest["videos"], honest["M"]) == (4, 4, 20)
    assert "T-MASS, M = 20, U(0, 1)" in capsys.readouterr().out
    leaky = [*flags, "--dataset", "csv", "--captions", "first", "--protocol", "released"]
    evaluate.main([*leaky, "--prior", "normal", "--prior-std", "0.003"])
    result = json.loads(Path("results-LEAKS.json").read_text())
    assert result["prior"] == {"prior": "normal", "std": 0.003} and "N(0, 0.003^2), LEAKS" in result["name"]
    with pytest.raises(
        SystemExit, match=r"^error: model_best\.pth does not say which data set it is for: name one by"
    ):
        evaluate.main(flags)


def test_noise_of_a_released_checkpoint_is_that_of_the_released_code():
    config = EvaluationConfig()
    assert prior_of(config, {"released": True}, "msrvtt") == {"prior": "uniform", "std": 1.0}
    assert prior_of(config, {"released": True}, "lsmdc") == {"prior": "normal", "std": 0.003}
    own = {"prior": "normal", "prior_std": 0.5}
    assert prior_of(config, own, "lsmdc") == {"prior": "normal", "std": 0.5}


# ------------------------------------------------------------------------------------------------ safetensors


@pytest.mark.parametrize("options", [dict(radius="none", heads=2), dict(radius="scalar", frames=7)])
def test_from_pretrained_gives_back_what_save_pretrained_wrote(tmp_path, options):
    model, folder = random_model(**options), tmp_path / "a" / "model"
    model.save_pretrained(folder, config={"prior": "uniform"})
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = TMASS.from_pretrained(folder)
    assert loaded.arguments == model.arguments and not loaded.training and equal_weights(loaded, model)
    assert json.loads((folder / "config.json").read_text())["config"] == {"prior": "uniform"}


def test_folder_that_names_a_method_opens_as_its_psi_and_radius(tmp_path):
    model = random_model(radius="none")
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["arguments"] |= dict(method="xpool", radius="linear")
    del content["arguments"]["fusion"], content["checksum"]  # which earlier versions did not write
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert TMASS.from_pretrained(tmp_path).arguments == model.arguments


def test_a_folder_of_save_pretrained_opens_as_a_run(tmp_path):
    random_model().save_pretrained(tmp_path, config={"dataset": "csv"})
    model, trained, file = open_checkpoint(tmp_path)
    assert trained == {"dataset": "csv"} and file == tmp_path / "model.safetensors"
    assert model.arguments["num_frames"] == 4


def test_damaged_folder_gives_one_sentence(tmp_path):
    random_model().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for content in (b"", whole[:30], whole[: len(whole) // 2]):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.safetensors or its config\.json is damaged"):
            TMASS.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json not found"):
        TMASS.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model\.safetensors not found"):
        TMASS.from_pretrained(tmp_path / "none")


# ------------------------------------------------------------------------------------------------ a full disk


def fails(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("save, name", [
    (lambda folder: save_checkpoint(folder / "last.pt", random_model(), step=2), "last.pt"),
    (lambda folder: random_model().save_pretrained(folder), "model.safetensors"),
])  # fmt: skip
def test_full_disk_leaves_the_older_file_and_no_half_file(tmp_path, monkeypatch, save, name):
    save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(engine.files.os, "fsync", fails)
    with pytest.raises(
        ModelError, match=rf"{name} could not be written \(No space left on device\): free some space"
    ):
        save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

"""Checkpoints of others and for others: released T-MASS and X-Pool files, safetensors folders, files that cannot be written."""

import json
from pathlib import Path

import pytest
import torch
from conftest import randn, random_model, small_clip

import evaluate
from model import TMASS, ModelError, XPool, _import_clip, load_checkpoint, load_clip, save_checkpoint

FRAMES, DIM = 3, 24


@pytest.fixture(scope="module")
def hugging_face() -> torch.nn.Module:
    """A small random CLIPModel of Hugging Face's: widths, depths, patches and the vocabulary of the real tokenizer, all different."""
    _import_clip()  # first: it mends the torchvision that transformers imports
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=20, vocab_size=49408,
                eos_token_id=49407, bos_token_id=49406)  # fmt: skip
    vision = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)).float().eval()
    for k, parameter in enumerate(model.parameters()):  # nothing at zero or one, where a wrong term would hide
        parameter.data += 0.1 * randn(*parameter.shape, seed=k)
    return model


def released_psi(text, frames, state):
    """psi and R of one text and one video as the released names say, written without model.py."""
    w = {name.removeprefix("pool_frames."): value for name, value in state.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        return torch.nn.functional.layer_norm(x, (DIM,), w[f"{name}.weight"], w[f"{name}.bias"])

    t, f = norm("layer_norm1", text), norm("layer_norm1", frames)
    a = (linear("cross_attn.k_proj", f) @ linear("cross_attn.q_proj", t) / DIM**0.5).softmax(0)
    o = norm("layer_norm2", linear("cross_attn.out_proj", a @ linear("cross_attn.v_proj", f)))
    video = norm("layer_norm3", o + linear("linear_proj", o))
    sims = torch.stack([torch.cosine_similarity(text, frame, dim=0) for frame in frames])
    return video, linear("stochastic.std_branch.linear_proj", sims).exp()


@pytest.fixture(scope="module")
def released(hugging_face) -> dict:
    """{"epoch", "state_dict", "optimizer"} with the names of the released code, position_ids and learnable_scalar included."""
    state = {f"clip.{name}": value for name, value in hugging_face.state_dict().items()}
    state["clip.text_model.embeddings.position_ids"] = torch.arange(20)[None]
    state["clip.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    shapes = {f"cross_attn.{part}_proj": (DIM, DIM) for part in ("q", "k", "v", "out")} | {"linear_proj": (DIM, DIM)}
    shapes = {f"pool_frames.{name}": shape for name, shape in shapes.items()} | {"stochastic.std_branch.linear_proj": (DIM, FRAMES)}
    shapes |= {f"pool_frames.layer_norm{k}": (DIM,) for k in (1, 2, 3)}
    for k, (name, shape) in enumerate(shapes.items()):
        state[f"{name}.weight"], state[f"{name}.bias"] = 0.3 * randn(*shape, seed=k), 0.3 * randn(shape[0], seed=100 + k)
    state["stochastic.std_branch.learnable_scalar"] = torch.tensor([float("nan")])  # uninitialised in the released code
    return {"epoch": 5, "state_dict": state, "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]).state_dict()}


# ------------------------------------------------------------------------------------------------------------- released checkpoints


def test_features_of_a_released_checkpoint_equal_hugging_faces(hugging_face, released, tmp_path):
    torch.save(released, tmp_path / "model_best.pth")
    model = load_checkpoint(tmp_path / "model_best.pth")
    assert model.resolution == 32 and model.arguments["num_frames"] == FRAMES and model.arguments["method"] == "tmass" and not model.training
    tokens = _import_clip().tokenize(["a red square", "a blue circle rolls to the left and back again", "x"], 20)
    images = randn(2, FRAMES, 3, 32, 32)
    padded = tokens.where(tokens > 0, 49407)  # the released code pads with the end mark, OpenAI's tokenizer with 0
    with torch.no_grad():
        text = hugging_face.text_projection(hugging_face.text_model(input_ids=padded).pooler_output)
        frames = hugging_face.visual_projection(hugging_face.vision_model(pixel_values=images.flatten(0, 1)).pooler_output)
        assert text.std() > 0.5 and frames.std() > 0.5
        assert torch.allclose(model.encode_text(tokens), text, rtol=0, atol=1e-5)
        assert torch.allclose(model.encode_frames(images).flatten(0, 1), frames, rtol=0, atol=1e-5)
    assert torch.equal(model.logit_scale, hugging_face.logit_scale)


def test_psi_and_R_of_a_released_checkpoint_equal_their_equations(released, tmp_path):
    torch.save(released, tmp_path / "model_best.pth")
    model = load_checkpoint(tmp_path / "model_best.pth")
    text, frames = randn(5, DIM), randn(2, FRAMES, DIM, seed=1)
    for i, j in ((0, 0), (4, 1)):
        video, radius = released_psi(text[i], frames[j], released["state_dict"])
        assert torch.allclose(model.fusion(text, frames)[i, j], video, atol=1e-5)
        assert torch.allclose(model.radius(text, frames)[i, j], radius, atol=1e-5)


def test_released_xpool_checkpoint_opens_without_a_mass(released, tmp_path):
    state = {name: value for name, value in released["state_dict"].items() if not name.startswith("stochastic.")}
    torch.save({**released, "state_dict": state}, tmp_path / "model_best.pth")
    model = load_checkpoint(tmp_path / "model_best.pth")
    assert model.radius is None and isinstance(model.fusion, XPool) and model.arguments["num_frames"] == 12
    assert torch.equal(model.fusion.value.weight, state["pool_frames.cross_attn.v_proj.weight"])


@pytest.mark.parametrize("spoil, says", [
    (lambda state: state.pop("clip.text_model.encoder.layers.1.self_attn.v_proj.bias"), "v_proj.bias"),
    (lambda state: state.pop("pool_frames.layer_norm2.weight"), "Error"),
    (lambda state: state.update(extra=torch.zeros(2)), "Error"),
    (lambda state: [state.pop(name) for name in list(state) if name.startswith("pool_frames")], "no pool_frames in it"),
])  # fmt: skip
def test_released_checkpoint_loads_strictly(released, tmp_path, spoil, says):
    state = dict(released["state_dict"])
    spoil(state)
    torch.save({**released, "state_dict": state}, tmp_path / "model_best.pth")
    with pytest.raises(ModelError, match=rf"model_best\.pth is not a checkpoint of train\.py .*{says}.*or a released checkpoint"):
        load_checkpoint(tmp_path / "model_best.pth")


@pytest.mark.parametrize("name, value", [
    ("text_projection", torch.ones(3)), ("ln_final.weight", torch.ones(32)), ("ln_final.weight", 3),
    ("visual.attnpool.positional_embedding", torch.ones(0, 3)),
])  # fmt: skip
def test_foreign_weights_give_one_sentence(tmp_path, name, value):
    """Sizes that no CLIP has, and things that are no tensors, in each of the layouts."""
    state = {**small_clip().state_dict(), name: value}
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ModelError, match=r"clip\.pt holds no CLIP of OpenAI's layout \(.+\): give"):
        load_clip("tiny", tmp_path / "clip.pt")
    torch.save({"model": {f"clip.{key}": v for key, v in state.items()}, "arguments": {}}, tmp_path / "ours.pt")
    for path in (tmp_path / "clip.pt", tmp_path / "ours.pt"):
        with pytest.raises(ModelError, match=rf"{path.name} is not a checkpoint of train\.py \(.+\): name"):
            load_checkpoint(path)


def test_file_with_other_python_objects_gives_one_sentence_and_runs_nothing(released, tmp_path):
    torch.save({**released, "config": TMASS}, tmp_path / "model_best.pth")
    with pytest.raises(ModelError, match=r"model_best\.pth holds Python objects .* keep its \"state_dict\" alone"):
        load_checkpoint(tmp_path / "model_best.pth")


def test_evaluate_scores_a_released_checkpoint(released, clips_folder, tmp_path, monkeypatch, capsys):
    """As `python evaluate.py --checkpoint model_best.pth --dataset ...` does, with the paper's protocol and with the released one."""
    monkeypatch.chdir(tmp_path)
    torch.save({**released, "state_dict": {**released["state_dict"], **longer_context(released)}}, "model_best.pth")
    flags = ["--checkpoint", "model_best.pth", "--annotations", str(clips_folder / "clips.csv"), "--videos", str(clips_folder / "clips")]
    evaluate.main([*flags, "--dataset", "csv", "--captions", "first"])
    honest = json.loads(Path("results.json").read_text())
    assert honest["prior"] == {"prior": "uniform", "std": 1.0} and (honest["texts"], honest["videos"], honest["M"]) == (4, 4, 20)
    assert "T-MASS, M = 20, U(0, 1)" in capsys.readouterr().out
    evaluate.main([*flags, "--dataset", "csv", "--captions", "first", "--protocol", "released", "--prior", "normal", "--prior-std", "0.003"])
    leaky = json.loads(Path("results-LEAKS.json").read_text())
    assert leaky["prior"] == {"prior": "normal", "std": 0.003} and "N(0, 0.003^2), LEAKS" in leaky["name"]
    with pytest.raises(SystemExit, match=r"^error: model_best\.pth does not say which data set it is for: name one by --dataset"):
        evaluate.main(flags)


def longer_context(released: dict) -> dict:
    """The built-in captions need more tokens than the small CLIP has places."""
    name = "clip.text_model.embeddings.position_embedding.weight"
    return {name: released["state_dict"][name].repeat(3, 1)}


def test_noise_of_a_released_checkpoint_is_the_released_codes():
    config = evaluate.EvaluationConfig()
    assert evaluate.prior_of(config, {"released": True}, "msrvtt") == {"prior": "uniform", "std": 1.0}
    assert evaluate.prior_of(config, {"released": True}, "lsmdc") == {"prior": "normal", "std": 0.003}
    assert evaluate.prior_of(config, {"prior": "normal", "prior_std": 0.5}, "lsmdc") == {"prior": "normal", "std": 0.5}


# ------------------------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("options", [dict(method="xpool", heads=2), dict(radius="scalar", frames=7)])
def test_from_pretrained_gives_back_what_save_pretrained_wrote(tmp_path, options):
    model = random_model(**options)
    model.save_pretrained(tmp_path / "a" / "model", config={"prior": "uniform"})
    assert {p.name for p in (tmp_path / "a" / "model").iterdir()} == {"config.json", "model.safetensors"}
    loaded = TMASS.from_pretrained(tmp_path / "a" / "model")
    assert loaded.arguments == model.arguments and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert json.loads((tmp_path / "a" / "model" / "config.json").read_text())["config"] == {"prior": "uniform"}


def test_evaluate_opens_a_folder_of_save_pretrained(tmp_path):
    random_model().save_pretrained(tmp_path, config={"dataset": "csv"})
    model, trained, file = evaluate.open_checkpoint(tmp_path)
    assert trained == {"dataset": "csv"} and file == tmp_path / "model.safetensors" and model.arguments["num_frames"] == 4


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


# ----------------------------------------------------------------------------------------------------------------------- a full disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_full_disk_leaves_the_older_checkpoint_and_no_half_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, random_model(), step=1)
    before = path.read_bytes()
    (tmp_path / ".last.pt.part").symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(ModelError, match=r"last\.pt could not be written \(No space left on device\): make room"):
        save_checkpoint(path, random_model(), step=2)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_encode_text_equals_clips_own():
    clip = small_clip()
    tokens = _import_clip().tokenize(["a red square", "a blue circle rolls to the left and back again", "x"], 20)
    own = clip.encode_text(tokens)
    assert torch.equal(TMASS(clip).encode_text(tokens), own)
    assert torch.equal(TMASS(clip).encode_text(tokens), own)  # also of a CLIP that has been in a model before

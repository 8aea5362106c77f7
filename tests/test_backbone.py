"""CLIP's weights in all their layouts, its tokenizer, and the one import of its package."""

import json
import re
import urllib.error
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, randn, small_clip

from engine.backbone import (
    activation_of,
    autocast,
    count_tokens,
    fingerprint,
    import_clip,
    laid_out,
    load_clip,
    resolve_amp,
    tokenize,
)
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.files import ModelError
from engine.weights import load_file
from model import TMASS


@pytest.mark.parametrize("trunk", ["resnet", "vit"])
@pytest.mark.parametrize("archive", [False, True], ids=["state_dict", "jit"])
def test_weights_come_back_as_stored_whatever_their_sizes(tmp_path, trunk, archive):
    clip, path = small_clip(trunk), tmp_path / "weights.pt"
    if archive:  # as OpenAI stores them
        side = clip.visual.input_resolution
        example = randn(2, 3, side, side), torch.ones(2, 20, dtype=torch.long)
        torch.jit.trace(clip, example, check_trace=False).save(path)
    else:
        torch.save(clip.state_dict(), path)
    loaded = load_clip(str(path))
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    pairs = zip(clip.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def loaded_as_stored(clip: torch.nn.Module, path) -> bool:
    """Whether load_clip gives back the weights of a CLIP, bit for bit."""
    found, own = load_clip("tiny", path).state_dict(), clip.state_dict()
    return found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)


@pytest.mark.parametrize("before", [
    "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "module.model.clip.",
])  # fmt: skip
def test_names_of_wrapped_modules_are_read(tmp_path, before):
    """DataParallel, DistributedDataParallel, torch.compile, Lightning, a checkpoint of a larger model."""
    clip = small_clip("vit")
    state = {f"{before}{name}": value for name, value in clip.state_dict().items()}
    more = {"head.weight": torch.ones(2)} if before == "module.model.clip." else {}
    torch.save({"epoch": 3, "state_dict": {**state, **more}}, tmp_path / "wrapped.pt")
    assert loaded_as_stored(clip, tmp_path / "wrapped.pt")


def test_a_compiled_part_and_averaged_weights_are_read(tmp_path):
    clip = small_clip("vit")
    names = (name.replace("visual.", "visual._orig_mod.") for name in clip.state_dict())
    state = dict(zip((f"module.{name}" for name in names), clip.state_dict().values()))
    torch.save({**state, "n_averaged": torch.tensor(7)}, tmp_path / "averaged.pt")
    assert loaded_as_stored(clip, tmp_path / "averaged.pt")


@pytest.mark.parametrize("name", ["clip.safetensors", "clip.bin"])
def test_safetensors_are_read_whatever_the_files_name(tmp_path, name):
    clip = small_clip()
    safetensors.torch.save_file(clip.state_dict(), tmp_path / name)
    assert loaded_as_stored(clip, tmp_path / name)


def test_tiny_is_clips_own_class_and_small():
    clip = load_clip("tiny")
    assert type(clip).__module__ == "clip.model"
    assert sum(p.numel() for p in clip.visual.parameters()) < 2e6


def test_a_failed_download_says_what_to_fetch(monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(import_clip(), "load", offline)
    with pytest.raises(ModelError, match=r"ViT-B-16\.pt .*--weights"):
        load_clip("ViT-B/16")


def test_unknown_arch_missing_foreign_and_corrupt_weights_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"unknown arch 'ViT-Z'.*tiny.*ViT-B/32"):
        load_clip("ViT-Z")
    with pytest.raises(ModelError, match=r"gone\.pt not found"):
        load_clip("tiny", tmp_path / "gone.pt")
    torch.save({"some": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(ModelError, match=r"foreign\.pt holds no CLIP"):
        load_clip("tiny", tmp_path / "foreign.pt")
    (tmp_path / "corrupt.pt").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ModelError, match=r"corrupt\.pt is not a file of weights"):
        load_clip("tiny", tmp_path / "corrupt.pt")


@pytest.mark.parametrize("name, value", [
    ("text_projection", torch.ones(3)), ("ln_final.weight", torch.ones(32)), ("ln_final.weight", 3),
    ("visual.attnpool.positional_embedding", torch.ones(0, 3)),
])  # fmt: skip
def test_foreign_weights_give_one_sentence(tmp_path, name, value):
    """Sizes that no CLIP has, and values that are no tensors."""
    torch.save({**small_clip().state_dict(), name: value}, tmp_path / "clip.pt")
    with pytest.raises(ModelError, match=r"clip\.pt holds no CLIP of OpenAI's layout \(.+\): give"):
        load_clip("tiny", tmp_path / "clip.pt")


def test_file_of_something_else_than_a_dict_gives_one_sentence(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ModelError, match=r"tensor\.pt holds no dict of weights, but Tensor"):
        load_file(tmp_path / "tensor.pt")


# ---- the activation, which arrays do not show

GELU, QUICK = {"model_cfg": {"embed_dim": 512}}, {"model_cfg": {"quick_gelu": True}}


def in_order(state: dict, *parts: str) -> dict:
    """The state with the parts of each layer in this order, in which a class declares them."""
    named = [(name, name.split("resblocks.")[-1].split(".")) for name in state]
    key = {name: (split[0], parts.index(split[1])) for name, split in named if split[0].isdigit()}
    layers = sorted(key, key=lambda name: (name.partition("resblocks.")[0], *key[name]))
    return {name: state[name] for name in [*(name for name in state if name not in key), *layers]}


def with_gelu(clip: torch.nn.Module) -> torch.nn.Module:
    for block in [*clip.transformer.resblocks, *clip.visual.transformer.resblocks]:
        block.mlp.gelu = torch.nn.GELU()
    return clip


@pytest.mark.parametrize("config, activation", [
    ({"config.json": {"text_config": {"hidden_act": "gelu"}}}, "gelu"),
    ({"open_clip_config.json": GELU}, "gelu"), ({"open_clip_config.json": QUICK}, "quick_gelu"),
    ({"config.json": [1]}, "quick_gelu"),
    ({"config.json": {"text_config": {"hidden_act": "quick_gelu"}, "vision_config": [3]}}, "quick_gelu"),
    ({"config.json": {"arguments": {"activation": "gelu"}}}, "gelu"), ({}, "quick_gelu"),
])  # fmt: skip
def test_the_configs_beside_a_file_name_its_activation(tmp_path, capsys, config, activation):
    """The arrays have the same names and shapes. Without a config, their order is that of OpenAI's class."""
    clip = small_clip("vit")
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    for name, content in config.items():
        (tmp_path / name).write_text(json.dumps(content))
    images, clip = randn(2, 3, 32, 32), with_gelu(clip) if activation == "gelu" else clip
    loaded = load_clip("tiny", tmp_path / "clip.pt")
    assert torch.allclose(loaded.encode_image(images), clip.encode_image(images), atol=1e-5)
    assert activation_of(loaded) == activation_of(loaded.visual) == activation and not capsys.readouterr().err


@pytest.mark.parametrize("parts, name, activation, sure", [
    (("attn", "ln_1", "mlp", "ln_2"), "clip.pt", "quick_gelu", True),  # OpenAI's class
    (("ln_1", "attn", "ln_2", "mlp"), "clip.pt", "gelu", False),  # OpenCLIP's class
    (("ln_1", "attn", "ln_2", "mlp"), "ViT-B-32-quickgelu.pt", "quick_gelu", True),
    (("attn", "ln_1", "ln_2", "mlp"), "clip.pt", "quick_gelu", False),  # by the alphabet
])  # fmt: skip
def test_a_file_without_a_config_shows_its_activation_or_a_note_says_what_is_assumed(
    tmp_path, capsys, parts, name, activation, sure
):
    state = in_order(small_clip("vit").state_dict(), *parts)
    torch.save({"state_dict": {f"module.{name}": x for name, x in state.items()}}, tmp_path / name)
    assert activation_of(load_clip("tiny", tmp_path / name)) == activation
    note = capsys.readouterr().err
    assert bool(note) != sure and note.count("\n") == (not sure)
    if not sure:  # as the note says
        assumed = {"gelu": "GELU", "quick_gelu": "QuickGELU"}[activation]
        assert f"{name} does not tell its activation; {assumed} is assumed" in note
        line, file = re.search(r"write ({.*}) to (.*)\.$", note).groups()
        Path(file).write_text(line)
        assert activation_of(load_clip("tiny", tmp_path / name)) != activation
        assert not capsys.readouterr().err


def test_an_archive_shows_its_activation_by_its_code(tmp_path, capsys):
    for number, clip in enumerate((small_clip("vit"), with_gelu(small_clip("vit")))):
        example, path = (randn(2, 3, 32, 32), torch.ones(2, 20, dtype=torch.long)), tmp_path / f"{number}.pt"
        torch.jit.trace(clip, example, check_trace=False).save(path)
        assert activation_of(load_clip("tiny", path)) == ("quick_gelu", "gelu")[number]
    assert not capsys.readouterr().err


def test_features_of_another_activation_have_another_fingerprint():
    assert fingerprint(small_clip("vit").visual) != fingerprint(with_gelu(small_clip("vit")).visual)


def test_a_clip_with_gelu_is_opened_with_gelu(tmp_path):
    """The arrays do not show it, so the file says it; one without a word is OpenAI's. Also as --weights."""
    model = TMASS(small_clip("vit"), num_frames=3).eval()
    images, tokens = randn(2, 3, 3, 32, 32), torch.randint(1, 49000, (4, 20))
    plain = model.encode_text(tokens)
    with_gelu(model.clip)
    save_checkpoint(tmp_path / "best.pt", model)
    model.save_pretrained(tmp_path)
    for name in ("best.pt", "model.safetensors"):
        opened = load_checkpoint(tmp_path / name)
        assert torch.equal(opened.encode_text(tokens), model.encode_text(tokens))
        assert torch.allclose(opened.encode_frames(images), model.encode_frames(images), atol=1e-5)
        assert activation_of(load_clip("tiny", tmp_path / name)) == "gelu"
    assert (model.encode_text(tokens) - plain).abs().max() > 1e-3
    content = load_file(tmp_path / "best.pt")
    content["arguments"]["activation"] = "relu"
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(ModelError, match=r"best\.pt is not a checkpoint .*its activation is 'relu'"):
        load_checkpoint(tmp_path / "best.pt")


@pytest.mark.parametrize("config, says", [
    ({"config.json": {"vision_config": {"hidden_size": 1280, "num_attention_heads": 16}}}, "16 heads for"),
    ({"config.json": {"text_config": {"hidden_act": "gelu_new"}}}, "the activation gelu_new, not quick_gelu"),
    ({"config.json": {"text_config": {"hidden_act": "gelu"}, "vision_config": {}}}, "gelu and quick_gelu"),
])  # fmt: skip
def test_a_clip_that_openais_class_computes_differently_is_refused(tmp_path, config, says):
    """Its weights have the same names and shapes: the features would be wrong without a word."""
    torch.save(small_clip("vit").state_dict(), tmp_path / "clip.pt")
    for name, content in config.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"clip\.pt cannot be used: .*{says}"):
        load_clip("tiny", tmp_path / "clip.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    state = small_clip("vit").state_dict()
    state["visual.proj"][3, 4] = value
    torch.save(state, tmp_path / "clip.pt")
    says = r"clip\.pt is damaged, or its training diverged: visual\.proj holds NaN or infinite values; name"
    with pytest.raises(ModelError, match=says):
        load_clip("tiny", tmp_path / "clip.pt")


def test_large_finite_weights_are_no_damage(tmp_path):
    """Their float16 sum is infinite."""
    state = {name: value.half() for name, value in small_clip("vit").state_dict().items()}
    state["token_embedding.weight"][:] = 100
    torch.save(state, tmp_path / "clip.pt")
    assert load_clip("tiny", tmp_path / "clip.pt").token_embedding.weight.max() == 100


@pytest.mark.parametrize("archive", [False, True], ids=["state_dict", "jit"])
def test_a_flipped_bit_is_found_by_the_checksum_of_its_part(tmp_path, archive):
    module, path = torch.nn.Linear(40, 50), tmp_path / "clip.pt"
    torch.jit.script(module).save(path) if archive else torch.save(module.state_dict(), path)
    load_file(path)
    content = bytearray(path.read_bytes())
    content[content.index(module.weight.detach().numpy().tobytes()) + 4003] ^= 1  # a little of one weight
    path.write_bytes(content)
    with pytest.raises(
        ModelError, match=r"clip\.pt is damaged, clip/data/\d does not match its checksum: copy"
    ):
        load_file(path)


def test_files_without_a_checksum_stay_readable(tmp_path):
    content = {"a": torch.arange(5.0)}
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, tmp_path / "unchecked.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("legacy.pt", "unchecked.pt"):
        assert torch.equal(load_file(tmp_path / name)["a"], content["a"])


def test_absurd_sizes_are_refused_before_they_fill_the_memory(tmp_path):
    """Tensors of one stored number, shapes that fit no other, and an archive packed to a thousandth."""
    state = small_clip("vit").state_dict()
    state["token_embedding.weight"] = torch.zeros(1, 1).expand(10**7, 10**7)
    torch.save(state, tmp_path / "expanded.pt")
    with pytest.raises(ModelError, match=r"expanded\.pt holds weights that are larger than what it stores"):
        load_clip("tiny", tmp_path / "expanded.pt")
    wide = {**small_clip("vit").state_dict(), "ln_final.weight": torch.ones(2**20)}
    torch.save(wide, tmp_path / "wide.pt")
    with pytest.raises(ModelError, match=r"wide\.pt holds no CLIP .* \(its sizes do not fit together\)"):
        load_clip("tiny", tmp_path / "wide.pt")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", bytes(2**26 + 2**20))
    with pytest.raises(ModelError, match=r"packed\.pt is packed, and larger than it can be"):
        load_file(tmp_path / "packed.pt")


def test_a_folder_and_an_unreadable_file_say_so(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r" is a folder: name a file in it"):
        load_clip("tiny", tmp_path)
    torch.save({}, tmp_path / "mine.pt")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(ModelError, match=r"mine\.pt could not be read \(Permission denied\)"):
        load_file(tmp_path / "mine.pt")


def test_captions_are_cut_to_the_context_and_counted_uncut():
    long = "a red square " * 30
    tokens = tokenize(["a red square", long], 20)
    assert tokens.shape == (2, 20) and tokens[:, 0].tolist() == [49406] * 2
    assert tokens[0, 4:].tolist() == [49407, *[0] * 15] and tokens[1, -1] == 49407  # cut, with its end mark
    assert count_tokens("a red square") == 5 and count_tokens(long) == 92


def test_fingerprint_changes_with_any_weight():
    one, other = small_clip(), small_clip()
    assert fingerprint(one) == fingerprint(other) and re.fullmatch("[0-9a-f]{16}", fingerprint(one))
    other.ln_final.bias.data[3] += 1e-7
    assert fingerprint(one) != fingerprint(other)


def test_amp_auto_is_off_on_the_cpu():
    cpu = torch.device("cpu")
    assert [resolve_amp(cpu, amp) for amp in ("auto", "bf16", "off")] == ["off", "bf16", "off"]


@pytest.mark.parametrize("trunk", ["resnet", "vit"])
def test_features_are_float32_sums_norms_and_projections_under_autocast(trunk):
    """Without autocast they are clip's own, bit for bit; in bf16 the last layers do not round them."""
    images, clip = randn(5, 3, 32, 32), small_clip(trunk)
    own, cpu = clip.encode_image(images), torch.device("cpu")
    with autocast(cpu, "bf16"):
        rounded = clip.encode_image(images)
    model = TMASS(laid_out(clip))
    assert torch.allclose(model.encode_frames(images[:, None])[:, 0], own, atol=0 if trunk == "vit" else 1e-6)
    with autocast(cpu, "bf16"):
        found = clip.encode_image(images)
    assert rounded.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert (found - own).norm() < 0.6 * (rounded.float() - own).norm()


def test_encode_text_equals_clips_own_bit_for_bit():
    clip = small_clip()
    tokens = tokenize(["a red square", "a blue circle rolls to the left and back again", "x"], 20)
    own = clip.encode_text(tokens)
    assert torch.equal(TMASS(clip).encode_text(tokens), own)
    assert torch.equal(TMASS(clip).encode_text(tokens), own)  # also of a CLIP that has been in a model before


def test_only_this_module_imports_clip():
    files = [
        path for folder in (".", "engine", "benchmarks", "notebooks") for path in (ROOT / folder).glob("*.py")
    ]
    importing = [
        path.name for path in files if re.search(r"^\s*(import|from) clip\b", path.read_text(), re.M)
    ]
    assert importing == ["backbone.py"]

"""CLIP's weights in all their layouts, its tokenizer, and the one import of its package."""

import re
import urllib.error

import pytest
import torch
from conftest import ROOT, randn, small_clip

from engine.backbone import (
    count_tokens,
    fingerprint,
    import_clip,
    load_clip,
    load_file,
    resolve_amp,
    tokenize,
)
from engine.files import ModelError
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

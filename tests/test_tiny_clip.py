"""The tiny CLIP: its examples, its losses, a few steps of its pretraining, its file."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randn
from safetensors.torch import load_file

import shapes
from engine import tiny_clip
from engine.backbone import TINY, TINY_FILE, import_clip, load_clip, tokenize, unknown_words
from engine.tiny_clip import STAGES, captions_loss, known_tokens, make_batch, similarity, words_loss
from model import TMASS

SMALL = tuple(replace(stage, batch=8, steps=3) for stage in STAGES)


@pytest.fixture(scope="module", autouse=True)
def few_clips():
    """Validation is on six clips."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "numbers", lambda split: range(3000, 3006))
        yield


@pytest.fixture(scope="module")
def pretrained(few_clips, tmp_path_factory):
    """A tiny CLIP after three steps of each stage, and its file."""
    file = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    return tiny_clip.pretrain(file, SMALL, workers=0), file


def test_the_phrases_of_a_picture_name_the_values_of_its_scene():
    batch = make_batch(replace(STAGES[0], batch=4), np.random.default_rng(0))
    assert batch.images.shape == (4, 1, 3, 64, 64) and batch.fits.shape == (0, 4)
    assert batch.tokens.shape == (26, TINY["context_length"]) and batch.values.shape == (4, 1, 4)
    rng = np.random.default_rng(0)
    scene = shapes.random_scene(rng)
    for (name, values), number in zip(shapes.ATTRIBUTES.items(), batch.values[0, 0].tolist(), strict=True):
        assert list(values)[number] == getattr(scene, name)
    for phrase, (name, value) in zip(
        tiny_clip.phrases(rng), [(n, v) for n, known in shapes.ATTRIBUTES.items() for v in known], strict=True
    ):
        assert any(word in phrase for word in shapes.ATTRIBUTES[name][value])


def test_the_captions_of_a_batch_fit_their_own_clips_and_groups_differ_in_little():
    batch = make_batch(replace(STAGES[1], batch=64), np.random.default_rng(0))
    assert batch.images.shape == (64, 3, 3, 64, 64) and len(batch.tokens) == 26 + 64
    assert batch.fits.diagonal().all()
    blocks = torch.block_diag(*[torch.ones(16, 16)] * 4).bool()
    assert batch.fits[blocks].float().mean() > 3 * batch.fits[~blocks].float().mean()


def test_no_example_is_a_validation_or_test_clip():
    """Of held-out clips and examples with the same seed, no random numbers are the same."""
    drawn = [scene.jitter for number in range(3000, 4000) for scene in shapes.make_clip(0, number).scenes]
    examples = set()
    for stage in STAGES:
        for step in range(0, stage.steps, 20):
            rng = np.random.default_rng([shapes.VERSION, 0, stage.scenes, step])
            examples |= {shapes.random_scene(rng).jitter for _ in range(2)}
    assert len(examples) == 2 * 400 and not examples & set(drawn)


def test_similarity_equals_its_equation_in_loops():
    text, frames = randn(3, 6), randn(4, 5, 6, seed=1)
    for i, j in np.ndindex(3, 4):
        unit = F.normalize(frames[j], dim=-1)
        weights = torch.softmax(torch.stack([F.cosine_similarity(text[i], f, dim=0) for f in unit]) / 0.1, 0)
        video = sum(w * f for w, f in zip(weights, unit))
        expected = F.cosine_similarity(text[i], video, dim=0)
        assert torch.allclose(similarity(text, frames)[i, j], expected, atol=1e-6)


def test_captions_loss_is_clips_loss_where_each_caption_fits_its_own_clip_only():
    scores, target = 5 * randn(6, 6), torch.arange(6)
    expected = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    assert torch.allclose(captions_loss(scores, torch.eye(6).bool()), expected)


def test_words_loss_is_least_where_the_right_values_score_highest():
    right = torch.tensor([[1, 2, 3, 4], [7, 0, 1, 5]])
    scores = torch.zeros(26, 2)
    for video, start, value in ((v, s, right[v, a]) for v in (0, 1) for a, s in enumerate((0, 8, 16, 20))):
        scores[start + value, video] = 50.0
    assert words_loss(scores, right) < 1e-6 < words_loss(-scores, right)


def test_every_word_of_a_caption_is_known():
    texts = [caption.text for number in range(300) for caption in shapes.make_clip(0, number).captions]
    assert torch.isin(tokenize(texts, TINY["context_length"]), known_tokens()).all()


def test_pretraining_changes_every_part_and_depends_on_the_seed_alone(pretrained, tmp_path):
    model, file = pretrained
    tiny_clip.pretrain(tmp_path / "again", SMALL, workers=0)
    tiny_clip.pretrain(tmp_path / "other", SMALL, seed=1, workers=0)
    kept = [load_file(path) for path in (file, tmp_path / "again", tmp_path / "other")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert not torch.equal(kept[0]["text_projection"], kept[2]["text_projection"])
    torch.manual_seed(0)
    start = import_clip().model.CLIP(**{**TINY, "vocab_size": len(known_tokens())}).state_dict()
    for name, value in model.clip.state_dict().items():
        assert not torch.equal(value, start[name]) or name.endswith("k_proj.bias"), name  # softmax ignores it


def test_the_file_holds_the_same_clip_up_to_rounding(pretrained):
    model, file = pretrained
    loaded, known = TMASS(load_clip("tiny", file), "mean", "none", 1).eval(), known_tokens()
    tokens = tokenize([shapes.make_clip(0, 0).captions[0].text], TINY["context_length"])
    text = model.encode_text(torch.searchsorted(known, tokens))
    assert torch.allclose(loaded.encode_text(tokens), text, rtol=1e-2, atol=1e-2 * text.std().item())
    unknown = torch.ones(TINY["vocab_size"], dtype=torch.bool)
    unknown[known] = False
    assert not loaded.clip.token_embedding.weight[unknown].any()
    assert unknown_words(loaded.clip, "a red dog in the snow") == ["dog"]


def test_the_shipped_clip_is_small_finite_and_knows_what_captions_say():
    assert TINY_FILE.stat().st_size <= 4 * 2**20
    clip = load_clip("tiny")
    assert all(value.isfinite().all() for value in clip.state_dict().values())
    model = TMASS(clip, "mean", "none", 1)
    found = tiny_clip.validate(model, torch.arange(TINY["vocab_size"]), range(3000, 3040))
    assert found["fits@1"] > 50 and found["R@10"] > 80

import json

import numpy as np
import pytest
import torch
from conftest import random_model, small_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from data import FrameCache, of_split
from evaluate import contact_sheet, extract_features, noise_bank, retrieval_metrics, scores, scores_literal, table
from losses import cosine_scores
from model import TMASS, ModelError, matched, save_checkpoint, stochastic_text

TEXTS, VIDEOS, FRAMES, DIM, M = 7, 5, 4, 24, 6


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


text, frames, noise = 3 * randn(TEXTS, DIM), 5 * randn(VIDEOS, FRAMES, DIM, seed=1), noise_bank(M, DIM, 0)
model = random_model(frames=FRAMES)


# ------------------------------------------------------------------------------------------------------------------------ scores


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([("clip", "linear"), ("xpool", "linear"), ("tmass", "fixed"), ("tmass", "scalar"), ("tmass", "linear")]),
    st.sampled_from([1, 2, 3]), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 4), st.sampled_from([1, 7, 1024]),
)  # fmt: skip
def test_fast_scores_equal_the_literal_ones(kind, heads, texts, videos, count, draws, block):
    model = random_model(kind[0], frames=count, radius=kind[1], heads=heads)
    t, f, e = 3 * randn(texts, DIM, seed=texts), 5 * randn(videos, count, DIM, seed=videos), noise_bank(draws, DIM, 0)
    assert torch.allclose(scores(model, t, f, e, block=block), scores_literal(model, t, f, e), atol=2e-5)


def test_literal_score_is_the_best_draw_of_its_pair():
    for i in range(TEXTS):
        for j in range(VIDEOS):
            t, f = text[i : i + 1], frames[j : j + 1]
            v, R = model.fusion(t, f)[0, 0], model.radius(t, f)[0, 0]
            draws = [torch.cosine_similarity(t[0] + R * eps, v, dim=0) for eps in noise]
            assert torch.allclose(scores_literal(model, text, frames, noise)[i, j], max(draws), atol=1e-5)


def released_protocol(model, text, frames, noise):
    """What the released evaluator computes: video j pooled by its own caption j, whatever the query."""
    video = matched(model.fusion(text, frames))
    t_s = stochastic_text(text, model.radius(text, frames), noise)
    return (normalize(t_s, dim=-1) * normalize(video, dim=-1)).sum(-1).amax(0)


def edits_leave_other_rows(score) -> bool:
    edited = text.clone()
    edited[1] = randn(DIM, seed=9)  # not "+= 1": LayerNorm would not see it
    before, after = score(model, text[:VIDEOS], frames, noise), score(model, edited[:VIDEOS], frames, noise)
    return ((after - before).abs() > 1e-5).any(dim=1).tolist() == [row == 1 for row in range(VIDEOS)]


@pytest.mark.parametrize("score", [scores, scores_literal])
def test_editing_one_caption_moves_only_its_row(score):
    assert edits_leave_other_rows(score)


def test_the_released_protocol_is_caught_by_that_test():
    assert not edits_leave_other_rows(released_protocol)


@pytest.mark.parametrize("score", [scores, scores_literal])
def test_cutting_and_permuting_the_gallery_cuts_and_permutes_the_scores(score):
    whole = score(model, text, frames, noise)
    videos, texts = torch.tensor([3, 0, 4]), torch.tensor([6, 2])
    assert torch.allclose(score(model, text[texts], frames[videos], noise), whole[texts][:, videos], atol=1e-5)
    assert torch.allclose(score(model, text[2:3], frames[4:5], noise), whole[2:3, 4:5], atol=1e-5)


def test_no_draws_score_the_text_itself_and_more_draws_never_score_less():
    assert torch.allclose(scores(model, text, frames, noise[:0]), cosine_scores(text, model.fusion(text, frames)), atol=1e-5)
    few, many = scores(model, text, frames, noise[:2]), scores(model, text, frames, noise)
    assert (many >= few - 1e-6).all() and (many > few + 1e-4).any()


def test_scores_leave_the_model_and_autograd_alone():
    assert not scores(model, text, frames, noise).requires_grad


def test_noise_bank_is_its_seed_and_its_prior():
    assert torch.equal(noise_bank(4, 9, 0), noise_bank(4, 9, 0)) and not torch.equal(noise_bank(4, 9, 0), noise_bank(4, 9, 1))
    normal, uniform = noise_bank(500, 99, 0, std=0.1), noise_bank(500, 99, 0, "uniform")
    assert abs(normal.mean()) < 1e-3 and abs(normal.std() - 0.1) < 1e-3
    assert abs(uniform.mean() - 0.5) < 1e-2 and uniform.min() >= 0 and uniform.max() <= 1


# ------------------------------------------------------------------------------------------------------------------------ metrics


def test_metrics_equal_sorting_by_hand():
    s, owner = randn(7, 5).numpy(), [0, 0, 1, 3, 3, 3, 4]  # video 2 has no caption
    t2v = [1 + int((row > row[o]).sum()) for row, o in zip(s, owner)]
    v2t = []
    for video in (0, 1, 3, 4):
        order = np.argsort(-s[:, video])
        v2t.append(1 + next(k for k, i in enumerate(order) if owner[i] == video))
    metrics = retrieval_metrics(torch.tensor(s), torch.tensor(owner))
    for name, ranks in {"t2v": t2v, "v2t": v2t}.items():
        for k in (1, 5, 10, 50):
            assert metrics[name][f"R@{k}"] == pytest.approx(100 * np.mean(np.array(ranks) <= k))
        assert metrics[name]["MdR"] == pytest.approx(np.median(ranks)) and metrics[name]["MnR"] == pytest.approx(np.mean(ranks))


def test_perfect_scores_rank_first_and_reversed_ones_last():
    owner = torch.arange(VIDEOS)
    assert retrieval_metrics(torch.eye(VIDEOS), owner)["t2v"] == {"R@1": 100, "R@5": 100, "R@10": 100, "R@50": 100, "MdR": 1, "MnR": 1}
    worst = retrieval_metrics(-torch.eye(VIDEOS), owner)
    assert worst["t2v"]["MnR"] == worst["v2t"]["MnR"] == VIDEOS


def test_constant_scores_rank_at_chance_not_first():
    metrics = retrieval_metrics(torch.zeros(3 * VIDEOS, VIDEOS), torch.arange(VIDEOS).repeat_interleave(3))
    assert metrics["t2v"]["MnR"] == (VIDEOS + 1) / 2 and metrics["t2v"]["R@1"] == 0
    assert metrics["v2t"]["MnR"] == (3 * VIDEOS + 1) / 4  # the best of 3 captions among 15, in expectation


def test_ties_rank_at_their_expected_place_over_random_orders():
    s, owner = torch.tensor([[2.0, 1, 1, 1, 0]]), torch.tensor([2])
    assert retrieval_metrics(s, owner)["t2v"]["MnR"] == 3  # one above, three level: ranks 2, 3, 4


def test_metrics_do_not_depend_on_the_order_of_texts_and_videos():
    s, owner = randn(7, 5), torch.tensor([0, 0, 1, 2, 3, 3, 4])
    texts, videos = torch.randperm(7), torch.randperm(5)
    inverse = videos.argsort()
    assert retrieval_metrics(s[texts][:, videos], inverse[owner[texts]])["t2v"] == pytest.approx(retrieval_metrics(s, owner)["t2v"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(bad):
    s = randn(TEXTS, VIDEOS)
    s[2, 1] = bad
    with pytest.raises(ModelError, match="1 of 35 scores are NaN or infinite"):
        retrieval_metrics(s, torch.zeros(TEXTS, dtype=torch.long))


def test_table_has_a_row_for_each_run_and_is_markdown():
    metrics = retrieval_metrics(randn(7, 5), torch.tensor([0, 0, 1, 2, 3, 3, 4]))
    lines = table({"X-Pool": metrics, "T-MASS, M = 20": metrics}).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1 and len({len(line) for line in lines}) == 1


# ----------------------------------------------------------------------------------------------------------- features, whole path


def test_features_are_those_of_each_clip_and_caption_alone(clips, tmp_path):
    model, cache = TMASS(small_clip(), num_frames=3), FrameCache(tmp_path, 3, 32)
    model.train()
    whole = extract_features(model, clips, cache, batch=7)
    part = extract_features(model, clips[5:6], cache)
    assert model.training and whole.text.shape == (120, 24) and whole.frames.shape == (24, 3, 24)
    assert whole.owner.tolist() == [k // 5 for k in range(120)]
    assert torch.allclose(part.frames[0], whole.frames[5], atol=1e-5) and torch.allclose(part.text, whole.text[25:30], atol=1e-5)


def test_contact_sheet_is_a_picture(clips, tmp_path):
    part = of_split(clips, "val")
    owner = torch.arange(4).repeat_interleave(5)
    contact_sheet(tmp_path / "sheet.png", randn(20, 4), owner, part, FrameCache(tmp_path, 3, 32), queries=3)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_is_evaluated_on_another_data_set_and_reported(clips_folder, tmp_path, capsys, monkeypatch):
    import evaluate

    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "runs" / "one" / "best.pt", random_model(frames=3))
    flags = ["--dataset", "csv", "--annotations", str(clips_folder / "clips.csv"), "--videos", str(clips_folder / "clips")]
    evaluate.main([*flags, "--M", "3"])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "runs" / "one" / "results.json").read_text())
    assert (result["texts"], result["videos"], result["M"], result["split"]) == (20, 4, 3, "test") and len(result["sha256"]) == 64
    assert "| T-MASS, M = 3 |" in printed and f"{result['metrics']['t2v']['MnR']:.1f}" in printed
    evaluate.main([*flags, "--M", "3"])
    again = json.loads((tmp_path / "runs" / "one" / "results.json").read_text())
    assert again["metrics"] == result["metrics"]

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, randn, random_model, small_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import evaluate
from data import FrameCache, cache_folder, of_split, read_csv
from evaluate import (
    Expectation,
    PairNoise,
    best_of,
    contact_sheet,
    dual_softmax,
    extract_features,
    feature_cache,
    gather,
    noise_bank,
    retrieval_metrics,
    scores,
    scores_literal,
    table,
)
from losses import cosine_scores
from model import TMASS, ModelError, Radius, XPool, matched, save_checkpoint, stochastic_text

TEXTS, VIDEOS, FRAMES, DIM, M = 7, 5, 4, 24, 6


text, frames, noise = 3 * randn(TEXTS, DIM), 5 * randn(VIDEOS, FRAMES, DIM, seed=1), noise_bank(M, DIM, 0)
model = random_model(frames=FRAMES)


# ------------------------------------------------------------------------------------------------------------------------ scores


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([("clip", "linear"), ("xpool", "linear"), ("tmass", "fixed"), ("tmass", "scalar"), ("tmass", "linear"), ("tmass", "joint")]),
    st.sampled_from([1, 2, 3]), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 4), st.sampled_from([1, 7, None]),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_fast_scores_equal_the_literal_ones(kind, heads, texts, videos, count, draws, block, dtype):
    model = random_model(kind[0], frames=count, radius=kind[1], heads=heads).to(dtype)
    t, f, e = 3 * randn(texts, DIM, seed=texts).to(dtype), 5 * randn(videos, count, DIM, seed=videos).to(dtype), noise_bank(draws, DIM, 0).to(dtype)
    assert torch.allclose(scores(model, t, f, e, block=block), scores_literal(model, t, f, e), atol=2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("noise", [noise, Expectation(M), PairNoise(M, seed=3)])
def test_scores_do_not_depend_on_the_device(noise):
    on_cuda = scores(random_model(frames=FRAMES).cuda(), text.cuda(), frames.cuda(), noise).cpu()
    assert torch.allclose(on_cuda, scores(model, text, frames, noise), atol=2e-5)


@pytest.mark.parametrize("block", [1, 6, None])
def test_own_draws_for_each_pair_do_not_depend_on_blocks_ranks_or_other_pairs(block):
    noise = PairNoise(M, seed=3)
    eps = noise.block(range(TEXTS), range(VIDEOS), DIM)
    whole = scores_literal(model, text, frames, eps)
    assert torch.allclose(scores(model, text, frames, noise, block=block), whole, atol=2e-5)
    assert torch.allclose(scores(model, text, frames[2:], replace(noise, first_video=2), block=block), whole[:, 2:], atol=2e-5)
    assert len({round(float(x), 6) for x in eps[0, :, :, 0].flatten()}) == TEXTS * VIDEOS  # no two pairs alike


@pytest.mark.parametrize("block", [1, 6, None])
def test_a_radius_of_text_and_video_is_scored_alike_in_every_way(block):
    joint = random_model(frames=FRAMES, radius="joint")
    v = joint.fusion(text, frames)
    R = joint.radius(text, frames, v)
    own = PairNoise(M, seed=3)
    drawn = scores_literal(joint, text, frames, own.block(range(TEXTS), range(VIDEOS), DIM))
    assert torch.allclose(scores(joint, text, frames, own, block=block), drawn, atol=2e-5)
    assert torch.allclose(scores(joint, text, frames, Expectation(M), block=block), Expectation(M).of(text[:, None], R, v), atol=2e-5)


def test_own_and_shared_draws_agree_in_distribution():
    shared = torch.stack([scores(model, text, frames, noise_bank(M, DIM, seed)) for seed in range(150)])
    own = torch.stack([scores(model, text, frames, PairNoise(M, seed)) for seed in range(150)])
    error = (shared.var(0) / 150 + own.var(0) / 150).sqrt()
    assert ((shared.mean(0) - own.mean(0)).abs() / error).max() < 4.5
    assert (shared.std(0) / own.std(0) - 1).abs().max() < 0.35


@pytest.mark.parametrize("prior,std", [("normal", 1.0), ("normal", 0.3), ("uniform", 1.0)])
def test_the_expectation_is_the_mean_of_many_samplings(prior, std):
    """With a mass of moderate size in enough channels; no draws are made."""
    torch.manual_seed(0)
    wide = TMASS(small_clip(), "tmass", FRAMES)
    wide.fusion, wide.radius = XPool(256).eval(), Radius("linear", FRAMES, 256, initial=0.5)
    t, f = 1.5 * randn(4, 256), randn(3, FRAMES, 256, seed=1)
    sampled = torch.stack([scores(wide, t, f, noise_bank(20, 256, seed, prior, std)) for seed in range(300)])
    expected = scores(wide, t, f, Expectation(20, prior, std))
    point = scores(wide, t, f, noise_bank(0, 256, 0))
    assert (expected - sampled.mean(0)).abs().max() < 0.05 * sampled.std() + 0.004
    assert (expected - sampled.mean(0)).abs().max() < 0.1 * (point - sampled.mean(0)).abs().max()  # the text itself is far off


def test_the_largest_of_M_normals():
    assert best_of(1) == pytest.approx(0, abs=1e-9)
    assert best_of(2) == pytest.approx(np.pi**-0.5, abs=1e-9)
    assert best_of(20) == pytest.approx(1.86748, abs=1e-4)  # Harter's table


def test_literal_score_is_the_best_draw_of_its_pair():
    for i in range(TEXTS):
        for j in range(VIDEOS):
            t, f = text[i : i + 1], frames[j : j + 1]
            v, R = model.fusion(t, f)[0, 0], model.radius(t, f)[0, 0]
            draws = [torch.cosine_similarity(t[0] + R * eps, v, dim=0) for eps in noise]
            assert torch.allclose(scores_literal(model, text, frames, noise)[i, j], max(draws), atol=1e-5)


def released_protocol(model, text, frames, noise):
    """What the released evaluator computes, word for word: video j pooled by its own caption j, whatever the query."""
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


def test_protocol_released_is_the_released_formula():
    t = text[:VIDEOS]
    assert torch.allclose(scores(model, t, frames, noise, own_text=t), released_protocol(model, t, frames, noise), atol=2e-5)
    assert not edits_leave_other_rows(lambda m, t, f, e: scores(m, t, f, e, own_text=t))


def test_half_precision_features_are_read_a_block_at_a_time():
    for t in (text, text[:2]):
        assert torch.allclose(scores(model, t, frames.half(), noise), scores(model, t, frames.half().float(), noise), atol=1e-6)


def test_memory_does_not_grow_with_the_draws():
    """The largest tensor made is that of a block of pairs: a counting mode watches every operation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple) else (result,):
                self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
            return result

    sizes = []
    for M, texts, videos in ((2, 40, 40), (12, 40, 40), (12, 80, 80)):
        inputs = randn(texts, DIM), randn(videos, FRAMES, DIM), noise_bank(M, DIM, 0)
        with Largest() as largest:
            scores(model, *inputs, block=256)
        sizes.append(largest.size)
    assert sizes == [2 * 256 * DIM] * 3  # the room for two tensors of a block of pairs


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


@pytest.fixture
def run(clips_folder, tmp_path, monkeypatch):
    """evaluate.py on a random T-MASS and the small data set: run(*flags) gives what it wrote to results.json."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "runs" / "one" / "best.pt", random_model(frames=3))
    flags = ["--dataset", "csv", "--annotations", str(clips_folder / "clips.csv"), "--videos", str(clips_folder / "clips"), "--device", "cpu"]

    def newest():
        return json.loads(max((tmp_path / "runs" / "one").glob("results*.json"), key=lambda path: path.stat().st_mtime_ns).read_text())

    return lambda *more: evaluate.main([*flags, "--M", "3", *more]) or newest()


def test_the_latest_run_is_evaluated_and_reported_alike_each_time(run, capsys, tmp_path):
    result = run()
    assert (result["texts"], result["videos"], result["M"], result["split"]) == (20, 4, 3, "test") and len(result["sha256"]) == 64
    printed = capsys.readouterr().out
    assert "| T-MASS, M = 3 |" in printed and f"{result['metrics']['t2v']['MnR']:.1f}" in printed and "LEAKS" not in printed
    for picture in ("ranks.png", "retrieved.png"):
        assert (tmp_path / "runs" / "one" / picture).read_bytes().startswith(b"\x89PNG")
    assert run()["metrics"] == result["metrics"]


def test_a_folder_that_cannot_be_written_is_said_and_the_metrics_are_printed(run, capsys, tmp_path):
    (tmp_path / "full").write_text("a file")
    with pytest.raises(
        SystemExit, match=r"^error: full/one could not be written \(Not a directory\): make room there, or name another folder by --out.$"
    ):
        run("--out", "full")
    printed = capsys.readouterr().out
    assert "| T-MASS, M = 3 |" in printed and "written:" not in printed


@pytest.mark.parametrize("flag, value", [("--M", "-1"), ("--batch", "0"), ("--prior-std", "nan")])
def test_numbers_out_of_range_give_one_sentence(run, flag, value):
    with pytest.raises(SystemExit, match=f"^error: {flag} {value}: give a number from [01] on.$"):
        run(flag, value)


def test_missing_videos_are_refused_and_a_smaller_gallery_is_named_beside_every_metric(run, clips_folder, tmp_path, capsys):
    shutil.copytree(clips_folder / "clips", tmp_path / "videos")
    (tmp_path / "videos" / "clip00021.mp4").unlink()
    videos = ("--videos", str(tmp_path / "videos"))
    with pytest.raises(SystemExit, match=r"1 of 4 videos to evaluate on cannot be read.*clip00021\.mp4 not found.*--allow-missing"):
        run(*videos)
    result = run(*videos, "--allow-missing")
    assert (result["videos"], result["missing"], result["texts"]) == (3, 1, 15) and "| T-MASS, M = 3, 3 of 4 videos |" in capsys.readouterr().out
    for path in (tmp_path / "videos").iterdir():
        path.write_text("no video")
    with pytest.raises(SystemExit, match="none of the 4 videos"):
        run(*videos, "--allow-missing", "--data", str(tmp_path / "other"))


def test_kept_features_are_evaluated_without_frames(run, clips_folder, tmp_path):
    """As on a laptop that has the features alone: the same metrics, without the picture."""
    shutil.copytree(clips_folder / "clips", tmp_path / "videos")
    flags = ("--videos", str(tmp_path / "videos"))
    expected = run(*flags)
    cache = FrameCache(cache_folder("csv", Path("data"), tmp_path / "videos"), 3, 32)
    clips = of_split(read_csv(clips_folder / "clips.csv", tmp_path / "videos"), "test")
    model = evaluate.open_checkpoint(Path("runs/one"))[0]
    extract_features(model, clips, cache, store=feature_cache(cache, model), keep=True)
    for path in [*cache.folder.glob("*.zip"), *(tmp_path / "videos").iterdir()]:
        path.unlink()
    assert run(*flags)["metrics"] == expected["metrics"]


@pytest.mark.parametrize("captions,texts", [("all", 20), ("first", 4), ("joined", 4)])
def test_captions_choose_the_queries(run, captions, texts):
    assert run("--captions", captions)["texts"] == texts


def test_no_draws_and_score_mean_are_the_same(run):
    assert run("--M", "0")["metrics"] == run("--score", "mean")["metrics"] != run()["metrics"]


def test_every_row_of_the_released_protocol_says_that_it_leaks_and_its_files_too(run, capsys, tmp_path):
    honest = run()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="one caption a video"):
        run("--protocol", "released")
    run("--protocol", "released", "--captions", "first", "--checkpoint", "runs/one", "runs/one/best.pt")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| T-MASS")]
    assert len(rows) == 2 and all("LEAKS" in row for row in rows)
    assert (
        json.loads((tmp_path / "runs" / "one" / "results.json").read_text()) == honest and (tmp_path / "runs" / "one" / "results-LEAKS.json").exists()
    )


def test_dual_softmax_is_called_transductive_and_uses_other_queries(run, capsys):
    run("--dsl")
    assert "transductive" in capsys.readouterr().out
    s = randn(TEXTS, VIDEOS)
    edited = s.clone()
    edited[1] += 1
    assert torch.allclose(dual_softmax(s, 5.0)[2, 3], s[2, 3] * (5 * s[:, 3]).softmax(0)[2])
    assert (dual_softmax(edited, 5.0)[0] != dual_softmax(s, 5.0)[0]).any()


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_two_processes_give_the_scores_of_one(run, clips_folder, tmp_path, noise):
    one = run("--noise", noise)["metrics"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / "evaluate.py", "--M=3", "--noise", noise,
               "--dataset", "csv", "--annotations", clips_folder / "clips.csv", "--videos", clips_folder / "clips", "--device", "cpu"]  # fmt: skip
    subprocess.run([str(word) for word in command], cwd=tmp_path, check=True, capture_output=True)
    assert json.loads((tmp_path / "runs" / "one" / "results.json").read_text())["metrics"] == one


def _share(rank, world, store, whole):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    first, last = VIDEOS * rank // world, VIDEOS * (rank + 1) // world
    part = scores(model, text, frames[first:last], noise)
    assert (gather(part.T.contiguous()).T - whole).abs().max() < 1e-6
    dist.destroy_process_group()


@pytest.mark.slow
def test_columns_scored_by_three_processes_are_gathered_in_order(tmp_path):
    """Five videos over three processes: unequal shares."""
    torch.multiprocessing.spawn(_share, (3, str(tmp_path / "store"), scores(model, text, frames, noise)), nprocs=3)

"""Evaluation of T-MASS ("Inference Pipeline", "Evaluation Metrics"): scores of all pairs, ranks, tables.

    python evaluate.py --M 20                                # the latest run, on its test split
    python evaluate.py --checkpoint runs/a runs/b --M 20     # several runs in one table
    torchrun --nproc-per-node 2 evaluate.py --M 20           # videos split over processes, the same scores

`scores_literal` is the paper's inference; the command computes the same scores faster (engine/scoring.py).
It encodes all texts and videos, then scores all pairs, then ranks. A score depends on one text and one video;
in the released evaluator it also depends on the pairing (docs/leak.md)."""

import engine  # isort: skip  # noqa: F401  # before torch: it sets how OpenMP waits
import hashlib
import json
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from engine import distributed
from engine.backbone import autocast, fingerprint
from engine.checkpoint import OTHER_TINY, latest_run, open_checkpoint, other_tiny_clip
from engine.config import EvaluationConfig, check_config, choose_noise, label, method_of, parse_evaluation
from engine.config import prior_of as prior_of  # "as": a re-export
from engine.datasets import DATASETS, Clip, cache_folder, of_split, read_clips, with_validation
from engine.distributed import choose_device, enough_memory, gather, gather_objects, rank_and_world, shard
from engine.features import FeatureCache, Features, extract_features, feature_cache
from engine.files import DataError, ModelError, write_atomic, writing
from engine.frames import FrameCache, set_limits
from engine.metrics import dsl_scores, relevance_metrics, retrieval_metrics, table, text_to_video_ranks
from engine.metrics import dual_softmax as dual_softmax  # "as": a re-export
from engine.plots import contact_sheet, rank_histogram
from engine.scoring import Expectation, PairNoise, best_of, default_block, no_overflow, noise_bank, scores
from losses import cosine_scores
from model import TMASS, stochastic_text

# Names that are importable from here, wherever they are defined.
__all__ = [
    "EvaluationConfig", "Expectation", "Features", "Opened", "PairNoise", "autocast", "best_of",
    "choose_device", "contact_sheet", "default_block", "draws", "dual_softmax", "evaluate",
    "extract_features", "feature_cache", "fingerprint", "latest_run", "main", "noise_bank",
    "open_checkpoint", "open_run", "prior_of", "rank_histogram", "retrieval_metrics", "score_all", "scores",
    "scores_literal", "table", "text_to_video_ranks",
]  # fmt: skip

# ------------------------------------------------------------------------------------- the paper's inference


def scores_literal(
    model: TMASS,
    text: Float[Tensor, "texts dim"],
    frames: Float[Tensor, "videos frames dim"],
    noise: Float[Tensor, "M dim"] | Float[Tensor, "M texts videos dim"],
) -> Float[Tensor, "texts videos"]:
    """The score of every pair, as the paper writes it ("Inference Pipeline"): the best of M draws.

        score[i, j] = max_m cos(t_s, v),    v = psi(t_i, frames_j),    t_s = t_i + R(t_i, frames_j) eps_m

    Both v and t_s belong to the pair (i, j). The released evaluator pools video j by its own caption, which
    leaks the pairing. Without a mass, or with M = 0, t itself is scored. Call model.eval() first."""
    video = model.fusion(text, frames)  # (texts, videos, dim)
    if model.radius is None or len(noise) == 0:
        return cosine_scores(text, video)
    radius = model.radius(text, frames, video)  # (texts, videos, dim)
    t_s = stochastic_text(text, radius, noise)  # (M, texts, videos, dim)
    return torch.stack([cosine_scores(draw, video) for draw in t_s]).amax(dim=0) + no_overflow(radius)


# ---------------------------------------------------------------------------------- what is scored: features


@dataclass(frozen=True)
class Opened:
    """A checkpoint and the features to score. Under torchrun each process has all texts and a shard of the
    videos."""

    model: TMASS
    trained: dict  # the config it was trained with
    file: Path
    dataset: str
    clips: list[Clip]
    listed: int  # clips in the split, unreadable ones included
    cache: FrameCache
    features: Features
    relevant: Bool[Tensor, "texts videos"] | None  # which videos fit each text; None where nobody knows


def open_run(config: EvaluationConfig, path: Path) -> Opened:
    """Opens a checkpoint and computes the features of the split's clips. Raises DataError and ModelError."""
    set_limits(config.max_pixels, config.time_limit)
    device = choose_device(config.device)
    model, trained, file = open_checkpoint(path)
    model = model.to(device)
    if other_tiny_clip(trained):
        warnings.warn(f"{file} {OTHER_TINY}: it does not compare with newer runs.", stacklevel=2)
    dataset = config.dataset or trained.get("dataset")
    if dataset is None:
        advice = "name one by --dataset (csv: with --annotations and --videos)"
        raise ModelError(f"{file} does not say which data set it is for: {advice}.")
    sources = [getattr(config, name) or trained.get(name) for name in ("annotations", "videos")]
    annotations, videos = (Path(source) if source else None for source in sources)
    clips = read_clips(dataset, config.data, annotations, videos)
    if config.split == "val" and dataset == trained.get("dataset"):  # what this run was validated on
        clips = with_validation(clips, trained.get("val", "official"), trained.get("seed", 0))
    clips = of_split(clips, config.split)
    if config.captions == "first":
        clips = [replace(clip, captions=clip.captions[:1]) for clip in clips]
    elif config.captions == "joined":
        clips = [replace(clip, captions=(" ".join(clip.captions),)) for clip in clips]
    if config.protocol == "released" and any(len(clip.captions) != 1 for clip in clips):
        advice = "add --captions first or joined"
        raise ModelError(f"--protocol released needs one caption a video, and some have several: {advice}.")
    folder = cache_folder(dataset, config.data, videos)
    cache = FrameCache(folder, model.arguments["num_frames"], model.resolution)
    store = feature_cache(cache, model)
    listed, clips = len(clips), readable(clips, cache, store, config.allow_missing)
    if (world := rank_and_world()[1]) > len(clips):
        raise ModelError(f"{world} processes for {len(clips)} videos: start fewer.")
    own = shard(len(clips))
    options = config.amp, store, trained.get("freeze", "none")  # of a frozen encoder: kept, without autocast
    features = extract_features(model, clips[own], cache, config.batch, config.workers, *options)
    features = replace(features, text=gather(features.text), owner=gather(features.owner + own.start))
    relevance = DATASETS[dataset].relevance
    relevant = None if relevance is None else relevance(clips)
    relevant = None if relevant is None else torch.from_numpy(relevant)
    return Opened(model, trained, file, dataset, clips, listed, cache, features, relevant)


def readable(clips: list[Clip], cache: FrameCache, store: FeatureCache, allow_missing: bool) -> list[Clip]:
    """Returns the clips whose frames or features can be read. Under torchrun each process checks a part.

    Raises DataError if any clip cannot be read, naming the first; with `allow_missing` only if none can."""
    rank, world = rank_and_world()
    failures = gather_objects(cache.fill([clip for clip in clips[rank::world] if store.load(clip) is None]))
    if failures and not allow_missing:
        first = next(failures[clip.id] for clip in clips if clip.id in failures)
        what = f"{len(failures)} of {len(clips)} videos to evaluate on cannot be read"
        why = f"a smaller gallery flatters the score ({first})"
        raise DataError(f"{what}, and {why}: replace them, or add --allow-missing.")
    left = [clip for clip in clips if clip.id not in failures]
    if not left:
        reason = next(iter(failures.values()))
        raise DataError(f"none of the {len(clips)} videos to evaluate on can be read: {reason}")
    return left


# --------------------------------------------------------------------------------------------------- scoring


def score_all(config: EvaluationConfig, opened: Opened) -> Float[Tensor, "texts videos"]:
    """Returns the scores of all pairs. Under torchrun each process scores its shard and gets all of them."""
    features, own = opened.features, shard(len(opened.clips))
    M, prior = draws(config, opened), prior_of(config, opened.trained, opened.dataset)
    how = config.score, config.noise, M, features.text.shape[1], config.seed, own.start
    noise = choose_noise(*how, **prior)
    own_text = features.text[own] if config.protocol == "released" else None
    progress = rank_and_world()[0] == 0
    part = scores(opened.model, features.text, features.frames, noise, own_text=own_text, progress=progress)
    return gather(part.T.contiguous()).T


def draws(config: EvaluationConfig, opened: Opened) -> int:
    """Returns M, or 0 where t itself is scored."""
    return config.M if opened.model.radius is not None and config.score != "mean" else 0


def measure(config: EvaluationConfig, opened: Opened, matrix: Float[Tensor, "texts videos"]) -> dict:
    """Returns retrieval_metrics, with --dsl those of the dual softmax, and relevance_metrics if relevance is
    known (the built-in clips). Raises ModelError for NaN scores."""
    owner, scale = opened.features.owner, opened.model.logit_scale.exp().item()
    texts, videos = dsl_scores(matrix, config.dsl, scale)  # for queries that are texts, videos
    try:
        metrics = {"t2v": retrieval_metrics(texts, owner)["t2v"]}
        metrics["v2t"] = retrieval_metrics(videos, owner)["v2t"]
        if opened.relevant is not None:
            metrics["t2v"] |= relevance_metrics(texts, opened.relevant)
    except ValueError as error:
        raise ModelError(f"the checkpoint {opened.file} is broken: {error}") from None
    return metrics


# --------------------------------------------------------------------------------------------------- results


def evaluate(config: EvaluationConfig, path: Path) -> dict:
    """Evaluates one checkpoint and writes results.json, ranks.png and retrieved.png.

    Returns the content of results.json, "written": the files, and "failure": "" or why they were not written.
    With --protocol released the names of the files contain -LEAKS. Under torchrun rank 0 writes."""
    started = time.time()
    opened = open_run(config, path)
    seconds = {"features": round(time.time() - started, 2)}
    started = time.time()
    matrix = score_all(config, opened)
    metrics = measure(config, opened, matrix)
    seconds["scores"] = round(time.time() - started, 2)

    model, file, clips, (rank, world) = opened.model, opened.file, opened.clips, rank_and_world()
    fusion, radius = model.arguments["fusion"], model.arguments["radius"]
    device = f"{torch.get_num_threads()} threads, {model.logit_scale.device.type}, torch {torch.__version__}"
    result = {
        "name": describe(config, opened),
        "checkpoint": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "method": method_of(fusion, radius),
        "fusion": fusion,
        "radius": radius,
        "dataset": opened.dataset,
        "split": config.split,
        "texts": len(opened.features.owner),
        "videos": len(clips),
        "missing": opened.listed - len(clips),
        "M": draws(config, opened),
        "prior": prior_of(config, opened.trained, opened.dataset),
        "seed": config.seed,
        "metrics": metrics,
        "seconds": seconds,
        "machine": f"{platform.machine()}, {world} processes, {device}",
        "config": {name: x if isinstance(x, int | str) else str(x) for name, x in asdict(config).items()},
        "trained": opened.trained,
    }
    out, failure = config.out / file.parent.name if config.out else file.parent, ""
    mark = "-LEAKS" if config.protocol == "released" else ""  # results without the leak are not overwritten
    if rank == 0:
        try:
            with writing(out, ModelError, "free some space there, or name another folder by --out."):
                write_results(out, mark, result, opened, matrix)
        except ModelError as error:
            failure = str(error)
    names = f"{out}/results{mark}.json, ranks{mark}.png, retrieved{mark}.png"
    return {**result, "written": names, "failure": failure}


def describe(config: EvaluationConfig, opened: Opened) -> str:
    """Returns the name of a result in tables: the model, and every flag that changes its scores."""
    M, prior = draws(config, opened), prior_of(config, opened.trained, opened.dataset)
    parts = [label(opened.model.arguments)]
    if M:
        parts.append(f"M = {M}")
        if config.prior or config.prior_std is not None or opened.trained.get("released"):
            parts.append("U(0, 1)" if prior["prior"] == "uniform" else f"N(0, {prior['std']:g}^2)")
        if config.score in ("expected", "mc", "delta"):
            parts.append({"mc": "expected, Monte Carlo"}.get(config.score, config.score))
        elif config.noise == "independent":
            parts.append("independent noise")
    if config.dsl != "none":
        parts.append(f"DSL {config.dsl} (transductive)")
    if config.protocol == "released":
        parts.append("LEAKS")
    if len(opened.clips) < opened.listed:
        parts.append(f"{len(opened.clips)} of {opened.listed} videos")
    return ", ".join(parts)


def write_results(out: Path, mark: str, result: dict, opened: Opened, matrix: Tensor) -> None:
    """Writes results.json and the two pictures. Raises OSError if they cannot be written."""
    owner, clips = opened.features.owner, opened.clips
    captions = [caption for clip in clips for caption in clip.captions]
    write_atomic(out / f"results{mark}.json", (json.dumps(result, indent=2) + "\n").encode())
    rank_histogram(out / f"ranks{mark}.png", text_to_video_ranks(matrix, owner), len(clips))
    try:
        picture, frames_of = out / f"retrieved{mark}.png", lambda video: opened.cache.frames(clips[video])
        contact_sheet(picture, matrix.cpu(), owner.cpu(), captions, frames_of, opened.relevant)
    except DataError as error:  # features are cached, but the frames and the video are gone
        print(f"no retrieved.png: {error}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------- command line


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Shows each warning of the block once, on rank 0, as a line "note: ..." on stderr."""
    shown: set[str] = set()

    def show(message: Warning | str, *_, **__) -> None:
        if rank_and_world()[0] == 0 and str(message) not in shown:
            print(f"note: {message}", file=sys.stderr)
        shown.add(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Anything wrong with the input ends it with one sentence and exit code 1."""
    config = parse_evaluation(arguments, __doc__)
    try:
        check_config(config)
        distributed.init_distributed(config.device)
        with warnings_as_notes(), enough_memory("lower --batch, or use --amp bf16"):
            results = [evaluate(config, path) for path in config.checkpoint or (latest_run(),)]
    except (DataError, ModelError) as error:
        sys.exit(f"error: {error}")
    if rank_and_world()[0] == 0:
        print(report(config, results))
    if dist.is_initialized():
        dist.destroy_process_group()
    if failures := [result["failure"] for result in results if result["failure"]]:
        sys.exit(f"error: {failures[0]}")


def report(config: EvaluationConfig, results: list[dict]) -> str:
    """Returns what the command prints: the sizes, the table of all checkpoints, the files."""
    rows = {}
    for result in results:
        name = result["name"]
        rows[name if name not in rows else f"{name} ({result['checkpoint']})"] = result["metrics"]
    r, leaks = results[0], config.protocol == "released"
    how = "THE PAIRING LEAKS INTO THE SCORES" if leaks else "no score knows the pairing"
    chance = f"chance: R@10 {min(100, 1000 / r['videos']):.1f}, MdR {(r['videos'] + 1) / 2:g}"
    sizes = f"{r['dataset']}, {r['split']} split: {r['texts']} captions x {r['videos']} videos"
    written = "".join(f"\nwritten: {result['written']}" for result in results if not result["failure"])
    return f"{sizes}, {how}; {chance}\n\n{table(rows)}\n{written}"


if __name__ == "__main__":
    main()

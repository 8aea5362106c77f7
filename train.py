"""Training of T-MASS ("Implementation Details"): the step, the loop, validation, the start of a run.

    python train.py                             # the paper's recipe on the built-in clips, minutes on a CPU
    python train.py --recipe best               # R from t and v, trained for ranking
    python train.py --method xpool              # the baseline; --method clip: mean pooling
    python train.py --dataset csv --annotations captions.csv --videos clips --arch ViT-B/16
    torchrun --nproc-per-node 4 train.py ...    # one process per GPU; each batch is split over them

Read `forward` and `train_step` first, which follow the paper, then `train`, the loop. The loss is always that
of the whole batch, also with --micro-batch and torchrun. The number of a step seeds its noise, and its batch
depends on seed and epoch only, so a resumed run ends with the weights of an uninterrupted one.
"""

import engine  # isort: skip  # noqa: F401  # before torch: it sets how OpenMP waits
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import data
from data import ClipDataset, epoch_batches, normalise
from engine import distributed
from engine.analysis import noise_ratio
from engine.backbone import autocast, load_clip
from engine.config import PRESETS, RECIPES, Config, check_config, label, loss_weights, parse, preset
from engine.datasets import Clip, cache_folder, of_split, read_clips, with_validation, without
from engine.distributed import gather, gather_features, shard
from engine.experiment import LOG_EVERY, Interrupt, Run, read_log, say, say_noise, stage
from engine.fast_training import best_of_draws, fast_symbols
from engine.features import extract_features, feature_cache
from engine.files import DataError, ModelError
from engine.frames import CHOICES, FrameCache, set_limits
from engine.metrics import retrieval_metrics
from engine.optim import TrainState, check_batches, compile_encoders, finite, learning_rate, train_mode
from engine.scoring import Delta, noise_bank, scores
from losses import cosine_scores, tmass_loss
from model import TMASS, Frames, Pairs, Text, matched, sample_noise, stochastic_text, support_text

__all__ = ["PRESETS", "RECIPES", "Config", "learning_rate", "main", "parse", "preset", "read_log", "train"]

# --------------------------------------------------------------------------------------------------- the step


class Encoder(nn.Module):
    """t = phi_t(caption) and f = phi_v(frame) of this process's pairs, under autocast; float32 features.

    Holds the whole model, so that DistributedDataParallel averages the gradients of psi and R too."""

    def __init__(self, model: TMASS, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Text, Frames]:
        """Of a micro-batch (--micro-batch) only the features are kept; its activations are recomputed in the
        backward pass (gradient caching). The gradients are those of the whole batch."""
        size = self.config.micro_batch or len(tokens)
        if size >= len(tokens):
            return self.encode(images, tokens)
        run = partial(checkpoint, self.encode, use_reentrant=False, preserve_rng_state=False)
        text, frames = zip(*map(run, images.split(size), tokens.split(size)))
        return torch.cat(text), torch.cat(frames)

    def encode(self, images: Tensor, tokens: Tensor) -> tuple[Text, Frames]:
        """The features of a micro-batch; with --freeze, images are features already, or tokens too."""
        model, freeze = self.model, self.config.freeze
        with autocast(tokens.device, self.config.amp):
            text = tokens if freeze == "clip" else model.encode_text(tokens)
            frames = model.encode_frames(normalise(images)) if freeze == "none" else images
        return text, frames


def forward(model: TMASS, text: Text, frames: Frames, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts, from the features of a batch in which text i belongs to video i; float32."""
    if fast := fast_symbols(model, text, frames, config):  # the same numbers, for known psi and R
        return tmass_loss(loss_weights(config), scale=model.logit_scale.exp(), **fast)
    video, scale = model.fusion(text, frames), model.logit_scale.exp()  # v = psi(t, f), 1 / tau
    radius = mass_scores = t_sup = None
    if model.radius is not None:
        radius = model.radius(text, frames, video)  # R = exp(S W + b), W and b learned
        t_sup = support_text(text, matched(video), matched(radius))
        mass_scores = score_mass(text, radius, video, config, scale)  # cos(t_s, v)
    symbols = dict(text=text, video=video, radius=radius, mass_scores=mass_scores, t_sup=t_sup)
    return tmass_loss(loss_weights(config), scale=scale, **symbols)  # L_s + alpha L_sup in the paper


def score_mass(
    text: Text, radius: Pairs, video: Pairs, config: Config, scale: Tensor
) -> Float[Tensor, "texts videos"]:
    """cos(t_s, v), with t_s drawn as --pairs says; or, of every pair, a best of M draws."""
    if config.pairs == "delta":
        return Delta(config.M, **config.eps).of(text[:, None], radius, video)
    if config.pairs in ("draws", "soft"):
        noise = sample_noise(config.M, text.shape[1], **config.eps, device=text.device)
        return best_of_draws(text, radius, video, noise, scale if config.pairs == "soft" else None)
    mass = matched(radius)[:, None] if config.pairs == "matched" else radius  # (texts, 1 or videos, dim)
    noise = sample_noise(1, *mass.shape, **config.eps, device=mass.device)  # eps
    return cosine_scores(stochastic_text(text, mass, noise)[0].squeeze(1), video)  # t_s = t + R eps


def train_step(
    state: TrainState, encoder: nn.Module, images: Tensor, tokens: Tensor, config: Config, pairs: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step on a batch of `pairs`, of which this process has a shard. Returns the loss and its parts.

    Every process computes the same loss, that of the whole batch. Nothing here waits for the GPU."""
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    torch.manual_seed(config.seed * 1_000_003 + state.step)  # of dropout and eps, the same in every process
    state.guard.before_forward()
    text, frames = encoder(images, tokens)  # t, f
    text, frames = gather_features(text, pairs), gather_features(frames, pairs)  # of all processes
    loss, parts = forward(model, text, frames, config)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward(torch.where(loss.isfinite(), 1.0, torch.nan))  # NaN loss: NaN gradient
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    state.guard.after_backward(optimizer, norm, state.step)  # skips the step if the gradient is not finite
    scaler.step(optimizer)
    scaler.update()
    state.schedule.step()
    model.logit_scale.data.clamp_(max=math.log(100))  # as in CLIP
    state.step += 1
    return loss.detach(), {name: part.detach() for name, part in parts.items()}


# --------------------------------------------------------------------------------------------------- the loop


@distributed.enough_memory("lower --micro-batch or --batch, or use --amp bf16")
def train(config: Config) -> Path:
    """Trains a model. Returns the run's folder: last.pt, best.pt, metrics.jsonl, data.json, loss.png.

    Ctrl-C or SIGTERM ends the step (under torchrun up to LOG_EVERY steps), saves, and raises
    KeyboardInterrupt. Under torchrun every process calls this. Raises DataError and ModelError."""
    check_config(config)
    device = distributed.choose_device(config.device)
    setup = prepare(config, device)
    model, batches = setup.model, Batches(setup.dataset, config)
    encoder, state = distributed.wrap(Encoder(model, config)), TrainState(model, config, batches.total)
    run = Run(config, setup.dataset.clips, setup.val_clips, setup.skipped)
    if (last := run.last_state()) is not None:
        state.load(last)
    sizes = batches.total, batches.per_epoch, batches.pairs
    run.start(label(model.arguments), device, state.step, state.validated, *sizes)
    with Interrupt() as interrupt:
        if state.validated < state.step and batches.end_epoch(state.step):  # stopped in its validation
            validate_and_save(state, setup, run, config)
        for pairs, images, tokens in batches.load(state.step, device):
            train_mode(model, config)
            loss, parts = train_step(state, encoder, images, tokens, config, pairs)
            step = state.step
            run.bar.update()
            if logged := step % LOG_EVERY == 0 or step == batches.total:
                log_step(state, {"loss": loss, **parts}, batches, run)
            stop = interrupt.on_any_rank(device, ask_others=logged)
            if stop or (config.save_every and step % config.save_every == 0):
                run.save("last.pt", model, **state.state_dict())
            if stop:
                distributed.barrier()  # rank 0 has saved
                how = f"continue with the same command and --out {run.out} --resume"
                raise KeyboardInterrupt(f"stopped after step {step} of {batches.total}: {how}")
            if batches.end_epoch(step):
                validate_and_save(state, setup, run, config)
    run.finish(state.step)
    distributed.barrier()  # the files are written
    return run.out


class Batches:
    """The batches of a run. They depend on seed and epoch only."""

    def __init__(self, dataset: ClipDataset, config: Config):
        self.dataset, self.config = dataset, config
        first = self.of_epoch(0)
        self.per_epoch, self.pairs = len(first), len(first[0])  # all batches have this size
        self.total = min(config.epochs * self.per_epoch, config.max_steps or math.inf)

    def of_epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The batches of an epoch, as (clip, caption) numbers."""
        return epoch_batches(self.dataset.clips, self.config.batch, self.config.seed, epoch)

    def end_epoch(self, steps: int) -> bool:
        """Whether an epoch, or the run, ends after so many steps."""
        return steps % self.per_epoch == 0 or steps == self.total

    def load(self, step: int, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
        """From a step to the end of the run: each batch's size, and this process's shard (images, tokens)."""
        config, dataset = self.config, self.dataset
        while step < self.total:
            epoch, done = divmod(step, self.per_epoch)
            dataset.augmentation = (config.seed, epoch) if config.augment else None
            dataset.sampling = (config.seed, epoch) if config.sampling == "random" else None
            batches = self.of_epoch(epoch)[done : done + self.total - step]
            own = [batch[shard(len(batch))] for batch in batches]
            loader = data.batches(dataset, own, config.workers, pin_memory=device.type == "cuda")
            for batch, (images, tokens) in zip(batches, loader):
                yield len(batch), images.to(device, non_blocking=True), tokens.to(device, non_blocking=True)
            step += len(batches)


def validate(
    model: TMASS, clips: list[Clip], cache: FrameCache, config: Config
) -> tuple[dict[str, dict], float | None]:
    """Metrics on the validation split, as in evaluate.py; and |R eps| / |t|, None without a mass.

    Each process scores a shard of the videos. Raises ModelError if a score is not finite."""
    own, keep = shard(len(clips)), config.freeze
    options = dict(amp=config.amp, store=None if keep == "none" else feature_cache(cache, model), keep=keep)
    features = extract_features(model, clips[own], cache, config.batch, config.workers, **options)
    text, owner = gather(features.text), gather(features.owner + own.start)
    noise = noise_bank(config.M, text.shape[1], config.seed, **config.eps)
    matrix = gather(scores(model.eval(), text, features.frames, noise).T.contiguous()).T
    ratio, sizes = None, (features.text, features.frames, features.owner)
    if model.radius is not None:
        ratio = noise_ratio(model, *sizes, **config.eps)
    try:
        return retrieval_metrics(matrix, owner), ratio
    except ValueError as error:
        raise ModelError(f"validation failed: {error}") from None


def validate_and_save(state: TrainState, setup: "Setup", run: Run, config: Config) -> None:
    """Validates and saves last.pt; best.pt too at the highest R@1 + R@5 + R@10 so far, or with --val none."""
    run.save("last.pt", state.model, **state.state_dict())  # a kill during the validation loses no step
    best = state.best
    if setup.val_clips:
        state.val, ratio = validate(state.model, setup.val_clips, setup.cache, config)
        run.log.row(step=state.step, val=state.val, **({} if ratio is None else {"noise": round(ratio, 4)}))
        found = state.val["t2v"]
        say(f"step {state.step}, validation: " + "  ".join(f"{name} {x:.1f}" for name, x in found.items()))
        say_noise(ratio, config, first=state.validated == 0)
        best = found["R@1"] + found["R@5"] + found["R@10"]
    state.validated = state.step
    if not setup.val_clips or best > state.best:
        state.best = best
        run.save("best.pt", state.model, step=state.step, val=state.val)
    run.save("last.pt", state.model, **state.state_dict())


def log_step(state: TrainState, losses: dict[str, Tensor], batches: Batches, run: Run) -> None:
    """Writes a row of metrics.jsonl. Raises ModelError after too many skipped steps in a row."""
    numbers = {name: finite(x) for name, x in {**losses, "scale": state.model.logit_scale.exp()}.items()}
    skipped, last = state.guard.read()
    run.bar.set_postfix({"loss": numbers["loss"]}, refresh=False)
    run.log.row(step=state.step, **numbers, lr=state.schedule.get_last_lr(), skipped=skipped)
    if last is not None:
        epoch, number = divmod(last, batches.per_epoch)
        ids = ", ".join(batches.dataset.clips[clip].id for clip, _ in batches.of_epoch(epoch)[number])
        what = f"{state.guard.stop_after} steps in a row had a loss or gradient that is not finite"
        which = f"the last of them step {last + 1}, with the clips {ids}"
        raise ModelError(f"{what}, {which}: check these clips, or lower --head-lr or --clip-lr.")


# --------------------------------------------------------------------------------------- the start of a run


@dataclass(frozen=True)
class Setup:
    """What a run needs before its first step."""

    model: TMASS
    dataset: ClipDataset  # the training clips
    val_clips: list[Clip]
    cache: FrameCache
    skipped: dict[str, str]  # the clips that cannot be read, and why


def prepare(config: Config, device: torch.device) -> Setup:
    """Reads the clips, builds the model, fills the caches. Raises DataError and ModelError."""
    set_limits(config.max_pixels, config.time_limit)
    with distributed.local_rank_zero_first():
        clips, val_clips = read_data(config)  # before any weights are downloaded
        model = build(config).to(device)
        folder = cache_folder(config.dataset, config.data, config.videos)
        cache = FrameCache(folder, config.num_frames, model.resolution, CHOICES[config.sampling])
        store = feature_cache(cache, model) if config.freeze != "none" else None
        todo = [c for c in [*clips, *val_clips] if store is None or store.load(c) is None]
        with stage(f"frames of {len(todo)} clips, decoded once") if todo else nullcontext():
            skipped = cache.fill(todo)
        clips, val_clips = without(clips, skipped), without(val_clips, skipped)
    setup = Setup(model, ClipDataset(clips, cache, model.clip.context_length), val_clips, cache, skipped)
    check_batches(config, model, clips, len(val_clips))
    compile_encoders(model, config.compile)
    if config.freeze != "none":
        with stage(f"CLIP's features of {len(clips)} clips, computed once"):
            freeze(setup, config)
    return setup


def read_data(config: Config) -> tuple[list[Clip], list[Clip]]:
    """The training and validation clips. Only evaluate.py reads the test split."""
    clips = read_clips(config.dataset, config.data, config.annotations, config.videos)
    clips = with_validation(clips, config.val, config.seed)
    return of_split(clips, "train"), [] if config.val == "none" else of_split(clips, "val")


def build(config: Config) -> TMASS:
    """The model at the start of training: pretrained CLIP, psi and R as initialised. Raises ModelError."""
    clip = load_clip(config.arch, config.weights)
    torch.manual_seed(config.seed)
    sizes = (config.num_frames, config.heads, config.dropout, config.initial_radius)
    try:
        model = TMASS(clip, config.fusion, config.radius, *sizes)
    except ValueError as error:  # such as heads that do not divide the channels
        raise ModelError(str(error)) from None
    if config.radius_start == "identity":
        nn.init.eye_(model.radius.linear.weight)  # W, (dim, frames) here
    return model


def freeze(setup: Setup, config: Config) -> None:
    """Fixes phi_v, or all of CLIP, and replaces the inputs by its features. The temperature still learns."""
    model, dataset = setup.model, setup.dataset
    (model.clip if config.freeze == "clip" else model.clip.visual).requires_grad_(False)
    model.logit_scale.requires_grad_(True)
    own, store = dataset.clips[shard(len(dataset.clips))], feature_cache(setup.cache, model)
    options = dict(store=store, keep=config.freeze)
    features = extract_features(model, own, setup.cache, config.batch, config.workers, **options)
    dataset.features = gather(features.frames).cpu()
    if config.freeze == "clip":
        counts = [len(clip.captions) for clip in dataset.clips]
        dataset.tokens = gather(features.text).cpu().split(counts)


# ----------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A mistake in the input ends it with one sentence and exit code 1."""
    try:
        config = parse(arguments, description=__doc__)
        distributed.init_distributed(config.device)
        train(config)
    except (DataError, ModelError) as error:
        rank, _ = distributed.rank_and_world()
        sys.exit(f"error (process {rank}): {error}" if rank else f"error: {error}")
    except KeyboardInterrupt as stop:
        say(str(stop) or "stopped")
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

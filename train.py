"""Training of T-MASS ("Implementation Details"): config, the loop, schedule, checkpoints.

    python train.py                                        # T-MASS on the built-in clips, on a CPU, in minutes
    python train.py --method xpool                         # its baseline; --method clip: mean-pooled frames
    python train.py --dataset csv --annotations captions.csv --videos clips --arch ViT-B/16

The step is in `train`, in the paper's order. The number of a step seeds all its randomness, and its batch follows from seed and epoch:
so a run that is resumed ends with the weights of one that was never stopped.
"""

import argparse
import hashlib
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

import data
from data import Clip, ClipDataset, DataError, FrameCache
from evaluate import choose_device, extract_features, feature_cache, noise_bank, open_checkpoint, retrieval_metrics, scores
from losses import cosine_scores, symmetric_cross_entropy, tmass_loss
from model import TMASS, ModelError, load_clip, load_file, matched, save_checkpoint, stochastic_text, support_text


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Defaults are the paper's; a data set's preset comes before them, and a flag before both."""

    dataset: Literal["shapes", "csv", "msrvtt", "msrvtt-7k", "msrvtt-full", "lsmdc", "didemo", "charades", "vatex", "msvd", "pictures"] = "shapes"
    """which clips and captions; shapes is built in and trains on a CPU in minutes (pictures: what the tiny CLIP is pretrained on)"""
    annotations: Path | None = None
    """for csv: a file of video,caption[,split]; for the others: the folder of annotations, where it is not DATA/DATASET"""
    videos: Path | None = None
    """the folder of video files; for csv needed, for the others where it is not DATA/DATASET"""
    data: Path = Path("data")
    """folder of data sets and of the cache of decoded frames"""
    out: Path | None = None
    """folder of this run; default: runs/DATASET-ARCH-METHOD, with a number behind it when that is taken"""
    resume: bool = False
    """go on from the last checkpoint in --out (or start, if there is none)"""

    method: Literal["clip", "xpool", "tmass"] = "tmass"
    """clip: mean-pooled frames; xpool: text-conditioned fusion psi; tmass: psi and the text mass"""
    arch: str = "ViT-B/32"
    """tiny, ViT-B/32, ViT-B/16, or a file of CLIP weights"""
    weights: Path | None = None
    """CLIP's weights as a file, for machines without network"""
    freeze: Literal["none", "vision"] = "none"
    """vision: phi_v keeps its weights, and its features are computed once and kept: training psi, R and phi_t then costs a tenth"""
    num_frames: int = 12
    """T', frames a clip"""
    sampling: Literal["uniform", "random"] = "uniform"
    """of frames in training: the midpoints of T' segments, or a random one of five in each segment; validation and test take midpoints"""
    heads: int = 1
    """attention heads of psi"""
    dropout: float = 0.3
    """in psi"""
    radius: Literal["fixed", "scalar", "linear"] = "linear"
    """R = exp(mean S), exp(theta mean S) or exp(S W + b)"""
    initial_radius: float = 1.0
    """about the R that training starts from, exp(b)"""
    prior: Literal["normal", "uniform"] = "normal"
    """eps ~ N(0, prior_std^2), the paper's with 1; or U(0, 1), the released code's default"""
    prior_std: float = 1.0
    pairs: Literal["matched", "every"] = "matched"
    """draw t_s in training for matched pairs only (as the released code) or for every pair (as inference does)"""
    alpha: float = 1.2
    """weight of the support-text loss"""
    M: int = 20
    """texts drawn for each pair in validation"""

    epochs: int = 5
    """an epoch shows every caption once"""
    max_steps: int | None = None
    """end after so many steps (the schedule too)"""
    batch: int = 32
    """text-video pairs a step"""
    clip_lr: float = 1e-6
    """AdamW's learning rate for CLIP"""
    head_lr: float = 3e-5
    """and for psi and R"""
    weight_decay: float = 0.2
    """on all parameters, as the released code"""
    warmup: float = 0.1
    """part of the steps in which the rate rises; then it falls as a cosine"""
    grad_clip: float = 1.0
    """largest norm of the gradient"""
    augment: bool = True
    """random crops and flips, the same for all frames of a clip"""
    seed: int = 0
    """of initialisation, order, augmentation, dropout and noise"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    amp: bool = True
    """bfloat16 autocast of CLIP, on CUDA"""
    workers: int = 0
    """processes that load batches ahead"""
    save_every: int = 0
    """steps between checkpoints, besides the one at each epoch's end"""


# A data set's numbers where they differ from the defaults. The released code's commands: head_lr 3e-5 for MSR-VTT, 1e-5 for LSMDC; numbers
# that a data set has of its own and that we do not know for certain are left at the defaults.
SMALL = dict(arch="tiny", weight_decay=0.01, augment=False)
PRESETS: dict[str, dict] = {
    "shapes": dict(**SMALL, freeze="vision", batch=64, clip_lr=3e-4, head_lr=5e-4, epochs=3),
    "pictures": dict(**SMALL, method="clip", num_frames=1, batch=128, clip_lr=1e-3, epochs=2),
    "lsmdc": dict(head_lr=1e-5, workers=8),
    **{name: dict(workers=8) for name in ("msrvtt", "msrvtt-7k", "msrvtt-full", "didemo", "charades", "vatex", "msvd")},
}
# Mean pooling on the built-in clips is the second half of the tiny CLIP's own pretraining: all of it learns.
PRETRAINING = dict(freeze="none", batch=32, clip_lr=1e-3, epochs=1, max_steps=200)


def preset(dataset: str, method: str) -> Config:
    """The defaults for a data set and a method, before any flag."""
    own = {"method": method, **PRESETS.get(dataset, {}), **(PRETRAINING if (dataset, method) == ("shapes", "clip") else {})}
    return replace(Config(), dataset=dataset, **own)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The command line: the preset of --dataset and --method, then what the flags say."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="shapes")
    first.add_argument("--method", default="tmass")
    chosen, _ = first.parse_known_args(arguments)
    default = preset(chosen.dataset, chosen.method)
    return tyro.cli(Config, default=default, args=arguments, description=__doc__)


# -------------------------------------------------------------------------------------------------------------- what a run starts from


def build(config: Config) -> TMASS:
    """The model as training starts: CLIP with its pretrained weights, psi and R with their first values."""
    if config.arch == "tiny" and config.weights is None and config.dataset != "pictures":
        clip = open_checkpoint(tiny_clip(config))[0].clip
    else:
        clip = load_clip(config.arch, config.weights)
    return TMASS(clip, config.method, config.num_frames, config.radius, config.heads, config.dropout, config.initial_radius)


def tiny_clip(config: Config) -> Path:
    """The run that the tiny CLIP of a run starts from; it is made now (once, in about three minutes) if it is not there yet.

    "tiny" has no weights on the web, so it is pretrained as OpenAI's CLIP was: on still pictures with captions, then (mean-pooled, the
    method "clip") on whole clips. From then on it is used as "ViT-B/32" is."""
    stage = ("pictures" if (config.dataset, config.method) == ("shapes", "clip") else "shapes", "clip")
    pretraining = replace(preset(*stage), data=config.data, device=config.device)
    out = run_folder(pretraining)
    if not finished(out):
        print(f"The tiny CLIP is pretrained first, once, on the built-in {stage[0]} ({out}).", flush=True)
        train(replace(pretraining, out=out, resume=True))
    return out


def read_data(config: Config) -> tuple[list[Clip], list[Clip]]:
    """Training and validation clips. The test split is read by evaluate.py alone."""
    clips = data.read_clips(config.dataset, config.data, config.annotations, config.videos)
    return data.of_split(clips, "train"), data.of_split(clips, "val")


def without(clips: list[Clip], skipped: dict[str, str]) -> list[Clip]:
    """The clips whose frames can be had. Raises DataError when none is left."""
    left = [clip for clip in clips if clip.id not in skipped]
    if not left:
        raise DataError(f"none of the {len(clips)} {clips[0].split} clips can be read: {skipped[clips[0].id]}")
    return left


def record_data(out: Path, clips: list[Clip], val_clips: list[Clip], skipped: dict[str, str]) -> None:
    """data.json: the clips of this run's validation, and those that were skipped, each with the reason; says how many these are."""
    content = dict(train=len(clips), val=[clip.id for clip in val_clips], skipped=skipped)
    (out / "data.json").write_text(json.dumps(content, indent=1) + "\n")
    if skipped:
        print(
            f"{len(skipped)} clips cannot be read and are skipped, listed in {out}/data.json; the first: {next(iter(skipped.values()))}", flush=True
        )


def run_folder(config: Config) -> Path:
    """runs/DATASET-ARCH-METHOD, where a run goes that names no folder."""
    return Path("runs") / re.sub(r"[^a-z0-9-]+", "", f"{config.dataset}-{Path(config.arch).stem}-{config.method}".lower())


def open_run(config: Config) -> Path:
    """The folder to write to: --out, or a new one under runs/. A run that is there is gone on with only by --resume, never overwritten."""
    out = config.out or run_folder(config)
    if (out / "metrics.jsonl").exists() and not config.resume:
        if config.out:
            raise ModelError(f"{out} holds a run: add --resume to go on with it, or name another folder by --out.")
        number = 2
        while (out.parent / f"{out.name}-{number}").exists():
            number += 1
        out = out.parent / f"{out.name}-{number}"
    out.mkdir(parents=True, exist_ok=True)
    return out


def finished(out: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    return (out / "metrics.jsonl").is_file() and '"done"' in (out / "metrics.jsonl").read_text()


# Flags that may differ between a run and its resumption: they do not change its numbers.
FREE = {"out", "resume", "device", "workers", "data", "annotations", "videos", "save_every"}


def plain(config: Config) -> dict:
    """The config as strings and numbers, for checkpoints and results."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def load_state(path: Path, config: Config, fingerprint: str) -> dict:
    """What last.pt holds. Raises ModelError when it was made by another config or from other data."""
    state = load_file(path)
    if "optimizer" not in state or "config" not in state:
        raise ModelError(f"{path} is not a last.pt of train.py: nothing to resume from; name another --out.")
    changed = [f"{name} {state['config'].get(name)} -> {value}" for name, value in plain(config).items()
               if name not in FREE and state["config"].get(name) != value]  # fmt: skip
    if changed:
        raise ModelError(f"{path} was made with another config ({', '.join(changed)}): resume with the same flags, or name another --out.")
    if state["data"] != fingerprint:
        raise ModelError(f"{path} was trained on other clips or captions than these: resume with the same data, or name another --out.")
    return state


# ------------------------------------------------------------------------------------------------------------------------ training


def learning_rate(step: int, total: int, warmup: float) -> float:
    """The factor of the learning rate at a step: a line up over the first `warmup` part of the steps, then half a cosine down to 0."""
    rise = max(1, round(warmup * total))
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def draw_noise(radius: Float[Tensor, "texts videos dim"], prior: str, std: float) -> Float[Tensor, "1 texts videos dim"]:
    """eps for one text of each mass: N(0, std^2), the paper's with 1, or U(0, 1), the released code's default."""
    noise = torch.empty(1, *radius.shape, device=radius.device)
    return noise.uniform_() if prior == "uniform" else noise.normal_(std=std)


def train_mode(model: TMASS, config: Config) -> None:
    """Training mode, but for batch norm (the tiny CLIP's ResNet has it): only CLIP's own pretraining moves its statistics."""
    model.train()
    if config.method != "clip":
        for module in model.clip.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def validate(model: TMASS, clips: list[Clip], cache: FrameCache, config: Config) -> dict[str, dict[str, float]]:
    """Metrics on the validation split, exactly as evaluate.py makes them."""
    store = feature_cache(cache, model) if config.freeze == "vision" else None
    features = extract_features(model, clips, cache, config.batch, config.workers, config.amp, store, keep=store is not None)
    noise = noise_bank(config.M, features.text.shape[1], config.seed, config.prior, config.prior_std)
    return retrieval_metrics(scores(model.eval(), features.text, features.frames, noise), features.owner)


def train(config: Config) -> Path:
    """Trains as the config says. Returns the run's folder: last.pt, best.pt (by R@1 + R@5 + R@10 on validation), metrics.jsonl, loss.png.

    Ctrl-C or SIGTERM ends the step, saves, and stops. Raises DataError and ModelError, each with a sentence for the user."""
    device = choose_device(config.device)
    if config.freeze == "vision" and (config.augment or config.sampling == "random"):
        raise ModelError("--freeze vision computes the features of each clip once: add --no-augment, and leave --sampling uniform.")
    torch.manual_seed(config.seed)
    model = build(config).to(device)
    clips, val_clips = read_data(config)
    cache = FrameCache(
        data.cache_folder(config.dataset, config.data, config.videos), config.num_frames, model.resolution, data.CHOICES[config.sampling]
    )
    store = feature_cache(cache, model) if config.freeze == "vision" else None
    skipped = cache.fill([clip for clip in [*clips, *val_clips] if not (store and store.load(clip) is not None)])
    clips, val_clips = without(clips, skipped), without(val_clips, skipped)
    dataset = ClipDataset(clips, cache, model.clip.context_length)
    if config.freeze == "vision":
        model.clip.visual.requires_grad_(False)
        dataset.features = extract_features(model, clips, cache, config.batch, config.workers, store=store, keep=True).frames.cpu()

    per_epoch = len(data.epoch_batches(clips, config.batch, config.seed, 0))
    total = min(config.epochs * per_epoch, config.max_steps or math.inf)
    clip_parameters = [p for p in model.clip.parameters() if p.requires_grad]
    head_parameters = [*model.fusion.parameters(), *(model.radius.parameters() if model.radius else [])]
    optimizer = torch.optim.AdamW(
        [{"params": clip_parameters, "lr": config.clip_lr}, {"params": head_parameters, "lr": config.head_lr}],
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, total, config.warmup))

    out, step, best = open_run(config), 0, -1.0
    fingerprint = hashlib.sha256(repr([(clip.id, clip.captions) for clip in [*clips, *val_clips]]).encode()).hexdigest()
    if config.resume and (out / "last.pt").exists():
        state = load_state(out / "last.pt", config, fingerprint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step, best = state["step"], state["best"]
    log = Log(out, step)
    about = dict(config=plain(config), data=fingerprint, commit=git_commit())
    record_data(out, clips, val_clips, skipped)

    def save() -> None:
        more = dict(optimizer=optimizer.state_dict(), schedule=schedule.state_dict(), step=step, best=best)
        save_checkpoint(out / "last.pt", model, **about, **more)

    print(f"{config.method} on {config.dataset}: {len(clips)} clips, {total} steps of {config.batch} pairs on {device}, run {out}", flush=True)
    bar = tqdm(initial=step, total=total, desc=config.method, unit=" steps")
    with Interrupt() as interrupt:
        while step < total:
            epoch, done = divmod(step, per_epoch)
            dataset.augmentation = (config.seed, epoch) if config.augment else None
            dataset.sampling = (config.seed, epoch) if config.sampling == "random" else None
            order = data.epoch_batches(clips, config.batch, config.seed, epoch)[done : done + total - step]
            for images, tokens in data.batches(dataset, order, config.workers, pin_memory=device.type == "cuda"):
                torch.manual_seed(config.seed * 1_000_003 + step)  # dropout's and eps's: a step's number is all of its luck
                train_mode(model, config)
                images, tokens = images.to(device, non_blocking=True), tokens.to(device, non_blocking=True)

                # ---- the step, in the paper's order -----------------------------------------------------------------------------
                with torch.autocast(device.type, torch.bfloat16, enabled=config.amp and device.type == "cuda"):
                    text = model.encode_text(tokens)  # t = phi_t(caption)
                    frames = images if config.freeze == "vision" else model.encode_frames(data.normalise(images))  # f = phi_v
                video = model.fusion(text, frames)  # v = psi(t, f)
                scale = model.logit_scale.exp()
                if config.method == "tmass":
                    radius = model.radius(text, frames)  # R = exp(S W + b)
                    mass = matched(radius)[:, None] if config.pairs == "matched" else radius  # (texts, 1 or videos, dim)
                    noise = draw_noise(mass, config.prior, config.prior_std)  # eps
                    t_s = stochastic_text(text, mass, noise)[0].squeeze(1)  # t_s = t + R eps
                    t_sup = support_text(text, matched(video), matched(radius))
                    loss, parts = tmass_loss(t_s, t_sup, video, scale, config.alpha)  # L_s + alpha L_sup
                else:
                    loss = symmetric_cross_entropy(cosine_scores(text, video), scale)  # L_ce
                    parts = {"L_ce": loss}
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    model.logit_scale.clamp_(max=math.log(100))  # CLIP's own bound on the temperature
                # ------------------------------------------------------------------------------------------------------------------

                step += 1
                bar.update()
                if step % 10 == 0 or step == total:
                    numbers = {name: part.item() for name, part in parts.items()}
                    if not math.isfinite(loss.item()):
                        raise ModelError(f"the loss is {loss.item()} at step {step}: lower --head-lr or --clip-lr; {out}/last.pt is from before.")
                    bar.set_postfix({"loss": f"{loss.item():.3f}"})
                    log.row(step=step, loss=loss.item(), **numbers, scale=scale.item(), lr=schedule.get_last_lr())
                if interrupt.asked or (config.save_every and step % config.save_every == 0):
                    save()
                if interrupt.asked:
                    raise KeyboardInterrupt(f"stopped after step {step} of {total}: go on with the same command and --out {out} --resume")
            if step % per_epoch == 0 or step == total:
                metrics = validate(model, val_clips, cache, config)
                log.row(step=step, val=metrics)
                bar.write(f"step {step}, validation: " + "  ".join(f"{name} {value:.1f}" for name, value in metrics["t2v"].items()), file=sys.stdout)
                if (score := sum(metrics["t2v"][name] for name in ("R@1", "R@5", "R@10"))) > best:
                    best = score
                    save_checkpoint(out / "best.pt", model, **about, step=step, val=metrics)
                save()
    bar.close()
    if not finished(out):
        log.row(step=step, done=True)
    plot_losses(out)
    return out


# --------------------------------------------------------------------------------------------------------------------------- records


class Interrupt:
    """While it holds, the first Ctrl-C or SIGTERM only sets `asked`, so that a step can be ended and saved; the next one kills."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "Interrupt":
        self.asked, self.before = False, {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def _ask(self, *_) -> None:
        self.asked = True
        self.__exit__()

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """metrics.jsonl: one row a line. Rows of steps after `step` (a run that is resumed repeats them) are dropped first."""

    def __init__(self, out: Path, step: int):
        self.path, self.started = out / "metrics.jsonl", time.time()
        rows = [row for row in read_log(out) if row["step"] <= step] if step else []
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def row(self, **values) -> None:
        """Appends a row, with the seconds since this process began to train."""
        with self.path.open("a") as file:
            file.write(json.dumps({**values, "seconds": round(time.time() - self.started, 2)}) + "\n")


def read_log(out: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plot_losses(out: Path) -> None:
    """loss.png: the loss and its parts by step, and recall on validation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_log(out)
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "val" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in [name for name in ("loss", "L_s", "L_sup") if steps and name in steps[0]]:
        left.plot([row["step"] for row in steps], [row[name] for row in steps], label=name)
    left.set(xlabel="step", ylabel="loss", title="training")
    left.legend()
    for name in ("R@1", "R@5", "R@10"):
        right.plot([row["step"] for row in validations], [row["val"]["t2v"][name] for row in validations], "o-", label=name)
    right.set(xlabel="step", ylabel="text-to-video, % of queries", title="validation", ylim=(0, 100))
    right.legend()
    figure.savefig(out / "loss.png", dpi=120)
    plt.close(figure)


def git_commit() -> str:
    """The commit of this code, "unknown" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Anything wrong with the input ends it with one sentence and exit code 1."""
    try:
        train(parse(arguments))
    except (DataError, ModelError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print(stop or "stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()

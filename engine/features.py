"""CLIP's features of a data set, each computed once, and a cache of them on disk.

`python data.py cache --features` fills the cache; it runs this module in a process of its own."""

import functools
import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from data import ClipDataset, batches, normalise, report
from engine.backbone import autocast, fingerprint, load_clip
from engine.datasets import Clip, cache_folder, read_clips
from engine.distributed import choose_device
from engine.frames import CHOICES, FrameCache, file_name, is_current, save
from engine.parts import own_part
from model import TMASS


@dataclass(frozen=True)
class Features:
    """The features of a data set: text (texts, dim) and frames (videos, frames, dim).

    owner (texts,) is the video that each text describes. Only the metrics read it."""

    text: Tensor
    frames: Tensor
    owner: Tensor


class FeatureCache:
    """phi_v of each clip's frames on disk, one .npz a clip, float32 (frames, dim).

    With them, neither CLIP nor the videos are needed. weights: a hash of the weights of phi_v."""

    def __init__(self, frames: FrameCache, weights: str):
        self.frames, self.folder = frames, frames.folder / f"features-{weights}"

    def path(self, clip: Clip) -> Path:
        """The file of a clip's features, whether it exists or not."""
        return self.folder / f"{file_name(clip)}.npz"

    def load(self, clip: Clip) -> Float[Tensor, "frames dim"] | None:
        """The features of a clip; None if there are none or the video has changed."""
        try:
            with np.load(self.path(clip)) as file:
                current = is_current(file["made_from"].tobytes(), clip)
                return torch.from_numpy(file["features"]) if current else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, clip: Clip, features: Float[Tensor, "frames dim"]) -> None:
        """Writes the features of a clip. Its frames must be in the cache. Raises DataError."""
        content = io.BytesIO()
        with zipfile.ZipFile(self.frames.path(clip)) as file:
            made_from = np.frombuffer(file.comment, np.uint8)
        np.savez(content, features=features.cpu().numpy(), made_from=made_from)
        save(self.path(clip), content.getvalue())


class TextCache:
    """phi_t of the captions of one list of clips on disk, one .npy, float32 (texts, dim)."""

    def __init__(self, frames: FrameCache, model: TMASS, captions: Sequence[str]):
        name = hashlib.sha256(json.dumps([model.clip.context_length, *captions]).encode()).hexdigest()[:16]
        weights = fingerprint(model.clip, without=("visual.", "logit_scale"))
        self.shape = len(captions), model.clip.text_projection.shape[1]
        self.path = frames.folder / "texts" / f"{weights}-{name}.npy"

    def load(self) -> Float[Tensor, "texts dim"] | None:
        """The features; None if there are none, or the file is damaged."""
        try:
            with self.path.open("rb") as file:
                text = torch.from_numpy(np.load(io.BytesIO(file.read()), allow_pickle=False))
        except (OSError, ValueError, EOFError):
            return None
        return text if text.shape == self.shape and text.dtype == torch.float32 else None

    def save(self, text: Float[Tensor, "texts dim"]) -> None:
        """Writes the features. Raises DataError if the file cannot be written."""
        content = io.BytesIO()
        np.save(content, text.cpu().numpy())
        save(self.path, content.getvalue())


def feature_cache(cache: FrameCache, model: TMASS) -> FeatureCache:
    """The cache of the features of this model's phi_v, in a folder below the frames."""
    return FeatureCache(cache, fingerprint(model.clip.visual))


@torch.no_grad()
def extract_features(
    model: TMASS,
    clips: Sequence[Clip],
    cache: FrameCache,
    batch: int = 32,
    workers: int = 0,
    amp: str = "off",
    store: FeatureCache | None = None,
    keep: Literal["none", "vision", "clip"] = "none",
) -> Features:
    """phi_t of every caption and phi_v of every frame, in eval mode, on the model's device, float32.

    store: a cache to read features from. keep: whose features are also written to it, and all are computed
    without autocast then: phi_v's ("vision"), or those of both ("clip"), as with --freeze.
    Raises DataError if a clip cannot be read."""
    training, device = model.training, model.logit_scale.device
    model.eval()
    dataset = ClipDataset(clips, cache, model.clip.context_length)
    frames: list[Tensor | None] = [store.load(clip) if store else None for clip in clips]
    todo = [number for number, known in enumerate(frames) if known is None]
    order = [todo[k : k + batch] for k in range(0, len(todo), batch)]
    amp, texts = "off" if keep in ("vision", "clip") else amp, None
    if store and keep == "clip":
        texts = TextCache(cache, model, [caption for clip in clips for caption in clip.captions])
    text = texts.load() if texts else None
    bar = functools.partial(tqdm, desc="features", total=len(order), disable=len(order) < 20, leave=False)
    with autocast(device, amp):
        for numbers, (images, _) in zip(order, bar(batches(dataset, order, workers))):
            for number, features in zip(numbers, model.encode_frames(normalise(images.to(device)))):
                frames[number] = features
                if store and keep in ("vision", "clip"):
                    store.save(clips[number], features)
        if text is None:
            tokens = torch.cat(dataset.tokens).split(8 * batch)
            text = torch.cat([model.encode_text(part.to(device)) for part in tokens])
            if texts:
                texts.save(text)
    model.train(training)
    counts = torch.tensor([len(clip.captions) for clip in clips])
    owner = torch.repeat_interleave(torch.arange(len(clips)), counts)
    stacked = torch.stack([features.to(device) for features in frames])
    return Features(text.to(device), stacked, owner.to(device))


def cache(
    dataset: str = "shapes",
    data: Path = Path("data"),
    annotations: Path | None = None,
    videos: Path | None = None,
    num_frames: int = 12,
    sampling: Literal["uniform", "random"] = "uniform",
    arch: str = "ViT-B/32",
    weights: Path | None = None,
    device: str = "auto",
    part: str | None = None,
) -> int:
    """`data.py cache --features`: frames of every clip and their features. Exit code 1: some clips failed."""
    model = TMASS(load_clip(arch, weights), "mean", "none", num_frames).to(choose_device(device))
    clips = own_part(read_clips(dataset, data, annotations, videos), part)
    folder = cache_folder(dataset, data, videos)
    frames = FrameCache(folder, num_frames, model.resolution, CHOICES[sampling])
    failures = frames.fill(clips)
    decoded = [clip for clip in clips if clip.id not in failures]
    extract_features(model, decoded, frames, store=feature_cache(frames, model), keep="vision")
    return report(frames, clips, failures)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line, started by data.py. A mistake in the input: one sentence, exit code 1."""
    import tyro

    try:
        sys.exit(tyro.cli(cache, args=arguments))
    except ValueError as error:  # DataError, ModelError
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # data.py says that it was stopped


if __name__ == "__main__":
    main()

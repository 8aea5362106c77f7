"""A trained T-MASS small enough to ship (assets/tiny.npz, under 2 MB), and built-in clips to try it on.

    python notebooks/sample.py runs/shapes-tiny-tmass-paper     # make sample: packs a run of `make demo`

The file holds the whole model: matrices with 8 bits a value and one scale for each row, vectors in float16,
and only those of the 49,408 word embeddings that the built-in captions use. The other embeddings are zero, so
this model knows no other words. Pictures and captions are not stored. shapes.py draws the pictures again,
without the video compression that the model saw in training.
"""

import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import shapes
from engine.checkpoint import build_from_checkpoint, open_checkpoint
from engine.features import Features
from model import TMASS

FILE = ROOT / "assets" / "tiny.npz"
WORDS = "clip.token_embedding.weight"


def load() -> TMASS:
    """The trained tiny T-MASS, in eval mode. `model.about` holds the config it was trained with."""
    with np.load(FILE) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "about"}
        about = json.loads(file["about"].item())
    state = {}
    for name, values in arrays.items():
        if not name.endswith((".scale", ".rows")):
            state[name] = values.float() * arrays[f"{name}.scale"] if f"{name}.scale" in arrays else values
    words = torch.zeros(about["vocabulary"], state[WORDS].shape[1])
    words[arrays[f"{WORDS}.rows"]] = state[WORDS]
    content = {"model": {**state, WORDS: words}, "arguments": about["arguments"]}
    model = build_from_checkpoint(content, FILE).requires_grad_(False)
    model.about = about
    return model


def clips(count: int = 100) -> list[shapes.ShapesClip]:
    """The first clips of the built-in test split: scenes, lengths, captions. `pictures(clip)` draws one."""
    first = sum(shapes.SPLITS.values()) - shapes.SPLITS["test"]
    return [shapes.make_clip(0, first + k) for k in range(count)]


def pictures(clip: shapes.ShapesClip, num_frames: int = 12) -> np.ndarray:
    """Draws the frames that the model sees of a clip: uint8 (frames, height, width, 3)."""
    scenes = zip(clip.scenes, clip.lengths)
    moments = [(scene, (k + 0.5) / length) for scene, length in scenes for k in range(length)]
    chosen = data.segment_midpoints(len(moments), num_frames)
    return np.stack([np.asarray(shapes.draw_frame(*moments[k])) for k in chosen])


def images(model: TMASS, clips: Sequence[shapes.ShapesClip]) -> Tensor:
    """The input of phi_v: resized and normalised, (videos, frames, 3, height, width)."""
    drawn = [pictures(clip, model.arguments["num_frames"]) for clip in clips]
    small = np.stack([[data.resize(frame, model.resolution) for frame in frames] for frames in drawn])
    return data.normalise(torch.from_numpy(small).permute(0, 1, 4, 2, 3))


def encode(model: TMASS, clips: Sequence[shapes.ShapesClip], captions: int = 1) -> Features:
    """Features of the first captions and of the frames of each clip, as extract_features returns them."""
    sentences = [caption.text for clip in clips for caption in clip.captions[:captions]]
    text = model.encode_text(data.tokenize(sentences, model.clip.context_length))
    frames = torch.cat(
        [model.encode_frames(images(model, clips[k : k + 20])) for k in range(0, len(clips), 20)]
    )
    return Features(text, frames, torch.arange(len(clips)).repeat_interleave(captions))


def write_folder(
    folder: Path, count: int, seed: int = 99, words: dict[str, str] | None = None
) -> list[shapes.ShapesClip]:
    """Writes `count` video files and captions.csv (video,caption,split), for notebook 08. Returns the clips.

    `words` replaces words of the captions. Of ten clips, six are for training, two for validation and two
    for the test. The seed differs from that of the built-in clips, so these are new clips."""
    folder.mkdir(parents=True)
    shapes._render_clips((folder, seed, range(count)))
    clips = [shapes.make_clip(seed, number) for number in range(count)]
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "caption", "split"])
        for number, clip in enumerate(clips):
            split = ["train", "val", "test"][np.searchsorted([6, 8], number % 10, side="right")]
            for caption in clip.captions:
                text = re.sub(r"\w+", lambda word: (words or {}).get(word[0], word[0]), caption.text)
                writer.writerow([f"clip{number:05d}.mp4", text, split])
    return clips


def pack(run: Path) -> None:
    """Writes FILE from a run of train.py. Raises ModelError if the run has no checkpoint."""
    model, config, _ = open_checkpoint(run)
    state = model.state_dict()
    captions = (
        caption.text
        for n in range(sum(shapes.SPLITS.values()))
        for caption in shapes.make_clip(0, n).captions
    )
    rows = data.tokenize(list(captions), model.clip.context_length).unique()
    command = f"python notebooks/sample.py runs/{run.name}"
    about = dict(arguments=model.arguments, config=config, vocabulary=len(state[WORDS]), command=command)
    arrays = {f"{WORDS}.rows": rows, "about": json.dumps(about)}
    for name, values in {**state, WORDS: state[WORDS][rows]}.items():
        if values.dim() < 2:
            arrays[name] = values.half() if values.is_floating_point() else values
            continue
        scale = values.abs().amax(dim=tuple(range(1, values.dim())), keepdim=True).clamp_min(1e-12) / 127
        arrays[name], arrays[f"{name}.scale"] = (values / scale).round().to(torch.int8), scale
    np.savez_compressed(FILE, **{name: np.asarray(values) for name, values in arrays.items()})
    print(f"{FILE.relative_to(ROOT)}: {FILE.stat().st_size / 2**20:.2f} MiB, from {run}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} RUN (a run of train.py, such as runs/shapes-tiny-tmass-paper)")
    pack(Path(sys.argv[1]))

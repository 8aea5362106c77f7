"""A trained T-MASS that is shipped, and built-in clips to try it on.

    python notebooks/sample.py runs/demo/tmass-paper     # make sample: packs the demo's paper run

The model is the tiny CLIP (assets/tiny_clip.safetensors), which the run keeps fixed, with the run's psi, R
and temperature (FILE, float16). Pictures and captions are not stored. shapes.py draws the pictures again,
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
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import shapes
from engine.backbone import load_clip
from engine.checkpoint import open_checkpoint, other_tiny_clip
from engine.features import Features
from engine.files import ModelError, write_atomic
from model import TMASS

FILE = ROOT / "assets" / "tiny_tmass.safetensors"


def load() -> TMASS:
    """The trained tiny T-MASS, in eval mode. `model.about` holds the config it was trained with.

    Raises ModelError if it was trained on another tiny CLIP."""
    with safe_open(FILE, "pt") as file:
        about = json.loads(file.metadata()["about"])
        state = {name: file.get_tensor(name).float() for name in file.keys()}
    if other_tiny_clip(about["config"]):
        raise ModelError(f"{FILE} was trained on another tiny CLIP: run make demo and make sample.")
    model = TMASS(load_clip("tiny"), **about["arguments"])
    model.load_state_dict({**model.state_dict(), **state})
    model.about = about
    return model.eval().requires_grad_(False)


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


def relevant(clips: Sequence[shapes.ShapesClip], captions: int = 1) -> Tensor:
    """Whether each clip shows what each of the first captions says: bool (captions, clips)."""
    mentions = [caption.mentions for clip in clips for caption in clip.captions[:captions]]
    return torch.from_numpy(shapes.fits(mentions, [clip.scenes for clip in clips]))


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
    """Writes FILE from a run of train.py. Raises ModelError for a run that has changed the tiny CLIP."""
    model, config, _ = open_checkpoint(run)
    state, tiny = model.state_dict(), load_clip("tiny").state_dict()
    clip = {name.removeprefix("clip."): value for name, value in state.items() if name.startswith("clip.")}
    temperature = "logit_scale"
    if any(not torch.equal(clip[name], tiny[name]) for name in tiny.keys() - {temperature}):
        raise ModelError(f"{run} does not hold {FILE.parent.name}/tiny_clip.safetensors, unchanged.")
    kept = {n: x.half() for n, x in state.items() if not n.startswith("clip.") or n == f"clip.{temperature}"}
    command = f"python notebooks/sample.py {run}"
    about = dict(arguments=model.arguments, config=config, command=command)
    write_atomic(FILE, save(kept, {"about": json.dumps(about)}))
    print(f"{FILE}: {FILE.stat().st_size / 2**20:.2f} MiB, from {run}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} RUN (a run of train.py, such as runs/demo/tmass-paper)")
    pack(Path(sys.argv[1]))

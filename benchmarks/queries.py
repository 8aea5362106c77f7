"""What the choices in engine/queries.py rest on: weights, pictures, near-duplicates, and what fits nothing.

    python benchmarks/queries.py --library library.db     # of built-in clips; about 5 minutes on 2 cores

Which built-in clips fit is known, so that precision can be measured. The library is one of data/shapes/clips,
made with a model that was trained on built-in clips.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import shapes  # noqa: E402
from engine.datasets import Clip  # noqa: E402
from engine.ffmpeg import check_ffmpeg  # noqa: E402
from engine.queries import LOW, SAME, difference, similarity, small_frames  # noqa: E402
from engine.searcher import RANDOM, SearchConfig, Searcher, read_captions, read_clip  # noqa: E402

COPIES = {
    "compressed strongly": ["-crf", "38"],
    "1.67 times as large": ["-vf", "scale=160:160", "-crf", "30"],
    "4 of 96 pixels cut off on each side": ["-vf", "crop=88:88", "-crf", "26"],
    "brighter by 6 %": ["-vf", "eq=brightness=0.06", "-crf", "26"],
    "12 frames a second instead of 8": ["-r", "12", "-crf", "28"],
}


def precision(score: Tensor, fits: Tensor) -> float:
    """Average precision of a ranking."""
    found = fits[score.argsort(descending=True)].double()
    return ((found.cumsum(0) / torch.arange(1, len(found) + 1)) * found).sum().item() / found.sum().item()


class World:
    """A library of built-in clips, and what they show."""

    def __init__(self, library: str, count: int):
        self.searcher = Searcher(SearchConfig(library))
        rows, frames = zip(*self.searcher.library.batches())
        rows, frames = [row for some in rows for row in some], torch.cat(frames)
        names = dict(enumerate(self.searcher.library.names([row["id"] for row in rows])))
        chosen = sorted(names, key=names.get)[-count:]  # the last ones are those of the test split
        self.names, self.ids = [names[n] for n in chosen], [rows[n]["id"] for n in chosen]
        self.frames = frames[chosen]
        self.clips = [shapes.make_clip(0, int(Path(name).stem[4:])) for name in self.names]

    def show(self, **values: str) -> Tensor:
        """Whether each clip has a scene with these values, bool (clips,)."""
        same = [[all(getattr(s, a) == v for a, v in values.items()) for s in c.scenes] for c in self.clips]
        return torch.tensor(same).any(dim=1)

    def score(self, captions: list[str]) -> Tensor:
        """Exact scores, (captions, clips)."""
        return self.searcher.score(self.searcher.text(captions), self.frames)


def weights(world: World) -> None:
    """Average precision of "a COLOUR SHAPE" with --and W PLACE and --and -W PLACE, over all of them."""
    things = list(itertools.product(shapes.ATTRIBUTES["colour"], shapes.ATTRIBUTES["shape"]))
    places = {place: words[0] for place, words in shapes.ATTRIBUTES["place"].items()}
    thing, place = world.score([f"a {c} {s}" for c, s in things]), world.score([*places.values()])
    for weight in (0.1, 0.25, 0.5, 0.75, 1.0):
        found: dict[int, list[float]] = {1: [], -1: []}
        for (n, (colour, shape)), (m, name) in itertools.product(enumerate(things), enumerate(places)):
            both, there = world.show(colour=colour, shape=shape), world.show(place=name)
            for sign, fits in ((1, both & there), (-1, both & ~there)):
                if fits.any():
                    found[sign].append(precision(thing[n] + sign * weight * place[m], fits))
        print(f"weight {weight}: and {np.mean(found[1]):.3f}, not {np.mean(found[-1]):.3f}", flush=True)


def pictures(world: World, count: int = 200) -> None:
    """Average precision of a picture of another clip: clips that show the same shape in the same colour."""
    found: dict[str, list[float]] = {"similarity": [], "exact score, the picture as text": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            scene = shapes.make_clip(0, 200_000 + number).scenes[number % 3]
            Image.fromarray(np.asarray(shapes.draw_frame(scene, 0.5))).save(f"{folder}/picture.png")
            own = world.searcher.picture(Path(folder, "picture.png"))
            fits = world.show(colour=scene.colour, shape=scene.shape)
            if fits.any():
                like = similarity(own, world.frames).amax(dim=-1).mean(dim=-1)
                exact = world.searcher.score(own, world.frames)[0]
                for name, score in zip(found, (like, exact)):
                    found[name].append(precision(score, fits))
    print("; ".join(f"{name} {np.mean(one):.3f}" for name, one in found.items()), flush=True)


def duplicates(world: World, count: int = 40) -> None:
    """How many changed copies are folded, and how many pairs of other clips."""
    strips = world.searcher.library.thumbnails(world.ids)
    frames, size = world.frames.shape[1], world.searcher.model.resolution
    small = [small_frames(strips[id], frames) for id in world.ids]
    pairs = [difference(one, other) for one in small[:count] for other in small if one is not other]
    print(
        f"folded: {sum(np.array(pairs) < SAME)} of {len(pairs)} pairs of other clips, least {min(pairs):.2f}"
    )
    folder = Path(world.searcher.library.about["folder"])
    with tempfile.TemporaryDirectory() as made:
        for kind, options in COPIES.items():
            found = []
            for number in range(count):
                path = Path(made, "copy.mp4")
                command = [check_ffmpeg(), "-v", "error", "-y", "-i", str(folder / world.names[number])]
                subprocess.run([*command, "-c:v", "libx264", *options, str(path)], check=True)
                strip = read_clip(Clip("", path, (), ""), frames, size)[1]
                found.append(difference(small[number], small_frames(strip, frames)) < SAME)
            print(f"folded: {sum(found)} of {count} copies, {kind}", flush=True)


def fitting(world: World, queries: int = 600, draws: int = 5) -> None:
    """How often the note "nothing fits well" comes for captions that a clip fits, and that none fits.

    For the second number, the clips that fit a caption are taken out of the library."""
    captions = [c for k in range(queries // 2) for c in shapes.make_clip(0, 300_000 + k).captions[:2]]
    fits = torch.from_numpy(shapes.fits([c.mentions for c in captions], [c.scenes for c in world.clips]))
    score = world.score([caption.text for caption in captions])
    every = read_captions(None, world.searcher.trained)
    rng = np.random.default_rng(0)
    for size in (50, 200, len(world.clips)):
        false, right = [], []
        for _ in range(draws):
            some = torch.from_numpy(rng.choice(len(world.clips), size, replace=False))
            drawn = [every[n] for n in rng.choice(len(every), min(RANDOM, len(every)), replace=False)]
            level = np.sort(world.score(drawn)[:, some].amax(dim=1).numpy())
            for own, there in zip(score[:, some], fits[:, some]):
                if there.any():
                    false.append(np.searchsorted(level, own.max(), "right") < LOW * len(level))
                if not there.all():
                    right.append(np.searchsorted(level, own[~there].max(), "right") < LOW * len(level))
        print(f"{size} clips: {np.mean(false):.3f} false alarms, {np.mean(right):.3f} found", flush=True)


def main() -> None:
    """Prints all four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--library", default="library.db")
    parser.add_argument("--clips", type=int, default=1000, help="of the library, the last by name")
    options = parser.parse_args()
    world = World(options.library, options.clips)
    with torch.no_grad():
        for part in (fitting, duplicates, pictures, weights):
            part(world)


if __name__ == "__main__":
    main()

"""The built-in data sets: short clips of moving shapes (H.264), with captions that tell only part of them.

It needs no download and no licence, and it follows the paper's motivation: "text is short, video is rich". A
clip shows three scenes one after the other, each a colour x shape x motion x place (8 x 8 x 4 x 6). A caption
describes one or two of them and leaves attributes out. Several clips can therefore fit one caption, so even a
perfect retriever stays below 100 % (`perfect_retriever`).

    python shapes.py                 # renders data/shapes (once), prints the perfect retriever's score

The files have the form of a user's own data: a CSV file `video,caption,split` beside a folder of video files.
Which clips fit a caption is known (`relevance`), as in no real data set.
"""

import argparse
import csv
import functools
import itertools
import math
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ffmpeg
import imageio_ffmpeg
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFilter
from tqdm.auto import tqdm

SIZE, FPS, FRAMES = 96, 8, 24  # pixels a side, frames a second, frames a clip (3 s)
VARIANTS, PANORAMA = 8, 2 * SIZE  # backgrounds a place; their width in pixels
SPRITE = 128  # pixels a side of a shape before it is scaled to a frame
SPLITS = {"train": 3000, "val": 500, "test": 500}
SCENES = (3,)  # of a clip: clip n has SCENES[n % len(SCENES)]
# More test sets: clips of other seeds; one has clips of one to five scenes, which tests complexity.
TEST_SETS: dict[str, dict] = {
    "shapes-second": dict(seed=1, splits={"test": 500}),
    "shapes-scenes": dict(seed=2, splits={"test": 800}, scenes=(1, 2, 3, 4, 5)),
}
CAPTIONS = 5  # of a clip
MARK = "shapes.txt"  # says what was rendered into the folder
VERSION = 1  # of scenes and captions; another one gives other clips
DRAWING = 2  # of pictures and files; folders of another version or drawing are rendered again

# Every attribute value with the words captions use for it.
COLOURS = {
    "red": ["red", "scarlet"], "orange": ["orange"], "yellow": ["yellow"], "green": ["green", "emerald"],
    "blue": ["blue"], "purple": ["purple", "violet"], "pink": ["pink"], "white": ["white"],
}  # fmt: skip
SHAPES = {
    "circle": ["circle", "disc"], "square": ["square", "box"], "triangle": ["triangle"],
    "star": ["star"], "heart": ["heart"], "ring": ["ring", "hoop"], "cross": ["cross", "plus sign"],
    "moon": ["crescent", "moon"],
}  # fmt: skip
MOTIONS = {
    "slide": ["slides", "glides by", "moves sideways"], "fall": ["falls", "drops down"],
    "grow": ["grows", "gets bigger"], "spin": ["spins", "rotates", "turns around"],
}  # fmt: skip
PLACES = {
    "desert": ["in the desert", "over the dunes"], "sea": ["at sea", "above the waves"],
    "forest": ["in the forest", "among the trees"], "city": ["in the city", "over the rooftops"],
    "snow": ["in the snow", "in the icy mountains"], "space": ["in space", "far from earth"],
}  # fmt: skip
ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "place": PLACES}

# The probability that a caption mentions an attribute.
KEEP = {"colour": 0.85, "shape": 0.85, "motion": 0.6, "place": 0.6}
JOINED = ["{a}, then {b}", "first {a}, later {b}", "{a} and after that {b}", "{b}, but before that {a}"]

# Colours of shapes, of the sky (top, bottom), and of what stands before it, from far to near, each with the
# base of hills and trees, or the height of houses, as a fraction of the picture's height.
Colour = tuple[int, int, int]
RGB: dict[str, Colour] = {
    "red": (222, 45, 50), "orange": (250, 140, 22), "yellow": (255, 222, 40), "green": (46, 184, 80),
    "blue": (40, 96, 228), "purple": (138, 58, 200), "pink": (255, 128, 190), "white": (250, 250, 252),
}  # fmt: skip
SKY: dict[str, tuple[Colour, Colour]] = {
    "desert": ((255, 214, 150), (255, 240, 205)), "sea": ((140, 205, 240), (220, 243, 250)),
    "forest": ((190, 225, 190), (226, 240, 205)), "city": ((32, 28, 66), (112, 72, 120)),
    "snow": ((168, 190, 222), (228, 236, 246)), "space": ((6, 6, 20), (26, 16, 50)),
}  # fmt: skip
DUNES = [(0.62, (236, 190, 124)), (0.74, (222, 168, 98)), (0.88, (200, 142, 76))]
WAVES = [(0.52, (52, 130, 186)), (0.66, (38, 108, 168)), (0.8, (26, 86, 146)), (0.92, (16, 66, 120))]
TREES = [(0.62, (120, 170, 122)), (0.78, (70, 128, 82)), (0.98, (34, 86, 52))]
HOUSES = [(0.5, (70, 56, 104)), (0.34, (34, 28, 58))]
MOUNTAINS = [(0.66, (128, 148, 186)), (0.82, (166, 184, 212))]


# ------------------------------------------------------------------------------- what clips and captions say


@dataclass(frozen=True)
class Scene:
    """One scene: its four attributes, and six numbers in [0, 1) that vary the drawing."""

    colour: str
    shape: str
    motion: str
    place: str
    jitter: tuple[float, ...]


@dataclass(frozen=True)
class Caption:
    """A sentence and its meaning: one dict (attribute -> value) for each scene it mentions, in time order."""

    text: str
    mentions: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class ShapesClip:
    """Scenes in time order, the number of frames of each (their sum is FRAMES), and the captions."""

    scenes: tuple[Scene, ...]
    lengths: tuple[int, ...]
    captions: tuple[Caption, ...]


def make_clip(seed: int, number: int, scenes: Sequence[int] = SCENES) -> ShapesClip:
    """Returns clip `number` of the data set with this seed, of scenes[number % len(scenes)] scenes (1 to 6).

    It depends on these arguments alone."""
    rng, n = np.random.default_rng([VERSION, seed, number]), scenes[number % len(scenes)]
    shown = tuple(random_scene(rng) for _ in range(n))
    least = max(2, 12 // n - 1)  # of 12 parts of the clip; the other parts are given out at random
    parts = least + np.bincount(rng.integers(n, size=12 - n * least), minlength=n)
    lengths = tuple(int(part) * FRAMES // 12 for part in parts)
    return ShapesClip(shown, lengths, tuple(random_caption(shown, rng) for _ in range(CAPTIONS)))


def random_scene(rng: np.random.Generator, palette: Mapping[str, Iterable[str]] = ATTRIBUTES) -> Scene:
    """A scene with one of the palette's values for each attribute."""
    values = {name: str(rng.choice(list(allowed))) for name, allowed in palette.items()}
    return Scene(**values, jitter=tuple(rng.random(6)))


def random_caption(
    scenes: Sequence[Scene], rng: np.random.Generator, keep: Mapping[str, float] = KEEP
) -> Caption:
    """A caption of one scene, or of two scenes and their order, with equal probability."""
    if rng.random() < 0.5 or len(scenes) == 1:
        mention = _mention(scenes[rng.integers(len(scenes))], rng, keep)
        return Caption(_phrase(mention, rng), (mention,))
    chosen = sorted(rng.choice(len(scenes), 2, replace=False))
    mentions = tuple(_mention(scenes[k], rng, keep) for k in chosen)
    a, b = (_phrase(mention, rng) for mention in mentions)
    return Caption(str(rng.choice(JOINED)).format(a=a, b=b), mentions)


def _mention(scene: Scene, rng: np.random.Generator, keep: Mapping[str, float]) -> dict[str, str]:
    """The attributes that a caption mentions: each is kept with its own probability, and at least two are."""
    kept = [name for name in ATTRIBUTES if rng.random() < keep[name]]
    for name in rng.permutation([name for name, probability in keep.items() if probability > 0]):
        if len(kept) < 2 and name not in kept:
            kept.append(str(name))
    return {name: getattr(scene, name) for name in ATTRIBUTES if name in kept}


def _phrase(mention: dict[str, str], rng: np.random.Generator) -> str:
    """Words for a mention, with synonyms: "a red ring grows in the desert"."""
    word = {name: str(rng.choice(ATTRIBUTES[name][value])) for name, value in mention.items()}
    noun = word.get("shape", str(rng.choice(["thing", "object", "shape"])))
    subject = f"{word['colour']} {noun}" if "colour" in word else noun
    subject = ("an " if subject[0] in "aeiou" else "a ") + subject
    sentence = f"{subject} {word['motion']}" if "motion" in word else subject
    if "place" not in word:
        return sentence
    return f"{word['place']}, {sentence}" if rng.random() < 0.3 else f"{sentence} {word['place']}"


def fits(
    captions: Sequence[tuple[dict[str, str], ...]], clips: Sequence[Sequence[Scene]]
) -> Bool[np.ndarray, "captions clips"]:
    """Whether each clip shows what each caption says: the scenes that it mentions, in this order.

    captions: the mentions of each (`Caption.mentions`); clips: the scenes of each."""
    most = max(map(len, clips))
    scenes = [[*clip, *[None] * (most - len(clip))] for clip in clips]  # None has no attribute of a caption
    values = {a: np.array([[getattr(s, a, "") for s in clip] for clip in scenes]) for a in ATTRIBUTES}
    pairs = list(itertools.combinations(range(most), 2))
    found = np.empty((len(captions), len(clips)), bool)
    for row, mentions in zip(found, captions):
        # for each mention, the scenes that have all its values: (clips, scenes)
        seen = [np.all([values[a] == v for a, v in mention.items()], axis=0) for mention in mentions]
        if len(seen) == 1:
            row[:] = seen[0].any(axis=1)
        else:
            row[:] = np.any([seen[0][:, i] & seen[1][:, j] for i, j in pairs], axis=0)
    return found


def relevance(
    names: Sequence[str],
    captions: Sequence[Sequence[str]],
    seed: int = 0,
    scenes: Sequence[int] = SCENES,
) -> Bool[np.ndarray, "captions clips"] | None:
    """`fits` of the named clips ("clip00012.mp4") and the captions of each; None for other captions.

    So what is relevant is known here, as in no real data set: clips that nobody described may fit, too."""
    clips = [make_clip(seed, int(Path(name).stem.removeprefix("clip")), scenes) for name in names]
    known = [{caption.text: caption.mentions for caption in clip.captions} for clip in clips]
    mentions = [own.get(text) for own, texts in zip(known, captions, strict=True) for text in texts]
    return None if None in mentions else fits(mentions, [clip.scenes for clip in clips])


def perfect_retriever(
    seed: int = 0,
    split: str = "test",
    splits: Mapping[str, int] | None = None,
    scenes: Sequence[int] = SCENES,
) -> dict[str, float]:
    """Returns the text-to-video metrics of a retriever that understands every caption and clip of a split.

    A clip fits a caption when the mentioned scenes are found in it, in order. The n clips that fit one rank
    before all others, tied, as engine/metrics.py counts ties: R@K = min(1, K / n), rank (n + 1) / 2."""
    clips = [make_clip(seed, number, scenes) for number in numbers(split, splits)]
    captions = [caption.mentions for clip in clips for caption in clip.captions]
    n = fits(captions, [clip.scenes for clip in clips]).sum(axis=1)
    rank = (n + 1) / 2
    recall = {f"R@{k}": float(np.minimum(1, k / n).mean() * 100) for k in (1, 5, 10)}
    return {**recall, "MdR": float(np.median(rank)), "MnR": float(rank.mean())}


def numbers(split: str, splits: Mapping[str, int] | None = None) -> range:
    """The numbers of the clips of a split. splits: the clips of each; default: SPLITS."""
    splits = splits or SPLITS
    ends = dict(zip(splits, itertools.accumulate(splits.values())))
    return range(ends[split] - splits[split], ends[split])


# ------------------------------------------------------------------------------------ drawing the background


class Painter:
    """Draws one panorama: the sky, then the hills, trees, houses or stars of a place, at random positions."""

    def __init__(self, place: str, rng: np.random.Generator, width: int, height: int):
        self.rng, self.width, self.height = rng, width, height
        top, bottom = np.array(SKY[place])
        ramp = np.linspace(0, 1, height)[:, None, None]
        sky = ((1 - ramp) * top + ramp * bottom).astype(np.uint8)
        self.image = Image.fromarray(np.repeat(sky, width, axis=1))
        self.draw = ImageDraw.Draw(self.image)
        getattr(self, place)()

    def _disc(self, x: float, y: float, r: float, fill: Colour) -> None:
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def _hills(self, base: float, height: float, waves: tuple[int, ...], fill: Colour) -> None:
        """Smooth hills around `base`, filled to the bottom: sines with these whole numbers of periods."""
        x, y = np.arange(0, self.width + 4, 4), 0
        for k in waves:
            amplitude, phase = self.rng.uniform(0.4, 1), self.rng.random()
            y += amplitude * np.sin(2 * math.pi * (k * x / self.width + phase)) / k**0.5
        skyline = zip(x.tolist(), (base * self.height - height * self.height * y).tolist())
        self.draw.polygon([*skyline, (self.width + 4, 10**4), (0, 10**4)], fill=fill)

    def _spread(self, n: int) -> np.ndarray:
        """n places from left to right, each at random in its own nth of the width."""
        return (np.arange(n) + self.rng.uniform(0, 0.8, n)) * self.width / n

    def desert(self) -> None:
        """A low sun over three dunes."""
        rng, w, h = self.rng, self.width, self.height
        self._disc(rng.uniform(0.1, 0.9) * w, 0.2 * h, 0.09 * h, (255, 250, 225))
        for base, fill in DUNES:
            self._hills(base, 0.05, (1, 2, 3), fill)

    def sea(self) -> None:
        """Five clouds of four discs each, over four rows of waves."""
        rng, w, h = self.rng, self.width, self.height
        for _ in range(5):
            x, y = rng.uniform(0, w), rng.uniform(0.06, 0.3) * h
            for step in range(4):
                dy, r = rng.uniform(-0.02, 0.02) * h, rng.uniform(0.04, 0.07) * h
                self._disc(x + step * 0.07 * h, y + dy, r, (250, 253, 255))
        for base, fill in WAVES:
            self._hills(base, 0.016, (9, 14), fill)

    def forest(self) -> None:
        """Three rows of fir trees, the nearest the darkest; a tree is two triangles."""
        rng, w, h = self.rng, self.width, self.height
        for (base, fill), n in zip(TREES, (26, 20, 14)):
            foot = base * h
            for x in self._spread(n):
                half, top = rng.uniform(0.07, 0.11) * h, (base - rng.uniform(0.28, 0.42)) * h
                for y in (top, top + 0.3 * (foot - top)):
                    self.draw.polygon([(x, y), (x - half, foot), (x + half, foot)], fill=fill)
            self.draw.rectangle((0, (base - 0.01) * h, w, h), fill=fill)

    def city(self) -> None:
        """A moon over two rows of houses; each window is lit with probability 1/2."""
        rng, w, h = self.rng, self.width, self.height
        self._disc(rng.uniform(0.1, 0.9) * w, 0.18 * h, 0.07 * h, (250, 240, 200))
        for tall, fill in HOUSES:
            x = 0.0
            while x < w:
                end, top = x + rng.uniform(0.14, 0.26) * h, (1 - tall * rng.uniform(0.7, 1.3)) * h
                self.draw.rectangle((x, top, end - 2, h), fill=fill)
                columns = np.arange(x + 0.03 * h, end - 0.05 * h, 0.055 * h)
                rows = np.arange(top + 0.03 * h, h, 0.075 * h)
                for left, upper in itertools.product(columns, rows):
                    if rng.random() < 0.5:
                        window = (left, upper, left + 0.022 * h, upper + 0.034 * h)
                        self.draw.rectangle(window, fill=(255, 214, 120))
                x = end

    def snow(self) -> None:
        """Two rows of mountains with white caps, snowy hills, and falling snow."""
        rng, w, h = self.rng, self.width, self.height
        for base, fill in MOUNTAINS:
            foot = base * h
            for x in self._spread(8):
                top, half = (base - rng.uniform(0.3, 0.5)) * h, rng.uniform(0.3, 0.45) * h
                self.draw.polygon([(x, top), (x - half, foot), (x + half, foot)], fill=fill)
                side, snow_line = 0.32 * half, top + 0.32 * (foot - top)
                cap = [(x, top), (x - side, snow_line), (x, top + 0.2 * (foot - top)), (x + side, snow_line)]
                self.draw.polygon(cap, fill=(246, 250, 255))
            self.draw.rectangle((0, (base - 0.005) * h, w, h), fill=fill)
        self._hills(0.84, 0.03, (2, 3), (238, 244, 252))
        for x, y in rng.uniform(0, 1, (60, 2)):
            self._disc(x * w, y * h, 0.011 * h, (255, 255, 255))

    def space(self) -> None:
        """Stars, the larger ones brighter, and two planets, each with its darker side."""
        rng, w, h = self.rng, self.width, self.height
        for x, y, r in rng.uniform(0, 1, (110, 3)):
            fill = tuple(int(c * (0.6 + 0.4 * r)) for c in (255, 245, 230))
            self._disc(x * w, y * h, (0.004 + 0.01 * r**4) * h, fill)
        for colour in ((70, 110, 150), (150, 92, 70)):
            x, y, r = rng.uniform(0, w), rng.uniform(0.15, 0.85) * h, rng.uniform(0.08, 0.2) * h
            self._disc(x, y, r, colour)
            self._disc(x + 0.16 * r, y + 0.14 * r, 0.84 * r, tuple(int(c * 0.72) for c in colour))


@functools.cache
def _panorama(place: str, variant: int) -> Image.Image:
    """A background, drawn large once a process and scaled down, which smooths its edges."""
    rng = np.random.default_rng([list(PLACES).index(place), variant])
    image = Painter(place, rng, 4 * PANORAMA, 4 * SIZE).image
    return image.resize((PANORAMA, SIZE), Image.Resampling.LANCZOS)


# ---------------------------------------------------------------------------------------- drawing the shapes


def _mask(shape: str, side: int) -> Image.Image:
    """The shape in white on black, side x side pixels."""
    mask = Image.new("L", (side, side))
    draw, c, r = ImageDraw.Draw(mask), side / 2, 0.42 * side

    def box(half_width: float, half_height: float) -> tuple[float, float, float, float]:
        return (c - half_width * r, c - half_height * r, c + half_width * r, c + half_height * r)

    def corners(n: int, radii: list[float]) -> list[tuple[float, float]]:
        """n points around the centre, the first at the top, at these distances in turn."""
        angles = [2 * math.pi * (i / n) - math.pi / 2 for i in range(n)]
        return [(c + d * math.cos(a), c + d * math.sin(a)) for a, d in zip(angles, itertools.cycle(radii))]

    if shape in ("circle", "ring", "moon"):
        draw.ellipse(box(1.0, 1.0), fill=255)
    if shape == "ring":
        draw.ellipse(box(0.55, 0.55), fill=0)
    elif shape == "moon":
        draw.ellipse((c - 0.35 * r, c - 1.0 * r, c + 1.45 * r, c + 0.8 * r), fill=0)
    elif shape == "square":
        draw.rounded_rectangle(box(0.84, 0.84), 0.12 * r, fill=255)
    elif shape == "triangle":
        draw.polygon([(x, y + 0.2 * r) for x, y in corners(3, [1.15 * r])], fill=255)
    elif shape == "star":
        draw.polygon(corners(10, [1.12 * r, 0.46 * r]), fill=255)
    elif shape == "cross":
        draw.rounded_rectangle(box(0.33, 1.0), 0.08 * r, fill=255)
        draw.rounded_rectangle(box(1.0, 0.33), 0.08 * r, fill=255)
    elif shape == "heart":
        t = np.linspace(0, 2 * math.pi, 120)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        draw.polygon(list(zip((c + x * r / 16).tolist(), (c - y * r / 16).tolist())), fill=255)
    return mask


@functools.cache
def _outlines(shape: str) -> tuple[Image.Image, Image.Image]:
    """The shape, and the shape with its rim."""
    mask = rim = _mask(shape, 3 * SPRITE)
    for _ in range(5):  # five filters of size 3 equal one of size 11 and take half the time
        rim = rim.filter(ImageFilter.MaxFilter(3))
    return mask, rim


@functools.cache
def _lit(colour: str) -> Image.Image:
    """A square of the colour, lit from the upper left."""
    rgb, side = np.array(RGB[colour], dtype=np.float32), 3 * SPRITE
    ramp = np.add.outer(np.arange(side), np.arange(side))[..., None] / (2 * side)  # 0 at the upper left
    light, shadow = np.clip(0.45 - ramp, 0, 1), np.clip(ramp - 0.5, 0, 1)
    body = rgb + light * (255 - rgb) * 0.9 - shadow * rgb * 0.6
    return Image.fromarray(np.clip(body, 0, 255).astype(np.uint8))


@functools.cache
def _sprite(colour: str, shape: str) -> Image.Image:
    """The shape in its colour on a transparent square, with a dark rim. It is drawn three times as large."""
    mask, rim = _outlines(shape)
    sprite = Image.new("RGBA", mask.size, (20, 18, 30, 0))
    sprite.paste((20, 18, 30, 255), mask=rim)
    sprite.paste(_lit(colour), mask=mask)
    return sprite.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)


@functools.cache
def _scaled_sprite(colour: str, shape: str, pixels: int) -> Image.Image:
    return _sprite(colour, shape).resize((pixels, pixels), Image.Resampling.BILINEAR)


def draw_frame(scene: Scene, time: float) -> Image.Image:
    """Returns the picture, SIZE x SIZE, of a scene at `time`, from 0 (its start) to 1 (its end)."""
    a, b, c, d, e, f = scene.jitter
    pan = (PANORAMA - SIZE) * (0.15 + 0.7 * (time if a < 0.5 else 1 - time)) * (0.5 + 0.5 * b)
    image = _panorama(scene.place, int(c * VARIANTS)).crop((round(pan), 0, round(pan) + SIZE, SIZE))
    size, x, y, turn = 0.46 + 0.14 * d, 0.4 + 0.2 * e, 0.42 + 0.16 * f, 0.0
    if scene.motion == "slide":
        x = 0.16 + 0.68 * (time if e < 0.5 else 1 - time)
    elif scene.motion == "fall":
        y = -0.02 + 0.86 * time**1.5
    elif scene.motion == "grow":
        size = 0.2 + 0.65 * time
    else:
        turn = (360 + 180 * e) * time * (1 if d < 0.5 else -1)
    pixels = round(size * SIZE)
    sprite = _scaled_sprite(scene.colour, scene.shape, pixels)
    if turn:
        sprite = sprite.rotate(turn, Image.Resampling.BICUBIC)
    image.paste(sprite, (round(x * SIZE - pixels / 2), round(y * SIZE - pixels / 2)), sprite)
    return image


def draw_clip(clip: ShapesClip) -> Iterator[Image.Image]:
    """Yields the FRAMES frames of a clip, in order."""
    for scene, length in zip(clip.scenes, clip.lengths):
        for k in range(length):
            yield draw_frame(scene, (k + 0.5) / length)


# ----------------------------------------------------------------------------------------- writing the files

# One thread and no version strings: the same frames give the same bytes. A key frame starts each clip.
H264 = {
    "vcodec": "libx264", "pix_fmt": "yuv420p", "crf": 20, "preset": "veryfast", "g": FRAMES, "bf": 0,
    "keyint_min": FRAMES, "sc_threshold": 0, "threads": 1, "fflags": "+bitexact", "flags:v": "+bitexact",
}  # fmt: skip
Job = tuple[Path, int, range]  # the folder to write to, the seed, the numbers of the clips


def _render_clips(job: Job, scenes: Sequence[int] = SCENES) -> int:
    """Writes the clips of a job; returns how many. One ffmpeg process encodes them and splits the files."""
    folder, seed, numbers = job
    ends = ",".join(str(FRAMES * k) for k in range(1, len(numbers)))
    split = dict(format="segment", segment_frames=ends, segment_start_number=numbers[0], reset_timestamps=1)
    process = (
        ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{SIZE}x{SIZE}", framerate=FPS)
        .output(str(folder / "clip%05d.mp4"), **split, **H264)
        .global_args("-nostdin", "-v", "error")
        .run_async(cmd=imageio_ffmpeg.get_ffmpeg_exe(), pipe_stdin=True)
    )
    for number in numbers:
        for image in draw_clip(make_clip(seed, number, scenes)):
            process.stdin.write(image.tobytes())
    process.stdin.close()
    if process.wait() != 0:
        raise RuntimeError(f"ffmpeg could not write clips to {folder}: is the disk full?")
    return len(numbers)


def is_rendered(path: Path) -> bool:
    """Whether a file lies where `render` writes clips."""
    return path.parent.name == "clips" and (path.parent.parent / MARK).is_file()


def decode(paths: Sequence[Path]) -> UInt8[np.ndarray, "clips frames height width 3"]:
    """All frames of these rendered clips, from one ffmpeg process: a process for each would take longer.

    Raises ValueError if they are not as rendered."""
    listing = "".join("file 'file:{}'\n".format(str(path.resolve()).replace("'", r"'\''")) for path in paths)
    source = dict(format="concat", safe=0, protocol_whitelist="pipe,file,fd", threads=1)
    options = dict(format="rawvideo", pix_fmt="rgb24", fps_mode="passthrough", noautoscale=None)
    stream = ffmpeg.input("pipe:", **source).output("pipe:", **options).global_args("-v", "error")
    run = dict(cmd=imageio_ffmpeg.get_ffmpeg_exe(), capture_stdout=True, capture_stderr=True)
    try:
        frames, errors = stream.run(input=listing.encode(), **run)
    except ffmpeg.Error as error:
        raise ValueError(error.stderr.decode(errors="replace")) from None
    if errors or len(frames) != len(paths) * FRAMES * SIZE * SIZE * 3:
        raise ValueError("these are not the rendered clips")
    return np.frombuffer(frames, np.uint8).reshape(len(paths), FRAMES, SIZE, SIZE, 3)


def _jobs(folder: Path, seed: int, count: int, size: int) -> list[Job]:
    """Jobs of at most `size` files each, for files 0 ... count - 1."""
    return [(folder, seed, range(k, min(k + size, count))) for k in range(0, count, size)]


def _write_csv(path: Path, files: Iterable[tuple[str, str, tuple[Caption, ...]]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["video", "caption", "split"])
        for name, split, captions in files:
            writer.writerows([name, caption.text, split] for caption in captions)


def render(
    folder: Path | str,
    seed: int = 0,
    splits: Mapping[str, int] | None = None,
    scenes: Sequence[int] = SCENES,
) -> Path:
    """Renders the data set into `folder`: clips.csv and clips/*.mp4. Returns it.

    splits: the clips of each split; default: SPLITS. scenes: as in `make_clip`.
    Does nothing where the same version is there already. All files are written to a temporary folder that is
    renamed at the end, so `folder` is complete or absent. Raises FileExistsError if it holds other files."""
    folder = Path(folder)
    mark = folder / MARK
    splits = splits or SPLITS
    stamp = f"shapes, version {VERSION}, drawing {DRAWING}, seed {seed}, {splits}"
    stamp += f", scenes {scenes}\n" if scenes != SCENES else "\n"
    if mark.exists() and mark.read_text() == stamp:
        return folder
    if folder.exists() and not mark.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something else than the built-in clips: name another --data.")
    work = folder.with_name(f"{folder.name}.making{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    (work / "clips").mkdir(parents=True)

    clips, spawn = sum(splits.values()), multiprocessing.get_context("spawn")
    bar = tqdm(total=clips, desc="rendering the built-in clips", unit=" clips")
    with spawn.Pool(os.cpu_count()) as pool, bar:
        make = functools.partial(_render_clips, scenes=scenes)
        for done in pool.imap_unordered(make, _jobs(work / "clips", seed, clips, 50)):
            bar.update(done)
    files = [(f"clip{n:05d}.mp4", split, n) for split in splits for n in numbers(split, splits)]
    captions = (make_clip(seed, n, scenes).captions for *_, n in files)
    _write_csv(work / "clips.csv", ((*file[:2], said) for file, said in zip(files, captions)))
    (work / mark.name).write_text(stamp)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)
    return folder


def main() -> None:
    """The command line: renders, then prints the perfect retriever's score for each split."""
    parser = argparse.ArgumentParser(description="Render the built-in clips and score a perfect retriever.")
    parser.add_argument("--out", type=Path, default=Path("data/shapes"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another data set")
    args = parser.parse_args()
    render(args.out, args.seed)
    for split in SPLITS:
        found = [f"{name} {value:.1f}" for name, value in perfect_retriever(args.seed, split).items()]
        print(f"perfect retriever, {split}:", "  ".join(found))


if __name__ == "__main__":
    main()

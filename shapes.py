"""The built-in data set: short clips of moving shapes, rendered to real H.264 files, with captions that tell only part of them.

It needs no download and no licence, and it is made after the paper's motivation: "text is short, video is rich". A clip shows three
scenes one after the other, each a colour x shape x motion x place (8 x 8 x 4 x 6). A caption speaks of one or two of them and leaves
attributes out, so that several clips can fit it: even a perfect retriever does not reach 100 % (`perfect_retriever`).

    python shapes.py                 # renders data/shapes (once), prints the perfect retriever's score

What it writes is what a user's own data looks like: a CSV file `video,caption,split` beside a folder of video files.
`pictures.csv` holds still pictures of one scene: the small CLIP is pretrained on them, as OpenAI's was on pictures from the web.
"""

import argparse
import csv
import functools
import itertools
import math
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ffmpeg
import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm.auto import tqdm

SIZE, FPS, FRAMES = 96, 8, 24  # pixels a side, frames a second, frames a clip (3 s)
SPLITS = {"train": 3000, "val": 500, "test": 500}
PICTURES = 9000
CAPTIONS = 5  # captions a clip
VERSION = 1  # raise it when what is drawn or written changes: stale folders are then made anew

# Every attribute value with the words captions use for it.
COLOURS = {
    "red": ["red", "scarlet"], "orange": ["orange"], "yellow": ["yellow"], "green": ["green", "emerald"],
    "blue": ["blue"], "purple": ["purple", "violet"], "pink": ["pink"], "white": ["white"],
}  # fmt: skip
SHAPES = {
    "circle": ["circle", "disc"], "square": ["square", "box"], "triangle": ["triangle"], "star": ["star"],
    "heart": ["heart"], "ring": ["ring", "hoop"], "cross": ["cross", "plus sign"], "moon": ["crescent", "moon"],
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
RGB = {
    "red": (222, 45, 50), "orange": (250, 140, 22), "yellow": (255, 222, 40), "green": (46, 184, 80),
    "blue": (40, 96, 228), "purple": (138, 58, 200), "pink": (255, 128, 190), "white": (250, 250, 252),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- what a clip says


@dataclass(frozen=True)
class Scene:
    """One scene: its four attributes, and where its drawing starts (all numbers in [0, 1), free of meaning to captions)."""

    colour: str
    shape: str
    motion: str
    place: str
    jitter: tuple[float, ...]


@dataclass(frozen=True)
class Caption:
    """A sentence, and what it says: one dict (attribute -> value) for each scene it speaks of, in time order."""

    text: str
    mentions: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class ShapesClip:
    """Three scenes in time order, the number of frames of each (they sum to FRAMES), and the captions."""

    scenes: tuple[Scene, ...]
    lengths: tuple[int, ...]
    captions: tuple[Caption, ...]


def _random_scene(rng: np.random.Generator) -> Scene:
    values = {name: str(rng.choice(list(words))) for name, words in ATTRIBUTES.items()}
    return Scene(**values, jitter=tuple(rng.random(6)))


def _mention(scene: Scene, rng: np.random.Generator, keep: dict[str, float]) -> dict[str, str]:
    """The part of a scene that a caption tells: each attribute is kept with its own probability, and at least two are."""
    kept = [name for name in ATTRIBUTES if rng.random() < keep[name]]
    for name in rng.permutation([name for name, p in keep.items() if p > 0]):
        if len(kept) < 2 and name not in kept:
            kept.append(str(name))
    return {name: getattr(scene, name) for name in ATTRIBUTES if name in kept}


def _phrase(mention: dict[str, str], rng: np.random.Generator) -> str:
    """'a red ring grows in the desert', with synonyms, without what the mention leaves out."""
    word = {name: str(rng.choice(ATTRIBUTES[name][value])) for name, value in mention.items()}
    noun = word.get("shape", str(rng.choice(["thing", "object", "shape"])))
    subject = f"{word['colour']} {noun}" if "colour" in word else noun
    subject = ("an " if subject[0] in "aeiou" else "a ") + subject
    sentence = f"{subject} {word['motion']}" if "motion" in word else subject
    if "place" not in word:
        return sentence
    return f"{word['place']}, {sentence}" if rng.random() < 0.3 else f"{sentence} {word['place']}"


KEEP = {"colour": 0.85, "shape": 0.85, "motion": 0.6, "place": 0.6}
KEEP_STILL = {"colour": 0.8, "shape": 0.8, "motion": 0.0, "place": 0.6}  # a picture does not show its motion


def _caption(scenes: tuple[Scene, ...], rng: np.random.Generator) -> Caption:
    if rng.random() < 0.5:
        mentions = (_mention(scenes[rng.integers(len(scenes))], rng, KEEP),)
        return Caption(_phrase(mentions[0], rng), mentions)
    first, second = sorted(rng.choice(len(scenes), 2, replace=False))
    mentions = (_mention(scenes[first], rng, KEEP), _mention(scenes[second], rng, KEEP))
    a, b = (_phrase(mention, rng) for mention in mentions)
    template = str(rng.choice(["{a}, then {b}", "first {a}, later {b}", "{a} and after that {b}", "{b}, but before that {a}"]))
    return Caption(template.format(a=a, b=b), mentions)


def make_clip(seed: int, number: int) -> ShapesClip:
    """Clip `number` of the data set with this seed: the same on every machine, whatever else is made."""
    rng = np.random.default_rng([VERSION, seed, number])
    scenes = tuple(_random_scene(rng) for _ in range(3))
    spare = np.bincount(rng.integers(3, size=3), minlength=3)  # 3 of 12 parts are dealt out at random
    lengths = tuple(int(3 + n) * FRAMES // 12 for n in spare)
    return ShapesClip(scenes, lengths, tuple(_caption(scenes, rng) for _ in range(CAPTIONS)))


def make_picture(seed: int, number: int) -> tuple[Scene, float, tuple[Caption, ...]]:
    """Picture `number`: a scene, the moment of it that is drawn (0 start, 1 end), and two captions."""
    rng = np.random.default_rng([VERSION, seed, 10**6 + number])
    scene = _random_scene(rng)
    mentions = [_mention(scene, rng, KEEP_STILL) for _ in range(2)]
    return scene, float(rng.random()), tuple(Caption(_phrase(m, rng), (m,)) for m in mentions)


def perfect_retriever(seed: int = 0, split: str = "test") -> dict[str, float]:
    """Text-to-video metrics of a retriever that understands every caption and every clip of a split, in percent and ranks.

    The n clips that fit a caption (its mentions found in its scenes, in order) cannot be told apart, and rank before all others:
    expected R@K = min(1, K / n), expected rank (n + 1) / 2. The rest is the ambiguity of the data."""
    clips = [make_clip(seed, number) for number in _numbers(split)]
    value = {n: np.array([[getattr(s, n) for s in clip.scenes] for clip in clips]) for n in ATTRIBUTES}  # (clips, 3)
    fits = []
    for caption in itertools.chain.from_iterable(clip.captions for clip in clips):
        seen = [np.all([value[n] == v for n, v in m.items()], axis=0) for m in caption.mentions]  # each (clips, 3)
        if len(seen) == 1:
            fits.append(seen[0].any(1).sum())
        else:
            pairs = [seen[0][:, i] & seen[1][:, j] for i, j in itertools.combinations(range(3), 2)]
            fits.append(np.any(pairs, axis=0).sum())
    n = np.array(fits)
    recall = {f"R@{k}": float(np.minimum(1, k / n).mean() * 100) for k in (1, 5, 10)}
    return {**recall, "MdR": float(np.median((n + 1) / 2)), "MnR": float(((n + 1) / 2).mean())}


def _numbers(split: str) -> range:
    ends = dict(zip(SPLITS, itertools.accumulate(SPLITS.values())))
    return range(ends[split] - SPLITS[split], ends[split])


# ------------------------------------------------------------------------------------------------------------------------- drawing


def _gradient(top: tuple[int, int, int], bottom: tuple[int, int, int], size: tuple[int, int]) -> Image.Image:
    ramp = np.linspace(0, 1, size[1])[:, None, None]
    pixels = (1 - ramp) * np.array(top) + ramp * np.array(bottom)
    return Image.fromarray(np.repeat(pixels, size[0], axis=1).astype(np.uint8))


def _ridge(rng: np.random.Generator, width: int, base: float, height: float, waves: tuple[int, ...]) -> list[tuple[float, float]]:
    """A skyline of smooth hills that joins up with itself at the ends (all waves are whole numbers a panorama)."""
    x = np.arange(0, width + 4, 4)
    y = sum(rng.uniform(0.4, 1) * np.sin(2 * math.pi * (k * x / width + rng.random())) / k**0.5 for k in waves)
    return [*zip(x.tolist(), (base - height * y).tolist()), (width + 4, 10**4), (0, 10**4)]


def _paint(place: str, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """One panorama. Each place keeps its palette; hills, trees, houses and stars fall differently each time."""
    sky = {
        "desert": ((255, 214, 150), (255, 240, 205)), "sea": ((140, 205, 240), (220, 243, 250)), "forest": ((190, 225, 190), (226, 240, 205)),
        "city": ((32, 28, 66), (112, 72, 120)), "snow": ((168, 190, 222), (228, 236, 246)), "space": ((6, 6, 20), (26, 16, 50)),
    }[place]  # fmt: skip
    image = _gradient(*sky, (width, height))
    draw = ImageDraw.Draw(image)

    def disc(x: float, y: float, r: float, fill: tuple[int, int, int]) -> None:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    if place == "desert":
        disc(rng.uniform(0.1, 0.9) * width, 0.2 * height, 0.09 * height, (255, 250, 225))
        for base, fill in ((0.62, (236, 190, 124)), (0.74, (222, 168, 98)), (0.88, (200, 142, 76))):
            draw.polygon(_ridge(rng, width, base * height, 0.05 * height, (1, 2, 3)), fill=fill)
    elif place == "sea":
        for _ in range(5):
            x, y = rng.uniform(0, width), rng.uniform(0.06, 0.3) * height
            for step in range(4):
                disc(x + step * 0.07 * height, y + rng.uniform(-0.02, 0.02) * height, rng.uniform(0.04, 0.07) * height, (250, 253, 255))
        for base, fill in ((0.52, (52, 130, 186)), (0.66, (38, 108, 168)), (0.8, (26, 86, 146)), (0.92, (16, 66, 120))):
            draw.polygon(_ridge(rng, width, base * height, 0.016 * height, (9, 14)), fill=fill)
    elif place == "forest":
        for base, fill, n in ((0.62, (120, 170, 122), 26), (0.78, (70, 128, 82), 20), (0.98, (34, 86, 52), 14)):
            for x in (np.arange(n) + rng.uniform(0, 0.8, n)) * width / n:
                half, top = rng.uniform(0.07, 0.11) * height, (base - rng.uniform(0.28, 0.42)) * height
                for level in (0, 0.3):
                    y = top + level * (base * height - top)
                    draw.polygon([(x, y), (x - half, base * height), (x + half, base * height)], fill=fill)
            draw.rectangle((0, (base - 0.01) * height, width, height), fill=fill)
    elif place == "city":
        disc(rng.uniform(0.1, 0.9) * width, 0.18 * height, 0.07 * height, (250, 240, 200))
        for depth, fill in ((0.5, (70, 56, 104)), (0.34, (34, 28, 58))):
            x = 0.0
            while x < width:
                w, top = rng.uniform(0.14, 0.26) * height, (1 - depth * rng.uniform(0.7, 1.3)) * height
                draw.rectangle((x, top, x + w - 2, height), fill=fill)
                for wx in np.arange(x + 0.03 * height, x + w - 0.05 * height, 0.055 * height):
                    for wy in np.arange(top + 0.03 * height, height, 0.075 * height):
                        if rng.random() < 0.5:
                            draw.rectangle((wx, wy, wx + 0.022 * height, wy + 0.034 * height), fill=(255, 214, 120))
                x += w
    elif place == "snow":
        for base, fill in ((0.66, (128, 148, 186)), (0.82, (166, 184, 212))):
            n = 8
            for x in (np.arange(n) + rng.uniform(0, 0.8, n)) * width / n:
                top, half, foot = (base - rng.uniform(0.3, 0.5)) * height, rng.uniform(0.3, 0.45) * height, base * height
                draw.polygon([(x, top), (x - half, foot), (x + half, foot)], fill=fill)
                cap = 0.32
                draw.polygon([(x, top), (x - cap * half, top + cap * (foot - top)), (x, top + 0.2 * (foot - top)),
                              (x + cap * half, top + cap * (foot - top))], fill=(246, 250, 255))  # fmt: skip
            draw.rectangle((0, (base - 0.005) * height, width, height), fill=fill)
        draw.polygon(_ridge(rng, width, 0.84 * height, 0.03 * height, (2, 3)), fill=(238, 244, 252))
        for x, y in rng.uniform(0, 1, (60, 2)):
            disc(x * width, y * height, 0.011 * height, (255, 255, 255))
    elif place == "space":
        for x, y, r in rng.uniform(0, 1, (110, 3)):
            disc(x * width, y * height, (0.004 + 0.01 * r**4) * height, tuple(int(c * (0.6 + 0.4 * r)) for c in (255, 245, 230)))
        for hue in ((70, 110, 150), (150, 92, 70)):
            x, y, r = rng.uniform(0, width), rng.uniform(0.15, 0.85) * height, rng.uniform(0.08, 0.2) * height
            disc(x, y, r, hue)
            disc(x + 0.16 * r, y + 0.14 * r, 0.84 * r, tuple(int(c * 0.72) for c in hue))
    return image


VARIANTS, PANORAMA = 8, 2 * SIZE  # panoramas a place; their width in pixels

# Panoramas and sprites are painted once a process, large, and scaled down: smooth edges at a fraction of a millisecond a frame.


@functools.cache
def _panorama(place: str, variant: int) -> Image.Image:
    rng = np.random.default_rng([list(PLACES).index(place), variant])
    return _paint(place, rng, 4 * PANORAMA, 4 * SIZE).resize((PANORAMA, SIZE), Image.Resampling.LANCZOS)


@functools.cache
def _sprite(colour: str, shape: str) -> Image.Image:
    """The shape in its colour on a transparent square of 128 px, with a dark rim and a light from the upper left."""
    big = 384
    mask = Image.new("L", (big, big))
    draw, c, r = ImageDraw.Draw(mask), big / 2, 0.42 * big

    def around(n: int, radius: list[float], turn: float = 0.0) -> list[tuple[float, float]]:
        angle = [2 * math.pi * (i / n) - math.pi / 2 + turn for i in range(n)]
        return [(c + radius[i % len(radius)] * math.cos(a), c + radius[i % len(radius)] * math.sin(a)) for i, a in enumerate(angle)]

    if shape in ("circle", "ring", "moon"):
        draw.ellipse((c - r, c - r, c + r, c + r), fill=255)
    if shape == "ring":
        draw.ellipse((c - 0.55 * r, c - 0.55 * r, c + 0.55 * r, c + 0.55 * r), fill=0)
    if shape == "moon":
        draw.ellipse((c - 0.35 * r, c - 1.0 * r, c + 1.45 * r, c + 0.8 * r), fill=0)
    if shape == "square":
        draw.rounded_rectangle((c - 0.84 * r, c - 0.84 * r, c + 0.84 * r, c + 0.84 * r), 0.12 * r, fill=255)
    if shape == "triangle":
        draw.polygon([(x, y + 0.2 * r) for x, y in around(3, [1.15 * r])], fill=255)
    if shape == "star":
        draw.polygon(around(10, [1.12 * r, 0.46 * r]), fill=255)
    if shape == "cross":
        draw.rounded_rectangle((c - 0.33 * r, c - r, c + 0.33 * r, c + r), 0.08 * r, fill=255)
        draw.rounded_rectangle((c - r, c - 0.33 * r, c + r, c + 0.33 * r), 0.08 * r, fill=255)
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 120)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        draw.polygon(list(zip((c + x * r / 16).tolist(), (c - y * r / 16).tolist())), fill=255)
    rim = functools.reduce(lambda grown, _: grown.filter(ImageFilter.MaxFilter(3)), range(5), mask)  # as one of size 11, in half the time
    rgb = np.array(RGB[colour], dtype=np.float32)
    ramp = np.add.outer(np.arange(big), np.arange(big)) / (2 * big)  # 0 upper left, 1 lower right
    body = rgb + np.clip(0.45 - ramp, 0, 1)[..., None] * (255 - rgb) * 0.9 - np.clip(ramp - 0.5, 0, 1)[..., None] * rgb * 0.6
    sprite = Image.new("RGBA", (big, big), (20, 18, 30, 0))
    sprite.paste((20, 18, 30, 255), mask=rim)
    sprite.paste(Image.fromarray(np.clip(body, 0, 255).astype(np.uint8)), mask=mask)
    return sprite.resize((128, 128), Image.Resampling.LANCZOS)


def draw_frame(scene: Scene, time: float) -> Image.Image:
    """A picture, SIZE x SIZE, of a scene at `time` in [0, 1] of its length."""
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
    sprite = _sprite(scene.colour, scene.shape)
    sprite = sprite.rotate(turn, Image.Resampling.BICUBIC) if turn else sprite
    pixels = round(size * SIZE)
    sprite = sprite.resize((pixels, pixels), Image.Resampling.BILINEAR)
    image.paste(sprite, (round(x * SIZE - pixels / 2), round(y * SIZE - pixels / 2)), sprite)
    return image


def draw_clip(clip: ShapesClip) -> Iterator[Image.Image]:
    """The FRAMES frames of a clip, in order."""
    for scene, length in zip(clip.scenes, clip.lengths):
        for k in range(length):
            yield draw_frame(scene, (k + 0.5) / length)


# ----------------------------------------------------------------------------------------------------------------------- rendering


def _render_clips(job: tuple[Path, int, range]) -> int:
    """Encodes the clips of one range with one ffmpeg process: it takes the frames of all, and cuts a file at each clip's end."""
    folder, seed, numbers = job
    cuts = ",".join(str(FRAMES * k) for k in range(1, len(numbers)))
    process = (
        ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{SIZE}x{SIZE}", framerate=FPS)
        .output(str(folder / "clip%05d.mp4"), format="segment", segment_frames=cuts, segment_start_number=numbers[0], reset_timestamps=1,
                vcodec="libx264", pix_fmt="yuv420p", crf=20, preset="veryfast", g=FRAMES, keyint_min=FRAMES, sc_threshold=0, bf=0, threads=1,
                fflags="+bitexact", **{"flags:v": "+bitexact"})
        .global_args("-nostdin", "-v", "error")
        .run_async(cmd=imageio_ffmpeg.get_ffmpeg_exe(), pipe_stdin=True)
    )  # fmt: skip
    for number in numbers:
        for image in draw_clip(make_clip(seed, number)):
            process.stdin.write(image.tobytes())
    process.stdin.close()
    if process.wait() != 0:
        raise RuntimeError(f"ffmpeg could not write clips to {folder}: is the disk full?")
    return len(numbers)


def _render_pictures(job: tuple[Path, int, range]) -> int:
    folder, seed, numbers = job
    for number in numbers:
        scene, time, _ = make_picture(seed, number)
        draw_frame(scene, time).save(folder / f"picture{number:05d}.jpg", quality=92)
    return len(numbers)


def _write_csv(path: Path, rows: Iterator[tuple[str, str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["video", "caption", "split"])
        writer.writerows(rows)


def render(folder: Path | str, seed: int = 0) -> Path:
    """Renders the data set into `folder` unless it is there already: clips.csv, clips/*.mp4, pictures.csv, pictures/*.jpg.

    Everything is made in a folder beside it that takes the name at the end: a `folder` that exists is whole."""
    folder = Path(folder)
    mark = folder / "shapes.txt"
    stamp = f"shapes, version {VERSION}, seed {seed}, {SPLITS}, {PICTURES} pictures\n"
    if mark.exists() and mark.read_text() == stamp:
        return folder
    if folder.exists() and not mark.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something else than the built-in clips: name another folder with --data.")
    work = folder.with_name(f"{folder.name}.making{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    (work / "clips").mkdir(parents=True)
    (work / "pictures").mkdir()

    clips, block = sum(SPLITS.values()), 50
    jobs = [(_render_clips, (work / "clips", seed, range(k, min(k + block, clips)))) for k in range(0, clips, block)]
    jobs += [(_render_pictures, (work / "pictures", seed, range(k, min(k + 500, PICTURES)))) for k in range(0, PICTURES, 500)]
    with (
        multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool,
        tqdm(total=clips + PICTURES, desc="rendering the built-in clips", unit=" files") as bar,
    ):
        for done in pool.imap_unordered(_call, jobs):
            bar.update(done)

    _write_csv(work / "clips.csv", ((f"clip{n:05d}.mp4", caption.text, split) for split in SPLITS for n in _numbers(split)
                                    for caption in make_clip(seed, n).captions))  # fmt: skip
    _write_csv(work / "pictures.csv", ((f"picture{n:05d}.jpg", caption.text, "val" if n < 500 else "train") for n in range(PICTURES)
                                       for caption in make_picture(seed, n)[2]))  # fmt: skip
    (work / mark.name).write_text(stamp)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)
    return folder


def _call(job):
    function, argument = job
    return function(argument)


def main() -> None:
    """The command line: renders, then prints the perfect retriever's score for each split."""
    parser = argparse.ArgumentParser(description="Render the built-in clips and print what a perfect retriever would score on them.")
    parser.add_argument("--out", type=Path, default=Path("data/shapes"), help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes another data set")
    args = parser.parse_args()
    render(args.out, args.seed)
    for split in SPLITS:
        score = "  ".join(f"{name} {value:.1f}" for name, value in perfect_retriever(args.seed, split).items())
        print(f"perfect retriever, {split}: {score}")


if __name__ == "__main__":
    main()

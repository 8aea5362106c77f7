"""Pictures are read as a viewer shows them; what cannot be read is one sentence."""

import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import message
from PIL import Image

from engine import pictures
from engine.datasets import Clip
from engine.files import DataError
from engine.frames import FrameCache, decode_frames, segment_midpoints
from engine.pictures import read_picture

RED, GREEN, WHITE = [255, 0, 0], [0, 255, 0], [255, 255, 255]
ANIMATIONS = ["gif", "webp", "apng", "avif"]


def ramp(count: int, size=(16, 12)) -> list[Image.Image]:
    """Frames that grow brighter."""
    return [Image.new("RGB", size, (20 * k, 20 * k, 20 * k)) for k in range(count)]


def save(path: Path, frames: list[Image.Image], **options) -> Path:
    """Writes an animation, or a still if there is one frame, in the format of the suffix."""
    options |= {"lossless": True} if path.suffix == ".webp" else {}
    kind = "PNG" if path.suffix == ".apng" else None
    frames[0].save(path, kind, save_all=len(frames) > 1, append_images=frames[1:], **options)
    return path


def png(path: Path, width: int, height: int, bits: int, kind: int, row: bytes, *more: bytes) -> Path:
    """Writes a PNG whose rows are all the same. more: further chunks, as name and content."""

    def chunk(content: bytes) -> bytes:
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = b"IDAT" + zlib.compress((b"\0" + row) * min(height, 9))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, (header, *more, body, b"IEND"))))
    return path


def first_row(path: Path) -> list[list[int]]:
    (frame,) = read_picture(path, 1)
    assert frame.dtype == np.uint8
    return frame[0].tolist()


# ---- as a viewer shows them


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_says(tmp_path, orientation, suffix):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16], upright[:16, 24:], upright[16:, 24:] = RED, GREEN, WHITE  # no two corners alike
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]  # as the EXIF standard defines them: where the first row and the first column are seen
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(exif=exif.tobytes(), quality=100, subsampling=0, lossless=True)
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a{suffix}", **options)
    (frame,) = read_picture(tmp_path / f"a{suffix}", 1)
    assert frame.shape == upright.shape and np.abs(frame.astype(int) - upright).max() < 8


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_data_and_unknown_orientations_are_no_reason_to_refuse(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 99
    for content in (exif.tobytes(), b"Exif\0\0MM\0*\0\0\xff\xff" + b"\1" * 30, b"Exif\0\0XX"):
        Image.new("RGB", (8, 4), "red").save(tmp_path / "a.jpg", exif=content)
        assert read_picture(tmp_path / "a.jpg", 1)[0].shape == (4, 8, 3)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = [0, 257, 32768, 65535]
    row = struct.pack(">4H", *values)
    assert first_row(png(tmp_path / "a.png", 4, 1, 16, 0, row)) == [[v] * 3 for v in (0, 1, 128, 255)]
    transparent = b"tRNS" + struct.pack(">H", 257)
    assert first_row(png(tmp_path / "b.png", 4, 1, 16, 0, row, transparent))[:2] == [[0] * 3, WHITE]
    colour = struct.pack(">3H", 65535, 256, 32768)
    assert first_row(png(tmp_path / "c.png", 1, 1, 16, 2, colour)) == [[255, 1, 128]]
    assert first_row(png(tmp_path / "d.png", 1, 1, 16, 4, struct.pack(">2H", 9, 0))) == [WHITE]


@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_what_is_transparent_is_white(tmp_path, suffix):
    image = Image.new("RGBA", (2, 1), (0, 255, 0, 0))  # a hidden green
    image.putpixel((0, 0), (255, 0, 0, 255))
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    image.save(tmp_path / f"a.{suffix}", **options)
    assert first_row(tmp_path / f"a.{suffix}") == [RED, WHITE]


def test_transparent_colours_of_every_kind_of_png_are_white(tmp_path):
    kinds = {
        "palette": (3, bytes([0, 1]), b"PLTE" + bytes([0, 255, 0, 255, 0, 0]), b"tRNS" + b"\0"),
        "colour": (2, bytes([0, 255, 0, 255, 0, 0]), b"tRNS" + struct.pack(">3H", 0, 255, 0)),
        "grey": (0, bytes([7, 0]), b"tRNS" + struct.pack(">H", 7)),
        "grey and alpha": (4, bytes([7, 0, 0, 255])),
    }
    for name, (kind, row, *chunks) in kinds.items():
        one, two = first_row(png(tmp_path / "a.png", 2, 1, 8, kind, row, *chunks))
        assert one == WHITE and two in (RED, [0, 0, 0]), name
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 51))
    half.save(tmp_path / "half.png")
    assert first_row(tmp_path / "half.png") == [[204] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "RGB"])
def test_other_kinds_of_pixels_become_three_channels(tmp_path, mode):
    suffix = "png" if mode == "1" else "jpg"
    Image.new("RGB", (5, 3), "white").convert(mode).save(tmp_path / f"a.{suffix}")
    assert first_row(tmp_path / f"a.{suffix}") == [WHITE] * 5


def test_a_still_gives_the_same_frame_each_time_whatever_its_suffix(tmp_path):
    Image.new("RGB", (777, 1), "red").save(tmp_path / "a.jpg", "WEBP", lossless=True)
    frames = read_picture(tmp_path / "a.jpg", 3)
    assert len(frames) == 3 and frames[0] is frames[1] and frames[0].shape == (1, 777, 3)


# ---- animations


@pytest.mark.parametrize("suffix", ANIMATIONS)
def test_an_animation_is_a_clip_of_its_frames(tmp_path, suffix):
    """At the midpoints of equal segments, by number, as of a video: the times of frames do not count."""
    path = save(tmp_path / f"a.{suffix}", ramp(11), duration=[3000] + [50] * 10)
    for wanted in (1, 4, 12):
        found = [round(frame.mean() / 20) for frame in read_picture(path, wanted)]
        assert found == segment_midpoints(11, wanted)
    assert [round(frame.mean() / 20) for frame in decode_frames(path, 4)] == segment_midpoints(11, 4)


@pytest.mark.parametrize("suffix", ["gif", "webp", "apng"])
def test_transparent_parts_of_an_animation_show_what_a_viewer_shows(tmp_path, suffix):
    frames = [Image.new("RGBA", (3, 1), (0, 255, 0, 0)) for _ in range(3)]
    for k, frame in enumerate(frames):
        frame.putpixel((k, 0), (255, 0, 0, 255))
    options = {"gif": {"disposal": 2}, "apng": {"disposal": 1}}.get(suffix, {})
    found = read_picture(save(tmp_path / f"a.{suffix}", frames, duration=100, **options), 3)
    assert [frame[0].tolist() for frame in found] == [
        [RED if k == n else WHITE for k in range(3)] for n in range(3)
    ]


def test_the_picture_for_programs_without_animation_is_no_frame(tmp_path):
    for count in (2, 4):
        save(tmp_path / "a.png", ramp(count), default_image=True)
        found = [round(frame.mean() / 20) for frame in read_picture(tmp_path / "a.png", count - 1)]
        assert found == [*range(1, count)]


def test_the_preview_inside_a_photo_is_no_frame(tmp_path):
    preview = Image.new("RGB", (8, 6), "lime")
    Image.new("RGB", (32, 24), "red").save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[preview])
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    assert {frame.shape for frame in read_picture(tmp_path / "a.jpg", 4)} == {(24, 32, 3)}


# ---- limits


def test_a_picture_that_is_too_large_or_too_long_is_refused_and_the_others_are_read(tmp_path):
    bomb = png(tmp_path / "bomb.png", 60_000, 60_000, 8, 2, b"")
    for name, size in {"fine.png": (40, 40), "wide.png": (777, 1), "high.png": (1, 777)}.items():
        Image.new("RGB", size, "red").save(tmp_path / name)
    clips = [Clip(path.name, path, ("a",), "train") for path in sorted(tmp_path.iterdir())]
    failed = FrameCache(tmp_path / "cache", 2, 32).fill(clips)
    what = "has more than 178,956,970 pixels, or a side longer than 65,535: make it smaller"
    assert failed.pop("bomb.png") == f"{bomb} {what}, or delete its rows."
    assert failed.keys() == {"wide.png", "high.png"}


def test_a_side_may_not_be_very_long(tmp_path):
    """Pillow takes minutes for rows of some million pixels."""
    path = png(tmp_path / "a.png", 65_536, 1, 8, 0, b"")
    assert "a side longer than 65,535" in message(read_picture, path, 1)


def test_an_animation_may_not_be_endless_and_large_frames_are_shrunk(tmp_path, monkeypatch):
    path = save(tmp_path / "a.webp", ramp(6, (64, 48)))
    monkeypatch.setattr(pictures, "LARGE", 0)  # now one picture is decoded at a time
    assert {frame.shape for frame in read_picture(path, 4)} == {(48, 64, 3)}
    monkeypatch.setattr(pictures, "MAX_KEPT", 64 * 48)
    assert [frame.shape for frame in read_picture(path, 4)] == [(24, 32, 3)] * 4
    assert read_picture(path, 1)[0].shape == (48, 64, 3)
    monkeypatch.setattr(pictures, "MAX_ANIMATION", 6 * 64 * 48 - 1)
    assert "an animation of 6 frames of 64 x 48 is too long" in message(read_picture, path, 1)


# ---- what cannot be read


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "apng", "avif"])
def test_a_truncated_picture_is_refused(tmp_path, suffix):
    """Also where what is left holds the frame that is wanted. A GIF does not say how many frames it has."""
    count = 1 if suffix in ("jpg", "png", "bmp") else 5
    frames = [Image.effect_noise((48, 32), 100).convert("RGB") for _ in range(count)]
    path = save(tmp_path / f"whole.{suffix}", frames)
    content, part = path.read_bytes(), tmp_path / f"part.{suffix}"
    for share in (0, 0.1, 0.5, 0.8):
        part.write_bytes(content[: int(share * len(content))])
        assert message(read_picture, part, 1).startswith(f"{part} is ")


@pytest.mark.filterwarnings("ignore")  # pytest undoes the filter of engine/pictures.py
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", *ANIMATIONS])
def test_damaged_pictures_are_read_or_refused_in_one_sentence(tmp_path, suffix):
    content = save(tmp_path / f"a.{suffix}", ramp(1 if suffix in ("jpg", "png", "bmp") else 3)).read_bytes()
    generator, path = random.Random(0), tmp_path / f"b.{suffix}"
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 3, 20])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            assert all(frame.ndim == 3 and frame.dtype == np.uint8 for frame in read_picture(path, 2))
        except DataError as error:
            assert str(error).startswith(f"{path} ") and "\n" not in str(error)


@pytest.mark.parametrize("error", [SyntaxError("a\nb"), RecursionError(), MemoryError(), OSError("zip")])
def test_whatever_pillow_raises_is_one_sentence(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    (tmp_path / "a.png").touch()
    monkeypatch.setattr(Image, "open", fail)
    said = message(read_picture, tmp_path / "a.png", 1)
    assert said.startswith(f"{tmp_path / 'a.png'} is not a readable picture (") and "\n" not in said


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    postscript = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    (tmp_path / "postscript.png").write_text(postscript)
    for name in ("text.png", "empty.png", "postscript.png"):  # Pillow would start Ghostscript for the last
        assert "is not a picture that can be read: replace it" in message(read_picture, tmp_path / name, 1)
    os.mkfifo(tmp_path / "pipe.png")
    assert "is a folder, pipe or device" in message(read_picture, tmp_path / "pipe.png", 1)
    (tmp_path / "link.png").symlink_to("gone.png")
    assert "link.png (a link to gone.png) not found" in message(read_picture, tmp_path / "link.png", 1)
    assert "gone.png not found" in message(read_picture, tmp_path / "gone.png", 1)

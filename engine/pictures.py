"""Pictures as frames: as a viewer shows them, with 8 bits a channel. An animation is a clip."""

import math
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from engine.files import DataError, not_found

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "WEBP")  # found by content, whatever the name says
ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")  # a JPEG's second picture is a preview or a depth map
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # of a picture, 179 million: above, Pillow refuses to open it
MAX_SIDE = 65_535  # of a picture; Pillow takes very long for longer rows
MAX_ANIMATION = 2**31  # pixels of all frames that are decoded, such as 1,000 of 1920 x 1080
MAX_KEPT = 2**27  # pixels of all frames that are returned; if there are more, the frames are shrunk
LARGE = 2**25  # pixels: larger pictures are decoded one at a time, to bound the memory

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the orientation in the EXIF data
EIGHT_BITS = np.round(np.arange(2**16) / 257).astype(np.uint8)  # of each 16-bit value

warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata, and pictures above half of MAX_PIXELS
_large = threading.Lock()


def read_picture(path: Path, num_frames: int) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """`num_frames` frames of a picture. It is turned as its EXIF data says; what is transparent is white.

    16-bit values are scaled to 8 bits. A still gives the same frame each time. An animation (GIF, WebP, APNG,
    AVIF) gives the frames at the midpoints of equal segments, by their number, as a video does; how long each
    is shown does not count. Frames that have more than MAX_KEPT pixels together are shrunk.
    Raises DataError for a file that is missing, truncated, damaged, too large, or not a picture."""
    try:
        if not path.is_file():
            kind = f"{path} is a folder, pipe or device, not a picture: delete its rows."
            raise DataError(kind if path.exists() else not_found(path))
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            return _frames(image, num_frames)
    except DataError:
        raise
    except Image.DecompressionBombError:
        what = f"has more than {MAX_PIXELS:,} pixels, or a side longer than {MAX_SIDE:,}: make it smaller"
    except UnidentifiedImageError:
        what = "is not a picture that can be read: replace it"
    except Exception as error:  # Pillow raises many kinds for a damaged file
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        what = f"is not a readable picture ({reason}): replace it"
        if "truncated" in reason.lower():
            what = "is truncated: copy or download it again"
    raise DataError(f"{path} {what}, or delete its rows.")


def _frames(image: Image.Image, num_frames: int) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    first, count, pixels = 0, 1, image.width * image.height
    if image.format in ANIMATED:
        first = int(getattr(image, "default_image", False))  # in an APNG, for programs that cannot play it
        count = getattr(image, "n_frames", 1) - first
    if max(image.size) > MAX_SIDE:
        raise Image.DecompressionBombError
    if count > 1 and count * pixels > MAX_ANIMATION:
        raise ValueError(f"an animation of {count} frames of {image.width} x {image.height} is too long")
    wanted = [(2 * k + 1) * count // (2 * num_frames) for k in range(num_frames)]
    kept = len({*wanted}) * pixels
    factor, turn, found = math.ceil(math.sqrt(kept / MAX_KEPT)), _turn(image), {}
    with _large if kept > LARGE else nullcontext():
        for number in range(count):  # all of them, so that a truncated file is always refused
            image.seek(first + number)
            image.load()
            if number in wanted:
                shown = _on_white(image)
                shown = shown.reduce(factor) if factor > 1 else shown
                found[number] = np.asarray(shown if turn is None else shown.transpose(turn))
    return [found[number] for number in wanted]


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How the picture is turned, by its EXIF data; not at all if that is damaged."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        return None


def _on_white(image: Image.Image) -> Image.Image:
    """A loaded picture in 8-bit RGB, on a white ground where it is transparent."""
    if image.mode.startswith("I"):  # 16-bit grey; `convert` would clip it at 255
        values = np.asarray(image)
        grey = EIGHT_BITS[values]
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    shown = Image.new("RGB", image.size, "white")
    shown.paste(image, mask=image.getchannel("A"))
    return shown

"""Pictures as cameras and editors write them → upright RGB on white → a small square of bytes.

Any size, mode and EXIF orientation; what cannot be taken for one still picture is refused with
its reason, and a picture too large is refused by its header, before it is decoded.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

SMALLEST_SIDE, LARGEST_SIDE = 8, 20_000  # pixels of a file's picture
MOST_PIXELS = 100_000_000  # of one picture: 300 MB once decoded

# Decoders for pictures alone. Pillow has others that start programs (EPS) or guess (raw types).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_UPRIGHT = {  # EXIF 2.32, tag 0x0112: how the camera was held → what turns the picture back
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class FolderError(ValueError):
    """A folder of pictures that cannot be used: what is wrong, in which lines, and the remedy."""


@contextmanager
def _own_limits() -> Iterator[None]:
    """This module's limits on what Pillow decodes; the caller's come back whatever happens.

    Pillow keeps them in globals, and only warns between one limit and twice that. They hold for
    one picture at a time: other threads that use Pillow meanwhile see them, too.
    """
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = MOST_PIXELS, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def read_picture(path: Path) -> Image.Image:
    """A file's picture in RGB, upright and on white, in its own size.

    Raises:
        FolderError: if it is no picture, damaged, animated, too small or too large; a picture too
            large is not decoded. The message goes on from the file's name.
    """
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # AVIF only in newer Pillows
    try:
        with (
            _own_limits(),
            path.open("rb") as file,
            Image.open(file, formats=formats) as image,
        ):
            _check_kind(image)
            image.load()
            turn = _turn(image)
            picture = _on_white(image)
            return picture if turn is None else picture.transpose(turn)
    except FolderError:
        raise
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        known = ", ".join(formats)
        reason = f"is no picture ({known}), or only the first bytes of one"
        raise FolderError("is an empty file" if empty else reason) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise FolderError(f"has more than {MOST_PIXELS:,} pixels; shrink it") from None
    except Exception as error:  # over damaged files Pillow's decoders raise nearly anything
        if isinstance(error, OSError) and error.strerror:
            raise FolderError(f"cannot be opened: {error.strerror}") from None
        reason = str(error).rstrip(".") or type(error).__name__
        raise FolderError(f"is damaged or cut off: {reason}") from None


def _check_kind(image: Image.Image) -> None:
    """Raise `FolderError` for a size or a kind of picture that is refused, from its header."""
    width, height = image.size
    if min(width, height) < SMALLEST_SIDE:
        raise FolderError(f"is {width}×{height} pixels; {SMALLEST_SIDE} a side is the least")
    if max(width, height) > LARGEST_SIDE:
        raise FolderError(f"is {width}×{height} pixels; {LARGEST_SIDE:,} a side is the most")
    # A phone's JPEG may carry a second picture, for depth or brightness (MPO): the first counts.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise FolderError("is animated or has several pages; save one frame as a picture")
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise FolderError("has 32-bit pixels, whose white is not agreed on; save it with 8 or 16")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns a loaded picture upright; None if nothing need, or its EXIF block is damaged.

    Pillow's own `exif_transpose` rewrites the whole block, and fails over many that viewers take.
    """
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged block makes it raise nearly anything, too
        return None


def _on_white(image: Image.Image) -> Image.Image:
    """A loaded picture of any mode in RGB."""
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        grey = np.asarray(image).astype(np.int64)
        shown = ((grey + 128) // 257).clip(0, 255)  # 65535 = 255 × 257; Pillow's own would clip
        shown[grey == image.info.get("transparency")] = 255
        return Image.fromarray(shown.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    pixels = image.convert("RGBA")
    white = Image.new("RGBA", pixels.size, "white")
    return Image.alpha_composite(white, pixels).convert("RGB")


def shrink(picture: Image.Image, side: int) -> UInt8[Tensor, "3 {side} {side}"]:
    """The central square of an RGB picture at another size, antialiased; 0 … 255."""
    width, height = picture.size
    square = min(width, height)
    left, top = (width - square) // 2, (height - square) // 2
    with _own_limits():  # Pillow holds what it crops against its limit, too
        central = picture.crop((left, top, left + square, top + square))
    # reducing_gap: large pictures are first averaged down to three times the size.
    small = central.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)

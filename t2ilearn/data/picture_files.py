"""Picture files as cameras and editors write them → upright RGB on white → a small square of bytes.

    find_picture  the name in a table → the path of a file inside the folder
    load_picture  the file, or its bytes → the picture as it is stored, with the file's texts
    read_picture  the file → an RGB picture in its own size, upright, on white
    shrink        the picture → its central square at the resolution of the model, as bytes

Any size, colour mode and EXIF orientation is accepted. A file that is not one still picture is
refused with the reason. A picture that is too large is refused by its header, before it is decoded.
`picture_damage` says which damage is noticed.

Shapes: side is the height and the width of the result, in pixels.
"""

import io
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from t2ilearn.data.picture_damage import damage

SMALLEST_SIDE, LARGEST_SIDE = 8, 20_000  # height and width of a file's picture, in pixels
MOST_PIXELS = 100_000_000  # in one picture: 300 MB once it is decoded
MOST_TEXT = 64 * 2**20  # bytes of one text or colour profile in a PNG, unpacked

# Pillow also has decoders that start other programs (EPS) or guess (raw types): they stay out.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_UPRIGHT = {  # EXIF 2.32, tag 0x0112: how the camera was held → what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_LIMITS: tuple[tuple[ModuleType, str, Any], ...] = (
    (Image, "MAX_IMAGE_PIXELS", MOST_PIXELS),
    (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
    (PngImagePlugin, "MAX_TEXT_CHUNK", MOST_TEXT),
    (PngImagePlugin, "MAX_TEXT_MEMORY", 4 * MOST_TEXT),  # of all texts together
)


class FolderError(ValueError):
    """A folder of pictures cannot be used. Says what is wrong, in which lines, and what to do."""


@contextmanager
def _own_limits() -> Iterator[None]:
    """Set this module's limits on what Pillow decodes, and restore the caller's in every case.

    Pillow keeps its limits in global variables, and only warns about a picture between one limit
    and twice the limit. They are set for one picture at a time; other threads that use Pillow
    meanwhile are under the same limits.
    """
    before = [getattr(module, name) for module, name, _ in _LIMITS]
    for module, name, limit in _LIMITS:
        setattr(module, name, limit)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        for (module, name, _), value in zip(_LIMITS, before, strict=True):
            setattr(module, name, value)


def find_picture(folder: Path, file: str) -> Path:
    """The path of a file that a row names, with "/" or "\\" between folders.

    A link inside the folder is followed, because the owner of the folder put it there.

    Raises:
        FolderError: if the name is empty, or leads out of the folder or to no file. The message
            continues a sentence that begins with the file's name.
    """
    if not file:
        raise FolderError("is not a file's name: the name is empty")
    # A table may have been made on Windows, whose rules know more ways out (C:\x, \\server\x).
    named = PureWindowsPath(file)
    if named.anchor or ".." in named.parts:
        raise FolderError("is outside the folder; name files relative to the folder, without ..")
    # "é" is one character or two, and systems differ in which of these they write to disk.
    spellings = dict.fromkeys([file, *(unicodedata.normalize(f, file) for f in ("NFC", "NFD"))])
    for spelling in spellings:
        path = folder.joinpath(*PureWindowsPath(spelling).parts)
        try:
            if path.is_file():
                return path
        except OSError as error:  # a name too long, a folder that may not be entered
            raise FolderError(f"cannot be opened: {error.strerror}") from None
    raise FolderError("is missing, or is not a file")


def read_picture(path: Path) -> Image.Image:
    """A file's picture in RGB, upright and on white, in its own size.

    Raises:
        FolderError: as `load_picture`.
    """
    image = load_picture(path)
    with _own_limits(), _reasons(path):
        picture, turn = _on_white(image), _turn(image)
        return picture if turn is None else picture.transpose(turn)


def load_picture(source: Path | bytes, smallest: int = SMALLEST_SIDE) -> Image.Image:
    """A picture as its file stores it, decoded, with the file's texts in `info`, wherever in the
    file they stand. Everything here that reads a picture calls this function.

    Args:
        source: a file, or the bytes of one.
        smallest: height and width that are not refused, in pixels.

    Raises:
        FolderError: if the file is not a picture, or the picture is damaged, animated, too small
            or too large; one that is too large is not decoded. The message continues a sentence
            that begins with the file's name.
    """
    Image.init()
    with _own_limits(), _reasons(source):
        data = source if isinstance(source, bytes) else source.read_bytes()
        image = Image.open(io.BytesIO(data), formats=_known_formats())
        _check_kind(image, smallest)
        image.load()
        if reason := damage(data, image.format):
            raise FolderError(f"is damaged or cut off: {reason}")
        return image


def _known_formats() -> list[str]:
    """Formats that this Pillow has; AVIF is only in newer ones."""
    return [name for name in _FORMATS if name in Image.OPEN]


@contextmanager
def _reasons(source: Path | bytes) -> Iterator[None]:
    """Whatever Pillow raises within the block, as a `FolderError` with the reason."""
    try:
        yield
    except FolderError:
        raise
    except UnidentifiedImageError:
        empty = not (len(source) if isinstance(source, bytes) else source.stat().st_size)
        known = ", ".join(_known_formats())
        reason = f"is not a picture ({known}), or only the first bytes of one"
        raise FolderError("is an empty file" if empty else reason) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise FolderError(f"has more than {MOST_PIXELS:,} pixels; shrink it") from None
    except Exception as error:  # Pillow's decoders raise nearly any error for damaged files
        if isinstance(error, OSError) and error.strerror:
            raise FolderError(f"cannot be opened: {error.strerror}") from None
        if "MAX_TEXT" in str(error):  # as Pillow names its limits
            most = f"{MOST_TEXT // 2**20} MiB"
            raise FolderError(
                f"holds a text or a colour profile of more than {most}; save it without"
            ) from None
        reason = str(error).rstrip(".") or type(error).__name__
        raise FolderError(f"is damaged or cut off: {reason}") from None


def _check_kind(image: Image.Image, smallest: int) -> None:
    """Raise `FolderError` for a size or a kind of picture that is refused, by its header."""
    width, height = image.size
    if min(width, height) < smallest:
        raise FolderError(f"is {width}×{height} pixels; a side has at least {smallest}")
    if max(width, height) > LARGEST_SIDE:
        raise FolderError(f"is {width}×{height} pixels; a side has at most {LARGEST_SIDE:,}")
    # A phone's JPEG may hold a second picture, for depth or brightness (MPO): the first is used.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise FolderError("is animated or has several pages; save one frame as a picture")
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise FolderError("has 32-bit pixels, whose white is undefined; save it with 8 or 16 bits")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns a loaded picture upright; None if it is upright, or its EXIF block is damaged.

    Pillow's own `exif_transpose` rewrites the whole block, and so fails on many damaged blocks
    that picture viewers accept.
    """
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # nearly any error here, too
        return None


def _on_white(image: Image.Image) -> Image.Image:
    """A loaded picture of any colour mode in RGB, on white where it is transparent."""
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        grey = np.asarray(image).astype(np.int64)
        shown = ((grey + 128) // 257).clip(0, 255)  # 65535 = 255 × 257; Pillow would clip
        shown[grey == image.info.get("transparency")] = 255
        return Image.fromarray(shown.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    pixels = image.convert("RGBA")
    white = Image.new("RGBA", pixels.size, "white")
    return Image.alpha_composite(white, pixels).convert("RGB")


def shrink(picture: Image.Image, side: int) -> UInt8[Tensor, "3 {side} {side}"]:
    """The central square of an RGB picture, resampled with antialiasing; values from 0 to 255."""
    width, height = picture.size
    square = min(width, height)
    left, top = (width - square) // 2, (height - square) // 2
    with _own_limits():  # Pillow checks what it crops against its limit, too
        central = picture.crop((left, top, left + square, top + square))
    # reducing_gap: a large picture is first averaged down to three times the size.
    small = central.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)  # (3, side, side)

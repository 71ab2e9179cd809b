"""Worlds of captioned pictures."""

from t2ilearn.data.captions import CaptionError, encode, parse
from t2ilearn.data.interface import CaptionedPictures, PictureBatch
from t2ilearn.data.shapes import Shapes, TinyShapes

__all__ = [
    "CaptionError",
    "CaptionedPictures",
    "PictureBatch",
    "Shapes",
    "TinyShapes",
    "encode",
    "parse",
]

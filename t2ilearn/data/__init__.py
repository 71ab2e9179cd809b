"""Worlds of captioned pictures."""

from t2ilearn.data.bpe import CaptionTokenizer
from t2ilearn.data.captions import CaptionError, WordTokenizer, encode, parse
from t2ilearn.data.folder import Folder, FolderError
from t2ilearn.data.interface import CaptionedPictures, PictureBatch, Tokenizer
from t2ilearn.data.shapes import Shapes, TinyShapes

__all__ = [
    "CaptionError",
    "CaptionTokenizer",
    "CaptionedPictures",
    "Folder",
    "FolderError",
    "PictureBatch",
    "Shapes",
    "TinyShapes",
    "Tokenizer",
    "WordTokenizer",
    "encode",
    "parse",
]

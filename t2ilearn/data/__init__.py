"""Worlds of captioned pictures."""

from t2ilearn.data.bpe import CaptionTokenizer
from t2ilearn.data.captions import CaptionError, WordTokenizer, encode, parse
from t2ilearn.data.emoji import Emoji
from t2ilearn.data.emoji_captions import parse_emoji
from t2ilearn.data.emoji_files import EmojiError
from t2ilearn.data.folder import Folder, FolderError
from t2ilearn.data.interface import CaptionedPictures, PictureBatch, Tokenizer
from t2ilearn.data.shapes import Shapes, TinyShapes
from t2ilearn.data.together import Together

__all__ = [
    "CaptionError",
    "CaptionTokenizer",
    "CaptionedPictures",
    "Emoji",
    "EmojiError",
    "Folder",
    "FolderError",
    "PictureBatch",
    "Shapes",
    "TinyShapes",
    "Together",
    "Tokenizer",
    "WordTokenizer",
    "encode",
    "parse",
    "parse_emoji",
]

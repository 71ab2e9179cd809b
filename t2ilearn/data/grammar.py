"""Which world a caption is of, and what it states there.

A model that learned several worlds takes the captions of each. A few can be read in two: "a star"
is a shape and an emoji. Such a caption is of the shapes world; with a style it is of the other:
"a star, glossy".
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from t2ilearn.data import captions as words
from t2ilearn.data.captions import CaptionError
from t2ilearn.data.emoji import Emoji
from t2ilearn.data.emoji_captions import single_words
from t2ilearn.data.emoji_files import STYLES
from t2ilearn.data.interface import CaptionedPictures
from t2ilearn.data.shapes import Shapes, TinyShapes

# The worlds that parse their own captions, by name, in the order in which they are asked.
WORLDS: dict[str, type[CaptionedPictures]] = {
    world.name: world for world in (TinyShapes, Shapes, Emoji)
}


class ReadCaption(NamedTuple):
    """A caption, the world that read it, and what it states there."""

    text: str
    world: type[CaptionedPictures]
    stated: Any


def read_caption(caption: str, worlds: Sequence[str] = ("shapes", "emoji")) -> ReadCaption:
    """What a caption states, by the first of these worlds whose grammar reads it.

    Args:
        worlds: names of worlds, among `WORLDS`.

    Raises:
        CaptionError: if none reads it. The message is of the world that was most likely meant.
        ValueError: for a world without a grammar.
    """
    if unknown := [world for world in worlds if world not in WORLDS]:
        raise ValueError(f"No grammar for {', '.join(unknown)}; there are {', '.join(WORLDS)}.")
    faults: dict[str, CaptionError] = {}
    for name, world in WORLDS.items():
        if name in worlds:
            try:
                return ReadCaption(caption, world, world.read(caption))
            except CaptionError as error:
                faults[name] = error
    if not faults:
        raise ValueError("Name at least one world.")
    meant = "emoji" if "emoji" in faults and _means_emoji(caption) else next(iter(faults))
    raise faults[meant]


def _means_emoji(caption: str) -> bool:
    """Whether a caption that no grammar can read is about an emoji.

    It is if it names a style; if it names an emoji that the shapes world has no word for and puts
    nothing beside it, as in "a dodo on a red background"; or if it has more words that the shapes
    world does not know than words for the looks of a shape: "a smal red star" means a shape.
    """
    used = set(re.sub(r"[.,;:!?]", " ", caption.lower()).split())
    looks = {*words.SIZES, *words.PATTERNS, *words.COLOURS, *words.SHAPES}
    beside = {word for relation in words.RELATIONS for word in relation.split()} - {"of"}
    strange = used - set(words.VOCABULARY)
    if used & set(STYLES) or len(strange) > len(used & looks):
        return True
    return bool(strange & single_words()) and not used & beside

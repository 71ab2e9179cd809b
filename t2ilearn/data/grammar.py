"""Which world a caption is of, and what it states there.

A model that learned both worlds takes the captions of either. A few can be read in both: "a star"
is a shape and an emoji. Such a caption is of the shapes world; with a style it is of the other:
"a star, glossy".
"""

import re
from collections.abc import Callable, Sequence

from t2ilearn.data import captions as words
from t2ilearn.data.captions import CaptionError, Stated, parse
from t2ilearn.data.emoji_captions import StatedEmoji, parse_emoji, single_words
from t2ilearn.data.emoji_files import STYLES

# By the names of the worlds, in the order in which they are asked.
GRAMMARS: dict[str, Callable[[str], Stated | StatedEmoji]] = {
    "tiny-shapes": parse,
    "shapes": parse,
    "emoji": parse_emoji,
}


def read_caption(caption: str, worlds: Sequence[str] = ("shapes", "emoji")) -> Stated | StatedEmoji:
    """What a caption states, by the first of these worlds whose grammar reads it.

    Args:
        worlds: names of worlds, among `GRAMMARS`.

    Raises:
        CaptionError: if none reads it. The message is of the world that was most likely meant.
        ValueError: for a world without a grammar.
    """
    if unknown := [world for world in worlds if world not in GRAMMARS]:
        raise ValueError(f"No grammar for {', '.join(unknown)}; there are {', '.join(GRAMMARS)}.")
    faults: dict[str, CaptionError] = {}
    for world in GRAMMARS:
        if world in worlds:
            try:
                return GRAMMARS[world](caption)
            except CaptionError as error:
                faults[world] = error
    if not faults:
        raise ValueError("Name at least one world.")
    meant = "emoji" if "emoji" in faults and _means_emoji(caption) else next(iter(faults))
    raise faults[meant]


def _means_emoji(caption: str) -> bool:
    """Whether a caption that nobody can read is about an emoji.

    It is if it names a style; if it names an emoji that the shapes world has no word for and puts
    nothing beside it, as in "a dodo on a red background"; or if it has more words that the shapes
    world does not know than words for the looks of a shape: "a smal red star" means a shape.
    """
    said = set(re.sub(r"[.,;:!?]", " ", caption.lower()).split())
    looks = {*words.SIZES, *words.PATTERNS, *words.COLOURS, *words.SHAPES}
    beside = {word for relation in words.RELATIONS for word in relation.split()} - {"of"}
    strange = said - set(words.VOCABULARY)
    if said & set(STYLES) or len(strange) > len(said & looks):
        return True
    return bool(strange & single_words()) and not said & beside

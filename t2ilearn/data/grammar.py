"""Which world a caption is of, and what it states there.

A model that learned both worlds takes the captions of either. A few can be read in both: "a star"
is a shape and an emoji. Such a caption is of the shapes world; with a style it is of the other:
"a star, glossy".
"""

from collections.abc import Callable, Sequence

from t2ilearn.data.captions import VOCABULARY, CaptionError, Stated, parse
from t2ilearn.data.emoji_captions import StatedEmoji, parse_emoji

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
        CaptionError: if none reads it. The message is of the world whose words it uses.
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
    foreign = set(caption.lower().replace(",", " ").rstrip(".").split()) - set(VOCABULARY)
    of_shapes = not foreign or list(faults)[-1] != "emoji"
    raise faults[next(iter(faults)) if of_shapes else "emoji"]

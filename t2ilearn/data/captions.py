"""Captions of the shapes world: their grammar, their tokens, and the way back to facts.

A caption is an English sentence about one or two objects. `describe` writes it from facts,
`parse` reads the facts back, `encode` turns it into token ids. A caption need not say
everything: an attribute left unsaid is `None` in what `parse` returns, and nobody is judged
by what was not asked for.

    sentence   = [ "on a white background" ] clause  |  clause [ "on a white background" ]
    clause     = [ "there is" | "a picture of" ] object [ [ "is" ] relation object ]
               | relation object "is" object
    object     = article [ size ] [ pattern ] [ colour ] shape
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from t2ilearn.models.tokens import END, PAD

SIZES = ("small", "large")
PATTERNS = ("solid", "striped", "dotted", "checkered")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
BACKGROUNDS = ("white", "black", "grey", "sky")
RELATIONS = ("above", "below", "left of", "right of")
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

TEXT_LENGTH = 24
_GLUE = ("a", "an", "the", "there", "is", "picture", "of", "on", "background", "left", "right")
VOCABULARY: tuple[str, ...] = (
    "<pad>",
    "<end>",
    "<null>",
    *_GLUE,
    "above",
    "below",
    *SIZES,
    *PATTERNS,
    *COLOURS,
    *SHAPES,
    *BACKGROUNDS,
)
_IDS = {word: number for number, word in enumerate(VOCABULARY)}
_WORDS = VOCABULARY[3:]


class CaptionError(ValueError):
    """A caption that cannot be read: an unknown word or an impossible sentence.

    The message says what is wrong, and lists the nearest known words where there are any.
    """


def check_unicode(caption: str) -> None:
    """Raise CaptionError for text that no file could hold, such as half of a Unicode pair: so a
    byte that is no UTF-8 reaches a program from the command line."""
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:
        raise CaptionError(
            f"The caption {caption[:40]!r} holds a character that is not valid Unicode."
        ) from None


@dataclass(frozen=True)
class StatedObject:
    """What a caption says of one object; `None` where it says nothing."""

    shape: str
    size: str | None = None
    pattern: str | None = None
    colour: str | None = None


@dataclass(frozen=True)
class Stated:
    """What a caption says of a picture.

    `relation` tells where the first object is, seen from the second: "above" means that the
    first is above the second. It is `None` exactly when there is one object.
    """

    objects: tuple[StatedObject, ...]
    relation: str | None = None
    background: str | None = None

    def canonical(self) -> "Stated":
        """The same facts with the upper or left object first, so that equal facts are equal."""
        if self.relation in ("below", "right of"):
            return replace(self, objects=self.objects[::-1], relation=INVERSE[self.relation])
        return self


def words_of(caption: str) -> list[str]:
    """Lower-case words of a caption without its punctuation.

    Raises:
        CaptionError: if the caption is empty, too long or holds a word the world does not know.
    """
    words = re.sub(r"[.,;:!?]", " ", caption.lower()).split()
    if not words:
        raise CaptionError("The caption is empty. Try: a small red star above a large blue ring.")
    for word in words:
        if word not in _WORDS:
            near = difflib.get_close_matches(word, _WORDS, n=3, cutoff=0.5)
            hint = f"Nearest known words: {', '.join(near)}." if near else _all_words()
            raise CaptionError(f"Unknown word {word[:40]!r} in the caption. {hint}")
    if len(words) >= TEXT_LENGTH:
        raise CaptionError(
            f"The caption has {len(words)} words; at most {TEXT_LENGTH - 1} are allowed."
        )
    return words


def _all_words() -> str:
    groups = (SIZES, PATTERNS, COLOURS, SHAPES, RELATIONS, BACKGROUNDS)
    return "Known words: " + "; ".join(", ".join(group) for group in groups) + "."


def encode(captions: Sequence[str]) -> Int[Tensor, "b 24"]:
    """Token ids of captions, each ended by END and padded with PAD.

    Raises:
        CaptionError: for an unknown word, an empty caption or more than 23 words.
    """
    ids = torch.full((len(captions), TEXT_LENGTH), PAD, dtype=torch.int64)
    for row, caption in enumerate(captions):
        tokens = [_IDS[word] for word in words_of(caption)] + [END]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids


class WordTokenizer:
    """`encode` with the sizes that a prior must know; what `bpe.CaptionTokenizer` is elsewhere."""

    vocabulary, length = len(VOCABULARY), TEXT_LENGTH

    def encode(self, captions: Sequence[str]) -> Int[Tensor, "b 24"]:
        """See the function of this name."""
        return encode(captions)


def decode(ids: Sequence[int]) -> str:
    """The words of a row of token ids, without END and PAD."""
    return " ".join(VOCABULARY[i] for i in ids if i not in (PAD, END))


def _noun_phrase(thing: StatedObject) -> str:
    words = [w for w in (thing.size, thing.pattern, thing.colour, thing.shape) if w]
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


TEMPLATES = 6


def describe(stated: Stated, template: int = 0) -> str:
    """Write the caption for some facts.

    Args:
        stated: the facts; objects are named in their order, or the second first in template 3.
        template: 0 … 5, the form of the sentence.
    """
    phrases = [_noun_phrase(thing) for thing in stated.objects]
    opening = ("", "there is ", "a picture of ", "", "", "there is ")[template]
    if stated.relation is None:
        clause = opening + phrases[0]
    elif template == 3:
        clause = f"{stated.relation} {phrases[1]} is {phrases[0]}"
    else:
        verb = " is " if template == 4 else " "
        clause = f"{opening}{phrases[0]}{verb}{stated.relation} {phrases[1]}"
    if stated.background is None:
        return clause
    place = f"on a {stated.background} background"
    return f"{place} {clause}" if template in (4, 5) else f"{clause} {place}"


class _Reader:
    """Walks over the words of one caption; each method reads one rule of the grammar."""

    def __init__(self, caption: str) -> None:
        self.words = words_of(caption)
        self.at = 0

    def peek(self, *words: str) -> bool:
        return tuple(self.words[self.at : self.at + len(words)]) == words

    def take(self, *words: str) -> bool:
        found = self.peek(*words)
        self.at += len(words) if found else 0
        return found

    def one_of(self, words: Sequence[str]) -> str | None:
        return next((w for w in words if self.take(*w.split())), None)

    def fail(self, expected: str) -> CaptionError:
        got = repr(self.words[self.at]) if self.at < len(self.words) else "the end"
        return CaptionError(f"Expected {expected}, found {got} in {' '.join(self.words)!r}.")

    def background(self) -> str | None:
        if not self.take("on"):
            return None
        if not self.one_of(("a", "the")):
            raise self.fail("'a' before the background")
        place = self.one_of(BACKGROUNDS)
        if place is None:
            raise self.fail(f"a background ({', '.join(BACKGROUNDS)})")
        if not self.take("background"):
            raise self.fail("'background'")
        return place

    def thing(self) -> StatedObject:
        if not self.one_of(("a", "an", "the")):
            raise self.fail("'a', 'an' or 'the'")
        size = self.one_of(SIZES)
        pattern = self.one_of(PATTERNS)
        colour = self.one_of(COLOURS)
        shape = self.one_of(SHAPES)
        if shape is None:
            raise self.fail(
                f"[size] [pattern] [colour] and then a shape (one of {', '.join(SHAPES)})"
            )
        return StatedObject(shape, size, pattern, colour)

    def clause(self) -> tuple[tuple[StatedObject, ...], str | None]:
        if relation := self.one_of(RELATIONS):
            second = self.thing()
            if not self.take("is"):
                raise self.fail("'is'")
            return (self.thing(), second), relation
        if not self.take("there", "is"):
            self.take("a", "picture", "of")
        first = self.thing()
        said_is = self.take("is")
        relation = self.one_of(RELATIONS)
        if relation:
            return (first, self.thing()), relation
        if said_is:
            raise self.fail(f"a relation ({', '.join(RELATIONS)})")
        return (first,), None


def parse(caption: str) -> Stated:
    """Read the facts a caption states.

    Raises:
        CaptionError: for an unknown word (nearest words listed) or a sentence that the grammar
            at the top of this file cannot read.
    """
    reader = _Reader(caption)
    place = reader.background()
    objects, relation = reader.clause()
    if reader.at < len(reader.words):
        if place is not None:
            raise reader.fail("the end (the background was already said)")
        place = reader.background()
    if reader.at < len(reader.words):
        raise reader.fail("the end")
    return Stated(objects, relation, place)

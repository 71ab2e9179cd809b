"""Captions of the emoji world: written from facts, and read back.

a dodo, glossy, on a sky background

caption    = [ place "," ] picture [ "," ] [ place ]
picture    = [ article [ style ] ( "drawing" | "picture" ) "of" ] thing [ said style ]
thing      = [ article ] [ style ] name, where a name is a concept or a synonym of one
said style = [ "," ] style | [ "," ] "in the" style "style"
place      = "on" article background "background"
"""

import difflib
import functools
import re
from dataclasses import dataclass

from t2ilearn.data.captions import BACKGROUNDS, CaptionError
from t2ilearn.data.emoji_files import STYLES, read_index

_ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class StatedEmoji:
    """What a caption says of a picture; `None` where it says nothing."""

    concept: str
    style: str | None = None
    background: str | None = None


def _bare(phrase: str) -> str:
    """A phrase without its article."""
    first, _, rest = phrase.partition(" ")
    return rest if first in _ARTICLES and rest else phrase


@functools.cache
def _names() -> dict[str, str]:
    """Every name and synonym that ships, and the concept it stands for."""
    concepts = read_index()["concepts"]
    return {_bare(phrase): name for name, phrases in concepts.items() for phrase in phrases}


@functools.cache
def single_words() -> frozenset[str]:
    """The names and synonyms that are one word, such as "dodo": enough to tell what is meant."""
    return frozenset(name for name in _names() if " " not in name)


@functools.cache
def concept_numbers() -> dict[str, int]:
    """Each concept's number: the first column of an emoji scene."""
    return {name: number for number, name in enumerate(read_index()["concepts"])}


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Every word that a caption of this world may hold, in alphabetical order."""
    glue = "a an the on background in style drawing picture of".split()
    words = {word for name in _names() for word in name.split()}
    return tuple(sorted(words | {*glue, *STYLES, *BACKGROUNDS}))


TEMPLATES = 5


def describe_emoji(
    phrase: str, style: str | None = None, background: str | None = None, template: int = 0
) -> str:
    """Write a caption.

    Args:
        phrase: the thing with its article, such as "a dodo" or "two hearts".
        style: one of `STYLES`, or None to leave it unsaid.
        background: one of `BACKGROUNDS`, or None to leave it unsaid.
        template: 0 … 4, the form of the sentence.
    """
    place = f"on a {background} background" if background else ""
    if template == 2:
        kind = f"{'an' if style and style[0] in 'aeiou' else 'a'} {style or ''}".strip()
        return f"{kind} drawing of {phrase} {place}".strip()
    thing = f"a picture of {phrase}" if template == 4 else phrase
    if template == 1:
        thing += f" in the {style} style" if style else ""
        return f"{thing} {place}".strip()
    if template == 3 and place:
        return ", ".join(part for part in (place, thing, style) if part)
    if style is None:
        return f"{thing} {place}".strip()
    return ", ".join(part for part in (thing, style, place) if part)


def parse_emoji(caption: str) -> StatedEmoji:
    """Read the facts a caption states, by the grammar at the top of this file.

    Raises:
        CaptionError: if the caption is empty, says a style or a background twice, or names one
            that does not exist (all are listed) or an unknown thing (the nearest are listed).
    """
    text = " ".join(re.sub(r"[.;:!?]", " ", caption.lower().replace("’", "'")).split())
    text, background = _take_place(text)
    thing, said = _take_styles(text)
    if not thing:
        raise CaptionError("The caption names nothing. Try: a dodo, glossy, on a sky background.")
    concept, style = _take_thing(thing)
    said += [style] if style else []
    for word in said:
        if word not in STYLES:
            raise CaptionError(f"Unknown style {word[:40]!r}. Known styles: {', '.join(STYLES)}.")
    if len(said) > 1:
        raise CaptionError(f"The caption names two styles: {' and '.join(said)}. One, please.")
    return StatedEmoji(concept, said[0] if said else None, background)


def _take_place(text: str) -> tuple[str, str | None]:
    """The text without its background, and the background it names."""
    # No second "on" inside: "an umbrella on ground on a sky background" has one background.
    pattern = r"[ ,]*\bon(?: (?:an?|the))?\b((?:(?!\bon\b)[^,]){0,40}?) ?\bbackground\b[ ,]*"
    places = [place.strip() for place in re.findall(pattern, text)]
    for place in places:
        if place not in BACKGROUNDS:
            raise CaptionError(
                f"Unknown background {place!r}. Known backgrounds: {', '.join(BACKGROUNDS)}."
            )
    if len(places) > 1:
        raise CaptionError(f"The caption names two backgrounds: {' and '.join(places)}.")
    return re.sub(pattern, ", ", text).strip(" ,"), places[0] if places else None


def _take_styles(text: str) -> tuple[str, list[str]]:
    """What is left to name the thing, and the words that stand where a style is said."""
    said = []
    if tail := re.fullmatch(r"(.*?),? in (?:the|an?) ([\w-]+) style", text):
        text = tail[1]
        said.append(tail[2])
    text, *parts = (part.strip() for part in text.split(","))
    said = [part for part in parts if part] + said
    if opening := re.fullmatch(r"(?:an?|the) (?:([\w-]+) )?(?:drawing|picture) of (.+)", text):
        text = opening[2]
        said = ([opening[1]] if opening[1] else []) + said
    return text, said


def _take_thing(text: str) -> tuple[str, str | None]:
    """The concept that a phrase names, and a style said without a comma ("a glossy dodo")."""
    names = _names()
    thing = _bare(text)
    if thing in names:  # first, since "a flat shoe" and "a soft ice cream" are things
        return names[thing], None
    first, _, rest = thing.partition(" ")
    if first in STYLES and rest in names:
        return names[rest], first
    front, _, last = thing.rpartition(" ")
    if last in STYLES and front in names:
        return names[front], last
    thing = thing[:40]
    near = difflib.get_close_matches(thing, names, n=3, cutoff=0.6)
    near += difflib.get_close_matches(thing.split()[-1], names, n=2, cutoff=0.6)
    telling = {word for word in thing.split() if len(word) > 3}
    near += [name for name in names if telling & set(name.split())]
    near = list(dict.fromkeys(near))[:5]
    hint = f"Nearest known: {', '.join(near)}." if near else "Try: dodo, puppy, red apple."
    raise CaptionError(f"Nothing here is called {thing!r}. {hint}")

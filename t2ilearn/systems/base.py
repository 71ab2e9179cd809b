"""What every system that draws offers, whatever happens inside it.

    system = systems.load("vqvae")
    request = Request(("a small red star",) * 4, options=system.make_options(guidance_scale=3.0))
    for pictures in system.steps(request, generator):   # as they form
        ...
    pictures = system.generate(request, generator)      # the last of these

A prior writes tokens there, a diffusion model removes noise, VQGAN-CLIP optimises a latent: the
caller does not know. A new system is one file: a subclass of `System` with its options, its
stages and `steps`, under `@register` (see `registry`).

Letters: B pictures, H and W their height and width.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, get_args, get_type_hints

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from t2ilearn.data.grammar import ReadCaption, read_caption
from t2ilearn.data.interface import CaptionedPictures

if TYPE_CHECKING:
    from pathlib import Path

    from t2ilearn.systems.stage import Stage


class Prompt(NamedTuple):
    """A text with a weight; a negative weight steers away from it."""

    text: str
    weight: float = 1.0


Caption = str | tuple[Prompt, ...]  # what one picture shall show


@dataclass(frozen=True)
class Options:
    """A system's own sampling options with their defaults; subclasses add fields and checks."""


AnyOptions = Options  # its name within `System`, where `Options` is the system's own class


@dataclass(frozen=True, eq=False)
class Request:
    """Everything that decides a drawing; a saved PNG remembers it.

    Args:
        captions: what each picture shall show, one entry a picture.
        system: the name under which the system was loaded.
        seed: 0 … 2^63 − 1.
        best_of: candidates that are drawn for each picture kept.
        scorer: which of the system's scorers reranks the candidates; None for its own choice.
        options: an instance of the system's `Options`.
        start: pictures to begin from, as bytes; one for all, or one for each picture.
        rows: how many eighths of the start picture stay, from above.
    """

    captions: tuple[Caption, ...]
    system: str = ""
    seed: int = 0
    best_of: int = 1
    scorer: str | None = None
    options: Options = field(default_factory=Options)
    start: UInt8[Tensor, "n 3 h w"] | None = None
    rows: int = 0

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal, start pictures pixel by pixel."""
        if not isinstance(other, Request):
            return NotImplemented
        mine, theirs = vars(self).copy(), vars(other).copy()
        start, other_start = mine.pop("start"), theirs.pop("start")
        if start is None or other_start is None:
            return mine == theirs and start is other_start
        return mine == theirs and torch.equal(start, other_start)

    @property
    def caption(self) -> str:
        """What the pictures shall show, as one text: the different captions, one after another."""
        return "; ".join(dict.fromkeys(as_text(caption) for caption in self.captions))

    @property
    def count(self) -> int:
        """How many pictures are kept."""
        return len(self.captions)

    def texts(self) -> list[str]:
        """The caption of each candidate, for systems that take one text without a weight.

        Raises:
            ValueError: if a picture has several prompts, or one with a weight.
        """
        texts = []
        for caption in self.captions:
            text = single_text(caption)
            if text is None:
                raise ValueError(f"{self.system} takes one caption a picture, without a weight.")
            texts += [text] * self.best_of
        return texts


def single_text(caption: Caption) -> str | None:
    """The text of a caption without weights; None if it has several prompts, or a weight."""
    if isinstance(caption, str):
        return caption
    return caption[0].text if len(caption) == 1 and caption[0].weight == 1 else None


def as_text(caption: Caption) -> str:
    """A caption as a person reads it; a prompt's weight follows it, as in "a star: 0.5"."""
    if isinstance(caption, str):
        return caption
    parts = [p.text if p.weight == 1 else f"{p.text}: {p.weight:g}" for p in caption]
    return " | ".join(parts)


class Candidates(NamedTuple):
    """What there is to choose from: pictures, their captions, and the tokens of those that have
    them."""

    pictures: Float[Tensor, "m 3 H W"]
    captions: list[ReadCaption | str]
    tokens: Tensor | None = None


# A number for each candidate; the higher, the better the picture fits its caption.
Scorer = Callable[[Candidates], Float[Tensor, " m"]]


def rerank(
    candidates: Candidates, best_of: int, scorer: Scorer
) -> tuple[Float[Tensor, "n 3 H W"], Tensor]:
    """Of each `best_of` candidates in a row the one with the highest score (Ramesh et al. 2021,
    section 2.5).

    Returns:
        The pictures kept, and their numbers among the candidates.

    Raises:
        ValueError: if the candidates are not a whole number of such rows, or are of unequal number,
            or the scorer has not one number for each.
    """
    m = len(candidates.pictures)
    if best_of < 1 or m % best_of or {len(part) for part in candidates if part is not None} != {m}:
        counts = ", ".join(str(len(part)) for part in candidates if part is not None)
        raise ValueError(f"{counts} pictures, captions and tokens make no rows of {best_of}.")
    scores = scorer(candidates)
    if scores.shape != (m,) or scores.isnan().any():
        raise ValueError(f"A scorer gives a number to each of {m} candidates, none of them NaN.")
    best = scores.view(-1, best_of).argmax(1).cpu()
    kept = best_of * torch.arange(m // best_of) + best
    return candidates.pictures[kept], kept


class System:
    """A text-to-image system.

    A subclass states what is below, and overrides `load` and `steps`. One without weights needs
    no `load`.

    Attributes:
        name: as the command line and cards call it.
        title: as tables and menus call it.
        shows: what it teaches, in a few words.
        chapter: of the book.
        Options: its sampling options, a frozen dataclass with defaults.
        takes_start: whether it can begin from a picture.
        varies: whether it draws variations of a start picture, and blends two.
        stages: its trainings, in order; the weights of the last one draw.
        also_trains: further trainings of its chapter, such as ablations.
        worlds: names of our own worlds that it learned; none where it learned pictures of yours.
        resolution: height and width of its pictures.
        weights_id: changes with any of its weights.
        parts: its networks by name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    shows: ClassVar[str] = ""
    chapter: ClassVar[int] = 0
    Options: ClassVar[type[AnyOptions]] = AnyOptions
    takes_start: ClassVar[bool] = False
    varies: ClassVar[bool] = False
    stages: "ClassVar[tuple[Stage, ...]]" = ()
    also_trains: "ClassVar[tuple[Stage, ...]]" = ()
    worlds: tuple[str, ...] = ()
    resolution: int = 64
    weights_id: str = "none"
    parts: Mapping[str, nn.Module] = {}

    @classmethod
    def load(cls, files: "Mapping[str, Path]") -> "System":
        """The system from its weights.

        Args:
            files: the weights of each stage, by the stage's name.
        """
        return cls()

    def steps(self, request: Request, generator: torch.Generator) -> Iterator[Tensor]:
        """The pictures (B, 3, H, W) in [−1, 1] as they form, one for each of `request.texts()`."""
        raise NotImplementedError

    def generate(
        self, request: Request, generator: torch.Generator
    ) -> Float[Tensor, "b 3 {self.resolution} {self.resolution}"]:
        """The last of `steps`."""
        *_, pictures = self.steps(request, generator)
        return pictures

    def candidates(self, request: Request, generator: torch.Generator) -> Candidates:
        """What `rerank` chooses from."""
        return Candidates(self.generate(request, generator), self.read_each(request))

    def read_each(self, request: Request) -> list[ReadCaption | str]:
        """What the caption of each candidate states; its text where nothing can be read."""
        read: dict[Caption, ReadCaption | str] = {}
        for caption in dict.fromkeys(request.captions):
            text = single_text(caption)
            read[caption] = (self.read(text) if text else None) or as_text(caption)
        return [read[c] for c in request.captions for _ in range(request.best_of)]

    def scorers(self) -> dict[str, Callable[["System"], Scorer]]:
        """What can rerank this system's drawings, by name."""
        return {}

    def default_scorer(self, captions: Sequence[ReadCaption | None]) -> str:
        """The scorer for drawings of these captions, unless another is asked for; "" for none."""
        return next(iter(self.scorers()), "")

    @classmethod
    def manners(cls) -> dict[str, AnyOptions]:
        """The ways of sampling that evaluation reports, by name; the last is the default one."""
        return {"as drawn": cls.Options()}

    def ceiling(self, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"] | None:
        """The best that the system could do for these real pictures; None without such a bound."""
        return None

    def likelihood(self, world: CaptionedPictures, n: int = 2000) -> dict[str, Any]:
        """What can be measured in a world whose pictures no judge reads; nothing by default."""
        return {}

    def read(self, caption: str) -> ReadCaption | None:
        """What a caption states in the worlds that the system learned; None where it learned
        pictures of your own, whose captions nothing can parse.

        Raises:
            CaptionError: if none of the worlds can read it.
        """
        return read_caption(caption, self.worlds) if self.worlds else None

    @classmethod
    def make_options(cls, /, **given: Any) -> AnyOptions:
        """This system's options, some of them changed.

        Raises:
            ValueError: for an option that it does not have (those that it has are listed), or a
                value of another kind or out of range.
        """
        return make_options(cls.Options, cls.name, given)


def make_options(kind: type[Options], owner: str, given: Mapping[str, Any]) -> Options:
    """An instance of a dataclass of options from values that a person or a file gave.

    Raises:
        ValueError: as `System.make_options`.
    """
    known = [f.name for f in fields(kind)]
    unknown = [name for name in given if name not in known]
    if unknown:
        listed = ", ".join(known) or "none at all"
        raise ValueError(f"{owner} has no option {unknown[0]!r}; its options are: {listed}.")
    hints = get_type_hints(kind)
    values = {name: _as_kind(name, value, hints[name]) for name, value in given.items()}
    return replace(kind(), **values)


_KIND_NAMES = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}


def _as_kind(name: str, value: Any, hint: Any) -> Any:
    """A value as its option's annotation asks for: int, float, bool or str, or one of them or None.

    "3" and numpy's numbers become numbers too; a truth value does not.
    """
    kinds = get_args(hint) or (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(each for each in kinds if each is not type(None))
    try:
        if kind is str or kind is bool:
            return _exactly(kind, value)
        if isinstance(value, bool):
            raise TypeError
        if kind is int:
            return int(value) if isinstance(value, str) else operator.index(value)
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        expected = f"The {name.replace('_', ' ')} must be {_KIND_NAMES[kind]}"
        raise ValueError(f"{expected}, not {shortened(value)}.") from None


def _exactly(kind: type, value: Any) -> Any:
    """A word or a truth value; the command line gives the latter as "true" or "false"."""
    if kind is bool and value in ("true", "false"):
        return value == "true"
    if not isinstance(value, kind):
        raise TypeError
    return value


def shortened(value: Any, most: int = 60) -> str:
    """A value as an error quotes it; Python refuses to print the longest numbers."""
    try:
        text = repr(value)
    except ValueError:
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= most else text[: most - 1] + "…"


def check_range(
    name: str, value: int | float, low: int | float, high: int | float, what: str = ""
) -> None:
    """Raise ValueError if an option is outside [low, high], or NaN."""
    if not low <= value <= high:
        least, most = f"{low:g}", "" if math.isinf(high) else f" … {high:g}"
        allowed = what or least + (most or " or more")
        raise ValueError(f"The {name} must be {allowed}, not {shortened(value)}.")


def options_text(options: Options) -> str:
    """Options and their values on one line."""
    return ", ".join(f"{name}={value}" for name, value in asdict(options).items()) or "none"

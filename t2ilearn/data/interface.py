"""What every world of captioned pictures offers, so that one recipe trains on any of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


class PictureBatch(NamedTuple):
    """Pictures in [−1, 1] and a caption for each."""

    pictures: Float[Tensor, "n 3 h w"]
    captions: list[str]


@runtime_checkable
class Tokenizer(Protocol):
    """Captions → rows of `length` ids below `vocabulary`; see `tokens` for the frame."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def length(self) -> int: ...

    def encode(self, captions: Sequence[str]) -> Int[Tensor, "b t"]:
        """Raises CaptionError for a caption that has no ids."""
        ...


@runtime_checkable
class CaptionedPictures(Protocol):
    """A world: pictures with captions, in a training split and named test sets.

    A *scene* is a row of integers that says what is shown: facts, or the number of a picture in a
    folder. The same scene can be shown and described anew, a little differently each time.

    A world that can be judged parses its own captions and names its judge: a network with one
    classifier a column of facts. `read` turns a caption into what it states, `facts` turns that
    into (column, value) pairs, and the judge's answers are compared with these.

    Attributes:
        name: as cards state it.
        resolution: height and width of its pictures.
        test_sets: their names; the first one carries the bars.
        worlds: the worlds that this one is made of; a single world is made of itself.
        label: what its figures begin with on a card.
        judge: weights of the network that judges its pictures; None where nothing can judge them.
        reader: weights of a second such network, which trainings and reranking may use; or None.
        first_answers: columns in which any of the judge's first so many answers counts.
        measures: what is reported of a set of pictures: a name and a (column, first answers) pair,
            or None for "everything that the caption states".
        reconstruction_sets: the test sets on which reconstructions are judged.
    """

    name: str
    resolution: int
    test_sets: tuple[str, ...]
    label: str
    judge: str | None
    reader: str | None
    first_answers: Mapping[int, int]
    measures: Mapping[str, tuple[int, int] | None]
    reconstruction_sets: tuple[str, ...]

    @property
    def worlds(self) -> "tuple[CaptionedPictures, ...]": ...

    @staticmethod
    def read(caption: str) -> Any:
        """What a caption states. Raises CaptionError if it cannot be read."""
        ...

    @staticmethod
    def facts(stated: Any) -> list[tuple[int, int]]:
        """What was stated, as pairs (column, value)."""
        ...

    def covers(self, stated: Any) -> bool:
        """Whether the world has everything that a caption states."""
        ...

    def unseen(self, stated: Any) -> bool:
        """Whether no training picture shows the combination that a caption states."""
        ...

    def scenes(
        self, n: int, split: str = "train", *, generator: torch.Generator
    ) -> Int[Tensor, "n facts"]:
        """n random scenes of a split."""
        ...

    def pictures(
        self, scenes: Int[Tensor, "n facts"], generator: torch.Generator
    ) -> Float[Tensor, "n 3 h w"]:
        """A picture of each scene, as in training."""
        ...

    def mixed_captions(
        self, scenes: Int[Tensor, "n facts"], generator: torch.Generator
    ) -> list[str]:
        """A caption of each scene, as in training: not every one says everything."""
        ...

    def sample(self, n: int, split: str = "train", *, generator: torch.Generator) -> PictureBatch:
        """n random pictures of a split with their captions."""
        ...

    def test_set(self, name: str, n: int = 2000) -> PictureBatch:
        """A named test set, the same at every call."""
        ...

    def test_scenes(self, name: str, n: int = 2000) -> tuple[Int[Tensor, "n facts"], list[str]]:
        """The scenes and captions of a test set, without its pictures."""
        ...

    def reader_test(self, n: int = 2000) -> PictureBatch:
        """Pictures with captions that say everything, to test a reader with."""
        ...

    def groups(self, name: str, n: int = 2000) -> Int[Tensor, "n columns"] | None:
        """What pictures of a test set that belong together have in common; None if none do."""
        ...

    def reference_set(self, n: int = 2000) -> Float[Tensor, "n 3 h w"]:
        """Real pictures that no test set holds: what sets of pictures are compared with."""
        ...


# A world's class, for what needs no world made: its captions, judge and measures. Python cannot
# check at run time that a class is one of a protocol with attributes.
if TYPE_CHECKING:
    WorldClass = type[CaptionedPictures]
else:
    WorldClass = type

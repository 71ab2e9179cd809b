"""What every world of captioned pictures offers, so that one recipe trains on any of them."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

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
    """

    name: str
    resolution: int
    test_sets: tuple[str, ...]  # the first one carries the bars

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

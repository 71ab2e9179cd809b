"""What every world of captioned pictures offers, so that one recipe trains on any of them."""

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class PictureBatch(NamedTuple):
    """Pictures in [−1, 1] and a caption for each."""

    pictures: Float[Tensor, "n 3 h w"]
    captions: list[str]


class CaptionedPictures(Protocol):
    """A world: pictures with captions, in a training split and named test sets."""

    name: str
    resolution: int

    def sample(self, n: int, split: str = "train", *, generator: torch.Generator) -> PictureBatch:
        """n random pictures of a split with their captions."""
        ...

    def test_set(self, name: str, n: int = 2000) -> PictureBatch:
        """A named test set, the same at every call."""
        ...

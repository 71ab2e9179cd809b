"""Figures count pictures: a picture with twenty captions is one picture, and not twenty.

A test set has one row for each caption. Its figures are means over the pictures: the rows of one
picture are averaged first, and the 95 % interval resamples pictures. A *shuffled* caption comes
from another picture, and is none of the captions that the picture has itself.

Letters: n rows of a test set, m different pictures.
"""

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from t2ilearn.judging.metrics import bootstrap

NO_OTHER = {"left out": "no picture can be given the caption of another"}


def picture_numbers(pictures: Float[Tensor, "n 3 h w"]) -> Int[Tensor, " n"]:
    """The number 0 … m − 1 of each row's picture; rows with equal pixels have one number."""
    seen: dict[bytes, int] = {}
    digests = (hashlib.sha256(picture.numpy().tobytes()).digest() for picture in pictures.cpu())
    return torch.tensor([seen.setdefault(digest, len(seen)) for digest in digests])


def different_pictures(pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "m 3 h w"]:
    """The pictures, each once, in order."""
    first: dict[int, int] = {}
    for row, number in enumerate(picture_numbers(pictures).tolist()):
        first.setdefault(number, row)
    return pictures if len(first) == len(pictures) else pictures[list(first.values())]


def other_captions(
    captions: Sequence[str], groups: Shaped[Tensor, "n ..."] | None = None
) -> dict[int, int]:
    """For each row the next one with a caption of another picture; a row without one is left out.

    Args:
        groups: what rows that belong together have in common, such as the number of their picture;
            None if no two rows belong together.

    Returns:
        Row → the row whose caption it gets.
    """
    keys: Sequence[Hashable] = range(len(captions))
    if groups is not None:
        keys = [tuple(row.flatten().tolist()) for row in groups]
    own: dict[Hashable, set[str]] = {}
    for key, caption in zip(keys, captions, strict=True):
        own.setdefault(key, set()).add(caption)
    every, found = list(captions) * 2, dict[int, int]()
    all_captions = set(captions)
    for row, key in enumerate(keys):
        if all_captions - own[key]:
            later = range(row + 1, row + len(captions))
            found[row] = next(i for i in later if every[i] not in own[key]) % len(captions)
    return found


def mean_of_pictures(
    each: Float[Tensor, " n"],
    numbers: Int[Tensor, " n"],
    generator: torch.Generator,
    digits: int = 4,
) -> dict[str, Any]:
    """The mean over pictures, with a bootstrap interval over pictures, as a card states it.

    Args:
        each: one value a row.
        numbers: of each row's picture; see `picture_numbers`.

    Returns:
        "value", "low" and "high"; of a single picture no ends, and the reason.
    """
    _, member = numbers.unique(return_inverse=True)
    total = torch.zeros(int(member.max()) + 1, dtype=torch.float64)
    means = total.index_add(0, member, each.double()) / member.bincount()
    if len(means) == 1:
        return {
            "value": round(means.item(), digits),
            "interval": "left out, for there is one picture",
        }
    interval = bootstrap(lambda x: x.mean().item(), means, generator=generator)
    return {name: round(value, digits) for name, value in interval._asdict().items()}

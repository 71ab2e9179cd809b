"""The attribute reader: a small network that reads what a picture shows.

It turns "does the picture match its caption?" into counting. Two readers ship for each world. The
*judge* (trained on every combination) only judges: no loss and no choice ever uses it. The
*training reader* (trained on the `train` split) may serve as a perceptual trunk or rerank drawings.

    picture (B, 3, 64, 64) → features (B, 192) → one small classifier an attribute

The *emoji judge* is the same network with other questions: which concept, which style, which
background.

An object slot is a place, not an order of words: slot 1 is the upper or left object. The last
answer of the first classifier is "unreadable", learned from junk; unreadable pictures count as
wrong.

Letters: B batch, H and W height and width, D features.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from t2ilearn import weights
from t2ilearn.data.shapes import CHOICES, FIELDS
from t2ilearn.models.layers import ResidualBlock, check_dtype, check_pictures

UNREADABLE = 2  # the count classifier's answer for pictures that show no scene

# One classifier a field, with as many answers as there are choices; "unreadable" is a third count.
SHAPES_ANSWERS = tuple(CHOICES[f.rsplit("_", 1)[0]] + (f == "count") for f in FIELDS)


@dataclass(frozen=True)
class ReaderConfig:
    """Sizes of a reader: picture side, channels of its levels, width of its features, and how many
    answers each of its classifiers knows."""

    resolution: int = 64
    channels: tuple[int, ...] = (32, 64, 96)
    features: int = 192
    answers: tuple[int, ...] = SHAPES_ANSWERS


class ReaderLoss(NamedTuple):
    """Mean cross-entropy of the attributes that are there."""

    attributes: Tensor
    total: Tensor


class Reader(nn.Module):
    """Reads the attributes of a picture: the eleven of the shapes world, unless told otherwise.

    Pictures of another size are resized to `config.resolution` first.
    """

    def __init__(self, config: ReaderConfig | None = None) -> None:
        super().__init__()
        self.config = config or ReaderConfig()
        channels = self.config.channels
        levels: list[nn.Module] = []
        for before, after in zip((3, *channels), channels, strict=False):
            levels.append(nn.Conv2d(before, after, 4, stride=2, padding=1))
            levels.append(ResidualBlock(after, after))
        self.levels = nn.Sequential(*levels)
        self.narrow = nn.Conv2d(channels[-1], 64, 4, stride=2, padding=1)
        side = self.config.resolution // 2 ** (len(channels) + 1)
        self.project = nn.Linear(64 * side * side, self.config.features)
        self.heads = nn.Linear(self.config.features, sum(self.config.answers))

    def trunk(self, pictures: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """The feature maps of each level, finest first: a perceptual distance compares them."""
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"Pictures have shape (B, 3, H, W), not {tuple(pictures.shape)}.")
        check_dtype(pictures, self.heads.weight)
        side = self.config.resolution
        x = pictures
        if x.shape[-2:] != (side, side):
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        maps = []
        for down, block in zip(self.levels[0::2], self.levels[1::2], strict=True):
            x = block(down(x))
            maps.append(x)
        return maps

    def features(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """What metrics compare: the last layer before the answers. Raises as `forward` does."""
        check_pictures(pictures)
        x = F.silu(self.narrow(self.trunk(pictures)[-1]))
        return F.silu(self.project(x.flatten(1)))

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _"]]:
        """Logits of every attribute, in the order of the world's `FIELDS`.

        Raises:
            ValueError: for pictures of another shape or type, NaN, or values outside [−1, 1].
        """
        answers = list(self.config.answers)
        return list(self.heads(self.features(pictures)).split(answers, dim=1))


def reader_loss(logits: list[Tensor], facts: Int[Tensor, "b fields"]) -> ReaderLoss:
    """Cross-entropy averaged over the attributes that are there (facts ≥ 0)."""
    terms = [
        F.cross_entropy(answer.float(), fact, ignore_index=-1, reduction="sum")
        for answer, fact in zip(logits, facts.unbind(1), strict=True)
    ]
    attributes = torch.stack(terms).sum() / (facts >= 0).sum()
    return ReaderLoss(attributes, attributes)


class Reading(NamedTuple):
    """What a reader saw: a value for every attribute, and whether it could read at all."""

    facts: Int[Tensor, "b 11"]
    readable: Bool[Tensor, " b"]


@torch.no_grad()
def read(reader: Reader, pictures: Float[Tensor, "b 3 h w"], chunk: int = 250) -> Reading:
    """Read pictures. Attributes of objects that are not there come out as −1."""
    facts, readable = [], []
    for part in pictures.split(chunk):
        answers = torch.stack([logits.argmax(1) for logits in reader(part)], 1)
        readable.append(answers[:, 0] != UNREADABLE)
        answers[:, 0].clamp_(max=1)
        single = answers[:, 0] == 0
        answers[single, 1] = -1
        answers[single, 7:] = -1
        facts.append(answers)
    return Reading(torch.cat(facts), torch.cat(readable))


class EmojiReading(NamedTuple):
    """What the emoji judge saw: the five likeliest concepts, best first, the style, the background,
    and whether it could read at all."""

    concepts: Int[Tensor, "b 5"]
    styles: Int[Tensor, " b"]
    backgrounds: Int[Tensor, " b"]
    readable: Bool[Tensor, " b"]


@torch.no_grad()
def read_emoji(judge: Reader, pictures: Float[Tensor, "b 3 h w"], chunk: int = 250) -> EmojiReading:
    """Read drawings. The last concept the judge knows is "unreadable"; it is never listed."""
    parts = []
    for part in pictures.split(chunk):
        concept, style, background = judge(part)
        known = concept[:, :-1].topk(5, dim=1)
        readable = known.values[:, 0] > concept[:, -1]
        answers = (known.indices, style.argmax(1), background.argmax(1), readable)
        parts.append(EmojiReading(*answers))
    return EmojiReading(*(torch.cat(column) for column in zip(*parts, strict=True)))


def junk(
    pictures: Float[Tensor, "b 3 h w"], generator: torch.Generator
) -> Float[Tensor, "b 3 h w"]:
    """Pictures that show no scene: noise, empty grounds, shuffled patches, blends of two."""
    n, _, h, w = pictures.shape
    kind = torch.randint(4, (n,), generator=generator)
    out = pictures.clone()
    noise = torch.randn(n, 3, h // 4, w // 4, generator=generator)
    out[kind == 0] = F.interpolate(noise, (h, w), mode="bilinear").clamp(-1, 1)[kind == 0]
    out[kind == 1] = pictures[:, :, :1, :1].expand(n, 3, h, w)[kind == 1]
    side = h // 4
    patches = pictures.unfold(2, side, side).unfold(3, side, side).flatten(2, 3)
    mixed = patches[:, :, torch.randperm(16, generator=generator)]  # (n, 3, 16, side, side)
    mixed = mixed.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(n, 3, h, w)
    out[kind == 2] = mixed[kind == 2]
    other = pictures[torch.randperm(n, generator=generator)]
    out[kind == 3] = (0.5 * pictures + 0.5 * other)[kind == 3]
    return out


def load_reader(name: str = "reader") -> Reader:
    """The training reader ("reader") or a judge ("judge", "emoji-judge"), in evaluation mode.

    Raises:
        WeightsError: if its weights are missing or damaged.
    """
    path = weights.find(name)
    return _loaded(path, weights.read_card(path.with_suffix(".json")).sha256)


@lru_cache(maxsize=4)
def _loaded(path: Path, sha256: str) -> Reader:
    """A reader from its file. The digest is part of the key: a retrained reader loads anew."""
    stored = weights.load(path)
    model = Reader(weights.make_config(ReaderConfig, stored))
    weights.load_into(model, stored)
    return model.eval()

"""The figures on a card, each between floor and ceiling.

Every share of pictures comes with the half-width of its 95 % interval, every distance with a
bootstrap interval. The *ceiling* is what the judge reads in real pictures, the *floor* in pictures
under other pictures' captions. Distances between sets of pictures are all measured to one
*reference set* of real pictures that no test set holds; their floor is the distance of the test
set's own real pictures to it.

Where a model learned several worlds together, its card has the figures of each; those of emoji
begin with "emoji".

Letters: B pictures, H and W height and width, F features.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from tqdm import tqdm

from t2ilearn.data import CaptionedPictures
from t2ilearn.data.interface import WorldClass
from t2ilearn.data.pixels import bytes_from_pictures, pictures_from_bytes
from t2ilearn.judging.alignment import measured
from t2ilearn.judging.counting import (
    NO_OTHER,
    different_pictures,
    mean_of_pictures,
    other_captions,
    picture_numbers,
)
from t2ilearn.judging.metrics import (
    Interval,
    bootstrap,
    codebook_usage,
    frechet_distance,
    kernel_distance,
    perplexity,
    precision_recall,
    psnr,
)
from t2ilearn.judging.reader import Reader, junk, load_reader
from t2ilearn.models.autoencoder import ImageTokenizer

TEST_PICTURES = 5_000  # codebook usage is over so many
CHUNK = 125  # pictures that a model is given at once
Z = 1.96  # standard deviations on either side in a 95 % interval


def share(
    right: Bool[Tensor, " n"], groups: Shaped[Tensor, "n columns"] | None = None
) -> dict[str, float]:
    """A share of pictures and the half-width of its 95 % interval, both in [0, 1].

    Args:
        right: one answer a picture.
        groups: what pictures that belong together have in common, such as concept and style. The
            interval is then over groups: thirty pictures of one drawing are no thirty drawings.

    Wilson's half-width: it does not vanish when all or none are right. With groups, the half-width
    of the cluster-robust normal interval, where that is wider.
    """
    n, p = len(right), right.float().mean().item()
    if groups is not None:
        n, wide = _clustered(right, groups)
        half = max(_wilson(n, p), wide)
    else:
        half = _wilson(n, p)
    return {"value": round(p, 4), "half_width": round(half, 4)}


def _wilson(n: int, p: float) -> float:
    """Half-width for n independent pictures."""
    return Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)


def _clustered(right: Tensor, groups: Tensor) -> tuple[int, float]:
    """How many groups there are, and the half-width when whole groups are resampled."""
    _, member = groups.unique(dim=0, return_inverse=True)
    count = int(member.max()) + 1
    error = torch.zeros(count, dtype=torch.float64)
    error.index_add_(0, member, right.double() - right.double().mean())
    variance = error.square().sum() * count / max(1, count - 1) / len(right) ** 2
    return count, Z * math.sqrt(variance.item())


def rounded(interval: Interval, digits: int = 4) -> dict[str, float]:
    """An interval as a card states it."""
    return {name: round(value, digits) for name, value in interval._asdict().items()}


def against_bars(metrics: Mapping[str, Any], bars: Mapping[str, float]) -> dict[str, Any]:
    """Each bar with what was measured and whether that is enough."""
    found = {name: metrics[name] for name in bars}
    values = {n: float(m["value"] if isinstance(m, dict) else m) for n, m in found.items()}
    return {
        name: {"bar": bar, "measured": values[name], "met": values[name] >= bar}
        for name, bar in bars.items()
    }


# --- damage, for readers -----------------------------------------------------------------------


def blur(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Each pixel becomes the mean of its 3×3 neighbourhood."""
    return F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)


def jpeg(pictures: Float[Tensor, "b 3 h w"], quality: int) -> Float[Tensor, "b 3 h w"]:
    """Through JPEG and back."""
    from torchvision.io import decode_jpeg, encode_jpeg

    back = [decode_jpeg(encode_jpeg(p, quality)) for p in bytes_from_pictures(pictures)]
    return pictures_from_bytes(torch.stack(back))


def damaged(pictures: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b 3 _ _"]]:
    """The same pictures as they are, and damaged in four ways: how robust is a reader?"""
    noise = 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return {
        "real": pictures,
        "blur 3x3": blur(pictures),
        "noise 0.1": (pictures + noise).clamp(-1, 1),
        "jpeg 50": jpeg(pictures, 50),
        "at 32 px": F.interpolate(pictures, (32, 32), mode="area"),
    }


def report_reader(
    reader: Reader, pictures: Tensor, captions: Sequence[str], world: WorldClass
) -> dict[str, Any]:
    """Shares of real pictures read right: ceiling, floor, and under damage."""
    metrics: dict[str, Any] = {}
    others = other_captions(captions)
    for name, version in damaged(pictures).items():
        for what, right in measured(reader, version, captions, world).items():
            metrics[_named(what, name)] = share(right)
    shuffled = [captions[other] for other in others.values()]
    for what, right in measured(reader, pictures[list(others)], shuffled, world).items():
        figure = share(right) if others else NO_OTHER
        metrics[_named(what, "floor (captions shuffled)")] = figure
    generator = torch.Generator().manual_seed(1)
    logits = reader(junk(pictures, generator))[0]
    metrics["junk called readable"] = share(logits[:, :-1].amax(1) >= logits[:, -1])
    return metrics


def _named(what: str, *rest: str) -> str:
    """The name of a figure: a world with one measure does not repeat its name."""
    return ", ".join([*([] if what == "judge" else [what]), *rest])


@torch.no_grad()
def evaluate_reader(reader: Reader, world: CaptionedPictures, n: int = 2000) -> dict[str, Any]:
    """The report of a reader on what its world tests readers with."""
    pictures, captions = world.reader_test(n)
    return report_reader(reader, pictures, captions, type(world))


# --- tokenizers: what survives the way to tokens and back --------------------------------------


@torch.no_grad()
def evaluate_tokenizer(
    model: ImageTokenizer, world: CaptionedPictures, n: int = 2000
) -> dict[str, Any]:
    """Codebook usage and perplexity over test pictures of all worlds; for each world PSNR, and,
    where there is a judge, what it still reads in reconstructions and how far they are from real
    pictures."""
    pictures = different_pictures(world.test_set(world.test_sets[0], TEST_PICTURES).pictures)
    parts = tqdm(pictures.split(CHUNK), desc="tokens", unit="batch", delay=2)
    indices = torch.cat([model.tokens(part) for part in parts])
    size = model.config.codebook_size
    metrics: dict[str, Any] = {
        "codebook usage": round(codebook_usage(indices, size), 4),
        "perplexity": round(perplexity(indices, size), 1),
    }
    for each in world.worlds:
        metrics |= _reconstructions(model, each, n)
    return metrics


def _reconstructions(model: ImageTokenizer, world: CaptionedPictures, n: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    sets = world.reconstruction_sets or world.test_sets[:1]
    for name in sets:
        suffix = f", {name}" if len(sets) > 1 else ""
        real = world.test_set(name, n)
        back = reconstructed(model, real.pictures)
        numbers, generator = picture_numbers(real.pictures), torch.Generator().manual_seed(0)
        metrics[f"{world.label}PSNR, dB{suffix}"] = mean_of_pictures(
            psnr(back, real.pictures), numbers, generator, 2
        )
        if world.judge is None:
            continue
        judge, groups = load_reader(world.judge), world.groups(name, n)
        for kind, pictures in (("reconstructions", back), ("real pictures", real.pictures)):
            for what, right in measured(judge, pictures, real.captions, type(world)).items():
                metrics[f"{world.label}{what} on {kind}{suffix}"] = share(right, groups)
        if name == sets[0]:
            metrics |= distances(judge, world, {"": back, ", floor (real)": real.pictures}, n)
    return metrics


def reconstructed(
    model: ImageTokenizer, pictures: Float[Tensor, "n 3 h w"]
) -> Float[Tensor, "n 3 h w"]:
    """Pictures through their tokens and back, clamped to [−1, 1]."""
    chunks = tqdm(pictures.split(CHUNK), desc="reconstructions", unit="batch", delay=2)
    parts = [model.decode_tokens(model.tokens(part)) for part in chunks]
    return torch.cat(parts).clamp(-1, 1)


# --- distances between sets of pictures --------------------------------------------------------


@torch.no_grad()
def distances(
    judge: Reader, world: CaptionedPictures, sets: Mapping[str, Tensor], n: int = 2000
) -> dict[str, Any]:
    """How far sets of pictures are from the world's reference set, in the judge's features.

    Args:
        sets: pictures by the ending that their figures get on the card.
    """
    real = judge.features(world.reference_set(n))
    spread = real.var(0).mean().sqrt()  # features in units of their own spread
    metrics: dict[str, Any] = {}
    for ending, pictures in sets.items():
        a, b = real / spread, judge.features(pictures) / spread
        generator = torch.Generator().manual_seed(0)
        precision, recall = precision_recall(a, b)
        frechet = bootstrap(frechet_distance, a, b, generator=generator, rounds=50)
        kernel = bootstrap(kernel_distance, a, b, generator=generator, rounds=20)
        name = f"{world.label}Fréchet distance in reader features{ending}"
        metrics |= {
            name: rounded(frechet._replace(low=max(0.0, frechet.low))),
            f"{world.label}kernel distance{ending}": rounded(kernel),
            f"{world.label}precision{ending}": round(precision, 4),
            f"{world.label}recall{ending}": round(recall, 4),
        }
    return metrics

"""Numbers that compare sets of pictures, each with the paper it comes from.

Features are whatever extractor you choose. With our judge's features the Fréchet distance is
called *Fréchet distance in reader features*; only with Inception's is it the FID.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from t2ilearn.models.layers import check_finite

LARGEST_VALUE = 16  # of a picture: what is larger has another scale


def _checked(features: Tensor, name: str, least: int = 2) -> Tensor:
    if features.ndim != 2 or len(features) < least:
        raise ValueError(
            f"{name} must have shape (N, D) with N ≥ {least}, not {tuple(features.shape)}."
        )
    check_finite(name, features)
    return features.double()


def _pair(real: Tensor, fake: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    real = _checked(real, "The real features", least)
    fake = _checked(fake, "The fake features", least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"Features of {real.shape[1]} and {fake.shape[1]} dimensions.")
    return real, fake


def _spread(features: Tensor) -> Tensor:
    """R, triangular or wide, with Rᵀ R = the covariance of the features."""
    centred = features - features.mean(0)
    return torch.linalg.qr(centred, mode="r").R / (len(features) - 1) ** 0.5


def frechet_distance(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> float:
    """‖μ − ν‖² + tr(A + B − 2 (A^½ B A^½)^½) of two Gaussians (Heusel 2017, Eq. 6), in float64.

    With A = Rᵀ R and B = Sᵀ S, the trace of the last root is the sum of the singular values of
    R Sᵀ. No root of an eigenvalue is taken, whose rounding errors around 0 would add up where
    there are fewer samples than features; (A B)^½ even gets complex roots there.

    Returns:
        At least 0, with an error of at most 1e-12 (‖μ − ν‖² + tr A + tr B) and the rounding of
        features far from 0.

    Raises:
        ValueError: for fewer than two samples, features of different sizes, or NaN.
    """
    real, fake = _pair(real, fake)
    r, s = _spread(real), _spread(fake)  # (min(n, D), D) and (min(m, D), D)
    cross = torch.linalg.svdvals(r @ s.T).sum()
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    distance = shift + r.square().sum() + s.square().sum() - 2 * cross
    return max(0.0, float(distance))


def kernel_distance(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> float:
    """Unbiased squared MMD with the kernel (x·y / D + 1)³ (Bińkowski 2018, Eq. 4)."""
    real, fake = _pair(real, fake)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return float(within(real) + within(fake) - 2 * kernel(real, fake).mean())


class PrecisionRecall(NamedTuple):
    """How many fakes look real, and how much of the real the fakes reach."""

    precision: float
    recall: float


def precision_recall(
    real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], k: int = 5
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi 2019, Eq. 1): inside a k-NN ball of the other."""
    if k < 1:
        raise ValueError(f"k must be 1 or more, not {k}.")
    real, fake = _pair(real, fake, k + 1)

    def covered(points: Tensor, by: Tensor) -> float:
        radius = torch.cdist(by, by).topk(k + 1, largest=False).values[:, -1]
        return float((torch.cdist(points, by) <= radius).any(1).double().mean())

    return PrecisionRecall(covered(fake, real), covered(real, fake))


def index_counts(indices: Int[Tensor, "..."], size: int) -> Float[Tensor, " k"]:
    """How often each of `size` indices occurs. Raises ValueError if one is not 0 … size − 1."""
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"Indices are whole numbers, not {indices.dtype}.")
    if indices.numel() == 0 or indices.min() < 0 or indices.max() >= size:
        raise ValueError(f"Indices must be 0 … {size - 1}, and at least one.")
    return torch.bincount(indices.flatten(), minlength=size).double()


def codebook_usage(indices: Int[Tensor, "..."], size: int) -> float:
    """Share of the codebook used at least once."""
    return float((index_counts(indices, size) > 0).double().mean())


def perplexity(indices: Int[Tensor, "..."], size: int) -> float:
    """exp of the entropy of the indices over the whole set; `size` if all are equally frequent."""
    p = index_counts(indices, size)
    p = p / p.sum()
    return min(float(size), float(torch.special.entr(p).sum().exp()))


def psnr(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB for each picture in [−1, 1] (peak to peak 2).

    Raises:
        ValueError: for pictures of different shapes, NaN, or values on another scale, such as that
            of bytes; a reconstruction may leave [−1, 1] a little.
    """
    if a.shape != b.shape:
        raise ValueError(f"Pictures of different shapes: {tuple(a.shape)}, {tuple(b.shape)}.")
    check_finite("Pictures", a)
    check_finite("Pictures", b)
    if a.numel() and (most := max(a.abs().max().item(), b.abs().max().item())) > LARGEST_VALUE:
        raise ValueError(f"Pictures lie in [−1, 1]; these reach {most:.3g}.")
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)).clamp(min=1e-12))


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(
    metric: Callable[..., float], *sets: Tensor, generator: torch.Generator, rounds: int = 200
) -> Interval:
    """A metric with its 95 % interval by resampling each set with replacement (Efron 1979).

    The interval is the spread of the resampled values about their own mean, put around the value:
    resampled sets hold duplicates, which shifts a Fréchet or kernel distance upwards.

    Raises:
        ValueError: if there is no set, an empty one, or fewer than two rounds.
    """
    if not sets or not all(len(s) for s in sets) or rounds < 2:
        raise ValueError("A bootstrap needs at least one set, none of them empty, and two rounds.")
    values = []
    for _ in range(rounds):
        picks = [torch.randint(len(s), (len(s),), generator=generator) for s in sets]
        values.append(float(metric(*(s[p] for s, p in zip(sets, picks, strict=True)))))
    resampled = torch.tensor(values, dtype=torch.float64)
    around = resampled.quantile(torch.tensor([0.025, 0.975]).double()) - resampled.mean()
    value = float(metric(*sets))
    low, high = (value + around).tolist()
    return Interval(value, low, high)


def inception_features(download: bool = False) -> torch.nn.Module:
    """torchvision's Inception v3 up to its 2,048 pooled features, for a Fréchet distance.

    Expects pictures in [−1, 1]; they are resized to 299×299.

    Raises:
        RuntimeError: if the weights are not in torch's cache and `download` is False, or cannot
            be fetched.
    """
    from torchvision.models import Inception_V3_Weights, inception_v3
    from torchvision.transforms import Resize

    chosen = Inception_V3_Weights.IMAGENET1K_V1
    cached = torch.hub.get_dir() + "/checkpoints/" + chosen.url.rsplit("/", 1)[1]
    try:
        if not download:
            open(cached, "rb").close()
        model = inception_v3(weights=chosen, transform_input=False)  # ours are in [−1, 1]
    except OSError as error:
        raise RuntimeError(
            f"Inception's weights are not at hand ({error}). Call with download=True on a machine "
            "with internet (104 MB), or use the judge's features, which ship."
        ) from None
    model.fc = torch.nn.Identity()
    return torch.nn.Sequential(Resize((299, 299), antialias=True), model).eval()

"""Diffusion: pictures mixed with noise, what a network predicts there, and the losses.

A picture x and Gaussian noise ε are mixed at a time t, and the network sees the mixture z_t:

    z_t  =  a(t) · x + b(t) · ε,        v_t  =  a'(t) · x + b'(t) · ε

It predicts x, ε or v. With z_t, any one of the three determines the other two, so that a model of
one kind works with every sampler (`diffusion_samplers`). Two processes say what a and b are:

| process | a(t), b(t) | a'(t), b'(t) | t |
|---|---|---|---|
| `VariancePreserving` | √ᾱ_t, √(1 − ᾱ_t) | −b, a | 0 (little noise) … S − 1 (noise) |
| `RectifiedFlow` | t, 1 − t | 1, −1 | 0 (noise) … 1 (picture) |

Papers: DDPM (Ho et al. 2020), v-prediction (Salimans & Ho 2022), rectified flow (Liu et al. 2023;
Lipman et al. 2023), logit-normal times (Esser et al. 2024), min-SNR weights (Hang et al. 2023), JiT
(Li & He 2025).

| symbol | name |
|---|---|
| ᾱ_t | `alpha_bar`, from `noise_schedules` |
| z_t (x_t in DDPM) | `z`, by `q_sample` |
| ε | `noise`; as a target "eps" |
| x, ε, v as targets | "x0", "eps", "v" |
| SNR = a² / b² | `Mix.snr` |
| γ | `gamma` of `min_snr_weight` |
| x̂, ε̂ | `Estimate.x`, `Estimate.eps` |

Differs from the papers in: errors are means over pixels, not sums; time indices start at 0, where
DDPM's start at 1; the reverse process has the variance β̃ (`diffusion_samplers`), which is not
learned; JiT's noise has standard deviation 1, as it has in the paper at low resolution.

Letters: B batch, C channels, H and W height and width, S times (T in the papers). Chapter 10 mixes
embeddings with noise, of shape (B, E).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .layers import at_least_float32, check_finite

TARGETS = ("eps", "x0", "v")  # what a network may predict
SMALLEST_DISTANCE = 0.05  # of 1 − t in JiT's loss: its weight is at most 1 / 0.05²
LOGIT_MEAN, LOGIT_STD = -0.8, 0.8  # of JiT's times: more noise than picture, most of the time

# (z, t, conditions …) → what the network predicts; t has one number for each picture.
Network = Callable[..., Tensor]


# --- processes: how much picture and how much noise --------------------------------------------


class Mix(NamedTuple):
    """z = a · x + b · ε and v = a' · x + b' · ε, at one time or at one time for each picture."""

    a: Tensor
    b: Tensor
    a_prime: Tensor
    b_prime: Tensor

    @property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio a² / b²: infinite for a clean picture, 0 for pure noise."""
        return self.a**2 / self.b**2

    def like(self, x: Float[Tensor, "b *shape"]) -> "Mix":
        """The same for x's device and type, in a shape that multiplies x."""
        if self.a.ndim == 0:
            return self
        shape = (-1, *[1] * (x.ndim - 1))
        return Mix(*(part.to(x.dtype).to(x.device).view(shape) for part in self))


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """DDPM's forward process, z_t = √ᾱ_t x + √(1 − ᾱ_t) ε (Ho et al. 2020, Eq. 4).

    Args:
        alpha_bar: ᾱ of the times 0 … S − 1. The time −1 is that of the clean picture.

    Raises:
        ValueError: if ᾱ does not fall from below 1 to 0 or above.
    """

    alpha_bar: Float[Tensor, " S"]

    def __post_init__(self) -> None:
        table = self.alpha_bar
        if len(table) == 0 or not (table[0] < 1 and (table.diff() < 0).all() and table[-1] >= 0):
            raise ValueError(
                "ᾱ must fall from below 1 to 0 or above, strictly; this table of "
                f"{len(table)} does not. `linear_alpha_bar` and `cosine_alpha_bar` make such."
            )

    @property
    def start(self) -> int:
        """The time at which sampling starts."""
        return len(self.alpha_bar) - 1

    def mix(self, t: Tensor) -> Mix:
        """a and b at times −1 … S − 1, in float64.

        Raises:
            ValueError: for a time that is none of these.
        """
        if t.numel() and not (-1 <= t.min() and t.max() <= self.start and (t == t.long()).all()):
            raise ValueError(
                f"Times are whole numbers from 0 to {self.start} (−1 for the clean picture), not "
                f"{t.min().item():g} … {t.max().item():g}."
            )
        table = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar.double()])
        alpha_bar = table[t.long().cpu() + 1]
        a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return Mix(a, b, -b, a)

    def sample_times(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Times of a batch, uniform on 0 … S − 1 (Ho et al. 2020, Algorithm 1)."""
        return torch.randint(len(self.alpha_bar), (count,), generator=generator)


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight line from noise to picture, z_t = t x + (1 − t) ε, whose direction is
    v = dz/dt = x − ε (Liu et al. 2023; time runs as in Li & He 2025).

    Args:
        mean, std: times are sigmoid(n) with n normal (Esser et al. 2024).

    Raises:
        ValueError: if the standard deviation is not above 0.
    """

    mean: float = LOGIT_MEAN
    std: float = LOGIT_STD

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(
                f"Times need a finite mean and std above 0, not {self.mean}, {self.std}."
            )

    @property
    def start(self) -> float:
        """The time at which sampling starts."""
        return 0.0

    def mix(self, t: Tensor) -> Mix:
        """a and b at times 0 … 1, in float64.

        Raises:
            ValueError: for a time outside.
        """
        if t.numel() and not (0 <= t.min() and t.max() <= 1):
            raise ValueError(f"Times go from 0 to 1, not {t.min().item():g} … {t.max().item():g}.")
        t = t.double()
        return Mix(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))

    def sample_times(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Logit-normal times of a batch."""
        return (self.mean + self.std * torch.randn(count, generator=generator)).sigmoid()


Process = VariancePreserving | RectifiedFlow


def q_sample(
    x: Float[Tensor, "b *shape"], t: Tensor, process: Process, noise: Float[Tensor, "b *shape"]
) -> Float[Tensor, "b *shape"]:
    """z_t = a x + b ε, in one step from any picture to any time (Ho et al. 2020, Eq. 4).

    Raises:
        ValueError: for pictures that are no floating numbers, NaN, or a time out of range.
    """
    check_finite("Pictures", x)
    mix = process.mix(t).like(x)
    return mix.a * x + mix.b * noise


# --- targets: x, ε and v are one thing in three coordinates ------------------------------------


class Estimate(NamedTuple):
    """x̂ and ε̂, with z = a x̂ + b ε̂."""

    x: Tensor
    eps: Tensor


def target_of(kind: str, x: Tensor, noise: Tensor, mix: Mix) -> Tensor:
    """What a network of this kind should predict.

    Args:
        kind: "eps", "x0" or "v".

    Raises:
        ValueError: for another kind.
    """
    check_target(kind)
    targets = {"eps": noise, "x0": x, "v": mix.a_prime * x + mix.b_prime * noise}
    return targets[kind]


def estimate_of(kind: str, prediction: Tensor, z: Tensor, mix: Mix) -> Estimate:
    """x̂ and ε̂ from a prediction of any kind: z and v are two equations in x and ε.

    Args:
        kind: "eps", "x0" or "v".
        mix: as `Mix.like(z)` gives it. b must not be 0, nor a for "eps".

    Raises:
        ValueError: for another kind.
    """
    check_target(kind)
    a, b, a_prime, b_prime = mix
    if kind == "eps":
        return Estimate((z - b * prediction) / a, prediction)
    if kind == "x0":
        return Estimate(prediction, (z - a * prediction) / b)
    determinant = a * b_prime - b * a_prime  # 1 or −1
    x = (b_prime * z - b * prediction) / determinant
    return Estimate(x, (a * prediction - a_prime * z) / determinant)


def with_x(x: Tensor, z: Tensor, mix: Mix) -> Estimate:
    """Another x̂, such as a clipped one, and the ε̂ that fits it: z = a x̂ + b ε̂ still holds."""
    return Estimate(x, (z - mix.a * x) / mix.b)


def check_target(kind: str, process: Process | None = None) -> None:
    """Raise ValueError for an unknown target, or one that a process has no use for."""
    if kind not in TARGETS:
        raise ValueError(f"A network predicts one of {', '.join(TARGETS)}, not {kind!r}.")
    if kind != "eps" or process is None:
        return
    if isinstance(process, RectifiedFlow) or process.alpha_bar[-1] == 0:
        raise ValueError(
            "Where z is pure noise, ε̂ = z says nothing of the picture, so a model of ε cannot "
            "start there. Predict v or x0."
        )


# --- losses: four papers, one shape ------------------------------------------------------------


class DiffusionLoss(NamedTuple):
    """The mean squared error of the prediction, the mean weight, and the weighted error."""

    mse: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    total: Float[Tensor, ""]


def min_snr_weight(kind: str, snr: Float[Tensor, " b"], gamma: float) -> Float[Tensor, " b"]:
    """Hang et al. 2023: the error of x̂ weighs min(SNR, γ), whatever the network predicts.

    The weight is min(SNR, γ) / SNR for "eps", min(SNR, γ) for "x0", and min(SNR, γ) / (SNR + 1)
    for "v" of `VariancePreserving`.

    Args:
        kind: the target.
        snr: SNR ≥ 0 of each picture; 0 is allowed.
        gamma: γ; the paper takes 5.

    Raises:
        ValueError: for another target, or γ ≤ 0.
    """
    check_target(kind)
    if not gamma > 0:
        raise ValueError(f"γ must be above 0, not {gamma}.")
    if kind == "eps":
        return (gamma / snr).clamp(max=1)  # at SNR = 0 too
    return snr.clamp(max=gamma) / (1 if kind == "x0" else snr + 1)


def ddpm_loss(
    network: Network,
    x: Float[Tensor, "b *shape"],
    process: VariancePreserving,
    *conditions: Tensor,
    target: str = "eps",
    gamma: float | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    t: Tensor | None = None,
) -> DiffusionLoss:
    """L_simple of Ho et al. 2020 (Eq. 14), for each of the three targets.

    Args:
        network: (z, t, and all conditions) → prediction.
        target: what it predicts: "eps", "x0" or "v".
        gamma: of min-SNR weights; None weighs all times alike.
        generator: on the CPU, for times and noise that are not given.
        noise, t: ε and t, where a test or a figure needs certain ones.
    """
    check_target(target, process)
    t, noise = _draw(x, process, generator, noise, t)
    mix = process.mix(t)
    z = q_sample(x, t, process, noise)
    prediction = at_least_float32(network(z, at_least_float32(t).to(x.device), *conditions))
    error = (prediction - target_of(target, x, noise, mix.like(x))) ** 2
    weight = torch.ones_like(mix.snr) if gamma is None else min_snr_weight(target, mix.snr, gamma)
    return _weighted(error, weight)


def flow_loss(
    network: Network,
    x: Float[Tensor, "b c h w"],
    process: RectifiedFlow,
    *conditions: Tensor,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    t: Tensor | None = None,
) -> DiffusionLoss:
    """Rectified flow (Liu et al. 2023, Eq. 1): the network predicts v = x − ε. See `ddpm_loss`."""
    t, noise = _draw(x, process, generator, noise, t)
    mix = process.mix(t)
    z = q_sample(x, t, process, noise)
    prediction = at_least_float32(network(z, at_least_float32(t).to(x.device), *conditions))
    error = (prediction - target_of("v", x, noise, mix.like(x))) ** 2
    return _weighted(error, torch.ones_like(mix.a))


def jit_loss(
    network: Network,
    x: Float[Tensor, "b c h w"],
    process: RectifiedFlow,
    *conditions: Tensor,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    t: Tensor | None = None,
) -> DiffusionLoss:
    """JiT (Li & He 2025): the network predicts x̂, and the loss compares v. See `ddpm_loss`.

        v̂ = (x̂ − z) / max(1 − t, 0.05),   v = (x − z) / max(1 − t, 0.05)

    So the error of x̂ has the weight 1 / max(1 − t, 0.05)². `mse` is the error of x̂.
    """
    t, noise = _draw(x, process, generator, noise, t)
    mix = process.mix(t)
    z = q_sample(x, t, process, noise)
    prediction = at_least_float32(network(z, at_least_float32(t).to(x.device), *conditions))
    error = (prediction - target_of("x0", x, noise, mix.like(x))) ** 2
    return _weighted(error, mix.b.clamp(min=SMALLEST_DISTANCE) ** -2)


def _draw(
    x: Tensor,
    process: Process,
    generator: torch.Generator | None,
    noise: Tensor | None,
    t: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Times and noise for a batch, each drawn if it is not given."""
    if t is None:
        t = process.sample_times(len(x), generator)
    if noise is None:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    if noise.shape != x.shape or t.shape != x.shape[:1]:
        raise ValueError(
            f"Noise has the pictures' shape {tuple(x.shape)} and there is one time for each; these "
            f"are {tuple(noise.shape)} and {tuple(t.shape)}."
        )
    return t, noise


def _weighted(error: Tensor, weight: Tensor) -> DiffusionLoss:
    """The mean over pixels, then the weighted mean over pictures."""
    each = error.flatten(1).mean(1)  # (B)
    weight = weight.to(each)
    return DiffusionLoss(each.mean(), weight.mean(), total=(weight * each).mean())

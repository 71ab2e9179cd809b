"""Sampling from a diffusion model: from noise to a picture, step by step, each step shown.

    denoise = Denoiser(network, process, "x0", threshold=static_threshold)
    for step in ddim_steps(denoise, noise, flow_times(50)):
        step.z, step.x                                      # z_t, and the picture x̂ it may become

Every sampler asks the same of a model, x̂ and ε̂ at z_t, and mixes them anew at the next time t':

| sampler | paper | z at the next time |
|---|---|---|
| `ddpm_steps` | Ho et al. 2020, Algorithm 2 | a sample of q(z' given z and x̂) |
| `ddim_steps` | Song et al. 2021a, Eq. 12 | a' x̂ + √(b'² − σ²) ε̂ + σ · noise |
| `dpm_solver_steps` | Lu et al. 2022, Algorithm 2 | as DDIM, with x̂ extrapolated from two times |
| `euler_steps` | Liu et al. 2023 | z + (t' − t) v̂ |
| `heun_steps` | Karras et al. 2022, Algorithm 1 | the same, with the mean of v̂ at both ends |

Papers, also: classifier-free guidance (Ho & Salimans 2022), within an interval (Kynkäänniemi et al.
2024), dynamic thresholding (Saharia et al. 2022, Imagen), time spacing (Lin et al. 2024).

| symbol | name |
|---|---|
| s | `guidance_scale`: u + s (c − u), s = w + 1 in the paper; 1 is the model as learned |
| η, σ | `eta`; DDIM's noise, σ² = η² β̃ |
| β̃ | `_posterior`'s variance (Ho et al. 2020, Eq. 7) |
| λ = ln (a / b) | `_log_snr`, half the logarithm of SNR |

Differs from the papers in: samplers take either process, so DDIM's step on a rectified flow is
Euler's, and DDPM's step is DDIM's with η = 1; in all of them b at the last time is 0, so the last
step returns x̂.

Letters: B batch, C channels, H and W height and width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .diffusion import (
    Estimate,
    Mix,
    Network,
    Process,
    RectifiedFlow,
    VariancePreserving,
    check_target,
    estimate_of,
    with_x,
)
from .layers import at_least_float32

Threshold = Callable[[Tensor], Tensor]


# --- times -------------------------------------------------------------------------------------


def timesteps(count: int, process: VariancePreserving, spacing: str = "trailing") -> list[float]:
    """Times at which a model is asked, from noise to picture, and −1, the picture's own.

    Args:
        count: how many steps, 1 … S.
        spacing: "trailing" begins at the last time, S − 1, where z is (nearly) pure noise;
            "leading", DDPM's and DDIM's, ends at time 0 and begins below S − 1.

    Raises:
        ValueError: for another number of steps or another spacing.
    """
    total = len(process.alpha_bar)
    if not 1 <= count <= total:
        raise ValueError(f"The number of steps must be 1 … {total}, not {count}.")
    if spacing == "trailing":
        times = [round(total - i * total / count) - 1 for i in range(count)]
    elif spacing == "leading":
        times = [i * (total // count) for i in reversed(range(count))]
    else:
        raise ValueError(f"The spacing must be trailing or leading, not {spacing!r}.")
    return [*map(float, times), -1.0]


def flow_times(count: int, shift: float = 1.0) -> list[float]:
    """Times of a rectified flow from 0 (noise) to 1 (picture), count + 1 of them.

    Args:
        count: how many steps.
        shift: above 1 spends more steps near the noise: 1 − t becomes s (1 − t) / (1 + (s − 1)
            (1 − t)) (Esser et al. 2024, Eq. 23).

    Raises:
        ValueError: if there is no step, or the shift is not above 0.
    """
    if count < 1:
        raise ValueError(f"The number of steps must be 1 or more, not {count}.")
    if not 0 < shift < math.inf:
        raise ValueError(f"The shift of times must be above 0, not {shift}.")
    noise = [1 - i / count for i in range(count + 1)]
    return [1 - shift * b / (1 + (shift - 1) * b) for b in noise]


# --- what samplers ask of a model --------------------------------------------------------------


def static_threshold(x: Float[Tensor, "b *shape"]) -> Float[Tensor, "b *shape"]:
    """x̂ clipped to [−1, 1]."""
    return x.clamp(-1, 1)


def dynamic_threshold(
    x: Float[Tensor, "b *shape"], percentile: float = 0.995
) -> Float[Tensor, "b *shape"]:
    """x̂ clipped to [−s, s] and divided by s, where s ≥ 1 is a percentile of the absolute values of
    x̂ in each picture (Saharia et al. 2022, section 2.3). Strong guidance drives pixels beyond 1;
    clipping alone would leave all of them at the border.

    Args:
        percentile: in (0, 1].

    Raises:
        ValueError: for another percentile.
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"The percentile must be in (0, 1], not {percentile}.")
    s = at_least_float32(x).abs().flatten(1).quantile(percentile, dim=1).clamp(min=1).to(x)
    s = s.view(-1, *[1] * (x.ndim - 1))
    return x.clamp(-s, s) / s


def guided(
    network: Network,
    conditions: Sequence[Tensor],
    null: Sequence[Tensor],
    guidance_scale: float,
    interval: tuple[float, float] = (-math.inf, math.inf),
) -> Network:
    """A network of z and t with classifier-free guidance: u + s (c − u), both in one batch.

    Args:
        network: (z, t, and all conditions) → prediction.
        conditions, null: with what c and u are computed; conditions that both have stand in both.
        guidance_scale: s ≥ 0; 1 is the conditional model, 0 the unconditional one.
        interval: the times, ends included, at which the model is guided; at others s is 1.

    Raises:
        ValueError: for a negative or infinite scale, an empty interval, or conditions that do not
            match.
    """
    if not 0 <= guidance_scale < math.inf:
        raise ValueError(f"The guidance scale must be 0 or more, not {guidance_scale}.")
    if not interval[0] <= interval[1]:
        raise ValueError(f"The guidance interval must not be empty, but it is {interval}.")
    if [c.shape for c in conditions] != [u.shape for u in null]:
        raise ValueError("Each condition needs a null condition of the same shape.")

    def predict(z: Tensor, t: Tensor) -> Tensor:
        if guidance_scale == 1 or not (interval[0] <= t.min() and t.max() <= interval[1]):
            return network(z, t, *conditions)
        if guidance_scale == 0:
            return network(z, t, *null)
        both = (torch.cat(pair) for pair in zip(conditions, null, strict=True))
        c, u = network(torch.cat([z, z]), torch.cat([t, t]), *both).chunk(2)
        return u + guidance_scale * (c - u)

    return predict


@dataclass(frozen=True, eq=False)
class Denoiser:
    """x̂ and ε̂ of a mixture z_t, by a network that predicts one of x, ε and v.

    Args:
        network: (z, t) → prediction, as `guided` makes it.
        process: what z_t is a mixture of.
        target: what the network predicts: "eps", "x0" or "v".
        threshold: applied to x̂; ε̂ is then derived again, so that both still make up z_t.

    Raises:
        ValueError: for a target that the process has no use for.
    """

    network: Network
    process: Process
    target: str
    threshold: Threshold | None = None

    def __post_init__(self) -> None:
        check_target(self.target, self.process)

    @torch.no_grad()
    def __call__(self, z: Float[Tensor, "b *shape"], t: float) -> Estimate:
        """x̂ and ε̂ at one time, without gradients.

        Raises:
            ValueError: if the network's prediction is not finite.
        """
        times = torch.full((len(z),), t, dtype=torch.float32, device=z.device)
        prediction = self.network(z, times).to(z.dtype)
        if not prediction.isfinite().all():
            raise ValueError(
                f"At time {t:g} the network predicts NaN or infinity. Weights that diverged do "
                "that, and half precision: sample in float32."
            )
        mix = self.mix(t)
        estimate = estimate_of(self.target, prediction, z, mix)
        if self.threshold is None:
            return estimate
        return with_x(self.threshold(estimate.x), z, mix)

    def mix(self, t: float) -> Mix:
        """a and b at one time, in float64."""
        return self.process.mix(torch.tensor(t, dtype=torch.float64))


class SamplerStep(NamedTuple):
    """z after a step, at time t, and the x̂ that the step was made with."""

    z: Tensor
    x: Tensor
    t: float


# --- samplers ----------------------------------------------------------------------------------


def ddpm_steps(
    denoise: Denoiser,
    z: Float[Tensor, "b *shape"],
    times: Sequence[float],
    *,
    generator: torch.Generator | None = None,
    noise: Sequence[Tensor] | None = None,
) -> Iterator[SamplerStep]:
    """Implements Algorithm 2 of Ho et al. (2020) over any times.

    Args:
        denoise: the model.
        z: noise at the first time.
        times: from `timesteps` or `flow_times`.
        generator: on the CPU, for each step's noise.
        noise: that noise, one tensor a step, for tests.
    """
    for i, (t, following) in enumerate(_pairs(denoise, times)):
        x, _ = denoise(z, t)
        from_x, from_z, variance = _posterior(denoise.mix(t), denoise.mix(following))
        z = from_x * x + from_z * z  # the posterior's mean (Eq. 7)
        if variance > 0:  # not at the last step
            z = z + variance.sqrt() * _noise(z, generator, noise, i)
        yield SamplerStep(z, x, following)


def ddim_steps(
    denoise: Denoiser,
    z: Float[Tensor, "b *shape"],
    times: Sequence[float],
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    noise: Sequence[Tensor] | None = None,
) -> Iterator[SamplerStep]:
    """Eq. 12 of Song et al. (2021a).

    Args:
        denoise, z, times, generator, noise: see `ddpm_steps`.
        eta: η in [0, 1]: 0 makes the picture a function of z, 1 is DDPM.

    Raises:
        ValueError: for η outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"η must be in [0, 1], not {eta}.")
    for i, (t, following) in enumerate(_pairs(denoise, times)):
        x, eps = denoise(z, t)
        after = denoise.mix(following)
        variance = eta**2 * _posterior(denoise.mix(t), after)[2]  # σ² (Eq. 16)
        z = after.a * x + (after.b**2 - variance).clamp(min=0).sqrt() * eps
        if variance > 0:
            z = z + variance.sqrt() * _noise(z, generator, noise, i)
        yield SamplerStep(z, x, following)


def dpm_solver_steps(
    denoise: Denoiser, z: Float[Tensor, "b *shape"], times: Sequence[float]
) -> Iterator[SamplerStep]:
    """Implements Algorithm 2 of Lu et al. (2022), DPM-Solver++(2M); see `ddpm_steps`.

    The first and the last step are of first order, which is DDIM's. Nothing is random.
    """
    before, gap_before = None, math.inf  # x̂ of the step before, and its h
    for t, following in _pairs(denoise, times):
        x, _ = denoise(z, t)
        now, after = denoise.mix(t), denoise.mix(following)
        gap = _log_snr(after) - _log_snr(now)  # h
        extrapolated = x
        if before is not None and math.isfinite(gap):
            extrapolated = x + gap / (2 * gap_before) * (x - before)
        ratio = after.b / now.b
        z = ratio * z + (after.a - ratio * now.a) * extrapolated
        before, gap_before = x, gap
        yield SamplerStep(z, x, following)


def euler_steps(
    denoise: Denoiser, z: Float[Tensor, "b *shape"], times: Sequence[float]
) -> Iterator[SamplerStep]:
    """Euler's method for dz/dt = v of a rectified flow; see `ddpm_steps`.

    Raises:
        ValueError: for another process.
    """
    _check_flow(denoise)
    for t, following in _pairs(denoise, times):
        x, eps = denoise(z, t)
        z = z + (following - t) * (x - eps)
        yield SamplerStep(z, x, following)


def heun_steps(
    denoise: Denoiser, z: Float[Tensor, "b *shape"], times: Sequence[float]
) -> Iterator[SamplerStep]:
    """Heun's method for dz/dt = v of a rectified flow: two evaluations a step, but one at the last
    (Karras et al. 2022, Algorithm 1); see `ddpm_steps`.

    Raises:
        ValueError: for another process.
    """
    _check_flow(denoise)
    for t, following in _pairs(denoise, times):
        x, eps = denoise(z, t)
        velocity = x - eps
        if following < 1:
            ahead = denoise(z + (following - t) * velocity, following)
            velocity = (velocity + ahead.x - ahead.eps) / 2
        z = z + (following - t) * velocity
        yield SamplerStep(z, x, following)


SAMPLERS: dict[str, Callable[..., Iterator[SamplerStep]]] = {
    "ddpm": ddpm_steps,
    "ddim": ddim_steps,
    "dpm": dpm_solver_steps,
    "euler": euler_steps,
    "heun": heun_steps,
}


def _posterior(now: Mix, after: Mix) -> tuple[Tensor, Tensor, Tensor]:
    """q(z' given z and x): the mean's factors of x and of z, and the variance β̃ (Ho et al. 2020,
    Eq. 7), from a and b at both times."""
    kept = now.a / after.a  # z = kept · z' + what this step adds
    added = now.b**2 - (kept * after.b) ** 2  # β in DDPM
    from_x = after.a * added / now.b**2
    from_z = kept * after.b**2 / now.b**2
    return from_x, from_z, added * after.b**2 / now.b**2


def _log_snr(mix: Mix) -> float:
    """λ = ln (a / b), infinite at both ends."""
    return (mix.a.log() - mix.b.log()).item()


def _pairs(denoise: Denoiser, times: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Each time with the next.

    Raises:
        ValueError: unless they go from noise to picture.
    """
    forward = isinstance(denoise.process, RectifiedFlow)
    pairs = list(zip(times, times[1:], strict=False))
    if not pairs or any((t < following) != forward for t, following in pairs):
        way = "rise from 0 to 1" if forward else f"fall from {denoise.process.start} to −1"
        raise ValueError(f"Times must {way}, at least two of them; these are {list(times)}.")
    return iter(pairs)


def _check_flow(denoise: Denoiser) -> None:
    """Raise ValueError unless the model is of a rectified flow."""
    if not isinstance(denoise.process, RectifiedFlow):
        raise ValueError(
            "Euler and Heun follow a rectified flow. For a variance-preserving process take ddim, "
            "ddpm or dpm."
        )


def _noise(
    z: Tensor, generator: torch.Generator | None, given: Sequence[Tensor] | None, i: int
) -> Tensor:
    """The noise of step i, from the CPU's generator unless it is given."""
    if given is not None:
        return given[i]
    return torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)

"""Noise schedules: how much of a picture is left after each step of DDPM's forward process.

    ᾱ_t  =  Π_{s ≤ t} (1 − β_s),        z_t  =  √ᾱ_t · x + √(1 − ᾱ_t) · ε

Papers: linear schedule (Ho et al. 2020), cosine schedule (Nichol & Dhariwal 2021), zero terminal
SNR (Lin et al. 2024).

| symbol | name |
|---|---|
| ᾱ | `alpha_bar`, falling from nearly 1 to nearly 0 |
| β | what one step adds: 1 − ᾱ_t / ᾱ_{t−1} |
| s | `offset` of the cosine schedule |

Differs from the papers in: times start at 0, where they start at 1. All is float64: in float32,
1 − ᾱ at the first time would be wrong by 2 in 10,000.

Letters: S times, T in the papers.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def linear_alpha_bar(
    steps: int = 1000, first: float = 1e-4, last: float = 0.02
) -> Float[Tensor, " {steps}"]:
    """ᾱ of DDPM's schedule: β rises linearly (Ho et al. 2020, section 4).

    Args:
        steps: S.
        first, last: β at the first and at the last step, in (0, 1). The defaults are for S = 1000.

    Raises:
        ValueError: if there is no step, or a β outside (0, 1).
    """
    _check_steps(steps)
    return _from_betas(torch.linspace(first, last, steps, dtype=torch.float64))


def cosine_alpha_bar(
    steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999
) -> Float[Tensor, " {steps}"]:
    """ᾱ = f(t) / f(0) with f(t) = cos²((t / S + s) / (1 + s) · π / 2) (Nichol & Dhariwal, Eq. 17).

    Args:
        steps: S.
        offset: s, so that the first β is not too small.
        max_beta: every β is clipped to this, which keeps the last ᾱ above 0.

    Raises:
        ValueError: if there is no step, s is negative, or a β leaves (0, 1).
    """
    _check_steps(steps)
    if not 0 <= offset < math.inf:
        raise ValueError(f"The cosine schedule's offset must be 0 or more, not {offset}.")
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = ((time + offset) / (1 + offset) * math.pi / 2).cos() ** 2
    return _from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def zero_terminal_snr(alpha_bar: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """The same schedule, shifted and scaled so that the last z is pure noise (Lin et al. 2024,
    Algorithm 1). Sampling begins at pure noise, so training should end there.

    A model of ε cannot be used with it: at the last step ε is z itself, and says nothing of x.
    """
    root = alpha_bar.double().sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"A schedule has one step at least, not {steps}.")


def _from_betas(beta: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    if not (0 < beta.min() and beta.max() < 1):
        raise ValueError(
            f"Every β must be between 0 and 1, so that ᾱ falls and stays in (0, 1); these go from "
            f"{beta.min():.3g} to {beta.max():.3g}."
        )
    return (1 - beta).cumprod(0)

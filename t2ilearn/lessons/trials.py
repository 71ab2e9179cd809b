"""Short trainings for chapters and labs: the shortest loop that works, and small VQ-VAEs.

    model = fit(model, compute_loss, pictures, steps=300)
    result = usage_trial(learning_rate=3e-3, initialisation="k-means", seed=0)

| to have | call |
|---|---|
| any small model trained on pictures in memory | `fit` |
| a small VQ-VAE trained, and its codebook measured | `usage_trial` |
| fewer steps where a test only asks whether cells run | `steps` |

A training in a chapter is short for its reader and long for a test that runs every cell. Therefore
chapters write `steps(300)`. It is 300, or a tenth of that where the environment variable
`T2ILEARN_REHEARSAL` is set, as the tests do. What holds only after a whole training stands behind
`rehearsing()`: `assert rehearsing() or usage > 0.8`.

Letters: B batch, H and W picture.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from t2ilearn.data import TinyShapes
from t2ilearn.judging.metrics import codebook_usage, perplexity, psnr
from t2ilearn.models.quantizers import VectorQuantizer
from t2ilearn.models.vqvae import VQVAE, VQVAEConfig, vqvae_loss

REHEARSAL = "T2ILEARN_REHEARSAL"
SMALL = VQVAEConfig(
    resolution=32,
    channels=(16, 32),
    blocks=1,
    codebook_size=256,
    code_dim=8,
    quantizer="gradient",
    cosine=False,
)
WITHOUT_CODEBOOK = 50  # steps before a k-means initialisation, which needs trained encodings
INITIALISATIONS = ("random", "k-means")


def rehearsing() -> bool:
    """Whether trainings are cut to a tenth, because a test runs them."""
    return bool(os.environ.get(REHEARSAL))


def steps(full: int) -> int:
    """So many steps; in a rehearsal a tenth of them, and at least one."""
    return max(1, full // 10) if rehearsing() else full


def fit(
    model: nn.Module,
    compute_loss: Callable[[nn.Module, Tensor, torch.Generator], Any],
    pictures: Float[Tensor, "n 3 h w"],
    steps: int,
    learning_rate: float | int = 3e-3,
    after_step: Callable[[nn.Module, Tensor, int, torch.Generator], None] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Train on random batches of eight; returns the model in evaluation mode.

    Args:
        compute_loss: (model, batch, generator) → a NamedTuple with a `total`.
        learning_rate: the highest; it rises for a tenth of the steps and then falls to 0.
        after_step: (model, batch, step, generator), after each update.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=max(steps, 2), pct_start=0.1
    )
    for step in range(steps):
        x = pictures[torch.randint(len(pictures), (8,), generator=generator)]  # (8, 3, H, W)
        terms = compute_loss(model, x, generator)
        optimizer.zero_grad()
        terms.total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)  # limits the few very large steps
        optimizer.step()
        schedule.step()
        if after_step is not None:
            after_step(model, x, step, generator)
    return model.eval()


@cache
def trial_pictures(seed: int) -> tuple[Tensor, Tensor]:
    """2048 training pictures of the small world, by the seed, and 256 test pictures."""
    world = TinyShapes()
    pictures = world.sample(2048, generator=torch.Generator().manual_seed(seed)).pictures
    return pictures, world.test_set("test-full", 256).pictures


class Trial(NamedTuple):
    """What a short training of a VQ-VAE ended with, on test pictures."""

    usage: float
    perplexity: float
    psnr: float


def usage_trial(
    learning_rate: float | int = 3e-3,
    initialisation: str = "random",
    seed: int = 0,
    restarts: bool = False,
    steps: int = 300,
    **changes: Any,
) -> Trial:
    """Train a small VQ-VAE on the small world, and measure its codebook on 256 test pictures.

    Args:
        learning_rate: of everything that learns by gradient.
        initialisation: of the codebook: "random", or "k-means" on the encodings after 50 steps
            without a codebook.
        seed: of weights and batches.
        restarts: whether dead codes are restarted every ten steps.
        changes: of `SMALL`, such as `quantizer="ema"`.

    Raises:
        ValueError: for another initialisation.
    """
    if initialisation not in INITIALISATIONS:
        raise ValueError(f"initialisation is one of {INITIALISATIONS}, not {initialisation!r}.")
    pictures, test = trial_pictures(seed)
    torch.manual_seed(seed)
    model = VQVAE.from_config(replace(SMALL, **changes))
    if isinstance(model.quantizer, VectorQuantizer):
        model.quantizer.decay = 0.9  # a short memory for a short training
    start = WITHOUT_CODEBOOK if initialisation == "k-means" else 0
    done = 0  # steps so far

    def compute_loss(model: nn.Module, x: Tensor, _: torch.Generator) -> Any:
        return vqvae_loss(x, model(x, quantize=done >= start))

    def after_step(model: nn.Module, x: Tensor, step: int, generator: torch.Generator) -> None:
        nonlocal done
        done = step + 1
        assert isinstance(model, VQVAE)
        if initialisation == "k-means" and done == start:
            model.kmeans_init(pictures[:64], generator)
        elif restarts and done >= start and step % 10 == 0 and step < 0.7 * steps:
            model.restart_dead_codes(x, generator)

    fit(model, compute_loss, pictures, steps, learning_rate, after_step, seed)
    with torch.no_grad():
        indices = model.tokens(test)  # (256, N)
        copies = model.decode_tokens(indices).clamp(-1, 1)
    size = model.config.codebook_size
    quality = psnr(copies, test).mean().item()
    return Trial(codebook_usage(indices, size), perplexity(indices, size), quality)

"""VQGAN and a Transformer over its tokens (chapter 4).

    t2ilearn train vqgan --preset tiny
    t2ilearn train vqgan --preset tiny --stage vqgan-no-discriminator    # an ablation

| stage | starts from | trained on top of |
|---|---|---|
| `vqgan` | random weights | the features of `reader`, for the perceptual term |
| `vqgan-prior` | random weights | the tokens of `vqgan` |
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from t2ilearn import weights
from t2ilearn.data import TinyShapes
from t2ilearn.judging.reader import Reader
from t2ilearn.models.lpips import perceptual_distance
from t2ilearn.models.vqgan import (
    Discriminator,
    DiscriminatorConfig,
    VQGANLossConfig,
    VQGANWithDiscriminator,
)
from t2ilearn.models.vqvae import VQVAE, VQVAEConfig
from t2ilearn.systems.registry import load_parent, register
from t2ilearn.systems.stage import Job, Recipe, Stage
from t2ilearn.systems.token_training import both_worlds, measure_tokenizer, train_with_codebook
from t2ilearn.systems.tokens import TokenSystem
from t2ilearn.systems.vqvae import BOOK, TINY, prior_stage
from t2ilearn.training import TrainConfig, TrainResult
from t2ilearn.weights import Weights

BETAS = (0.5, 0.9)  # of AdamW: short memories, since the opponent changes all the time
LOSS = VQGANLossConfig(pixel_weight=2.0, disc_weight=0.4)
PRESETS = {
    "tiny": Recipe(
        TinyShapes,
        TINY,
        TrainConfig(6000, 16, 2e-3, gradient_clip=0.2, ema_decay=0.995),
        other_configs=(DiscriminatorConfig(channels=16, num_levels=1),),
        settings={"loss": LOSS},
    ),
    "book": Recipe(
        both_worlds,
        BOOK,
        TrainConfig(24_000, 16, 1e-3, gradient_clip=0.2, ema_decay=0.999),
        other_configs=(DiscriminatorConfig(channels=32, num_levels=2),),
        settings={"loss": LOSS},
    ),
}
# What each part of the loss contributes: the same training without it.
ABLATIONS: dict[str, dict[str, Any]] = {
    "vqgan-no-discriminator": {"disc_weight": 0.0},
    "vqgan-no-perceptual": {"perceptual_weight": 0.0},
    "vqgan-fixed-weight": {"adaptive": False},
}


def _train(job: Job) -> TrainResult:
    """Chapter 2's model against a discriminator; the perceptual term uses the training reader."""
    recipe = job.recipe
    torch.manual_seed(recipe.train.seed)
    model = VQVAE.from_config(recipe.model)
    reader = load_parent(job, "reader").requires_grad_(False)
    if not isinstance(reader, Reader):
        raise TypeError(f"The stage reader makes {type(reader).__name__}, no reader.")

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return perceptual_distance(reader.to(x.device).trunk, x, y)

    def compute_loss(both: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        return both(*batch)

    discriminator = Discriminator(recipe.other_configs[0])
    both = VQGANWithDiscriminator(model, discriminator, recipe.settings["loss"], distance)
    return train_with_codebook(job, both, model, compute_loss, betas=BETAS)


def _evaluate(job: Job, both: nn.Module) -> dict[str, Any]:
    return measure_tokenizer(job, both.get_submodule("generator"))


def _build(stored: Weights) -> dict[str, nn.Module]:
    model = VQVAE.from_config(weights.make_config(VQVAEConfig, stored))
    discriminator = Discriminator(weights.make_config(DiscriminatorConfig, stored))
    both = nn.ModuleDict({"generator": model, "discriminator": discriminator})
    weights.load_into(both, stored)
    both.eval()
    return {"tokenizer": model, "discriminator": discriminator}


def _stage(name: str, presets: dict[str, Recipe], bars: Any = None) -> Stage:
    return Stage(name, presets, _train, _evaluate, _build, needs=("reader",), bars=bars or {})


def _ablation(name: str, changes: dict[str, Any]) -> Stage:
    recipe = replace(PRESETS["tiny"], settings={"loss": replace(LOSS, **changes)})
    return _stage(name, {"tiny": recipe})


VQGAN_STAGE = _stage(
    "vqgan",
    PRESETS,
    {
        "book": {
            "codebook usage": 0.9,
            "judge on reconstructions": 0.96,
            "emoji, concept on reconstructions, held-out": 0.9,
        }
    },
)
PRIOR_STAGE = prior_stage("vqgan-prior", "vqgan", bars={"book": {"test-full, as drawn": 0.95}})


@register
class VQGANSystem(TokenSystem):
    """VQGAN and a Transformer prior."""

    name, title, chapter = "vqgan", "VQGAN and Transformer", 4
    shows = "a perceptual loss and a discriminator"
    stages = (VQGAN_STAGE, PRIOR_STAGE)
    also_trains = tuple(_ablation(name, changes) for name, changes in ABLATIONS.items())

"""DALL·E: a discrete VAE, and one Transformer over words and tokens (chapter 5).

    t2ilearn train dalle-dvae --preset tiny
    t2ilearn train dalle --preset tiny         # the same Transformer on the tokens of a VQGAN

| stage | starts from | trained on top of |
|---|---|---|
| `dvae` | random weights | – |
| `dalle-dvae` | random weights | the tokens of `dvae` |
| `dalle` | random weights | the tokens of `vqgan` |
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from t2ilearn import weights
from t2ilearn.data import TinyShapes
from t2ilearn.models.dalle import DALLE, dalle_loss
from t2ilearn.models.dvae import (
    DVAE,
    KL_WEIGHT,
    DVAEConfig,
    dvae_loss,
    gumbel_noise,
    kl_weight_at,
    temperature_at,
)
from t2ilearn.models.transformer import PriorConfig
from t2ilearn.systems.registry import register
from t2ilearn.systems.stage import Job, Recipe, Stage
from t2ilearn.systems.token_training import (
    both_worlds,
    measure_tokenizer,
    reconstructions,
    train_prior,
)
from t2ilearn.systems.tokens import TokenSystem
from t2ilearn.systems.vqgan import VQGAN_STAGE
from t2ilearn.systems.vqvae import PRIORS, measure_prior
from t2ilearn.training import TrainConfig, TrainResult
from t2ilearn.weights import Weights

TOKEN_NOISE = 0.4  # the largest share of corrupted tokens that DALL·E is given while it learns

# --- stage one: the discrete VAE ---------------------------------------------------------------


def _train_dvae(job: Job) -> TrainResult:
    world, recipe = job.world, job.recipe
    torch.manual_seed(recipe.train.seed)
    model = DVAE(recipe.model)
    size, steps, side = recipe.train.batch_size, recipe.train.steps, recipe.model.side

    def make_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
        scenes = world.scenes(size, recipe.split, generator=generator)
        noise = gumbel_noise((size, recipe.model.codebook_size, side, side), generator)
        return world.pictures(scenes, generator), noise, step / steps

    def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        x, noise, progress = batch
        output = model(x, temperature_at(progress), noise)
        return dvae_loss(x, output, kl_weight_at(progress, recipe.settings["kl_weight"]))

    return job.train(model, make_batch, compute_loss, draw_samples=reconstructions(model, world))


def _build_dvae(stored: Weights) -> dict[str, nn.Module]:
    model = DVAE(weights.make_config(DVAEConfig, stored))
    weights.load_into(model, stored)
    return {"tokenizer": model.eval()}


DVAE_STAGE = Stage(
    "dvae",
    {
        "tiny": Recipe(
            TinyShapes,
            DVAEConfig(resolution=32, channels=(32, 64), blocks=1, codebook_size=256, code_dim=16),
            TrainConfig(6000, 16, 2e-3, gradient_clip=0.2, ema_decay=0.995),
            # A token stands for a quarter as many numbers: β/192 a nat, as at `book`.
            settings={"kl_weight": KL_WEIGHT / 4},
        ),
        "book": Recipe(
            both_worlds,
            DVAEConfig(
                resolution=64, channels=(32, 64, 160), blocks=1, codebook_size=1024, code_dim=32
            ),
            TrainConfig(24_000, 16, 1e-3, gradient_clip=0.2, ema_decay=0.999),
            settings={"kl_weight": KL_WEIGHT},
        ),
    },
    _train_dvae,
    measure_tokenizer,
    _build_dvae,
)


# --- stage two: words and tokens in one sequence -----------------------------------------------


def _dalle_stage(
    name: str, tokenizer_stage: str, bars: dict[str, dict[str, float]] | None = None
) -> Stage:
    def run(job: Job) -> TrainResult:
        def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
            tokens, given, captions = batch
            return dalle_loss(model(given, captions), captions, tokens)

        return train_prior(job, tokenizer_stage, DALLE, compute_loss)

    def evaluate(job: Job, model: nn.Module) -> dict[str, Any]:
        return measure_prior(job, tokenizer_stage, model)

    def build(stored: Weights) -> dict[str, nn.Module]:
        model = DALLE(weights.make_config(PriorConfig, stored))
        weights.load_into(model, stored)
        return {"prior": model.eval()}

    presets = {p: replace(r, settings={"token_noise": TOKEN_NOISE}) for p, r in PRIORS.items()}
    return Stage(
        name,
        presets,
        run,
        evaluate,
        build,
        needs=(tokenizer_stage,),
        reads_captions=True,
        bars=bars or {},
    )


DALLE_STAGE = _dalle_stage(
    "dalle",
    "vqgan",
    {
        "book": {
            "test-full, as drawn": 0.96,
            "composition, as drawn": 0.88,
            "emoji, style, seen, as drawn": 0.95,
            "emoji, concept in the first five, seen, as drawn": 0.85,
        }
    },
)
DALLE_DVAE_STAGE = _dalle_stage("dalle-dvae", "dvae")


@register
class DALLESystem(TokenSystem):
    """DALL·E on the tokens of a VQGAN."""

    name, title, chapter = "dalle", "DALL·E on VQGAN tokens", 5
    shows = "words and tokens in one sequence"
    stages = (VQGAN_STAGE, DALLE_STAGE)


@register
class DALLEDVAESystem(TokenSystem):
    """DALL·E as in its paper, on the tokens of a discrete VAE."""

    name, title, chapter = "dalle-dvae", "DALL·E on dVAE tokens", 5
    shows = "a discrete VAE, and words and tokens in one sequence"
    stages = (DVAE_STAGE, DALLE_DVAE_STAGE)

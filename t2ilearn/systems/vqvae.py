"""VQ-VAE and a Transformer over its tokens (chapters 2 and 3).

    t2ilearn train vqvae --preset tiny
    t2ilearn train vqvae --preset tiny --stage pixelcnn    # the paper's own prior

| stage | starts from | trained on top of |
|---|---|---|
| `vqvae` | random weights | – |
| `prior` | random weights | the tokens of `vqvae` |
| `pixelcnn` | random weights | the tokens of `vqvae` |
"""

from typing import Any

import torch
from torch import nn

from t2ilearn import weights
from t2ilearn.data import CaptionTokenizer, TinyShapes, WordTokenizer
from t2ilearn.data.bpe import SHARED_LENGTH
from t2ilearn.models.pixelcnn import PixelCNN
from t2ilearn.models.transformer import Prior, PriorConfig, TransformerPrior, prior_loss
from t2ilearn.models.vqvae import VQVAE, VQVAEConfig, vqvae_loss
from t2ilearn.systems.evaluation import evaluate_system
from t2ilearn.systems.registry import register
from t2ilearn.systems.stage import Job, Recipe, Stage
from t2ilearn.systems.token_training import (
    both_worlds,
    both_worlds_for_priors,
    load_tokenizer,
    measure_tokenizer,
    train_prior,
    train_with_codebook,
)
from t2ilearn.systems.tokens import TokenSystem
from t2ilearn.training import TrainConfig, TrainResult
from t2ilearn.weights import Weights

TINY = VQVAEConfig(resolution=32, channels=(32, 64), blocks=1, codebook_size=256, code_dim=16)
BOOK = VQVAEConfig(resolution=64, channels=(32, 64, 160), blocks=1, codebook_size=1024, code_dim=32)
WORDS = WordTokenizer()
BOTH_WORLDS = {"vocabulary": 1024, "text_length": SHARED_LENGTH}  # of the shared text tokenizer
PRIORS = {
    "tiny": Recipe(
        TinyShapes,
        PriorConfig(
            codebook_size=256, dim=96, num_layers=3, num_heads=3, vocabulary=WORDS.vocabulary
        ),
        TrainConfig(5000, 32, 2e-3, ema_decay=0.998),
    ),
    "book": Recipe(
        both_worlds_for_priors,
        PriorConfig(codebook_size=1024, dim=192, num_layers=5, num_heads=6, **BOTH_WORLDS),
        TrainConfig(40_000, 32, 1.5e-3, 0.03, ema_decay=0.999),
        text_tokenizer=CaptionTokenizer.shared,
    ),
}
PIXELCNNS = {
    "tiny": Recipe(
        TinyShapes,
        PriorConfig(
            codebook_size=256, dim=40, num_layers=4, num_heads=2, vocabulary=WORDS.vocabulary
        ),
        TrainConfig(6000, 32, 2e-3, ema_decay=0.998),
    ),
    "book": Recipe(
        both_worlds_for_priors,
        PriorConfig(codebook_size=1024, dim=96, num_layers=5, num_heads=3, **BOTH_WORLDS),
        TrainConfig(4000, 96, 1e-3, 0.02, ema_decay=0.998),
        text_tokenizer=CaptionTokenizer.shared,
    ),
}
PRIOR_BARS = {
    "tiny": {"test-full, as drawn": 0.8},
    "book": {
        "test-full, as drawn": 0.86,
        "emoji, style, seen, as drawn": 0.9,
        "emoji, concept in the first five, seen, as drawn": 0.6,
    },
}


# --- stage one: pictures become tokens ---------------------------------------------------------


def _train_vqvae(job: Job) -> TrainResult:
    torch.manual_seed(job.recipe.train.seed)
    model = VQVAE.from_config(job.recipe.model)

    def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        x, _, quantize = batch
        return vqvae_loss(x, model(x, quantize), beta=job.recipe.model.beta)

    return train_with_codebook(job, model, model, compute_loss)


def _build_vqvae(stored: Weights) -> dict[str, nn.Module]:
    model = VQVAE.from_config(weights.make_config(VQVAEConfig, stored))
    weights.load_into(model, stored)
    return {"tokenizer": model.eval()}


VQVAE_STAGE = Stage(
    "vqvae",
    {
        "tiny": Recipe(
            TinyShapes, TINY, TrainConfig(6000, 16, 2e-3, gradient_clip=0.2, ema_decay=0.995)
        ),
        "book": Recipe(
            both_worlds, BOOK, TrainConfig(24_000, 16, 1e-3, gradient_clip=0.2, ema_decay=0.999)
        ),
    },
    _train_vqvae,
    measure_tokenizer,
    _build_vqvae,
    bars={
        "book": {
            "PSNR, dB": 32.0,
            "codebook usage": 0.9,
            "judge on reconstructions": 0.92,
            "emoji, concept on reconstructions, held-out": 0.75,
        }
    },
)


# --- stage two: tokens from a caption ----------------------------------------------------------


def prior_stage(
    name: str,
    tokenizer_stage: str,
    model: type[Prior] = TransformerPrior,
    presets: dict[str, Recipe] | None = None,
    bars: dict[str, dict[str, float]] | None = None,
) -> Stage:
    """A prior over the tokens of an earlier stage, trained by cross-entropy."""

    def run(job: Job) -> TrainResult:
        def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
            tokens, given, captions = batch
            return prior_loss(model(given, captions), tokens)

        return train_prior(job, tokenizer_stage, model, compute_loss)

    def evaluate(job: Job, trained: nn.Module) -> dict[str, Any]:
        return measure_prior(job, tokenizer_stage, trained)

    def build(stored: Weights) -> dict[str, nn.Module]:
        prior = model(weights.make_config(PriorConfig, stored))
        weights.load_into(prior, stored)
        return {"prior": prior.eval()}

    return Stage(
        name,
        PRIORS if presets is None else presets,
        run,
        evaluate,
        build,
        needs=(tokenizer_stage,),
        reads_captions=True,
        bars=bars or {},
    )


def measure_prior(job: Job, tokenizer_stage: str, prior: nn.Module) -> dict[str, Any]:
    """The report of the system that a tokenizer and a prior are together."""
    if not isinstance(prior, Prior):
        raise TypeError(f"{type(prior).__name__} is no prior.")
    tokenizer = load_tokenizer(job, tokenizer_stage)
    system = TokenSystem(tokenizer, prior, job.text_tokenizer, "", ())
    return evaluate_system(system, job.world.worlds)


PRIOR_STAGE = prior_stage("prior", "vqvae", bars=PRIOR_BARS)
PIXELCNN_STAGE = prior_stage("pixelcnn", "vqvae", PixelCNN, PIXELCNNS)


@register
class VQVAESystem(TokenSystem):
    """VQ-VAE and a Transformer prior."""

    name, title, chapter = "vqvae", "VQ-VAE and Transformer", 3
    shows = "pictures as tokens, and a prior that writes them"
    stages = (VQVAE_STAGE, PRIOR_STAGE)


@register
class PixelCNNSystem(TokenSystem):
    """VQ-VAE and the PixelCNN prior of its paper."""

    name, title, chapter = "pixelcnn", "VQ-VAE and PixelCNN", 3
    shows = "the prior of the VQ-VAE paper"
    stages = (VQVAE_STAGE, PIXELCNN_STAGE)

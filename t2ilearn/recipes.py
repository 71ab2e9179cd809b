"""One short entry a system and preset: data + model + step + evaluation → weights and a card.

    t2ilearn train vqvae --preset tiny      # then: t2ilearn train prior --preset tiny

`tiny` trains on a laptop; `book` makes what ships. A recipe is data: read `RECIPES`, then the one
function of the system. Every run writes its weights and its card into `RUNS/SYSTEM-PRESET/`.
"""

import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from t2ilearn import __version__, weights
from t2ilearn.data import Shapes, TinyShapes, encode
from t2ilearn.data.shapes import render
from t2ilearn.drawing import load_reader, load_vqvae
from t2ilearn.metrics import codebook_usage, frechet_distance, perplexity, psnr
from t2ilearn.prior import (
    PixelCNN,
    PriorConfig,
    TransformerPrior,
    drop_captions,
    prior_loss,
    sample,
)
from t2ilearn.reader import UNREADABLE, Reader, ReaderConfig, aligned, junk, read, reader_loss
from t2ilearn.training import TrainConfig, TrainResult, train
from t2ilearn.vqvae import VQVAE, VQVAEConfig, vqvae_loss


@dataclass(frozen=True)
class Recipe:
    """What one run needs: a world, the sizes of the model, the length of the training."""

    world: Shapes
    model: Any
    train: TrainConfig
    split: str = "train"


WORDS = 42  # len(data.captions.VOCABULARY); a test holds the two together
_TINY_VQVAE = VQVAEConfig(resolution=32, channels=(32, 64), blocks=1, codes=64, code_dim=16)
_BOOK_VQVAE = VQVAEConfig(resolution=64, channels=(32, 64, 128), blocks=2, codes=512, code_dim=32)

RECIPES: dict[tuple[str, str], Recipe] = {
    ("judge", "book"): Recipe(
        Shapes(), ReaderConfig(), TrainConfig(3000, 128, 2e-3, 0.02, ema_decay=0.998), "all"
    ),
    ("reader", "book"): Recipe(
        Shapes(), ReaderConfig(), TrainConfig(2000, 128, 2e-3, 0.02, ema_decay=0.998, seed=1)
    ),
    ("vqvae", "tiny"): Recipe(
        TinyShapes(), _TINY_VQVAE, TrainConfig(800, 64, 2e-3, ema_decay=0.99)
    ),
    ("vqvae", "book"): Recipe(Shapes(), _BOOK_VQVAE, TrainConfig(4000, 64, 1e-3, ema_decay=0.998)),
    ("prior", "tiny"): Recipe(
        TinyShapes(),
        PriorConfig(codes=64, length=64, width=96, depth=3, heads=4, vocabulary=WORDS),
        TrainConfig(1200, 64, 2e-3, ema_decay=0.99),
    ),
    ("prior", "book"): Recipe(
        Shapes(),
        PriorConfig(codes=512, length=64, width=192, depth=5, heads=6, vocabulary=WORDS),
        TrainConfig(4000, 96, 2e-3, 0.02, ema_decay=0.998),
    ),
}

"""What tests of trainings share: recipes of a few thousand parameters, and short evaluations."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from t2ilearn.judging import report
from t2ilearn.models.clip import TextTowerConfig
from t2ilearn.models.dalle2 import ImageConditioningConfig
from t2ilearn.models.diffusion_prior import DiffusionPriorConfig
from t2ilearn.models.dit import DiTConfig
from t2ilearn.models.dvae import DVAEConfig
from t2ilearn.models.transformer import PriorConfig
from t2ilearn.models.vqvae import VQVAEConfig
from t2ilearn.systems import clip, dalle2, dalle2_decoder, diffusion, readers, token_training, vqvae
from t2ilearn.systems.registry import STAGES

QUIET = {"progress": False}
SIZES = {
    VQVAEConfig: {"channels": (8, 8), "codebook_size": 32, "code_dim": 4},
    DVAEConfig: {"channels": (8, 8), "codebook_size": 32, "code_dim": 4},
    TextTowerConfig: {"dim": 16, "num_layers": 1, "num_heads": 2},
    PriorConfig: {"codebook_size": 32, "dim": 16, "num_layers": 1, "num_heads": 2},
    DiTConfig: {"patch": 8, "dim": 32, "num_layers": 1},
    DiffusionPriorConfig: {"dim": 32, "num_layers": 1},
    ImageConditioningConfig: {"dim": 32},
}
EVALUATIONS = (
    (token_training, "evaluate_tokenizer"),
    (vqvae, "evaluate_system"),
    (diffusion, "evaluate_system"),
    (readers, "evaluate_reader"),
    (clip, "evaluate_clip"),
    (dalle2, "evaluate_system"),
)


@contextmanager
def tiny_systems(n=16):
    """Within the block the preset "tiny" has models of a few thousand parameters and batches of 8,
    and n pictures are measured; yields the arguments of each evaluation."""
    asked, bootstrap = [], report.bootstrap

    def measured_on_few(function):
        return lambda *args, **how: asked.append(args) or function(*args, **{**how, "n": n})

    with pytest.MonkeyPatch.context() as patch:
        for module, name in EVALUATIONS:
            patch.setattr(module, name, measured_on_few(getattr(module, name)))
        patch.setattr(report, "TEST_PICTURES", 24)
        for module in (dalle2, dalle2_decoder):
            patch.setattr(module, "MEASURED", n)
        patch.setattr(dalle2, "NEIGHBOURS", 64)
        patch.setattr(
            report, "bootstrap", lambda *sets, **how: bootstrap(*sets, **{**how, "rounds": 2})
        )
        patch.setitem(token_training.PICTURES_PER_WORLD, "tiny-shapes", 64)
        for stage in STAGES.values():
            if recipe := stage.presets.get("tiny"):
                model = replace(recipe.model, **SIZES[type(recipe.model)])
                train = replace(recipe.train, batch_size=8)
                patch.setitem(stage.presets, "tiny", replace(recipe, model=model, train=train))
        yield asked

"""The networks that judge, and the one that trainings may use: no systems that draw.

    picture → reader → every attribute;   loss = cross-entropy of the attributes that are there

A twelfth of each batch is junk, whose answer is "unreadable"; the rest is damaged as models damage
pictures, so that a reader reads drawings as well as renderings.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from t2ilearn import weights
from t2ilearn.data import Emoji, Shapes
from t2ilearn.data.captions import BACKGROUNDS
from t2ilearn.data.emoji_files import STYLES
from t2ilearn.judging.reader import Reader, ReaderConfig, junk, reader_loss
from t2ilearn.judging.report import blur, evaluate_reader
from t2ilearn.systems.registry import register_plan
from t2ilearn.systems.stage import Job, Recipe, Stage
from t2ilearn.training import TrainConfig, TrainResult
from t2ilearn.weights import Weights

CONCEPTS = 1324  # in the emoji archives; a test holds the two together
_EMOJI = ReaderConfig(
    channels=(32, 64, 88), features=128, answers=(CONCEPTS + 1, len(STYLES), len(BACKGROUNDS))
)  # the last concept: "unreadable"


def degrade(
    pictures: Float[Tensor, "b 3 h w"], generator: torch.Generator
) -> Float[Tensor, "b 3 h w"]:
    """Damage pictures as models do: a sixth stays, a sixth is shrunk, one blurred, half noisy."""
    n, _, h, w = pictures.shape
    kind = torch.randint(6, (n,), generator=generator)
    out = pictures.clone()
    small = F.interpolate(pictures, (h // 2, w // 2), mode="area")
    out[kind == 1] = F.interpolate(small, (h, w), mode="bilinear")[kind == 1]
    out[kind == 2] = blur(pictures)[kind == 2]
    strength = torch.rand(n, 1, 1, 1, generator=generator) * 0.25 * (kind >= 3)[:, None, None, None]
    return (out + strength * torch.randn(out.shape, generator=generator)).clamp(-1, 1)


def _run(job: Job) -> TrainResult:
    world, recipe = job.world, job.recipe
    size, spoiled = recipe.train.batch_size, recipe.train.batch_size // 12
    unreadable = recipe.model.answers[0] - 1  # the first field's last answer

    def make_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        scenes = world.scenes(size, recipe.split, generator=generator)
        pictures = degrade(world.pictures(scenes, generator), generator)
        pictures[:spoiled] = junk(pictures, generator)[:spoiled]
        scenes[:spoiled], scenes[:spoiled, 0] = -1, unreadable
        return pictures, scenes

    def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        pictures, facts = batch
        return reader_loss(model(pictures), facts)

    torch.manual_seed(recipe.train.seed)
    return job.train(Reader(recipe.model), make_batch, compute_loss)


def _evaluate(job: Job, model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, Reader):
        raise TypeError(f"{type(model).__name__} is no reader.")
    return evaluate_reader(model, job.world)


def _build(stored: Weights) -> dict[str, nn.Module]:
    model = Reader(weights.make_config(ReaderConfig, stored))
    weights.load_into(model, stored)
    return {"reader": model.eval()}


def _stage(name: str, recipe: Recipe, bars: dict[str, float] | None = None) -> Stage:
    return Stage(
        name,
        {"book": recipe},
        _run,
        _evaluate,
        _build,
        trains_on_folders=False,
        one_size=True,
        bars={"book": bars or {}},
    )


JUDGE = _stage(
    "judge",
    Recipe(Shapes, ReaderConfig(), TrainConfig(4000, 128, 2e-3, 0.02, ema_decay=0.998), "all"),
    {"real": 0.995},
)
READER = _stage(
    "reader",
    Recipe(Shapes, ReaderConfig(), TrainConfig(1200, 128, 2e-3, 0.02, ema_decay=0.995, seed=1)),
)
EMOJI_JUDGE = _stage(
    "emoji-judge",
    Recipe(Emoji, _EMOJI, TrainConfig(10_000, 128, 2e-3, 0.02, ema_decay=0.998), "all"),
    {"concept, real": 0.98, "style, real": 0.995},
)
register_plan("readers", (JUDGE, READER, EMOJI_JUDGE))

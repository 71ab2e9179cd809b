"""CLIP, which compares pictures with captions (chapter 6): no system that draws.

    t2ilearn train clip --preset tiny
    t2ilearn train clip --preset book --stage clip-score

| stage | starts from | used for |
|---|---|---|
| `clip` | random weights | reranking, and the losses of chapters 7 and 10 |
| `clip-score` | random weights, another seed and width | measuring; no loss and no reranking |

A picture is ranked by a model that was not its judge: what one network likes, the other need not.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from t2ilearn import weights
from t2ilearn.data import CaptionedPictures, CaptionTokenizer, TinyShapes, WordTokenizer
from t2ilearn.data.bpe import SHARED_LENGTH
from t2ilearn.judging.clip import evaluate_clip, first_of_each
from t2ilearn.models.clip import CLIP, ImageTowerConfig, TextTowerConfig, clip_loss
from t2ilearn.models.tokens import PAD
from t2ilearn.systems.registry import register_plan
from t2ilearn.systems.stage import Job, Recipe, Stage
from t2ilearn.systems.token_training import both_worlds
from t2ilearn.training import TrainConfig, TrainResult
from t2ilearn.weights import Weights

BETAS = (0.9, 0.98)  # of AdamW, for Vision Transformers (Table 19 of the paper)
_DRAWS = 16  # times a batch is filled up before a world counts as too small

_WORDS = WordTokenizer()
_TINY = Recipe(
    TinyShapes,
    TextTowerConfig(_WORDS.vocabulary, _WORDS.length, 64, 2, 4, 64),
    TrainConfig(1000, 64, 2e-3, 0.1, ema_decay=0.998),
    other_configs=(ImageTowerConfig(32, 8, 64, 3, 4, 64),),
)
_BOOK = Recipe(
    both_worlds,
    TextTowerConfig(1024, SHARED_LENGTH, 128, 3, 4, 128),
    TrainConfig(8000, 128, 1e-3, 0.1, warmup_steps=500, ema_decay=0.999),
    text_tokenizer=CaptionTokenizer.shared,
    other_configs=(ImageTowerConfig(64, 8, 128, 4, 4, 128),),
)


def _another(recipe: Recipe, dim: int, num_heads: int) -> Recipe:
    """The same recipe with another seed, other widths and one block less a tower."""
    text, (image,) = recipe.model, recipe.other_configs
    text = replace(text, dim=dim, num_heads=num_heads, num_layers=text.num_layers - 1)
    image = replace(image, dim=dim, num_heads=num_heads, num_layers=image.num_layers - 1)
    train = replace(recipe.train, seed=recipe.train.seed + 1)
    return replace(recipe, model=text, train=train, other_configs=(image,))


def distinct_scenes(
    world: CaptionedPictures, n: int, split: str, generator: torch.Generator
) -> Int[Tensor, "m facts"]:
    """n different scenes, or fewer if the world has not so many: two pictures of one scene in a
    batch would be wrong answers to each other's captions.
    """
    scenes = world.scenes(n, split, generator=generator)
    for _ in range(_DRAWS):
        scenes = scenes[first_of_each(scenes)]
        if len(scenes) >= n:
            break
        scenes = torch.cat([scenes, world.scenes(n, split, generator=generator)])
    return scenes[first_of_each(scenes)][:n]


def without_padding(captions: Int[Tensor, "b t"]) -> Int[Tensor, "b t2"]:
    """Captions cut to the longest of the batch."""
    return captions[:, : int((captions != PAD).sum(1).max())]


# --- training ----------------------------------------------------------------------------------


def _train(job: Job) -> TrainResult:
    world, recipe, words = job.world, job.recipe, job.text_tokenizer
    any_seed = torch.Generator().manual_seed(recipe.train.seed)
    size = len(distinct_scenes(world, recipe.train.batch_size, recipe.split, any_seed))

    def make_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        scenes = distinct_scenes(world, size, recipe.split, generator)
        captions = words.encode(world.mixed_captions(scenes, generator))
        return world.pictures(scenes, generator), without_padding(captions)

    def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        return clip_loss(model(*batch))

    def after_step(model: nn.Module, batch: Any, step: int, generator: torch.Generator) -> None:
        model.clamp_logit_scale()  # type: ignore[operator]

    torch.manual_seed(recipe.train.seed)
    model = CLIP(recipe.other_configs[0], recipe.model)
    result = job.train(model, make_batch, compute_loss, after_step=after_step, betas=BETAS)
    model.clamp_logit_scale()  # their average may lie a little above
    return result


def _evaluate(job: Job, model: nn.Module) -> dict[str, Any]:
    return evaluate_clip(model, job.text_tokenizer.encode, job.world)  # type: ignore[arg-type]


def _build(stored: Weights) -> dict[str, nn.Module]:
    image_config = weights.make_config(ImageTowerConfig, stored)
    model = CLIP(image_config, weights.make_config(TextTowerConfig, stored))
    weights.load_into(model, stored)
    return {"clip": model.eval()}


def _stage(name: str, presets: dict[str, Recipe]) -> Stage:
    return Stage(name, presets, _train, _evaluate, _build, reads_captions=True)


CLIP_STAGE = _stage("clip", {"tiny": _TINY, "book": _BOOK})
CLIP_SCORE_STAGE = _stage(
    "clip-score", {"tiny": _another(_TINY, 48, 3), "book": _another(_BOOK, 144, 6)}
)
register_plan("clip", (CLIP_STAGE, CLIP_SCORE_STAGE))

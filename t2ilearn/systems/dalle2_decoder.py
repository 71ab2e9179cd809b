"""DALL·E 2's decoder: chapter 9's network learns to follow an image embedding (chapter 10).

    t2ilearn train dalle2 --stage dalle2-decoder --preset tiny

| stage | starts from | trained on top of |
|---|---|---|
| `dalle2-decoder` | random weights | `clip`, `diffusion` |

Its file holds the paths of the image embedding alone: the network beside it is that of
`diffusion`, unchanged. It is measured by variations: pictures decoded from the true embeddings of
test pictures, without a caption. What does the judge still read in them?

Letters: B pictures, T tokens of a caption, E dimension of CLIP's space.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from t2ilearn import weights
from t2ilearn.data import CaptionedPictures, CaptionTokenizer, TinyShapes
from t2ilearn.judging.alignment import measured
from t2ilearn.judging.clip import embed_pictures
from t2ilearn.judging.reader import load_reader
from t2ilearn.judging.report import CHUNK, share
from t2ilearn.models.clip import CLIP
from t2ilearn.models.dalle2 import (
    Decoder,
    ImageConditioning,
    ImageConditioningConfig,
    drop_embeddings,
)
from t2ilearn.models.diffusion import RectifiedFlow, jit_loss
from t2ilearn.models.diffusion_prior import no_embedding
from t2ilearn.models.diffusion_samplers import SamplerStep
from t2ilearn.models.dit import DiT
from t2ilearn.models.tokens import null_caption
from t2ilearn.models.transformer import drop_captions
from t2ilearn.systems.clip import CLIP_STAGE
from t2ilearn.systems.diffusion import MEASURED, DiffusionOptions, denoise
from t2ilearn.systems.diffusion import STAGE as DIFFUSION_STAGE
from t2ilearn.systems.registry import load_parent
from t2ilearn.systems.stage import Job, Recipe, Stage
from t2ilearn.systems.token_training import both_worlds_for_priors
from t2ilearn.training import TrainConfig, TrainResult
from t2ilearn.weights import Weights

DROPPED = {  # shares left out in training, each by chance of its own (section 2.1)
    "drop_captions": 0.5,
    "drop_embeddings": 0.1,
}


def clip_of(job: Job) -> CLIP:
    """The CLIP that a run is on top of, frozen."""
    clip = load_parent(job, CLIP_STAGE.name)
    if not isinstance(clip, CLIP):
        raise TypeError(f"The stage {CLIP_STAGE.name} makes {type(clip).__name__}, no CLIP.")
    return clip.requires_grad_(False)


def network_of(job: Job) -> DiT:
    """The diffusion network that a run is on top of."""
    network = load_parent(job, DIFFUSION_STAGE.name)
    if not isinstance(network, DiT):
        raise TypeError(f"The stage {DIFFUSION_STAGE.name} makes {type(network).__name__}, no DiT.")
    return network


def _train(job: Job) -> TrainResult:
    world, recipe, words = job.world, job.recipe, job.text_tokenizer
    clip, network, process = clip_of(job), network_of(job), RectifiedFlow()
    torch.manual_seed(recipe.train.seed)
    conditioning = ImageConditioning(recipe.model)
    decoder, settings = Decoder(network, conditioning), recipe.settings

    @torch.no_grad()
    def make_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        size = recipe.train.batch_size
        pictures, captions = world.sample(size, recipe.split, generator=generator)
        embeddings = embed_pictures(clip, pictures)
        embeddings = drop_embeddings(embeddings, settings["drop_embeddings"], generator)
        ids = drop_captions(words.encode(captions), settings["drop_captions"], generator)
        return pictures, embeddings, ids

    def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        pictures, embeddings, ids = batch
        decoder.network.to(pictures.device)

        def predict(z: Tensor, t: Tensor, embedding: Tensor, caption: Tensor) -> Tensor:
            return decoder.network(z, t, caption, model(embedding))

        return jit_loss(predict, pictures, process, embeddings, ids, generator=generator)

    return job.train(conditioning, make_batch, compute_loss)


def decode(
    decoder: Decoder,
    embeddings: Tensor,
    ids: Tensor,
    options: DiffusionOptions,
    generator: torch.Generator,
) -> Iterator[SamplerStep]:
    """The sampler's steps from embeddings (B, E) and ids of captions (B, T)."""
    ids = ids.to(embeddings.device)
    null = [no_embedding(embeddings), null_caption(*ids.shape).to(ids)]
    side = decoder.network.config.resolution
    return denoise(decoder, [embeddings, ids], null, RectifiedFlow(), side, options, generator)


# --- measuring ---------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_variations(
    decoder: Decoder, clip: CLIP, world: CaptionedPictures, n: int
) -> dict[str, Any]:
    """Shares of variations in which the judge reads what the caption of the original states.

    Returns:
        One figure for each test set and what its judge reads; none in a world without a judge.
    """
    metrics: dict[str, Any] = {}
    if world.judge is None:
        return metrics
    judge, options = load_reader(world.judge), DiffusionOptions()
    for name in world.test_sets:
        real = world.test_set(name, n)
        embeddings = embed_pictures(clip, real.pictures)
        pictures = variations(decoder, embeddings, options, torch.Generator().manual_seed(0))
        for what, right in measured(judge, pictures, real.captions, type(world)).items():
            kept = "" if what == "judge" else f"{what}, "
            figure = share(right, world.groups(name, n))
            metrics[f"{world.label}{kept}{name}, variations"] = figure
    return metrics


def variations(
    decoder: Decoder,
    embeddings: Tensor,
    options: DiffusionOptions,
    generator: torch.Generator,
) -> Tensor:
    """A picture (3, H, W) in [−1, 1] for each embedding, without a caption."""
    parts, length = [], decoder.network.config.text_length
    with tqdm(total=len(embeddings), desc="variations", unit="picture", delay=2) as bar:
        for part in embeddings.split(CHUNK):
            *_, last = decode(decoder, part, null_caption(len(part), length), options, generator)
            parts.append(last.x.clamp(-1, 1).cpu())
            bar.update(len(part))
    return torch.cat(parts)


def _evaluate(job: Job, model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, ImageConditioning):
        raise TypeError(f"{type(model).__name__} is no ImageConditioning.")
    decoder, clip = Decoder(network_of(job), model).eval(), clip_of(job)
    found: dict[str, Any] = {}
    for world in job.world.worlds:
        found |= evaluate_variations(decoder, clip, world, MEASURED)
    return found


def _build(stored: Weights) -> dict[str, nn.Module]:
    model = ImageConditioning(weights.make_config(ImageConditioningConfig, stored))
    weights.load_into(model, stored)
    return {"conditioning": model.eval()}


DECODER_STAGE = Stage(
    "dalle2-decoder",
    {
        "tiny": Recipe(
            TinyShapes,
            ImageConditioningConfig(64, 96),
            TrainConfig(3000, 32, 2e-3, ema_decay=0.998),
            settings=DROPPED,
        ),
        "book": Recipe(
            both_worlds_for_priors,
            ImageConditioningConfig(128, 192),
            TrainConfig(12_000, 32, 1e-3, ema_decay=0.999),
            text_tokenizer=CaptionTokenizer.shared,
            settings=DROPPED,
        ),
    },
    _train,
    _evaluate,
    _build,
    needs=(CLIP_STAGE.name, DIFFUSION_STAGE.name),
)

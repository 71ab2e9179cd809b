"""What the trainings of systems with tokens share: worlds, the tokenizer's loop, the prior's loop.

    stage one   pictures → tokenizer (VQ-VAE, VQGAN, dVAE)
    stage two   tokens and captions → prior over tokens

Pictures are encoded once, before the second stage begins, so that it never touches a pixel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from t2ilearn.data import CaptionedPictures, Emoji, Shapes, Together
from t2ilearn.judging.report import evaluate_tokenizer
from t2ilearn.models.autoencoder import ImageTokenizer
from t2ilearn.models.sampling import sample
from t2ilearn.models.transformer import Prior, corrupt_tokens, drop_captions
from t2ilearn.models.vqvae import VQVAE
from t2ilearn.systems.registry import load_parent
from t2ilearn.systems.stage import Job, encode_world
from t2ilearn.training import TrainResult

# Pictures that a prior learns from; those of a folder are moved a little each time.
PICTURES_PER_WORLD = {"tiny-shapes": 20_000, "shapes + emoji": 150_000, "folder": 20_000}
WARM_UP = 300  # steps without a codebook, so that it can start at the centres of real encodings
RESTART_EVERY = 50  # steps between restarts of dead codes; none late in training
DROP_CAPTIONS = 0.1  # the share of a prior's captions left out, so that guidance works


def both_worlds() -> Together:
    """Shapes and emoji, an equal share of each."""
    return Together((Shapes(), Emoji()))


def both_worlds_for_priors() -> Together:
    """Two emoji for each scene of shapes, since each drawing has to be learned by itself. None is
    moved: a shift of one pixel changes nearly all tokens and adds nothing to learn."""
    return Together((Shapes(), Emoji(smallest=1.0)), turns=(0, 1, 1))


# --- stage one ---------------------------------------------------------------------------------


def train_with_codebook(
    job: Job, model: nn.Module, tokenizer: VQVAE, compute_loss: Any, **options: Any
) -> TrainResult:
    """Train a model of which `tokenizer` is the whole or a part.

    Its batches are (pictures, share of the training that is done, whether to quantize yet). The
    codebook starts at the centres of real encodings, and dead codes are restarted.
    """
    world, recipe = job.world, job.recipe
    steps, warm_up = recipe.train.steps, min(WARM_UP, recipe.train.steps // 4)

    def pictures(n: int, generator: torch.Generator) -> Tensor:
        scenes = world.scenes(n, recipe.split, generator=generator)
        return world.pictures(scenes, generator)

    def make_batch(step: int, generator: torch.Generator) -> tuple[Tensor, float, bool]:
        return pictures(recipe.train.batch_size, generator), step / steps, step >= warm_up

    def after_step(_: nn.Module, batch: Any, step: int, generator: torch.Generator) -> None:
        x, progress, quantize = batch
        if step == warm_up - 1:
            tokenizer.kmeans_init(pictures(256, generator).to(x.device), generator)
        elif quantize and step % RESTART_EVERY == 0 and progress < 0.7:
            tokenizer.restart_dead_codes(x, generator)

    examples = reconstructions(tokenizer, world)
    return job.train(
        model, make_batch, compute_loss, after_step=after_step, draw_samples=examples, **options
    )


def reconstructions(
    tokenizer: ImageTokenizer, world: CaptionedPictures
) -> Callable[[nn.Module], Tensor]:
    """What a run's frames show: eight test pictures, and these from their tokens."""
    examples = world.test_set(world.test_sets[0], 8).pictures

    def draw_samples(_: nn.Module) -> Tensor:
        x = examples.to(next(tokenizer.parameters()).device)
        return torch.cat([x, tokenizer.decode_tokens(tokenizer.tokens(x))])

    return draw_samples


def measure_tokenizer(job: Job, model: nn.Module) -> dict[str, Any]:
    """The report of a tokenizer on its world."""
    if not isinstance(model, ImageTokenizer):
        raise TypeError(f"{type(model).__name__} is no tokenizer of pictures.")
    return evaluate_tokenizer(model, job.world)


# --- stage two ---------------------------------------------------------------------------------


def load_tokenizer(job: Job, stage: str) -> ImageTokenizer:
    """The tokenizer of an earlier stage.

    Raises:
        TrainingError: if it was trained anew since the run began.
        TypeError: if that stage makes no tokenizer of pictures.
    """
    tokenizer = load_parent(job, stage)
    if not isinstance(tokenizer, ImageTokenizer):
        raise TypeError(f"The stage {stage} makes {type(tokenizer).__name__}, no tokenizer.")
    return tokenizer


def train_prior(
    job: Job, tokenizer_stage: str, make_model: Callable[[Any], Prior], compute_loss: Any
) -> TrainResult:
    """Train a prior over the tokens of an earlier stage.

    Its batches are (tokens, the same with some corrupted, ids of captions); a share of the
    captions is left out.
    """
    world, recipe, words = job.world, job.recipe, job.text_tokenizer
    tokenizer = load_tokenizer(job, tokenizer_stage)
    count, noise = PICTURES_PER_WORLD[world.name], recipe.settings.get("token_noise", 0.0)
    scenes, tokens = encode_world(tokenizer, world, count, recipe.train.seed)

    def make_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(scenes), (recipe.train.batch_size,), generator=generator)
        captions = words.encode(world.mixed_captions(scenes[rows], generator))  # new each time
        captions = drop_captions(captions, DROP_CAPTIONS, generator)
        right = tokens[rows].long()
        given = corrupt_tokens(right, recipe.model.codebook_size, noise, generator)
        return right, given, captions

    torch.manual_seed(recipe.train.seed)
    prior = make_model(recipe.model)
    examples = words.encode(world.test_set(world.test_sets[0], 8).captions)

    def draw_samples(_: nn.Module) -> Tensor:
        ids = examples.to(next(prior.parameters()).device)
        drawn = sample(prior, ids, generator=torch.Generator().manual_seed(0))
        return tokenizer.decode_tokens(drawn.cpu())

    return job.train(prior, make_batch, compute_loss, draw_samples=draw_samples)

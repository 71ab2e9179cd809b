"""One short entry a system and preset: data + model + step + evaluation → weights and a card.

    t2ilearn train vqvae --preset tiny      # then: t2ilearn train prior --preset tiny

`tiny` trains on a laptop; `book` makes what ships. A recipe is data: read `RECIPES`, then the one
function of the system. Every run writes its weights and its card into `RUNS/SYSTEM-PRESET/`.
"""

import math
import platform
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
_TINY_VQVAE = VQVAEConfig(resolution=32, channels=(32, 64), blocks=1, codes=256, code_dim=16)
_BOOK_VQVAE = VQVAEConfig(resolution=64, channels=(32, 64, 120), blocks=2, codes=1024, code_dim=32)

RECIPES: dict[tuple[str, str], Recipe] = {
    ("judge", "book"): Recipe(
        Shapes(), ReaderConfig(), TrainConfig(4000, 128, 2e-3, 0.02, ema_decay=0.998), "all"
    ),
    ("reader", "book"): Recipe(
        Shapes(), ReaderConfig(), TrainConfig(2000, 128, 2e-3, 0.02, ema_decay=0.998, seed=1)
    ),
    ("vqvae", "tiny"): Recipe(
        TinyShapes(), _TINY_VQVAE, TrainConfig(800, 64, 2e-3, ema_decay=0.99)
    ),
    ("vqvae", "book"): Recipe(Shapes(), _BOOK_VQVAE, TrainConfig(4500, 64, 1e-3, ema_decay=0.998)),
    ("prior", "tiny"): Recipe(
        TinyShapes(),
        PriorConfig(codes=256, width=96, depth=3, heads=3, vocabulary=WORDS),
        TrainConfig(1200, 64, 2e-3, ema_decay=0.99),
    ),
    ("prior", "book"): Recipe(
        Shapes(),
        PriorConfig(codes=1024, width=192, depth=5, heads=6, vocabulary=WORDS),
        TrainConfig(4000, 96, 2e-3, 0.02, ema_decay=0.998),
    ),
}

_CODES_PER_WORLD = {"tiny-shapes": 8_000, "shapes": 60_000}
TEST_PICTURES = 5_000
REVIVE_EVERY = 25  # steps; late in training the codebook is left in peace


def train_system(
    system: str,
    preset: str = "tiny",
    runs: Path | str = "runs",
    *,
    steps: int | None = None,
    precision: str | None = None,
    progress: bool = True,
) -> Path:
    """Train one part by its recipe, measure it, and write weights and card.

    Args:
        system: "judge", "reader", "vqvae" or "prior".
        preset: "tiny" or "book".
        runs: the folder for runs; an interrupted run is resumed from there.
        steps: fewer or more steps than the recipe's.

    Returns:
        The safetensors file, with its card beside it.

    Raises:
        ValueError: for an unknown system or preset.
    """
    if (system, preset) not in RECIPES:
        known = ", ".join(f"{s} {p}" for s, p in RECIPES)
        raise ValueError(f"No recipe for {system!r} at preset {preset!r}. There are: {known}.")
    recipe = RECIPES[system, preset]
    if steps is not None:
        recipe = replace(recipe, train=replace(recipe.train, steps=steps))
    name = system if system in ("judge", "reader") else f"{system}-{preset}"
    build = {"judge": _reader, "reader": _reader, "vqvae": _vqvae, "prior": _prior}[system]
    run_dir = Path(runs) / name
    result, metrics = build(recipe, run_dir, preset, precision=precision, progress=progress)
    card = {
        "system": system,
        "preset": preset,
        "config": asdict(recipe.model),
        "data": {"world": recipe.world.name, "split": recipe.split, "seed": recipe.train.seed},
        "train": asdict(recipe.train),
        "steps": result.steps_done,
        "minutes": round(result.seconds / 60, 1),
        "device": _device_name(),
        "precision": precision or "fp32",
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "metrics": metrics,
        "command": _command(system, preset, steps, precision),
        "version": __version__,
    }
    return weights.save(run_dir, name, result.model.state_dict(), card)


def _command(system: str, preset: str, steps: int | None, precision: str | None) -> str:
    """The line that repeats a run."""
    line = f"t2ilearn train {system} --preset {preset}"
    line += f" --steps {steps}" if steps is not None else ""
    return line + (f" --precision {precision}" if precision else "")


def _device_name() -> str:
    """The accelerator's name, or what kind of CPU this is and how many threads are used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def share(right: Tensor) -> dict[str, float]:
    """A share of pictures with the half-width of its 95 % interval, both in [0, 1]."""
    value = right.float().mean().item()
    return {
        "value": round(value, 4),
        "half_width": round(1.96 * math.sqrt(value * (1 - value) / len(right)), 4),
    }


# --- readers -----------------------------------------------------------------------------------


def degrade(
    pictures: Float[Tensor, "b 3 h w"], generator: torch.Generator
) -> Float[Tensor, "b 3 h w"]:
    """Spoil pictures as models do: a sixth stays, a sixth is shrunk, one blurred, half is noisy."""
    n, _, h, w = pictures.shape
    kind = torch.randint(6, (n,), generator=generator)
    out = pictures.clone()
    small = F.interpolate(pictures, (h // 2, w // 2), mode="area")
    out[kind == 1] = F.interpolate(small, (h, w), mode="bilinear")[kind == 1]
    out[kind == 2] = blur(pictures)[kind == 2]
    strength = torch.rand(n, 1, 1, 1, generator=generator) * 0.25 * (kind >= 3)[:, None, None, None]
    return (out + strength * torch.randn(out.shape, generator=generator)).clamp(-1, 1)


def blur(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Each pixel becomes the mean of its 3×3 neighbourhood."""
    return F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)


def jpeg(pictures: Float[Tensor, "b 3 h w"], quality: int) -> Float[Tensor, "b 3 h w"]:
    """Through JPEG and back."""
    from torchvision.io import decode_jpeg, encode_jpeg

    as_bytes = pictures.add(1).mul(127.5).round().clamp(0, 255).byte()
    back = [decode_jpeg(encode_jpeg(p, quality)) for p in as_bytes]
    return torch.stack(back).float().div(127.5).sub(1)


def _reader(
    recipe: Recipe, run_dir: Path, preset: str, *, precision: str | None, progress: bool
) -> tuple[TrainResult, dict]:
    world, spoiled = recipe.world, recipe.train.batch_size // 12

    def make_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        scenes = world.scenes(recipe.train.batch_size, recipe.split, generator=generator)
        pictures = degrade(render(scenes, world.resolution, generator), generator)
        pictures[:spoiled] = junk(pictures, generator)[:spoiled]
        scenes[:spoiled], scenes[:spoiled, 0] = -1, UNREADABLE
        return pictures, scenes

    def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        pictures, facts = batch
        return reader_loss(model(pictures), facts)

    torch.manual_seed(recipe.train.seed)
    reader = Reader(recipe.model)
    result = train(
        reader, make_batch, compute_loss, recipe.train, run_dir,
        precision=precision, progress=progress,
    )  # fmt: skip
    return result, evaluate_reader(reader, world)


def evaluate_reader(reader: Reader, world: Shapes, n: int = 2000) -> dict:
    """Share of real pictures read fully right: ceiling, floor, and under damage."""
    pictures, captions = world.test_set("test-full", n)
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(pictures.shape, generator=generator)
    versions = {
        "real": pictures,
        "blur 3x3": blur(pictures),
        "noise 0.1": (pictures + noise).clamp(-1, 1),
        "jpeg 50": jpeg(pictures, 50),
        "at 32 px": F.interpolate(pictures, (32, 32), mode="area"),
    }
    metrics: dict[str, Any] = {
        name: share(aligned(reader, version, captions)) for name, version in versions.items()
    }
    metrics["floor (captions shuffled)"] = share(
        aligned(reader, pictures, captions[1:] + captions[:1])
    )
    metrics["junk called readable"] = share(read(reader, junk(pictures, generator)).readable)
    return metrics


# --- VQ-VAE ------------------------------------------------------------------------------------


def _vqvae(
    recipe: Recipe, run_dir: Path, preset: str, *, precision: str | None, progress: bool
) -> tuple[TrainResult, dict]:
    world = recipe.world
    torch.manual_seed(recipe.train.seed)
    model = VQVAE(recipe.model)

    def make_batch(step: int, generator: torch.Generator) -> Tensor:
        return world.sample(recipe.train.batch_size, recipe.split, generator=generator).pictures

    def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        return vqvae_loss(batch, model(batch), beta=recipe.model.beta)

    def revive(_: nn.Module, batch: Any, step: int, generator: torch.Generator) -> None:
        if step % REVIVE_EVERY == 0 and step < 0.7 * recipe.train.steps:
            model.revive(batch, generator)

    start = make_batch(0, torch.Generator().manual_seed(recipe.train.seed))
    model.kmeans_start(start, torch.Generator().manual_seed(recipe.train.seed))
    examples = world.test_set("test-full", 8).pictures
    result = train(
        model, make_batch, compute_loss, recipe.train, run_dir, after_step=revive,
        draw_samples=lambda _: torch.cat([examples, model.decode_tokens(model.tokens(examples))]),
        precision=precision, progress=progress,
    )  # fmt: skip
    return result, evaluate_vqvae(model, world)


@torch.no_grad()
def evaluate_vqvae(model: VQVAE, world: Shapes, n: int = 2000) -> dict:
    """PSNR, codebook usage and perplexity over the test pictures, and what the judge still reads.

    `judge (real)` is the ceiling: the same pictures before the codes.
    """
    judge = load_reader("judge")
    generator = torch.Generator().manual_seed(0)
    scenes = world.scenes(TEST_PICTURES, "test", generator=generator)
    pictures = render(scenes, world.resolution, generator)
    codes = torch.cat([model.tokens(part) for part in pictures.split(250)])
    test = world.test_set("test-full", n)
    back = torch.cat([model.decode_tokens(model.tokens(p)) for p in test.pictures.split(250)])
    return {
        "psnr_db": round(psnr(back.clamp(-1, 1), test.pictures).mean().item(), 2),
        "usage": round(float(codebook_usage(codes, model.config.codes)), 4),
        "perplexity": round(float(perplexity(codes, model.config.codes)), 1),
        "judge (reconstructions)": share(aligned(judge, back, test.captions)),
        "judge (real)": share(aligned(judge, test.pictures, test.captions)),
    }


# --- priors over its codes ---------------------------------------------------------------------


@torch.no_grad()
def _encode_world(vqvae: VQVAE, world: Shapes, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scenes and their codes, computed once: training then never touches a pixel."""
    generator = torch.Generator().manual_seed(seed)
    scenes = world.scenes(n, "train", generator=generator)
    codes = [
        vqvae.tokens(render(part, world.resolution, generator)).to(torch.int16)
        for part in scenes.split(250)
    ]
    return scenes, torch.cat(codes)


def _prior(
    recipe: Recipe, run_dir: Path, preset: str, *, precision: str | None, progress: bool
) -> tuple[TrainResult, dict]:
    world, size = recipe.world, recipe.train.batch_size
    own = run_dir.parent / f"vqvae-{preset}" / f"vqvae-{preset}.safetensors"
    vqvae = load_vqvae(own if own.exists() else f"vqvae-{preset}")
    scenes, codes = _encode_world(vqvae, world, _CODES_PER_WORLD[world.name], recipe.train.seed)

    def make_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(scenes), (size,), generator=generator)
        captions = encode(world.mixed_captions(scenes[rows], generator))  # new words each time
        return codes[rows].long(), drop_captions(captions, 0.1, generator)

    def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        tokens, captions = batch
        return prior_loss(model(tokens, captions), tokens)

    examples = encode(world.test_set("test-full", 8).captions)

    torch.manual_seed(recipe.train.seed)
    prior = TransformerPrior(recipe.model)

    def draw_samples(model: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return vqvae.decode_tokens(sample(prior, examples, generator=generator))

    result = train(
        prior, make_batch, compute_loss, recipe.train, run_dir,
        draw_samples=draw_samples, precision=precision, progress=progress,
    )  # fmt: skip
    metrics = evaluate_prior(vqvae, prior, world)
    metrics["vqvae"] = weights.load(own if own.exists() else f"vqvae-{preset}").card["sha256"]
    return result, metrics


@torch.no_grad()
def evaluate_prior(
    vqvae: VQVAE,
    prior: TransformerPrior,
    world: Shapes,
    n: int = 2000,
    guidance_scale: float = 1.0,
) -> dict:
    """Caption alignment on the three test sets, with the judge's ceiling and floor, and the
    Fréchet distance in reader features with its own floor (real against real)."""
    judge = load_reader("judge")
    metrics: dict[str, Any] = {}
    for name in ("test-full", "test-partial", "composition"):
        test = world.test_set(name, n)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.cat(
            [
                vqvae.decode_tokens(
                    sample(prior, part, guidance_scale=guidance_scale, generator=generator)
                )
                for part in encode(test.captions).split(100)
            ]
        )
        metrics[name] = share(aligned(judge, drawn, test.captions))
        if name == "test-full":
            other = world.sample(n, "test", generator=generator).pictures
            real, fake, again = (judge.features(p) for p in (test.pictures, drawn, other))
            metrics["ceiling (real)"] = share(aligned(judge, test.pictures, test.captions))
            shuffled = test.captions[1:] + test.captions[:1]
            metrics["floor (captions shuffled)"] = share(aligned(judge, drawn, shuffled))
            metrics["frechet_reader"] = round(float(frechet_distance(real, fake)), 3)
            metrics["frechet_reader floor"] = round(float(frechet_distance(real, again)), 3)
    metrics["guidance_scale"] = guidance_scale
    return metrics

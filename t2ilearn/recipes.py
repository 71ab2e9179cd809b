"""One short entry a system and preset: data + model + step + evaluation → weights and a card.

    t2ilearn train vqvae --preset tiny      # then: t2ilearn train prior --preset tiny
    t2ilearn train vqvae --data my-pictures # the same on pictures of your own

`tiny` trains on a laptop; `book` makes what ships. A recipe is data: read `RECIPES`, then the one
function of the system. Every run writes its weights and its card into `RUNS/SYSTEM-PRESET/`, and
what the card says was measured on the weights as they come back from that file.
"""

import copy
import json
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
from t2ilearn.dalle import (
    DVAE,
    KL_WEIGHT,
    DVAEConfig,
    Stream,
    dalle_loss,
    dvae_loss,
    gumbel_noise,
    kl_weight_at,
    temperature_at,
)
from t2ilearn.data import (
    CaptionedPictures,
    CaptionTokenizer,
    Emoji,
    Folder,
    Shapes,
    TinyShapes,
    Together,
    Tokenizer,
    WordTokenizer,
)
from t2ilearn.data.bpe import SHARED_LENGTH
from t2ilearn.data.captions import BACKGROUNDS
from t2ilearn.data.emoji_files import STYLES
from t2ilearn.drawing import CODES_OF, PRIORS, load_reader, load_vqvae
from t2ilearn.evaluation import (
    blur,
    evaluate_emoji_judge,
    evaluate_prior,
    evaluate_reader,
    evaluate_vqvae,
)
from t2ilearn.prior import Prior, PriorConfig, drop_captions, prior_loss, sample, slip
from t2ilearn.reader import Reader, ReaderConfig, junk, reader_loss
from t2ilearn.training import TrainConfig, TrainingError, TrainResult, is_first_process, train
from t2ilearn.vqgan import VQGAN, Critic, CriticConfig, Objective, Players, perceptual_distance
from t2ilearn.vqvae import VQVAE, PictureCodes, VQVAEConfig, vqvae_loss


@dataclass(frozen=True)
class Recipe:
    """What one run needs: a world, the sizes of the model, the length of the training, and how
    captions become ids."""

    world: Callable[[], CaptionedPictures]  # made when a run begins: some read archives
    model: Any
    train: TrainConfig
    split: str = "train"
    tokenizer: Callable[[], Tokenizer] = WordTokenizer
    critic: CriticConfig | None = None  # of a VQGAN, and what the two are trained for
    objective: Objective | None = None
    kl_weight: float = KL_WEIGHT  # of a dVAE, at the end
    slips: float = 0.0  # the largest share of wrong codes that DALL·E hears while it learns


def both_worlds() -> Together:
    """Shapes and emoji, an equal share of each."""
    return Together((Shapes(), Emoji()))


def both_worlds_for_priors() -> Together:
    """Two emoji for each scene of shapes, since each drawing has to be learned by itself. None is
    moved: a shift of one pixel changes nearly all codes, and says nothing new."""
    return Together((Shapes(), Emoji(smallest=1.0)), turns=(0, 1, 1))


WORDS = WordTokenizer()
_BOTH = {"vocabulary": 1024, "text_length": SHARED_LENGTH}  # of the tokenizer for both worlds
_TINY_VQVAE = VQVAEConfig(resolution=32, channels=(32, 64), blocks=1, codes=256, code_dim=16)
_BOOK_VQVAE = VQVAEConfig(resolution=64, channels=(32, 64, 160), blocks=1, codes=1024, code_dim=32)

CONCEPTS = 1324  # in the emoji archives; a test holds the two together
_EMOJI_JUDGE = ReaderConfig(
    channels=(32, 64, 88), features=128, answers=(CONCEPTS + 1, len(STYLES), len(BACKGROUNDS))
)  # the last concept: "unreadable"

RECIPES: dict[tuple[str, str], Recipe] = {
    ("judge", "book"): Recipe(
        Shapes, ReaderConfig(), TrainConfig(4000, 128, 2e-3, 0.02, ema_decay=0.998), "all"
    ),
    ("reader", "book"): Recipe(
        Shapes, ReaderConfig(), TrainConfig(1200, 128, 2e-3, 0.02, ema_decay=0.995, seed=1)
    ),
    ("emoji-judge", "book"): Recipe(
        Emoji, _EMOJI_JUDGE, TrainConfig(10_000, 128, 2e-3, 0.02, ema_decay=0.998), "all"
    ),
    ("vqvae", "tiny"): Recipe(
        TinyShapes, _TINY_VQVAE, TrainConfig(6000, 16, 2e-3, gradient_clip=0.2, ema_decay=0.995)
    ),
    ("vqvae", "book"): Recipe(
        both_worlds, _BOOK_VQVAE, TrainConfig(24_000, 16, 1e-3, gradient_clip=0.2, ema_decay=0.999)
    ),
    ("vqgan", "tiny"): Recipe(
        TinyShapes,
        _TINY_VQVAE,
        TrainConfig(6000, 16, 2e-3, gradient_clip=0.2, ema_decay=0.995),
        critic=CriticConfig(width=16, levels=1),
        objective=Objective(pixels=2.0, adversarial=0.4),
    ),
    ("vqgan", "book"): Recipe(
        both_worlds,
        _BOOK_VQVAE,
        TrainConfig(24_000, 16, 1e-3, gradient_clip=0.2, ema_decay=0.999),
        critic=CriticConfig(width=32, levels=2),
        objective=Objective(pixels=2.0, adversarial=0.4),
    ),
    ("prior", "tiny"): Recipe(
        TinyShapes,
        PriorConfig(codes=256, width=96, depth=3, heads=3, vocabulary=WORDS.vocabulary),
        TrainConfig(5000, 32, 2e-3, ema_decay=0.998),
    ),
    ("prior", "book"): Recipe(
        both_worlds_for_priors,
        PriorConfig(codes=1024, width=192, depth=5, heads=6, **_BOTH),
        TrainConfig(40_000, 32, 1.5e-3, 0.03, ema_decay=0.999),
        tokenizer=CaptionTokenizer.shared,
    ),
    ("dvae", "tiny"): Recipe(
        TinyShapes,
        DVAEConfig(resolution=32, channels=(32, 64), blocks=1, codes=256, code_dim=16),
        TrainConfig(6000, 16, 2e-3, gradient_clip=0.2, ema_decay=0.995),
        kl_weight=KL_WEIGHT / 4,  # a code pays for a quarter as many numbers: β/192 a nat, as ever
    ),
    ("dvae", "book"): Recipe(
        both_worlds,
        DVAEConfig(resolution=64, channels=(32, 64, 160), blocks=1, codes=1024, code_dim=32),
        TrainConfig(24_000, 16, 1e-3, gradient_clip=0.2, ema_decay=0.999),
    ),
    ("pixelcnn", "tiny"): Recipe(
        TinyShapes,
        PriorConfig(codes=256, width=40, depth=4, heads=2, vocabulary=WORDS.vocabulary),
        TrainConfig(6000, 32, 2e-3, ema_decay=0.998),
    ),
    ("pixelcnn", "book"): Recipe(
        both_worlds_for_priors,
        PriorConfig(codes=1024, width=96, depth=5, heads=3, **_BOTH),
        TrainConfig(4000, 96, 1e-3, 0.02, ema_decay=0.998),
        tokenizer=CaptionTokenizer.shared,
    ),
}

for _preset in ("tiny", "book"):  # the second stage is chapter 3's
    RECIPES["vqgan-prior", _preset] = RECIPES["prior", _preset]
    for _name in ("dalle", "dalle-dvae"):  # the same sizes, words and codes in one stream
        RECIPES[_name, _preset] = replace(RECIPES["prior", _preset], slips=0.4)

# What each part of a VQGAN's loss is good for: the same training without it.
ABLATIONS: dict[str, dict[str, Any]] = {
    "vqgan-no-critic": {"adversarial": 0.0},
    "vqgan-no-perceptual": {"perceptual": 0.0},
    "vqgan-fixed-weight": {"adaptive": False},
}
for _name, _changes in ABLATIONS.items():
    _whole = RECIPES["vqgan", "tiny"]
    assert _whole.objective is not None
    RECIPES[_name, "tiny"] = replace(_whole, objective=replace(_whole.objective, **_changes))

# Pictures that a prior learns from; those of a folder are moved a little each time.
CODES_PER_WORLD = {"tiny-shapes": 20_000, "shapes + emoji": 150_000, "folder": 20_000}
FOLDER_SHIFT = 2  # pixels
WARM_UP = 300  # steps without a codebook, so that it can start at the centres of real encodings
REVIVE_EVERY = 50  # steps; late in training the codebook is left in peace
PLAYERS_BETAS = (0.5, 0.9)  # of AdamW: who plays against somebody should not remember for long
DROP_CAPTIONS = 0.1  # the share of a prior's captions that say nothing, so that guidance works


# What weights must reach to be called good; a card says where they do not.
BARS: dict[tuple[str, str], dict[str, float]] = {
    ("judge", "book"): {"real": 0.995},
    ("emoji-judge", "book"): {"concept, real": 0.98, "style, real": 0.995},
    ("vqvae", "book"): {
        "PSNR, dB": 32.0,
        "codebook usage": 0.9,
        "judge on reconstructions": 0.92,
        "emoji, concept on reconstructions, held-out": 0.75,
    },
    ("vqgan", "book"): {
        "codebook usage": 0.9,
        "judge on reconstructions": 0.96,
        "emoji, concept on reconstructions, held-out": 0.9,
    },
    ("vqgan-prior", "book"): {"test-full, as drawn": 0.95},
    ("dalle", "book"): {
        "test-full, as drawn": 0.96,
        "composition, as drawn": 0.88,
        "emoji, style, seen, as drawn": 0.95,
        "emoji, concept in the first five, seen, as drawn": 0.85,
    },
    ("prior", "tiny"): {"test-full, as drawn": 0.8},
    ("prior", "book"): {
        "test-full, as drawn": 0.86,
        "emoji, style, seen, as drawn": 0.9,
        "emoji, concept in the first five, seen, as drawn": 0.6,
    },
}


def against_bars(metrics: dict[str, Any], bars: dict[str, float]) -> dict[str, Any]:
    """Each bar with what was measured and whether that is enough."""
    found = {name: metrics[name] for name in bars}
    values = {n: float(m["value"] if isinstance(m, dict) else m) for n, m in found.items()}
    return {
        name: {"bar": bar, "measured": values[name], "met": values[name] >= bar}
        for name, bar in bars.items()
    }


@dataclass(frozen=True)
class Job:
    """One run of a recipe: where it goes, and how it is run."""

    recipe: Recipe
    world: CaptionedPictures
    system: str
    preset: str
    runs: Path
    tokenizer: Tokenizer
    how: dict[str, Any]  # precision and progress, for `train`

    @property
    def name(self) -> str:
        """The name of its weights; readers come in one size only."""
        one_size = isinstance(self.recipe.model, ReaderConfig)
        return self.system if one_size else f"{self.system}-{self.preset}"

    def train(
        self, model: nn.Module, make_batch: Any, compute_loss: Any, **options: Any
    ) -> TrainResult:
        """`training.train` with this run's config, folder and options."""
        config, run_dir = self.recipe.train, self.runs / self.name
        return train(model, make_batch, compute_loss, config, run_dir, **options, **self.how)

    def claim(self) -> None:
        """Note in the run's folder what it learns from: pictures of your own, a VQ-VAE's codes.

        Raises:
            t2ilearn.flight.TrainingError: if a run is there already that learned from something
                else. To go on would mix the two, and the card would tell of one.
        """
        learns_from = {"world": self.world.name}
        if isinstance(self.world, Folder):
            learns_from["pictures and captions"] = self.world.fingerprint()
        if isinstance(self.recipe.model, PriorConfig):
            learns_from["vqvae"] = self.vqvae()[1]
        path = self.runs / self.name / "learns_from.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in learns_from if before.get(name) != learns_from[name]]
            if changed:
                raise TrainingError(
                    f"{path.parent} holds a run that learned from something else "
                    f"({', '.join(changed)}). Remove that folder, or name another with --runs."
                )
        if is_first_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            weights.write_atomically(path, json.dumps(learns_from).encode("utf-8"))

    def vqvae(self) -> tuple[PictureCodes, str]:
        """The VQ-VAE, or VQGAN, whose codes a prior learns, and its SHA-256: this folder's, or the
        shipped."""
        name = f"{CODES_OF[self.system]}-{self.preset}"
        own = self.runs / name / f"{name}.safetensors"
        found = own if own.exists() else name
        return load_vqvae(found), weights.load(found).card["sha256"]


def train_system(
    system: str,
    preset: str = "tiny",
    runs: Path | str | None = None,
    *,
    data: Path | str | None = None,
    steps: int | None = None,
    precision: str | None = None,
    progress: bool = True,
) -> Path:
    """Train one part by its recipe, measure it, and write weights and card.

    Args:
        system: "judge", "reader", "emoji-judge", "vqvae", "prior", "pixelcnn", "vqgan",
            "vqgan-prior", or one of `ABLATIONS`.
        preset: "tiny" or "book".
        runs: the folder for runs; an interrupted run is resumed from there. By default "runs", or
            "runs/NAME" for a data folder of that name.
        data: a folder of pictures of your own with a captions.csv, to train on instead of the
            recipe's world; see `data.Folder`. For all but the readers.
        steps: fewer or more steps than the recipe's.
        precision: "no", "bf16" or "fp16"; by default what suits the device.

    Returns:
        The safetensors file, with its card beside it. After Ctrl-C it holds the partial model, and
        the card has no metrics.

    Raises:
        ValueError: for an unknown system or preset, or a system that cannot learn from a folder.
        FolderError: if the folder of pictures is not in order.
        t2ilearn.flight.TrainingError: if the run's folder holds a run that learned from other data.
    """
    if (system, preset) not in RECIPES:
        known = ", ".join(f"{s} {p}" for s, p in RECIPES)
        raise ValueError(f"No recipe for {system!r} at preset {preset!r}. There are: {known}.")
    recipe = RECIPES[system, preset]
    if steps is not None:
        recipe = replace(recipe, train=replace(recipe.train, steps=steps))
    world = recipe.world()
    tokenizer = recipe.tokenizer()
    if data is not None:
        recipe, world, tokenizer = with_own_pictures(recipe, world.resolution, Path(data))
    if runs is None:
        runs = "runs" if data is None else Path("runs", Path(data).resolve().name)
    how = {"precision": precision, "progress": progress}
    job = Job(recipe, world, system, preset, Path(runs), tokenizer, how)
    run, evaluate = _SYSTEMS[system]
    job.claim()
    result = run(job)
    if not is_first_process():  # of several processes one measures and writes
        return job.runs / job.name / f"{job.name}.safetensors"
    card: dict[str, Any] = {
        "system": system,
        "preset": preset,
        "config": asdict(recipe.model),
        "data": {"world": world.name, "split": recipe.split, "seed": recipe.train.seed},
        "train": asdict(recipe.train),
        "steps": result.steps_done,
        "minutes": round(result.seconds / 60, 1),
        "device": _device_name(),
        "precision": result.precision,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "command": _command(system, preset, data, steps, precision),
        "version": __version__,
    }
    if recipe.critic is not None and recipe.objective is not None:
        card |= {"critic": asdict(recipe.critic), "objective": asdict(recipe.objective)}
    if isinstance(tokenizer, CaptionTokenizer) and isinstance(recipe.model, PriorConfig):
        card["tokenizer"] = tokenizer.save(job.runs / job.name / "tokenizer.json")
    path = weights.save(job.runs / job.name, job.name, result.model.state_dict(), card)
    if result.stopped:
        return path
    stored = weights.load(path)
    weights.load_into(result.model, stored)
    card["metrics"] = evaluate(job, result.model)
    bars = BARS.get((system, preset), {}) if data is None else {}
    card["bars"] = against_bars(card["metrics"], bars)
    return weights.save(path.parent, job.name, stored.state, card)


def with_own_pictures(
    recipe: Recipe, resolution: int, folder: Path
) -> tuple[Recipe, Folder, CaptionTokenizer]:
    """A recipe for pictures of your own, these, and the tokenizer learned from their captions.

    Raises:
        FolderError: if the folder is not in order.
        ValueError: if the recipe's model reads attributes that such pictures do not have.
    """
    if isinstance(recipe.model, ReaderConfig):
        raise ValueError("Readers learn the shapes world alone: own pictures state no attributes.")
    world = Folder(folder, resolution, FOLDER_SHIFT)
    tokenizer = CaptionTokenizer.train(world.captions).fitted(world.captions + world.test_captions)
    model = recipe.model
    if isinstance(model, PriorConfig):
        sizes = {"vocabulary": tokenizer.vocabulary, "text_length": tokenizer.length}
        model = replace(model, **sizes)
    return replace(recipe, model=model), world, tokenizer


def _command(
    system: str, preset: str, data: Path | str | None, steps: int | None, precision: str | None
) -> str:
    """The line that repeats a run."""
    line = f"t2ilearn train {system} --preset {preset}"
    line += f" --data {Path(data).name}" if data is not None else ""
    line += f" --steps {steps}" if steps is not None else ""
    return line + (f" --precision {precision}" if precision else "")


def _device_name() -> str:
    """The accelerator's name, or what kind of CPU this is and how many threads are used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"


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


def _train_reader(job: Job) -> TrainResult:
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


def _evaluate_reader(job: Job, reader: nn.Module) -> dict[str, Any]:
    assert isinstance(reader, Reader)
    if isinstance(job.world, Emoji):
        return evaluate_emoji_judge(reader, job.world)
    assert isinstance(job.world, Shapes)
    return evaluate_reader(reader, job.world)


# --- VQ-VAE ------------------------------------------------------------------------------------


def _train_vqvae(job: Job) -> TrainResult:
    torch.manual_seed(job.recipe.train.seed)
    model = VQVAE(job.recipe.model)

    def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        x, _, quantize = batch
        return vqvae_loss(x, model(x, quantize), beta=job.recipe.model.beta)

    return _train_codes(job, model, model, compute_loss)


def _train_codes(
    job: Job, model: nn.Module, vqvae: VQVAE, compute_loss: Any, **options: Any
) -> TrainResult:
    """Train a model of which `vqvae` is the whole or a part. Its batches are (pictures, share of
    the training that is behind us, whether the decoder hears codes yet)."""
    world, recipe = job.world, job.recipe
    steps, warm_up = recipe.train.steps, min(WARM_UP, recipe.train.steps // 4)

    def pictures(n: int, generator: torch.Generator) -> Tensor:
        scenes = world.scenes(n, recipe.split, generator=generator)
        return world.pictures(scenes, generator)

    def make_batch(step: int, generator: torch.Generator) -> tuple[Tensor, float, bool]:
        return pictures(recipe.train.batch_size, generator), step / steps, step >= warm_up

    def tend_codes(_: nn.Module, batch: Any, step: int, generator: torch.Generator) -> None:
        x, progress, quantize = batch
        if step == warm_up - 1:
            vqvae.kmeans_start(pictures(256, generator).to(x.device), generator)
        elif quantize and step % REVIVE_EVERY == 0 and progress < 0.7:
            vqvae.revive(x, generator)

    copies = _copies(vqvae, world)
    return job.train(
        model, make_batch, compute_loss, after_step=tend_codes, draw_samples=copies, **options
    )


def _copies(model: PictureCodes, world: CaptionedPictures) -> Callable[[nn.Module], Tensor]:
    """What a run shows of itself: eight test pictures, and these from their codes."""
    examples = world.test_set(world.test_sets[0], 8).pictures

    def draw_samples(_: nn.Module) -> Tensor:
        x = examples.to(next(model.parameters()).device)
        return torch.cat([x, model.decode_tokens(model.tokens(x))])

    return draw_samples


def _evaluate_vqvae(job: Job, model: nn.Module) -> dict[str, Any]:
    assert isinstance(model, PictureCodes)
    return evaluate_vqvae(model, job.world)


# --- VQGAN -------------------------------------------------------------------------------------


def _train_vqgan(job: Job) -> TrainResult:
    """Chapter 2's model against a critic; what pictures look like, the training reader says."""
    recipe = job.recipe
    assert recipe.objective is not None and recipe.critic is not None
    torch.manual_seed(recipe.train.seed)
    model = VQGAN(recipe.model)
    trunk = copy.deepcopy(load_reader("reader")).requires_grad_(False)  # it may change device

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return perceptual_distance(trunk.to(x.device).trunk, x, y)

    def compute_loss(players: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        return players(*batch)

    players = Players(model, Critic(recipe.critic), recipe.objective, distance)
    return _train_codes(job, players, model, compute_loss, betas=PLAYERS_BETAS)


def _evaluate_vqgan(job: Job, players: nn.Module) -> dict[str, Any]:
    assert isinstance(players, Players)
    return evaluate_vqvae(players.generator, job.world)


# --- dVAE --------------------------------------------------------------------------------------


def _train_dvae(job: Job) -> TrainResult:
    world, recipe = job.world, job.recipe
    torch.manual_seed(recipe.train.seed)
    model = DVAE(recipe.model)
    size, steps, side = recipe.train.batch_size, recipe.train.steps, recipe.model.side

    def make_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
        scenes = world.scenes(size, recipe.split, generator=generator)
        noise = gumbel_noise((size, recipe.model.codes, side, side), generator)
        return world.pictures(scenes, generator), noise, step / steps

    def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        x, noise, share = batch
        output = model(x, temperature_at(share), noise)
        return dvae_loss(x, output, kl_weight_at(share, recipe.kl_weight))

    return job.train(model, make_batch, compute_loss, draw_samples=_copies(model, world))


# --- priors over its codes ---------------------------------------------------------------------


@torch.no_grad()
def encode_world(
    vqvae: PictureCodes, world: CaptionedPictures, n: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Scenes (n, facts) and their codes (n, N), computed once: training never touches a pixel."""
    generator = torch.Generator().manual_seed(seed)
    scenes = world.scenes(n, "train", generator=generator)
    parts = [vqvae.tokens(world.pictures(s, generator)) for s in scenes.split(250)]
    return scenes, torch.cat(parts).to(torch.int16)


def _train_prior(job: Job) -> TrainResult:
    world, recipe, vqvae = job.world, job.recipe, job.vqvae()[0]
    size, words = recipe.train.batch_size, job.tokenizer
    scenes, codes = encode_world(vqvae, world, CODES_PER_WORLD[world.name], recipe.train.seed)

    def make_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(scenes), (size,), generator=generator)
        captions = words.encode(world.mixed_captions(scenes[rows], generator))  # new each time
        captions, tokens = drop_captions(captions, DROP_CAPTIONS, generator), codes[rows].long()
        return tokens, slip(tokens, recipe.model.codes, recipe.slips, generator), captions

    def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        tokens, heard, captions = batch
        said = model(heard, captions)
        if isinstance(said, Stream):
            return dalle_loss(said, captions, tokens)
        return prior_loss(said, tokens)

    torch.manual_seed(recipe.train.seed)
    prior = PRIORS[job.system](recipe.model)
    examples = words.encode(world.test_set(world.test_sets[0], 8).captions)

    def draw_samples(_: nn.Module) -> Tensor:
        ids = examples.to(next(prior.parameters()).device)
        drawn = sample(prior, ids, generator=torch.Generator().manual_seed(0))
        return vqvae.decode_tokens(drawn.cpu())

    return job.train(prior, make_batch, compute_loss, draw_samples=draw_samples)


def _evaluate_prior(job: Job, prior: nn.Module) -> dict[str, Any]:
    vqvae, sha256 = job.vqvae()
    assert isinstance(prior, Prior)
    return evaluate_prior(vqvae, prior, job.world, job.tokenizer) | {"vqvae": sha256}


_SYSTEMS: dict[str, tuple[Callable[[Job], TrainResult], Callable[[Job, nn.Module], dict]]] = {
    "judge": (_train_reader, _evaluate_reader),
    "reader": (_train_reader, _evaluate_reader),
    "emoji-judge": (_train_reader, _evaluate_reader),
    "vqvae": (_train_vqvae, _evaluate_vqvae),
    **dict.fromkeys(["vqgan", *ABLATIONS], (_train_vqgan, _evaluate_vqgan)),
    "dvae": (_train_dvae, _evaluate_vqvae),
    **dict.fromkeys(PRIORS, (_train_prior, _evaluate_prior)),
}

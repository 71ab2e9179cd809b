"""Diffusion Transformer: pictures from noise, in pixels, guided by a caption (chapters 8 and 9).

    t2ilearn train diffusion --preset tiny
    t2ilearn draw "a large red star" --with diffusion-tiny --steps 40 --guidance-scale 3

| stage | starts from | trained on top of |
|---|---|---|
| `diffusion` | random weights | – |

One network and one loss: `models.dit` predicts the clean picture from a mixture with noise, by
`models.diffusion.jit_loss`, and `models.diffusion_samplers` draws with it.

Letters: B pictures, T tokens of a caption.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2ilearn import weights
from t2ilearn.data import CaptionedPictures, CaptionTokenizer, TinyShapes, Tokenizer, WordTokenizer
from t2ilearn.data.bpe import SHARED_LENGTH
from t2ilearn.data.captions import CaptionError
from t2ilearn.data.grammar import WORLDS, ReadCaption
from t2ilearn.data.together import worlds_in
from t2ilearn.judging.counting import (
    NO_OTHER,
    mean_of_pictures,
    other_captions,
    picture_numbers,
)
from t2ilearn.judging.report import CHUNK
from t2ilearn.models.diffusion import RectifiedFlow, jit_loss, q_sample
from t2ilearn.models.diffusion_samplers import (
    SAMPLERS,
    Denoiser,
    SamplerStep,
    dynamic_threshold,
    flow_times,
    guided,
    static_threshold,
)
from t2ilearn.models.dit import DiT, DiTConfig
from t2ilearn.models.tokens import null_caption
from t2ilearn.models.transformer import drop_captions
from t2ilearn.systems.base import (
    AnyOptions,
    Options,
    Request,
    Scorer,
    System,
    check_range,
    shortened,
)
from t2ilearn.systems.evaluation import evaluate_system
from t2ilearn.systems.registry import load_part, register
from t2ilearn.systems.stage import Job, Recipe, Stage
from t2ilearn.systems.token_training import DROP_CAPTIONS, both_worlds_for_priors
from t2ilearn.systems.tokens import (
    by_reader,
    encode_captions,
    load_text_tokenizer,
    reader_reads,
)
from t2ilearn.training import TrainConfig, TrainResult
from t2ilearn.weights import Weights, WeightsError

THRESHOLDS = {"none": None, "static": static_threshold, "dynamic": dynamic_threshold}
MOST_STEPS = 1000
MEASURED = 500  # pictures of each test set: each of them is drawn in many steps


# --- training ----------------------------------------------------------------------------------


def _train(job: Job) -> TrainResult:
    """Pictures are rendered anew for each step; a share of the captions is left out."""
    world, recipe, words = job.world, job.recipe, job.text_tokenizer
    process, dropped = RectifiedFlow(), recipe.settings["drop_captions"]

    def make_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pictures, captions = world.sample(
            recipe.train.batch_size, recipe.split, generator=generator
        )
        return pictures, drop_captions(words.encode(captions), dropped, generator)

    def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        pictures, captions = batch
        return jit_loss(model, pictures, process, captions, generator=generator)

    torch.manual_seed(recipe.train.seed)
    model = DiT(recipe.model)
    system = DiffusionSystem(model, words, "", (), dropped > 0)
    examples = tuple(world.test_set(world.test_sets[0], 8).captions)
    options = DiffusionOptions(guidance_scale=2.0 if dropped > 0 else 1.0)

    def draw_samples(_: nn.Module) -> Tensor:
        request = Request(examples, options=options)
        return system.generate(request, torch.Generator().manual_seed(0))

    return job.train(model, make_batch, compute_loss, draw_samples=draw_samples)


def _evaluate(job: Job, model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, DiT):
        raise TypeError(f"{type(model).__name__} is no DiT.")
    dropped = job.recipe.settings["drop_captions"] > 0
    system = DiffusionSystem(model, job.text_tokenizer, "", (), dropped)
    return evaluate_system(system, job.world.worlds, n=MEASURED)


def _build(stored: Weights) -> dict[str, nn.Module]:
    network = DiT(weights.make_config(DiTConfig, stored))
    weights.load_into(network, stored)
    return {"network": network.eval()}


STAGE = Stage(
    "diffusion",
    {
        "tiny": Recipe(
            TinyShapes,
            DiTConfig(
                resolution=32,
                patch=4,
                dim=96,
                num_layers=3,
                vocabulary=WordTokenizer.vocabulary,
                text_length=WordTokenizer.length,
            ),
            TrainConfig(6000, 32, 2e-3, ema_decay=0.998),
            settings={"drop_captions": DROP_CAPTIONS},
        ),
        "book": Recipe(
            both_worlds_for_priors,
            DiTConfig(vocabulary=1024, text_length=SHARED_LENGTH),
            TrainConfig(40_000, 32, 1e-3, ema_decay=0.999),
            text_tokenizer=CaptionTokenizer.shared,
            settings={"drop_captions": DROP_CAPTIONS},
        ),
    },
    _train,
    _evaluate,
    _build,
    reads_captions=True,
    bars={
        "tiny": {"test-full, as drawn": 0.8},
        "book": {
            "test-full, as drawn": 0.8,
            "composition, as drawn": 0.7,
            "emoji, concept, seen, as drawn": 0.8,
            "emoji, concept, held-out, as drawn": 0.35,
            "emoji, style, seen, as drawn": 0.93,
        },
    },
)


# --- drawing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiffusionOptions(Options):
    """How noise becomes a picture.

    Args:
        steps: times at which the network is asked; heun asks it twice at each but the last.
        sampler: ddpm, ddim, dpm, euler or heun; see `models.diffusion_samplers`.
        guidance_scale: 1 follows the caption as learned, more insists on it, 0 ignores it.
        guidance_from, guidance_until: the times, 0 (noise) … 1 (picture), between which the scale
            holds; at others it is 1.
        threshold: of the predicted picture: none, static (clipped) or dynamic (clipped and
            rescaled).
        eta: ddim's noise, 0 (none) … 1 (as ddpm).
        shift: above 1 spends more of the steps near the noise.

    Raises:
        ValueError: for a value out of range, or options that do not go together.
    """

    steps: int = 25
    sampler: str = "dpm"
    guidance_scale: float = 2.0
    guidance_from: float = 0.0
    guidance_until: float = 1.0
    threshold: str = "static"
    eta: float = 0.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_range("number of steps", self.steps, 1, MOST_STEPS)
        check_range("guidance scale", self.guidance_scale, 0, 20)
        check_range("guidance from", self.guidance_from, 0, 1)
        check_range("guidance until", self.guidance_until, self.guidance_from, 1)
        check_range("eta", self.eta, 0, 1)
        check_range("shift", self.shift, 0.1, 10)
        for name, value, known in (
            ("sampler", self.sampler, SAMPLERS),
            ("threshold", self.threshold, THRESHOLDS),
        ):
            if value not in known:
                raise ValueError(f"The {name} is {', '.join(known)}, not {shortened(value)}.")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta is an option of ddim; the sampler is {self.sampler}.")


def denoise(
    network: Callable[..., Tensor],
    conditions: Sequence[Tensor],
    null: Sequence[Tensor],
    process: RectifiedFlow,
    resolution: int,
    options: DiffusionOptions,
    generator: torch.Generator,
) -> Iterator[SamplerStep]:
    """A sampler's steps as the options say, on the device of the conditions.

    Args:
        network: (z, t, and all conditions) → x̂.
        conditions, null: one row a picture; see `diffusion_samplers.guided`.
    """
    interval = (options.guidance_from, options.guidance_until)
    predict = guided(network, conditions, null, options.guidance_scale, interval)
    denoiser = Denoiser(predict, process, "x0", THRESHOLDS[options.threshold])
    count, device = len(conditions[0]), conditions[0].device
    noise = torch.randn(count, 3, resolution, resolution, generator=generator).to(device)
    how: dict[str, Any] = {}
    if options.sampler in ("ddpm", "ddim"):
        how["generator"] = generator
    if options.sampler == "ddim":
        how["eta"] = options.eta
    times = flow_times(options.steps, options.shift)
    return SAMPLERS[options.sampler](denoiser, noise, times, **how)


@register
class DiffusionSystem(System):
    """A network that removes noise, and the captions that guide it.

    Args:
        network: predicts the clean picture.
        text_tokenizer: captions → ids.
        weights_id, worlds: see `System`.
        knows_null: whether some captions were left out in training, so that there is an
            unconditional prediction to guide away from.
    """

    name, title, chapter = "diffusion", "Diffusion Transformer", 9
    shows = "a picture from noise, and how a caption guides it"
    Options, stages = DiffusionOptions, (STAGE,)

    def __init__(
        self,
        network: DiT,
        text_tokenizer: Tokenizer,
        weights_id: str,
        worlds: tuple[str, ...],
        knows_null: bool = True,
    ) -> None:
        self.network, self.text_tokenizer = network, text_tokenizer
        self.weights_id, self.worlds, self.knows_null = weights_id, worlds, knows_null
        self.resolution = network.config.resolution
        self.process = RectifiedFlow()
        self.parts: Mapping[str, nn.Module] = {"network": network}

    @classmethod
    def load(cls, files: Mapping[str, Path]) -> "DiffusionSystem":
        """The system from the weights of its one stage.

        Raises:
            WeightsError: if they are missing or damaged, or of another network.
        """
        (file,) = files.values()
        card, network = weights.read_card(file.with_suffix(".json")), load_part(file)
        if not isinstance(network, DiT):
            raise WeightsError(f"{file} holds {type(network).__name__}, not a DiT.")
        worlds = tuple(world for world in worlds_in(card.data["world"]) if world in WORLDS)
        dropped = card.settings.get("drop_captions", 0.0)
        return cls(network, load_text_tokenizer(file, card), card.sha256[:8], worlds, dropped > 0)

    def steps(self, request: Request, generator: torch.Generator) -> Iterator[Tensor]:
        """The picture x̂ that each step's mixture may become, from a blur to the picture."""
        options = request.options
        if not isinstance(options, DiffusionOptions):
            raise ValueError(f"{self.name} takes DiffusionOptions, not {type(options).__name__}.")
        texts = request.texts()
        self._check_guidance(options, texts)
        for step in self.denoise(texts, options, generator):
            yield step.x.clamp(-1, 1).cpu()

    def denoise(
        self, texts: Sequence[str], options: DiffusionOptions, generator: torch.Generator
    ) -> Iterator[SamplerStep]:
        """The sampler's steps for these captions, on the network's device."""
        caption = self.ids(texts).to(next(self.network.parameters()).device)  # (B, T)
        null = null_caption(*caption.shape).to(caption)
        return denoise(
            self.network, [caption], [null], self.process, self.resolution, options, generator
        )

    def _check_guidance(self, options: DiffusionOptions, texts: Sequence[str]) -> None:
        """Raise ValueError where an unconditional prediction is asked of a model without one."""
        if not self.knows_null and (options.guidance_scale != 1 or not all(texts)):
            raise ValueError(
                f"{self.name} was trained with every caption, so it makes no prediction without "
                "one, and there is nothing to guide it away from. Set the guidance scale to 1, and "
                "give a caption."
            )

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, T) of captions; those of an empty caption are the unconditional ones."""
        return encode_captions(self.text_tokenizer, texts, self.network.config.text_length)

    def read(self, caption: str) -> ReadCaption | None:
        """See `System.read`; of your own pictures any caption can be asked for, but not none."""
        if not self.worlds and not caption.strip():
            raise CaptionError("The caption is empty: say what to draw.")
        return super().read(caption)

    def scorers(self) -> dict[str, Callable[[System], Scorer]]:
        """The training reader of the world."""
        return {"reader": by_reader}

    def default_scorer(self, captions: Sequence[ReadCaption | None]) -> str:
        """The reader where the captions' world has one."""
        return "reader" if reader_reads(captions) else ""

    @classmethod
    def manners(cls) -> dict[str, AnyOptions]:
        """Without guidance, and as `draw` samples by default."""
        return {"as learned": DiffusionOptions(guidance_scale=1.0), "as drawn": cls.Options()}

    @torch.no_grad()
    def likelihood(self, world: CaptionedPictures, n: int = 2000) -> dict[str, Any]:
        """The error of the predicted picture on test pictures, under their own captions, under
        another picture's, and without: what can be measured in any world. Means and intervals are
        over pictures."""
        generator = torch.Generator().manual_seed(0)
        real = world.test_set(world.test_sets[0], n)
        own = self.text_tokenizer.encode(real.captions)
        numbers = picture_numbers(real.pictures)
        count = int(numbers.max()) + 1
        noise = torch.randn(count, *real.pictures.shape[1:], generator=generator)[numbers]
        t = self.process.sample_times(count, generator)[numbers]
        z = q_sample(real.pictures, t, self.process, noise)
        others, every = other_captions(real.captions, numbers), torch.arange(len(own))
        rows = torch.tensor(list(others), dtype=torch.int64)
        captions = {  # the rows that are measured, and the captions that they are given
            "squared error of x̂": (every, own),
            "squared error of x̂, captions shuffled": (rows, own[list(others.values())]),
        }
        if self.knows_null:
            captions["squared error of x̂, no caption"] = (every, null_caption(*own.shape))
        metrics: dict[str, Any] = {"test pictures": count}
        for what, (rows, ids) in captions.items():
            if not len(rows):
                metrics[what] = NO_OTHER
                continue
            parts = zip(z[rows].split(CHUNK), t[rows].split(CHUNK), ids.split(CHUNK), strict=True)
            predicted = torch.cat([self.network(*part) for part in parts])
            error = (predicted - real.pictures[rows]).square().flatten(1).mean(1)  # (B)
            metrics[what] = mean_of_pictures(error, numbers[rows], generator)
        return metrics

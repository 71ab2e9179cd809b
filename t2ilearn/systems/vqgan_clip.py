"""VQGAN-CLIP: pictures optimised until CLIP finds them similar to their prompts (chapter 7).

    draw("a small red star", system="vqgan-clip", steps=100)
    draw((Prompt("a red star"), Prompt("a white background", -0.3)), system="vqgan-clip")

It has no training of its own: the stages `vqgan` (chapter 4) and `clip` (chapter 6) are all it
needs. Prompts may have weights; a negative one steers away.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from t2ilearn import weights
from t2ilearn.data.captions import CaptionError
from t2ilearn.data.grammar import WORLDS, ReadCaption
from t2ilearn.data.pixels import pictures_from_bytes
from t2ilearn.judging.report import reconstructed
from t2ilearn.models.cutouts import CutoutConfig
from t2ilearn.models.vqgan_clip import (
    Latents,
    OptimisationConfig,
    Prompts,
    TokenLogits,
    codec_of,
    make_prompts,
    optimise,
    start_from_noise,
    start_from_pictures,
)
from t2ilearn.models.vqvae import VQVAE
from t2ilearn.systems import registry
from t2ilearn.systems.base import (
    Caption,
    Options,
    Prompt,
    Request,
    Scorer,
    System,
    check_range,
)
from t2ilearn.systems.clip import CLIP_STAGE
from t2ilearn.systems.registry import load_part, register
from t2ilearn.systems.reranking import TrainedCLIP, clip_scorer, load_clip
from t2ilearn.systems.tokens import by_reader
from t2ilearn.systems.vqgan import VQGAN_STAGE

FORMS = ("latents", "logits")


@dataclass(frozen=True)
class VQGANCLIPOptions(Options):
    """How a picture is optimised.

    Args:
        steps: of the optimisation; 0 shows the start.
        learning_rate: of Adam.
        cutouts: squares that CLIP is shown in every step.
        smallest_cutout: the side of the smallest one, as a share of the picture's.
        augment: whether cutouts are turned, recoloured, partly erased and made noisy.
        form: "latents" optimises code vectors, "logits" a distribution over tokens.
        start_from: another system, whose drawing of the same caption is the start; None starts
            from noise, unless the request has a start picture.
        patience: end early after so many steps in which no picture became better; None never does.

    Raises:
        ValueError: for a value out of range.
    """

    steps: int = 100
    learning_rate: float = 0.1
    cutouts: int = 16
    smallest_cutout: float = 0.8
    augment: bool = True
    form: str = "latents"
    start_from: str | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        check_range("number of steps", self.steps, 0, 5000)
        check_range("learning rate", self.learning_rate, 1e-6, 10)
        check_range("number of cutouts", self.cutouts, 1, 512)
        check_range("smallest cutout", self.smallest_cutout, 0.05, 1)
        if self.form not in FORMS:
            raise ValueError(f"The form must be {' or '.join(FORMS)}, not {self.form!r}.")
        if self.patience is not None:
            check_range("patience", self.patience, 1, 5000)

    def for_cutouts(self) -> CutoutConfig:
        """As `models.cutouts.make_cutouts` takes them."""
        config = CutoutConfig(self.cutouts, self.smallest_cutout)
        if self.augment:
            return config
        return dataclasses.replace(
            config, degrees=0.0, perspective=0.0, jitter=0.0, erasing=0.0, noise=0.0
        )


@register
class VQGANCLIPSystem(System):
    """The VQGAN of chapter 4 and the CLIP of chapter 6.

    Args:
        tokenizer: pictures ⇄ code vectors.
        clip: compares pictures with prompts.
        weights_id, worlds: see `System`.
    """

    name, title, chapter = "vqgan-clip", "VQGAN-CLIP", 7
    shows = "a picture optimised towards its caption"
    stages = (VQGAN_STAGE, CLIP_STAGE)
    Options = VQGANCLIPOptions
    takes_start = True

    def __init__(
        self, tokenizer: VQVAE, clip: TrainedCLIP, weights_id: str, worlds: tuple[str, ...]
    ) -> None:
        self.tokenizer, self.clip = tokenizer, clip
        self.weights_id, self.worlds = weights_id, worlds
        self.resolution = tokenizer.config.resolution
        self.parts: Mapping[str, nn.Module] = {"tokenizer": tokenizer, "clip": clip.model}

    @classmethod
    def load(cls, files: Mapping[str, Path]) -> "VQGANCLIPSystem":
        """Both networks from their weights.

        Raises:
            WeightsError: if weights are missing or damaged.
        """
        tokenizer, clip = load_part(files[VQGAN_STAGE.name]), load_clip(files[CLIP_STAGE.name])
        digests = [weights.read_card(f.with_suffix(".json")).sha256[:8] for f in files.values()]
        worlds = tuple(world for world in clip.worlds if world in WORLDS)
        return cls(tokenizer.requires_grad_(False), clip, "-".join(digests), worlds)  # type: ignore[arg-type]

    def steps(self, request: Request, generator: torch.Generator) -> Iterator[Tensor]:
        """The picture at the start and after every step of Adam."""
        options = request.options
        if not isinstance(options, VQGANCLIPOptions):
            raise ValueError(f"{self.name} takes VQGANCLIPOptions, not {type(options).__name__}.")
        prompts = self.prompts(_each_candidate(request))
        for step in optimise(
            self._start(request, options, generator),
            codec_of(self.tokenizer),
            self.clip.model.image_tower,
            prompts,
            self.clip.model.image_tower.config.resolution,
            generator,
            options.for_cutouts(),
            OptimisationConfig(options.steps, options.learning_rate, options.patience),
        ):
            yield step.pictures

    @torch.no_grad()
    def prompts(self, captions: list[Caption]) -> Prompts:
        """The directions in CLIP's space that the captions name.

        Raises:
            ValueError: for a caption without a prompt, or a weight of 0.
            CaptionError: for a text that is empty or too long.
        """
        each = [(Prompt(c),) if isinstance(c, str) else c for c in captions]
        texts = list(dict.fromkeys(prompt.text for prompts in each for prompt in prompts))
        if not all(text.strip() for text in texts):
            raise CaptionError("A prompt is empty: say what to draw.")
        if not texts:
            raise ValueError("A caption without a prompt says nothing to draw.")
        found = self.clip.model.encode_text(self.clip.text_tokenizer.encode(texts))
        embedding = dict(zip(texts, found, strict=True))
        return make_prompts([[(embedding[p.text], p.weight) for p in prompts] for prompts in each])

    def _start(
        self, request: Request, options: VQGANCLIPOptions, generator: torch.Generator
    ) -> Latents | TokenLogits:
        """What is optimised: from noise, the request's picture, or another system's drawing."""
        codec, count = codec_of(self.tokenizer), request.count * request.best_of
        if request.rows:
            raise ValueError(
                f"{self.name} changes the whole of a start picture: rows of it cannot stay. Use a "
                "system that writes tokens to complete pictures."
            )
        if request.start is not None:
            pictures = pictures_from_bytes(request.start)
            pictures = pictures.repeat_interleave(count // len(pictures), 0)
        elif options.start_from is not None:
            pictures = self._drawing_of(options.start_from, request, generator)
        else:
            return start_from_noise(count, codec, generator, options.form)
        return start_from_pictures(self._resized(pictures), codec, options.form)

    def _drawing_of(self, name: str, request: Request, generator: torch.Generator) -> Tensor:
        """What another system draws for the same captions, of each the prompt that weighs most."""
        if registry.find(name).system.name == self.name:
            raise ValueError(f"{self.name} cannot start from itself.")
        other = registry.load(name)
        texts = tuple(_heaviest(caption) for caption in _each_candidate(request))
        return other.generate(Request(texts, name, options=other.make_options()), generator)

    def _resized(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Pictures at the resolution of this system."""
        size = (self.resolution, self.resolution)
        if tuple(pictures.shape[2:]) == size:
            return pictures
        return F.interpolate(pictures, size, mode="bilinear", antialias=True).clamp(-1, 1)

    def read(self, caption: str) -> ReadCaption | None:
        """What a caption states in the worlds that CLIP learned; None for any other text, which is
        a prompt all the same, and for prompts with weights.

        Raises:
            CaptionError: for an empty caption.
        """
        if not caption.strip():
            raise CaptionError("The caption is empty: say what to draw.")
        try:
            return super().read(caption)
        except CaptionError:
            return None

    def scorers(self) -> dict[str, Callable[[System], Scorer]]:
        """The CLIP that drew, as its paper does, and the training reader of the world."""
        return {"clip": lambda _: clip_scorer(self.clip), "reader": by_reader}

    def ceiling(self, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """The best that any tokens could show: real pictures through the tokenizer."""
        return reconstructed(self.tokenizer, pictures)


def _each_candidate(request: Request) -> list[Caption]:
    """The caption of each candidate, with its weights."""
    return [caption for caption in request.captions for _ in range(request.best_of)]


def _heaviest(caption: Caption) -> str:
    """The text of the prompt with the largest weight."""
    return caption if isinstance(caption, str) else max(caption, key=lambda p: p.weight).text

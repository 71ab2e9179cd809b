"""Systems of two stages: a tokenizer of pictures, and a prior that writes tokens from a caption.

Letters: B pictures, T tokens of a caption, N = h · w tokens of a picture.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from t2ilearn import weights
from t2ilearn.data import CaptionedPictures, Tokenizer
from t2ilearn.data.captions import CaptionError
from t2ilearn.data.grammar import WORLDS, ReadCaption
from t2ilearn.data.pixels import pictures_from_bytes
from t2ilearn.data.together import worlds_in
from t2ilearn.judging.alignment import score
from t2ilearn.judging.counting import (
    NO_OTHER,
    mean_of_pictures,
    other_captions,
    picture_numbers,
)
from t2ilearn.judging.reader import load_reader
from t2ilearn.judging.report import CHUNK, reconstructed
from t2ilearn.models.autoencoder import ImageTokenizer
from t2ilearn.models.dalle import encode_prefix
from t2ilearn.models.sampling import sample_steps
from t2ilearn.models.tokens import null_caption
from t2ilearn.models.transformer import Prior, log_likelihood
from t2ilearn.systems.base import (
    AnyOptions,
    Candidates,
    Options,
    Request,
    Scorer,
    System,
    check_range,
    shortened,
)
from t2ilearn.systems.registry import load_part
from t2ilearn.systems.reranking import clip_scorers, load_text_tokenizer
from t2ilearn.weights import WeightsError


@dataclass(frozen=True)
class TokenOptions(Options):
    """How tokens are sampled.

    Args:
        guidance_scale: 1 follows the caption as learned, more insists on it, 0 ignores it.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_p: only the likeliest tokens that together reach this probability; None or 1 for all.
        top_k: only so many likeliest tokens; None for all.

    Raises:
        ValueError: for a value out of range.
    """

    guidance_scale: float = 2.0
    temperature: float = 1.0
    top_p: float | None = 0.9
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_range("guidance scale", self.guidance_scale, 0, 20)
        if not 0 <= self.temperature < float("inf") or 0 < self.temperature < 1e-6:
            raise ValueError(
                "The temperature must be 0 (greedy) or at least 0.000001, not "
                f"{shortened(self.temperature)}."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be in (0, 1], not {shortened(self.top_p)}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k must be 1 or more, not {shortened(self.top_k)}.")

    def for_sampler(self) -> dict[str, Any]:
        """As `models.sampling.sample_steps` takes them."""
        return {
            "guidance_scale": self.guidance_scale,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


class TokenSystem(System):
    """A tokenizer of pictures and a prior over its tokens.

    Args:
        tokenizer: pictures ⇄ tokens.
        prior: tokens from the ids of a caption.
        text_tokenizer: captions → ids.
        weights_id, worlds: see `System`.
    """

    Options = TokenOptions
    takes_start = True

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        prior: Prior,
        text_tokenizer: Tokenizer,
        weights_id: str,
        worlds: tuple[str, ...],
    ) -> None:
        self.tokenizer, self.prior, self.text_tokenizer = tokenizer, prior, text_tokenizer
        self.weights_id, self.worlds = weights_id, worlds
        self.resolution = tokenizer.config.resolution
        self.parts: Mapping[str, nn.Module] = {"tokenizer": tokenizer, "prior": prior}

    @classmethod
    def load(cls, files: Mapping[str, Path]) -> "TokenSystem":
        """The two stages from their weights.

        Raises:
            WeightsError: if weights are missing or damaged, or the prior was trained on the tokens
                of another tokenizer.
        """
        (first, tokenizer_file), (_, prior_file) = files.items()
        cards = [weights.read_card(file.with_suffix(".json")) for file in files.values()]
        wanted = cards[1].parents.get(first)
        if wanted != cards[0].sha256:
            raise WeightsError(
                f"{prior_file} was trained on the tokens of another {first} "
                f"({str(wanted)[:8]}) than {tokenizer_file} ({cards[0].sha256[:8]}), which would "
                "mean something else there. Train the prior again."
            )
        tokenizer, prior = load_part(tokenizer_file), load_part(prior_file)
        if not isinstance(tokenizer, ImageTokenizer) or not isinstance(prior, Prior):
            raise WeightsError(
                f"{tokenizer_file} and {prior_file} hold {type(tokenizer).__name__} and "
                f"{type(prior).__name__}, not a tokenizer of pictures and a prior."
            )
        worlds = worlds_in(cards[1].data["world"])
        return cls(
            tokenizer,
            prior,
            load_text_tokenizer(prior_file, cards[1]),
            "-".join(card.sha256[:8] for card in cards),
            tuple(world for world in worlds if world in WORLDS),
        )

    def steps(self, request: Request, generator: torch.Generator) -> Iterator[Tensor]:
        """The picture after every row of tokens; what is not yet drawn is grey."""
        config = self.prior.config
        for tokens in self.draw_tokens(request, generator):
            done = tokens.shape[1]
            if done % config.side == 0:
                full = F.pad(tokens, (0, config.num_image_tokens - done))
                pictures = self._decode(full)
                pictures[:, :, done // config.side * self.resolution // config.side :] = 0
                yield pictures

    def generate(self, request: Request, generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
        """The finished pictures, decoded once."""
        return self.candidates(request, generator).pictures

    @torch.no_grad()
    def candidates(self, request: Request, generator: torch.Generator) -> Candidates:
        """Finished pictures with their tokens."""
        *_, tokens = self.draw_tokens(request, generator)
        return Candidates(self._decode(tokens), self.read_each(request), tokens)

    @torch.no_grad()
    def _decode(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures of tokens, in [−1, 1]."""
        return self.tokenizer.decode_tokens(tokens).clamp(-1, 1)

    def draw_tokens(
        self, request: Request, generator: torch.Generator
    ) -> Iterator[Int[Tensor, "b n"]]:
        """Tokens one by one; yields all there are after each."""
        options = request.options
        if not isinstance(options, TokenOptions):
            raise ValueError(f"{self.name} takes TokenOptions, not {type(options).__name__}.")
        texts = request.texts()
        if options.top_k is not None and options.top_k > self.prior.config.codebook_size:
            most = self.prior.config.codebook_size
            raise ValueError(f"top-k must be 1 … {most}, not {shortened(options.top_k)}.")
        yield from sample_steps(
            self.prior,
            self.ids(texts),
            start=self._prefix(request, len(texts)),
            generator=generator,
            **options.for_sampler(),
        )

    def _prefix(self, request: Request, count: int) -> Int[Tensor, "b n"]:
        """The tokens of the rows that stay; none without a start picture."""
        if request.start is None:
            return torch.zeros(count, 0, dtype=torch.int64)
        pictures = pictures_from_bytes(request.start)
        tokens = encode_prefix(self.tokenizer, pictures, request.rows)
        return tokens.repeat_interleave(count // len(tokens), 0)

    def ids(self, texts: list[str]) -> Int[Tensor, "n t"]:
        """Ids of captions; those of an empty caption are the unconditional ones."""
        return encode_captions(self.text_tokenizer, texts, self.prior.config.num_text_tokens)

    def read(self, caption: str) -> ReadCaption | None:
        """See `System.read`; of your own pictures any caption can be asked for, but not none."""
        if not self.worlds and not caption.strip():
            raise CaptionError("The caption is empty: say what to draw.")
        return super().read(caption)

    def scorers(self) -> dict[str, Callable[[System], Scorer]]:
        """The training reader of the world, the prior's own likelihood, and CLIP if it ships."""
        return {"reader": by_reader, "likelihood": by_likelihood, **clip_scorers(self)}

    def default_scorer(self, captions: Sequence[ReadCaption | None]) -> str:
        """The reader where the captions' world has one, else the likelihood."""
        return "reader" if reader_reads(captions) else "likelihood"

    @classmethod
    def manners(cls) -> dict[str, AnyOptions]:
        """Without guidance and truncation, and as `draw` samples by default."""
        learned = TokenOptions(guidance_scale=1.0, top_p=None)
        return {"as learned": learned, "as drawn": cls.Options()}

    def ceiling(self, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """The best that the second stage could do: real pictures through the tokenizer."""
        return reconstructed(self.tokenizer, pictures)

    @torch.no_grad()
    def likelihood(self, world: CaptionedPictures, n: int = 2000) -> dict[str, Any]:
        """Nats per token on test pictures, under their own captions, under another picture's, and
        without: what can be measured in any world, also where no judge reads drawings. Means and
        intervals are over pictures."""
        generator = torch.Generator().manual_seed(0)
        real = world.test_set(world.test_sets[0], n)
        own = self.text_tokenizer.encode(real.captions)
        tokens = torch.cat([self.tokenizer.tokens(part) for part in real.pictures.split(CHUNK)])
        numbers = picture_numbers(real.pictures)
        others, every = other_captions(real.captions, numbers), torch.arange(len(own))
        rows = torch.tensor(list(others), dtype=torch.int64)
        captions = {  # the rows that are measured, and the captions that they are given
            "nats a token": (every, own),
            "nats a token, captions shuffled": (rows, own[list(others.values())]),
            "nats a token, no caption": (every, null_caption(*own.shape)),
        }
        metrics: dict[str, Any] = {"test pictures": int(numbers.max()) + 1}
        for what, (rows, ids) in captions.items():
            if not len(rows):
                metrics[what] = NO_OTHER
                continue
            pairs = zip(tokens[rows].split(CHUNK), ids.split(CHUNK), strict=True)
            each = torch.cat([-log_likelihood(self.prior, q, c) / q.shape[1] for q, c in pairs])
            metrics[what] = mean_of_pictures(each, numbers[rows], generator)
        return metrics


def encode_captions(
    text_tokenizer: Tokenizer, texts: Sequence[str], length: int
) -> Int[Tensor, "n t"]:
    """Ids of captions, each of this length; an empty caption is the unconditional one."""
    ids = null_caption(len(texts), length)
    given = [number for number, text in enumerate(texts) if text]
    if given:
        ids[given] = text_tokenizer.encode([texts[number] for number in given])
    return ids


def reader_reads(captions: Sequence[ReadCaption | None]) -> bool:
    """Whether these captions are of one world, and a training reader reads its pictures."""
    worlds = {caption.world if caption else None for caption in captions}
    return len(worlds) == 1 and all(world and world.reader for world in worlds)


def by_reader(system: System) -> Scorer:
    """How surely the training reader finds in a picture what its caption states."""

    def scorer(among: Candidates) -> Tensor:
        captions = [caption for caption in among.captions if isinstance(caption, ReadCaption)]
        readers = {caption.world.reader for caption in captions}
        if len(captions) != len(among.captions) or len(readers) != 1 or None in readers:
            raise ValueError(
                "The training reader reads captions of shapes; let likelihood choose here."
            )
        world = captions[0].world
        return score(load_reader(world.reader or ""), among.pictures, captions, world)

    return scorer


def by_likelihood(system: System) -> Scorer:
    """How likely the prior finds a picture's tokens, given its caption."""

    def scorer(among: Candidates) -> Tensor:
        if not isinstance(system, TokenSystem) or among.tokens is None:
            raise ValueError(f"{system.name} has no tokens, and so no likelihood to choose by.")
        texts = [c if isinstance(c, str) else c.text for c in among.captions]
        return log_likelihood(system.prior, among.tokens, system.ids(texts))

    return scorer

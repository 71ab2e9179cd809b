"""DALL·E 2's prior: from a caption to the embedding of a picture, by diffusion.

    caption y → CLIP's text tower → z_T ┐
    caption y → tokens ─────────────────┴→ diffusion prior → ẑ_I        P(z_I given y)

The prior is a Transformer that removes noise from an image embedding. Its tokens are, in this
order: the caption's tokens, the text embedding, the time, the noisy image embedding, and a learned
query, at which the clean embedding is read. Every token attends to itself and to those before it.

Papers: unCLIP (Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP
Latents", section 2.2), classifier-free guidance (Ho & Salimans 2022).

| symbol | name |
|---|---|
| z_I, z_T (z_i, z_t in the paper) | `image_embedding`, `text_embedding`, both of length 1 |
| z_I^(t), ẑ_I | `noisy`, what `DiffusionPrior` returns |
| y | `caption` |
| L_prior (Eq. 2) | `diffusion_prior_loss` |

Differs from the paper in: the prior works on standardised embeddings (each coordinate minus its
mean, divided by its standard deviation): an embedding of length 1 has coordinates of about 1 / √E,
which Gaussian noise of variance 1 would bury from the first time on.

Letters: B batch, E dimension of CLIP's space, D dimension of a token's vector, T tokens of a
caption, S times.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .clip import unit_length
from .conditioning import INIT_STD, TimeEmbedding, check_captions
from .diffusion import DiffusionLoss, VariancePreserving, ddpm_loss
from .diffusion_samplers import Denoiser, SamplerStep, ddpm_steps, guided, timesteps
from .layers import TransformerBlock, check_finite
from .noise_schedules import cosine_alpha_bar
from .tokens import PAD, null_caption

OTHERS = 4  # tokens of the prior behind the caption's: text embedding, time, noisy, query
TIMES = 1000  # S
CANDIDATES = 2  # embeddings of which the more similar to the text is kept (section 2.2)
HEAD_DIM = 32


def prior_process() -> VariancePreserving:
    """The prior's forward process: 1000 times of the cosine schedule (Table 3 of the paper)."""
    return VariancePreserving(cosine_alpha_bar(TIMES))


def check_embeddings(x: Tensor, dim: int, what: str = "Embeddings") -> None:
    """Raise ValueError unless these are embeddings (B, E), floating and finite."""
    if x.ndim != 2 or x.shape[1] != dim:
        raise ValueError(
            f"{what} have shape (B, {dim}), not {tuple(x.shape)}. They must come from the CLIP "
            "that this model was trained on top of."
        )
    check_finite(what, x)


def no_embedding(x: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
    """∅ for embeddings: zeros, which no embedding of length 1 is."""
    return torch.zeros_like(x)


@dataclass(frozen=True)
class DiffusionPriorConfig:
    """Sizes of a diffusion prior.

    Args:
        embed_dim: E.
        dim: D, a multiple of 32, the width of an attention head.
        num_layers: blocks.
        vocabulary: the number of text tokens there are.
        text_length: T.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    embed_dim: int = 128
    dim: int = 160
    num_layers: int = 4
    vocabulary: int = 1024
    text_length: int = 28

    def __post_init__(self) -> None:
        if self.dim < 1 or self.dim % HEAD_DIM:
            raise ValueError(f"dim must be a multiple of {HEAD_DIM}, not {self.dim}.")
        if min(self.embed_dim, self.num_layers) < 1:
            raise ValueError(
                "embed_dim and num_layers must be at least 1; they are "
                f"{self.embed_dim} and {self.num_layers}."
            )
        if self.vocabulary < 3 or self.text_length < 2:
            raise ValueError(
                "Captions need a vocabulary of 3 tokens or more and a length of 2 or more, not "
                f"{self.vocabulary} and {self.text_length}."
            )


class Standardised(nn.Module):
    """Embeddings ⇄ coordinates of mean 0 and variance 1.

    Both directions return new tensors: an embedding that is scaled in place would be another one
    wherever else it is used.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "n e"]) -> None:
        """Take mean and standard deviation from embeddings.

        Raises:
            ValueError: if a coordinate is the same in all of them.
        """
        check_embeddings(x, len(self.mean))
        std = x.std(0)
        if len(x) < 2 or not (std > 0).all():
            raise ValueError("A coordinate of these embeddings never changes: give more of them.")
        self.mean.copy_(x.mean(0))
        self.std.copy_(std)

    def forward(self, x: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
        """Coordinates of mean 0 and variance 1."""
        return (x - self.mean) / self.std

    def inverse(self, x: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
        """The embedding, of length 1 again."""
        return unit_length(x * self.std + self.mean)


class DiffusionPrior(nn.Module):
    """(noisy, t, text embedding, caption) → ẑ_I, standardised (Ramesh et al. 2022, section 2.2)."""

    def __init__(self, config: DiffusionPriorConfig) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.image_scale = Standardised(config.embed_dim)
        self.text_scale = Standardised(config.embed_dim)
        self.token = nn.Parameter(INIT_STD * torch.randn(config.vocabulary, dim))
        length = config.text_length + OTHERS
        self.position = nn.Parameter(INIT_STD * torch.randn(length, dim))
        self.text_embedding = nn.Linear(config.embed_dim, dim)
        self.no_text = nn.Parameter(torch.zeros(dim))
        self.time = TimeEmbedding(dim, dim)
        self.noisy = nn.Linear(config.embed_dim, dim)
        self.query = nn.Parameter(INIT_STD * torch.randn(dim))
        heads = dim // HEAD_DIM
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads, nn.GELU()) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.last = nn.Linear(dim, config.embed_dim)

    def forward(
        self,
        noisy: Float[Tensor, "b e"],
        t: Float[Tensor, " b"],
        text_embedding: Float[Tensor, "b e"],
        caption: Int[Tensor, "b l"],
    ) -> Float[Tensor, "b e"]:
        """ẑ_I of each, standardised as `noisy` is.

        Args:
            noisy: z_I^(t).
            t: times, 0 … S − 1.
            text_embedding: z_T, of length 1; `no_embedding` for none.
            caption: token ids; `tokens.null_caption` for none.

        Raises:
            ValueError: for other shapes, unknown ids, NaN, or a caption that is all padding.
        """
        self._check(noisy, t, text_embedding, caption)
        words = F.embedding(caption, self.token)  # (B, T, D)
        others = [
            self._text_vector(text_embedding),
            self.time(t),
            self.noisy(noisy),
            self.query.expand(len(noisy), -1),
        ]
        x = torch.cat([words, torch.stack([o.to(words) for o in others], 1)], 1)  # (B, T + 4, D)
        x = x + self.position
        bias = causal_bias(caption != PAD)
        for block in self.blocks:
            x = block(x, bias)
        return self.last(self.norm(x[:, -1]))

    def _text_vector(self, text_embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b d"]:
        """The text embedding's token; a learned vector where there is no embedding."""
        given = text_embedding.any(1, keepdim=True)  # (B, 1)
        return torch.where(
            given, self.text_embedding(self.text_scale(text_embedding)), self.no_text
        )

    def _check(self, noisy: Tensor, t: Tensor, text_embedding: Tensor, caption: Tensor) -> None:
        config = self.config
        check_embeddings(noisy, config.embed_dim, "Noisy embeddings")
        check_embeddings(text_embedding, config.embed_dim, "Text embeddings")
        check_captions(caption, config.vocabulary, config.text_length)
        if not len(noisy) == len(text_embedding) == len(caption) or t.shape != noisy.shape[:1]:
            raise ValueError(
                f"{len(noisy)} noisy embeddings need as many times, text embeddings and captions, "
                f"not {tuple(t.shape)} times, {len(text_embedding)} text embeddings and "
                f"{len(caption)} captions."
            )


def causal_bias(real: Bool[Tensor, "b t"]) -> Float[Tensor, "b 1 s s"]:
    """What the prior's attention adds to its scores: −∞ for later tokens and for padding, else 0.

    A token of padding attends to itself, so that its row has an end; nothing else sees it.
    """
    real = F.pad(real, (0, OTHERS), value=True)  # (B, S)
    count = real.shape[1]
    earlier = torch.ones(count, count, dtype=torch.bool, device=real.device).tril()
    itself = torch.eye(count, dtype=torch.bool, device=real.device)
    allowed = (earlier & real[:, None]) | itself  # (B, S, S)
    bias = torch.zeros(allowed.shape, device=real.device)
    return bias.masked_fill(~allowed, -math.inf)[:, None]


def diffusion_prior_loss(
    prior: nn.Module,
    image_embedding: Float[Tensor, "b e"],
    text_embedding: Float[Tensor, "b e"],
    caption: Int[Tensor, "b l"],
    process: VariancePreserving,
    *,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    t: Tensor | None = None,
) -> DiffusionLoss:
    """L_prior = E ‖f(z_I^(t), t, y) − z_I‖² (Eq. 2): the prior predicts the embedding itself.

    Args:
        prior: a `DiffusionPrior`, with wrappers or without.
        image_embedding: z_I, standardised by the prior's `image_scale`.
        text_embedding: z_T of the same pairs, of length 1; `no_embedding` for none.
        caption: token ids.
        generator, noise, t: see `diffusion.ddpm_loss`.
    """
    conditions = text_embedding, caption
    how: dict[str, Any] = {"generator": generator, "noise": noise, "t": t}
    return ddpm_loss(prior, image_embedding, process, *conditions, target="x0", **how)


def prior_steps(
    prior: DiffusionPrior,
    text_embedding: Float[Tensor, "b e"],
    caption: Int[Tensor, "b l"],
    process: VariancePreserving,
    steps: int,
    guidance_scale: float,
    generator: torch.Generator,
) -> Iterator[SamplerStep]:
    """Standardised embeddings from noise, by DDPM's sampler with classifier-free guidance.

    Raises:
        ValueError: for a number of steps or a guidance scale that there is not, or NaN.
    """
    none = no_embedding(text_embedding), null_caption(*caption.shape).to(caption.device)
    network = guided(prior, [text_embedding, caption], list(none), guidance_scale)
    denoise = Denoiser(network, process, "x0")
    shape = (len(caption), prior.config.embed_dim)
    noise = torch.randn(shape, generator=generator).to(text_embedding)
    return ddpm_steps(denoise, noise, timesteps(steps, process), generator=generator)


def sample_image_embedding(
    prior: DiffusionPrior,
    text_embedding: Float[Tensor, "b e"],
    caption: Int[Tensor, "b l"],
    process: VariancePreserving,
    generator: torch.Generator,
    steps: int = 64,
    guidance_scale: float = 1.0,
    candidates: int = CANDIDATES,
) -> Float[Tensor, "b e"]:
    """ẑ_I of length 1: of some samples the one most similar to z_T (section 2.2).

    Args:
        candidates: how many are sampled for each caption.

    Raises:
        ValueError: if there is no candidate; else as `prior_steps`.
    """
    if candidates < 1:
        raise ValueError(f"At least one embedding must be sampled, not {candidates}.")
    texts, captions = (x.repeat_interleave(candidates, 0) for x in (text_embedding, caption))
    *_, last = prior_steps(prior, texts, captions, process, steps, guidance_scale, generator)
    found = prior.image_scale.inverse(last.z).unflatten(0, (-1, candidates))  # (B, n, E)
    best = torch.einsum("bne, be -> bn", found, text_embedding.to(found)).argmax(1)
    return found[torch.arange(len(found), device=found.device), best]

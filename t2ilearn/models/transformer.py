"""Autoregressive priors over tokens, and the Transformer: what makes a VQ-VAE draw from words.

A prior is one distribution over the next token at a time,

    p(q | c)  =  Π_i  p(q_i | q_1 … q_{i−1}, c)

so that sampling tokens one by one is sampling from the whole. There are two models of the factors:
the Transformer below (Vaswani et al. 2017; Radford et al. 2019; second stage of Esser et al. 2021)
and the PixelCNN in `pixelcnn`. `prior_loss` is the cross-entropy of the product;
`sampling.sample_steps` samples from it.

    caption c_1 … c_T, start, q_1 … q_{N−1}  →  blocks of attention and MLP  →  logits of q_1 … q_N

| symbol | name |
|---|---|
| q_i | `indices[:, i]`, the grid row by row |
| c, ∅ | `caption`, `tokens.null_caption` |

Differs from the papers in: the Transformer's input and output embeddings are one matrix, as in
GPT-2; the embeddings of text, image and positions have one initial scale, because with small
position embeddings the caption is a bag of words, from which the model cannot tell which colour
belongs to which shape; caption tokens attend to each other in both directions.

Letters: B batch, T tokens of a caption, N = h · w tokens of a picture, K code vectors in the
codebook, D dimension of a token's vector.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .layers import KVCache, TransformerBlock, check_ids
from .tokens import PAD, null_caption

INIT_STD = 0.02  # standard deviation of all weights at the start (GPT-2)


@dataclass(frozen=True)
class PriorConfig:
    """Sizes of a prior.

    Args:
        codebook_size: K.
        side: h = w, the side of the grid of tokens.
        dim: D.
        num_layers: blocks of a Transformer, layers of a PixelCNN.
        num_heads: of attention; D must be a multiple.
        vocabulary: the number of text tokens there are; 0 for a prior without captions.
        text_length: T, the tokens of a caption with its padding.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    codebook_size: int = 1024
    side: int = 8
    dim: int = 192
    num_layers: int = 5
    num_heads: int = 6
    vocabulary: int = 0
    text_length: int = 24

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.dim < 1 or self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} must be a multiple of num_heads {self.num_heads}.")
        if self.codebook_size < 2 or min(self.side, self.num_layers) < 1 or self.vocabulary < 0:
            raise ValueError(
                "codebook_size must be at least 2, side and num_layers at least 1, vocabulary at "
                f"least 0; they are {self.codebook_size}, {self.side}, {self.num_layers} and "
                f"{self.vocabulary}."
            )
        if self.vocabulary and self.text_length < 2:
            raise ValueError(f"A caption has at least two tokens, not {self.text_length}.")

    @property
    def num_image_tokens(self) -> int:
        """N, the number of tokens in a picture."""
        return self.side**2

    @property
    def num_text_tokens(self) -> int:
        """T, or 0 for a prior without captions."""
        return self.text_length if self.vocabulary else 0


# --- what every prior has: a loss, inputs for its training, and their checks -------------------


class PriorLoss(NamedTuple):
    """−log p(q | c) / N, in nats per token."""

    cross_entropy: Float[Tensor, ""]
    total: Float[Tensor, ""]


def prior_loss(logits: Float[Tensor, "b n k"], indices: Int[Tensor, "b n"]) -> PriorLoss:
    """Mean cross-entropy of each token given the tokens before it, in float32."""
    cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), indices.flatten())
    return PriorLoss(cross_entropy, total=cross_entropy)


def drop_captions(
    caption: Int[Tensor, "b t"], rate: float, generator: torch.Generator
) -> Int[Tensor, "b t"]:
    """Captions with some replaced by ∅, so that one model learns p(q | c) and p(q).

    Args:
        rate: the share that is replaced, in [0, 1]; Ho & Salimans (2022) use 0.1 to 0.2.
    """
    dropped = torch.rand(len(caption), generator=generator) < rate
    null = null_caption(*caption.shape).to(caption.device)
    return torch.where(dropped.to(caption.device)[:, None], null, caption)


def corrupt_tokens(
    indices: Int[Tensor, "b n"], codebook_size: int, max_share: float, generator: torch.Generator
) -> Int[Tensor, "b n"]:
    """Tokens with some replaced at random: the input of a training whose targets stay correct.

    With correct previous tokens only (teacher forcing), a model completes every picture that it
    has memorised, whatever the caption, and cannot recover from its own first error: exposure bias
    (Ranzato et al. 2016).

    Args:
        codebook_size: K.
        max_share: each picture's own share of replaced tokens is uniform in [0, max_share].
    """
    share = max_share * torch.rand(len(indices), 1, generator=generator)
    replaced = torch.rand(indices.shape, generator=generator) < share
    random = torch.randint(codebook_size, indices.shape, generator=generator)
    return torch.where(replaced.to(indices.device), random.to(indices.device), indices)


class Prior(nn.Module):
    """What all priors have in common: their sizes, and the checks of their inputs."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config

    def check(self, indices: Tensor, caption: Tensor | None) -> None:
        """Raise ValueError if these are not inputs for this prior."""
        length, last = self.config.num_image_tokens, self.config.codebook_size - 1
        self._check_caption(caption)
        if caption is not None and indices.ndim == 2 and len(caption) != len(indices):
            raise ValueError(f"{len(indices)} pictures but {len(caption)} captions.")
        if indices.ndim != 2 or indices.shape[1] > length:
            raise ValueError(
                f"A picture has at most {length} tokens: (B, N ≤ {length}), not "
                f"{tuple(indices.shape)}."
            )
        check_ids("Tokens", indices)
        if indices.numel() and not 0 <= indices.min() <= indices.max() <= last:
            wrong = f"{indices.min().item()} … {indices.max().item()}"
            raise ValueError(f"Tokens are numbers from 0 to {last}; these are {wrong}.")

    def _check_caption(self, caption: Tensor | None) -> None:
        length, last = self.config.num_text_tokens, self.config.vocabulary - 1
        if (caption is None) != (length == 0):
            kind = "with captions: give one" if length else "without captions: give none"
            raise ValueError(f"This is a prior {kind}.")
        if caption is None:
            return
        if caption.ndim != 2 or caption.shape[1] != length:
            raise ValueError(f"Captions have shape (B, {length}), not {tuple(caption.shape)}.")
        check_ids("Text tokens", caption)
        if caption.numel():
            if not 0 <= caption.min() <= caption.max() <= last:
                worst = caption.max().item() if caption.max() > last else caption.min().item()
                raise ValueError(f"Text tokens are numbers from 0 to {last}, not {worst}.")
            if (caption == PAD).all(1).any():
                raise ValueError("A caption is all padding; use null_caption() for no caption.")

    def code_logits(
        self, indices: Int[Tensor, "b n"], caption: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b n k"]:
        """Logits of every image token, given the caption and the image tokens before it."""
        return self(indices, caption)

    def next_logits(
        self,
        indices: Int[Tensor, "b n"],
        caption: Int[Tensor, "b t"] | None = None,
        caches: list[KVCache] | None = None,
    ) -> Float[Tensor, "b k"]:
        """Logits of the token that follows these. Without caches everything is computed again."""
        return self.code_logits(F.pad(indices, (0, 1)), caption)[:, -1]

    def new_caches(self, batch: int) -> list[KVCache] | None:
        """Empty caches for `next_logits`, or None for a prior that has none."""
        return None


@torch.no_grad()
def log_likelihood(
    model: Prior, indices: Int[Tensor, "b n"], caption: Int[Tensor, "b t"] | None = None
) -> Float[Tensor, " b"]:
    """log p(q | c) of whole pictures, in nats: which of several is the likeliest for a caption."""
    logits = model.code_logits(indices, caption).float()
    return -F.cross_entropy(logits.mT, indices, reduction="none").sum(1)


def empty_caches(config: PriorConfig, batch: int, length: int, like: Tensor) -> list[KVCache]:
    """A cache for each block, with room for `length` tokens; like a tensor of the model."""
    sizes = (batch, config.num_heads, length, config.dim // config.num_heads)
    return [KVCache(*sizes, like.detach()) for _ in range(config.num_layers)]


# --- the Transformer ---------------------------------------------------------------------------


class TransformerPrior(Prior):
    """c_1 … c_T, start, q_1 … q_{N−1}  →  logits of q_1 … q_N."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        dim, length = config.dim, config.num_text_tokens + config.num_image_tokens
        if config.vocabulary:
            self.text_embedding = nn.Embedding(config.vocabulary, dim)
        self.start = nn.Parameter(INIT_STD * torch.randn(1, 1, dim))
        self.image_embedding = nn.Embedding(config.codebook_size, dim)
        self.position = nn.Parameter(INIT_STD * torch.randn(length, dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, config.num_heads) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.apply(gpt2_init)

    def forward(
        self, indices: Int[Tensor, "b n"], caption: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b n k"]:
        """Logits of every image token; those of token i depend on the caption and tokens before i.

        Raises:
            ValueError: for tokens out of range, too many of them, or a caption for a prior without
                captions.
        """
        self.check(indices, caption)
        x = self._embed(indices[:, :-1], caption)  # (B, T + N, D): text, start, image
        x = self._through_blocks(x, self._mask(caption, x.shape[1]))
        return self._logits(x[:, self.config.num_text_tokens :])

    def next_logits(
        self,
        indices: Int[Tensor, "b n"],
        caption: Int[Tensor, "b t"] | None = None,
        caches: list[KVCache] | None = None,
    ) -> Float[Tensor, "b k"]:
        """Logits of the token that follows these; what the caches hold is not computed again."""
        if caches is None:
            return super().next_logits(indices, caption)
        seen, total = caches[0].length, self.config.num_text_tokens + 1 + indices.shape[1]
        if seen == 0:
            x = self._embed(indices, caption)
        else:  # one new token a call
            x = self.image_embedding(indices[:, seen - total :]) + self.position[seen:total]
        x = self._through_blocks(x, self._mask(caption, total)[:, :, seen:], caches)
        return self._logits(x[:, -1])

    def new_caches(self, batch: int) -> list[KVCache]:
        """One empty cache a block."""
        return empty_caches(self.config, batch, len(self.position), self.position)

    def _embed(self, indices: Tensor, caption: Tensor | None) -> Float[Tensor, "b total d"]:
        """Text (if any), start and image, each with its position added."""
        parts = [self.start.expand(len(indices), -1, -1), self.image_embedding(indices)]
        if caption is not None:
            parts.insert(0, self.text_embedding(caption))
        x = torch.cat(parts, dim=1)
        return x + self.position[: x.shape[1]]

    def _through_blocks(
        self, x: Tensor, mask: Tensor, caches: list[KVCache] | None = None
    ) -> Float[Tensor, "b _ d"]:
        for number, block in enumerate(self.blocks):
            x = block(x, mask, None if caches is None else caches[number])
        return self.norm(x)

    def _logits(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        return x @ self.image_embedding.weight.T

    def _mask(self, caption: Tensor | None, total: int) -> Bool[Tensor, "_ 1 total total"]:
        """True where attention is allowed: to previous tokens, among all text, never to padding."""
        allowed = torch.ones(total, total, dtype=torch.bool, device=self.position.device).tril()
        if caption is None:
            return allowed[None, None]
        length = self.config.num_text_tokens
        allowed[:length, :length] = True
        real = F.pad(caption != PAD, (0, total - length), value=True)  # (B, total)
        return (allowed & real[:, None])[:, None]


def gpt2_init(module: nn.Module) -> None:
    """Radford et al. 2019: all matrices have one scale, and biases start at 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)

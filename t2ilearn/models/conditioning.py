"""How a diffusion network reads its two conditions: the time, and the tokens of a caption.

Papers: sinusoidal embedding of the time (Vaswani et al. 2017; Ho et al. 2020), a Transformer over
text tokens whose outputs the picture attends to (GLIDE: Nichol et al. 2022; Imagen: Saharia et al.
2022).

| symbol | name |
|---|---|
| t | the time, by `timestep_embedding` |
| c | `caption`; ∅ is `tokens.null_caption`, a caption like any other |

Differs from the papers in: the text encoder is trained with the model, where Imagen's is a frozen
T5. Tokens and positions have one initial scale, because with small position embeddings the caption
is a bag of words, which cannot say which colour belongs to which shape.

Letters: B batch, T tokens of a caption, D dimension of a token's vector.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .layers import TransformerBlock, at_least_float32, check_ids
from .tokens import PAD

INIT_STD = 0.5  # of token and position embeddings alike


def timestep_embedding(
    t: Float[Tensor, " b"],
    dim: int,
    max_period: float = 10_000.0,
    cos_first: bool = False,
    shift: float = 1.0,
) -> Float[Tensor, "b {dim}"]:
    """sin(ω_i t) and cos(ω_i t) with ω_i = max_period^(−i / (dim / 2 − shift)).

    Args:
        t: times; those of a rectified flow, 0 … 1, are multiplied by 1000 first.
        dim: an even number.
        cos_first: the order of the two halves. DDPM has sin first and shift 1; DiT has cos first
            and shift 0.

    Raises:
        ValueError: if dim is odd or too small.
    """
    half = dim // 2
    if dim < 2 or dim % 2 or half <= shift:
        raise ValueError(f"A time's embedding has an even dim above {2 * shift:g}, not {dim}.")
    number = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = (-math.log(max_period) * number / (half - shift)).exp()
    angle = at_least_float32(t)[:, None] * frequency  # (B, dim / 2)
    first, second = (angle.cos(), angle.sin()) if cos_first else (angle.sin(), angle.cos())
    return torch.cat([first, second], dim=1)


class TimeEmbedding(nn.Module):
    """t → a vector, by the sinusoidal embedding and an MLP of two layers.

    Args:
        dim: of the sinusoidal embedding, even.
        outputs: D, the length of the vector.
        scale: t is multiplied by it first.
    """

    def __init__(self, dim: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        self.dim, self.scale = dim, scale
        self.mlp = nn.Sequential(nn.Linear(dim, outputs), nn.SiLU(), nn.Linear(outputs, outputs))

    def forward(self, t: Tensor) -> Float[Tensor, "b d"]:
        """The vector of each time (B,)."""
        t = self.scale * at_least_float32(t)
        waves = timestep_embedding(t, self.dim, cos_first=True, shift=0.0)
        return self.mlp(waves.to(next(self.parameters()).dtype))


class TextTokens(NamedTuple):
    """The vectors of a caption's tokens, and which of them are tokens and no padding."""

    vectors: Float[Tensor, "b t d"]
    real: Bool[Tensor, "b t"]

    def bias(self, others: int = 0) -> Float[Tensor, "b 1 1 keys"]:
        """What attention adds to its scores: −∞ for padding, 0 for tokens and for `others`, keys
        that follow them."""
        bias = torch.zeros(self.real.shape, device=self.real.device)
        bias = bias.masked_fill(~self.real, -math.inf)
        return F.pad(bias, (0, others))[:, None, None]


class TextEncoder(nn.Module):
    """Captions → vectors of their tokens: embeddings, positions and Transformer blocks.

    Attention goes both ways and leaves out padding. The output is only as long as the longest
    caption of the batch.

    Args:
        vocabulary: how many text tokens there are.
        length: T, the tokens of a caption with its padding.
        dim: D.
        num_layers: blocks; with 0, and no positions, the caption would be a bag of words.
        num_heads: of attention; D must be a multiple.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    def __init__(
        self, vocabulary: int, length: int, dim: int, num_layers: int, num_heads: int
    ) -> None:
        super().__init__()
        if vocabulary < 3 or length < 2 or num_layers < 0:
            raise ValueError(
                "A text encoder has a vocabulary of 3 tokens or more, captions of 2 or more, and 0 "
                f"or more layers, not {vocabulary}, {length} and {num_layers}."
            )
        self.vocabulary, self.length = vocabulary, length
        self.token = nn.Parameter(INIT_STD * torch.randn(vocabulary, dim))
        self.position = nn.Parameter(INIT_STD * torch.randn(length, dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, num_heads, nn.GELU()) for _ in range(num_layers)
        )

    def forward(self, caption: Int[Tensor, "b t"]) -> TextTokens:
        """Vectors of tokens.

        Raises:
            ValueError: for another shape, an unknown id, or a caption that is all padding.
        """
        check_captions(caption, self.vocabulary, self.length)
        real = caption != PAD
        longest = int(real.any(0).sum())  # padding is behind the tokens
        caption, real = caption[:, :longest], real[:, :longest]
        x = F.embedding(caption, self.token) + self.position[:longest]
        bias = TextTokens(x, real).bias()
        for block in self.blocks:
            x = block(x, bias)
        return TextTokens(x, real)


def check_captions(caption: Tensor, vocabulary: int, length: int) -> None:
    """Raise ValueError unless these are captions: (B, T) ids of text tokens, none all padding."""
    if caption.ndim != 2 or caption.shape[1] != length:
        raise ValueError(f"Captions have shape (B, {length}), not {tuple(caption.shape)}.")
    check_ids("Text tokens", caption)
    if not len(caption):
        return
    low, high = (end.item() for end in caption.aminmax())
    if not 0 <= low <= high < vocabulary:
        wrong = high if high >= vocabulary else low
        raise ValueError(f"Text tokens are numbers from 0 to {vocabulary - 1}, not {wrong}.")
    if (caption == PAD).all(1).any():
        raise ValueError("A caption is all padding; use null_caption() for no caption.")

"""Bricks without a paper's idea of their own, used by every chapter.

Letters: B batch, C channels, H and W height and width, T tokens, D width, h heads.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + f(x): two 3×3 convolutions, each after a group norm and SiLU (He 2016, pre-activation).

    Shapes: (B, in_channels, H, W) → (B, out_channels, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b _ h w"]:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.skip(x) + y


class KVCache:
    """Keys and values of the tokens seen so far, in buffers allocated once.

    Args:
        batch, heads, length, head_width: sizes of the buffers (B, h, T, D / h).
    """

    def __init__(self, batch: int, heads: int, length: int, head_width: int, like: Tensor) -> None:
        self.keys = like.new_zeros(batch, heads, length, head_width)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values; returns everything so far.

        Raises:
            ValueError: if the buffers are full.
        """
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"The cache holds {self.keys.shape[2]} tokens; {end} do not fit.")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani 2017, Eq. 1)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"The width ({width}) must be a multiple of the heads ({heads}).")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "..."] | None = None,
        cache: KVCache | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "b t d"]:
        """Mix values by softmax(q kᵀ / √(d/h)). `mask` is True where attention is allowed."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class TransformerBlock(nn.Module):
    """Attention, then a two-layer network, each on a normalised copy of the stream (pre-LN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "..."] | None = None,
        cache: KVCache | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "b t d"]:
        x = x + self.attention(self.norm1(x), mask, cache, is_causal)
        return x + self.mlp(self.norm2(x))

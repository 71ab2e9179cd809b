"""Bricks without an idea of their own: what the chapters' models are built from.

Papers: residual blocks with the normalisation first (He et al. 2016b), group norm (Wu & He 2018),
SiLU and GELU (Hendrycks & Gimpel 2016), attention (Vaswani et al. 2017), Transformer blocks with
the normalisation first (Radford et al. 2019, GPT-2).

| symbol | name |
|---|---|
| softmax(q kᵀ / √d) v | `Attention`, Eq. 1 of Vaswani et al.; `SpatialAttention` over places |
| keys and values of tokens already seen | `KVCache` |

Differs from the papers in: nothing that weights could tell: `TransformerBlock` computes what GPT-2
and CLIP compute from the same numbers.

Letters: B batch, C channels, H and W height and width, T tokens, D width, h heads.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

GROUPS = 8  # of group norms, unless said otherwise: channels are multiples of it


def group_norm(channels: int, groups: int = GROUPS, eps: float = 1e-5) -> nn.GroupNorm:
    """A group norm, after a look at its sizes.

    Raises:
        ValueError: if the channels are not a multiple of the groups.
    """
    if channels < 1 or channels % groups:
        raise ValueError(f"Channels must be multiples of {groups}, not {channels}.")
    return nn.GroupNorm(groups, channels, eps)


class ResidualBlock(nn.Module):
    """x + f(x), where f is two 3×3 convolutions, each after a group norm and a SiLU.

    Shapes: (B, in_channels, H, W) → (B, out_channels, H, W). Where the two differ, x passes
    through a 1×1 convolution.

    Args:
        groups, eps: of the group norms.

    Raises:
        ValueError: if a number of channels is not a multiple of the groups.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int = GROUPS, eps: float = 1e-5
    ) -> None:
        super().__init__()
        first, second = (group_norm(c, groups, eps) for c in (in_channels, out_channels))
        self.norm1 = first
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = second
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b _ h w"]:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.skip(x) + y


class SpatialAttention(nn.Module):
    """x + attention of one head over the places of a feature map, after a group norm.

    Shapes: (B, C, H, W) → (B, C, H, W). Each place takes a weighted mean of all H · W places.

    Args:
        groups, eps: of the group norm.

    Raises:
        ValueError: if the channels are not a multiple of the groups.
    """

    def __init__(self, channels: int, groups: int = GROUPS, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups, eps)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).mT for f in (self.q, self.k, self.v))  # (B, HW, C) each
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.mT.reshape(x.shape))


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x): the cheap GELU that OpenAI's CLIP weights were trained with."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x * torch.sigmoid(1.702 * x)


class KVCache:
    """Keys and values of the tokens that one block has seen, so that a new token costs one step.

    Args:
        batch, heads, length, head_width: the buffers are (B, h, T, D / h), allocated once.
        like: a tensor on the device and of the type that the buffers shall have.
    """

    def __init__(self, batch: int, heads: int, length: int, head_width: int, like: Tensor) -> None:
        self.keys = like.new_zeros(batch, heads, length, head_width)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def extend(
        self, keys: Float[Tensor, "b h t d"], values: Float[Tensor, "b h t d"]
    ) -> tuple[Float[Tensor, "b h total d"], Float[Tensor, "b h total d"]]:
        """Append new keys and values; returns everything so far, as views of the buffers.

        Raises:
            ValueError: if the buffers are full, or were made for another batch or width.
        """
        b, h, t, d = keys.shape
        end = self.length + t
        if (b, h, d) != (len(self.keys), self.keys.shape[1], self.keys.shape[3]):
            made, got = tuple(self.keys.shape), tuple(keys.shape)
            raise ValueError(f"This cache was made for keys like {made}, not {got}.")
        if end > self.keys.shape[2]:
            raise ValueError(f"This cache holds {self.keys.shape[2]} tokens; {end} do not fit.")
        if self.length == 0:  # under autocast the keys come in half precision, unlike the stream
            self.keys, self.values = self.keys.to(keys.dtype), self.values.to(values.dtype)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, Eq. 1).

    Raises:
        ValueError: if the width is not a multiple of the heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
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
        """Every token takes a weighted mean of the values of those that it may look at.

        Args:
            mask: True where attention is allowed; broadcasts to (B, h, T, tokens seen in all).
            cache: what came before x; x is appended to it.
            is_causal: every token looks at itself and at those before it, cached ones included.

        Raises:
            ValueError: if both `mask` and `is_causal` are given.
        """
        if mask is not None and is_causal:
            raise ValueError("Give a mask or is_causal=True, not both: put the two into one mask.")
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, T, D / h)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, h, seen, D / h)
            if is_causal:  # PyTorch's own flag would align the first query with the first key
                seen = k.shape[2]
                mask = torch.ones(t, seen, dtype=torch.bool, device=x.device).tril(seen - t)
                is_causal = False
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class TransformerBlock(nn.Module):
    """Attention, then a network of two layers on each token, both on a normalised copy of x.

    Args:
        activation: between the two layers; by default GPT-2's GELU. OpenAI's CLIP has `QuickGELU`.
    """

    def __init__(self, width: int, heads: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            activation or nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
        )

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "..."] | None = None,
        cache: KVCache | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "b t d"]:
        """Arguments as for `Attention`."""
        x = x + self.attention(self.norm1(x), mask, cache, is_causal)
        return x + self.mlp(self.norm2(x))

"""Layers that several chapters share, and guards: of float32, and of what is a picture or a token.

Papers: residual blocks with the normalisation first (He et al. 2016b), group norm (Wu & He 2018),
SiLU and GELU (Hendrycks & Gimpel 2016), attention (Vaswani et al. 2017), Transformer blocks with
the normalisation first (Radford et al. 2019, GPT-2).

| symbol | name |
|---|---|
| softmax(q kᵀ / √d) v | `Attention`, Eq. 1 of Vaswani et al.; `SpatialAttention` over places |
| keys and values of previous tokens | `KVCache` |

Differs from the papers in: nothing that the weights could show: `TransformerBlock` computes what
GPT-2 and CLIP compute from the same numbers.

Letters: B batch, C channels, H and W height and width, T tokens, D dimension of a token's vector,
h attention heads.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

GROUPS = 8  # of group norms, unless stated otherwise: channels are multiples of it
RANGE_TOLERANCE = 1e-3  # pixels may leave [−1, 1] by this much
LEAST_TEMPERATURE = 1e-6  # above 0: logits divided by less overflow in float32


# --- guards ------------------------------------------------------------------------------------


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it has that type already.

    Losses and distances are computed so: half precision rounds small differences to 0.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_pictures(x: Tensor, resolution: int | None = None, multiple_of: int = 1) -> None:
    """Check that a tensor is a batch of pictures: (B, 3, H, W), floating, in [−1, 1].

    Args:
        resolution: H and W; None accepts any size.
        multiple_of: a number that must divide H and W.

    Raises:
        ValueError: for another shape or type, sides of 0, NaN, or values outside [−1, 1].
    """
    sides = "H, W" if resolution is None else f"{resolution}, {resolution}"
    wrong_size = resolution is not None and tuple(x.shape[2:]) != (resolution, resolution)
    if x.ndim != 4 or x.shape[1] != 3 or wrong_size or not x.is_floating_point():
        raise ValueError(
            f"Pictures are float tensors of shape (B, 3, {sides}) with values in [−1, 1]; this is "
            f"{x.dtype} of shape {tuple(x.shape)}."
        )
    if min(x.shape[1:]) == 0:
        raise ValueError(f"There is no pixel in pictures of shape {tuple(x.shape)}.")
    if x.shape[2] % multiple_of or x.shape[3] % multiple_of:
        raise ValueError(
            f"One token stands for {multiple_of} × {multiple_of} pixels: both sides must be "
            f"multiples of {multiple_of}, not {x.shape[2]} × {x.shape[3]}. Crop or resize."
        )
    if len(x) == 0:
        return
    low, high = torch.stack(x.detach().aminmax()).tolist()  # both are NaN if any pixel is
    if not -1 - RANGE_TOLERANCE <= low <= high <= 1 + RANGE_TOLERANCE:
        raise ValueError(
            f"Pixels go from −1 to 1; these go from {low:.3g} to {high:.3g}. "
            "Bytes become pixels by x / 127.5 − 1."
        )


def check_dtype(x: Tensor, weight: Tensor) -> None:
    """Check that numbers have the type of the weights that take them, or autocast is on.

    Raises:
        ValueError: for another type, with the cure.
    """
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        kind = str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"These are {x.dtype}, and the weights of the model are {weight.dtype}: give "
            f"x.to(torch.{kind}), or convert the model by model.to({x.dtype})."
        )


def check_mixtures(z: Tensor, weight: Tensor, resolution: int) -> None:
    """Check that a tensor is a batch of pictures and noise: (B, 3, H, W), of any finite numbers.

    Raises:
        ValueError: for another shape or type, NaN or infinity.
    """
    if z.ndim != 4 or tuple(z.shape[1:]) != (3, resolution, resolution):
        size = f"(B, 3, {resolution}, {resolution})"
        raise ValueError(f"Pictures have shape {size}, not {tuple(z.shape)}.")
    check_dtype(z, weight)
    check_finite("Pictures", z)


def check_finite(what: str, x: Tensor) -> None:
    """Raise ValueError unless these are floating numbers without NaN and infinity."""
    if not x.is_floating_point():
        raise ValueError(f"{what} are floating numbers, not {x.dtype}.")
    if not x.detach().isfinite().all():
        raise ValueError(f"{what} hold NaN or infinity.")


def check_ids(what: str, ids: Tensor) -> None:
    """Raise ValueError unless these are whole numbers of a type that can look up token vectors."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{what} are whole numbers as torch.int64, not {ids.dtype}.")


# --- convolutions ------------------------------------------------------------------------------


def group_norm(channels: int, groups: int = GROUPS, eps: float = 1e-5) -> nn.GroupNorm:
    """A group norm whose sizes were checked.

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

    Shapes: (B, C, H, W) → (B, C, H, W). Each place receives a weighted mean of all H · W places.

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


# --- Transformers ------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x): the cheap GELU that OpenAI's CLIP weights were trained with."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x * torch.sigmoid(1.702 * x)


class KVCache:
    """Keys and values of the tokens that one block has processed, so that none is computed twice.

    Args:
        batch, num_heads, length, head_dim: the buffers are (B, h, T, D / h), allocated once.
        like: a tensor on the device and of the type that the buffers shall have.
    """

    def __init__(
        self, batch: int, num_heads: int, length: int, head_dim: int, like: Tensor
    ) -> None:
        self.keys = like.new_zeros(batch, num_heads, length, head_dim)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def extend(
        self, keys: Float[Tensor, "b h t d"], values: Float[Tensor, "b h t d"]
    ) -> tuple[Float[Tensor, "b h total d"], Float[Tensor, "b h total d"]]:
        """Append new keys and values; returns everything so far, as views of the buffers.

        Raises:
            ValueError: if the buffers are full, or were made for another batch or dimension.
        """
        b, h, t, d = keys.shape
        end = self.length + t
        if (b, h, d) != (len(self.keys), self.keys.shape[1], self.keys.shape[3]):
            made, got = tuple(self.keys.shape), tuple(keys.shape)
            raise ValueError(f"This cache was made for keys like {made}, not {got}.")
        if end > self.keys.shape[2]:
            raise ValueError(f"This cache holds {self.keys.shape[2]} tokens; {end} do not fit.")
        if self.length == 0:  # under autocast the keys come in half precision, unlike x
            self.keys, self.values = self.keys.to(keys.dtype), self.values.to(values.dtype)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def attend(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h s d"],
    v: Float[Tensor, "b h s d"],
    bias: Float[Tensor, "..."],
) -> Float[Tensor, "b h t d"]:
    """softmax(q kᵀ / √d + bias) v: Eq. 1 of Vaswani et al. with numbers added to the scores.

    On a CPU it is computed as it is written, with the softmax in float32: forward and backward take
    half the time of PyTorch's own function there (bfloat16, one thread, 92 tokens).

    Args:
        bias: −∞, or a large negative number, where attention is not allowed; broadcasts to
            (B, h, T, S), S keys.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, h, T, S)
    return (at_least_float32(scores) + bias).softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, Eq. 1).

    Raises:
        ValueError: if `dim` is not a multiple of `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim ({dim}) must be a multiple of num_heads ({num_heads}).")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
        cache: KVCache | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "b t d"]:
        """Every token receives a weighted mean of the values of the tokens that it may attend to.

        Args:
            mask: True where attention is allowed, or numbers to add to the scores; broadcasts to
                (B, h, T, cached + new tokens).
            cache: the tokens before x; x is appended to it.
            is_causal: every token attends to itself and to those before it, cached ones included.

        Raises:
            ValueError: if both `mask` and `is_causal` are given.
        """
        if mask is not None and is_causal:
            raise ValueError("Give mask or is_causal=True, not both; combine the two in one mask.")
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, T, D / h)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, h, total, D / h)
            if is_causal:  # PyTorch's own flag would align the first query with the first key
                total = k.shape[2]
                mask = torch.ones(t, total, dtype=torch.bool, device=x.device).tril(total - t)
                is_causal = False
        if mask is not None and mask.is_floating_point():
            y = attend(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class TransformerBlock(nn.Module):
    """Attention between tokens, then an MLP on each token, each after a layer normalisation.

    Args:
        activation: of the MLP; by default GPT-2's GELU. OpenAI's CLIP has `QuickGELU`.
    """

    def __init__(self, dim: int, num_heads: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim),
            activation or nn.GELU(approximate="tanh"),
            nn.Linear(4 * dim, dim),
        )

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
        cache: KVCache | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "b t d"]:
        """Arguments as for `Attention`."""
        x = x + self.attention(self.norm1(x), mask, cache, is_causal)
        return x + self.mlp(self.norm2(x))

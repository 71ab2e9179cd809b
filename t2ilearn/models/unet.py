"""A conditional U-Net: the network of DDPM, Imagen and DALL·E 2, for small pictures.

    z_t ─ conv ─ blocks ─ ↓ ─ blocks ─ ↓ ─ blocks ─┐
            │        │             │               middle        skip connections: the upper row is
    out ─ conv ─ blocks ─ ↑ ─ blocks ─ ↑ ─ blocks ─┘             concatenated to the lower one

Every block is two convolutions whose second normalisation the time shifts and scales. At small
sides follow self-attention between the places and cross-attention from the places to the tokens of
the caption. With `low_resolution`, the same class is an upsampler: a small picture is enlarged and
given as three more channels. In training some noise is added to the small picture, and its time is
a second condition (noise conditioning), so that flaws of drawn small pictures do not matter.

Papers: U-Net (Ronneberger et al. 2015; as in Ho et al. 2020), shift and scale by the time (Nichol &
Dhariwal 2021; Dhariwal & Nichol 2021), cross-attention to text tokens and noise-conditioned
upsampling (Saharia et al. 2022; Ho et al. 2022, cascaded diffusion).

| symbol | name |
|---|---|
| z_t, t | `z`, `t` |
| c | `caption` |
| the small picture, its time of noise | `low`, `low_t`; `diffusion.q_sample` adds the noise |

Differs from the papers in: self-attention and cross-attention follow each other, where Imagen's
tokens join the keys of self-attention; the text encoder is trained along, with no pooled vector;
no dropout.

Letters: B batch, C channels, H and W height and width, T tokens of a caption, D dimension of a
token's vector.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .conditioning import TextEncoder, TextTokens, TimeEmbedding
from .layers import (
    Attention,
    ResidualBlock,
    attend,
    check_finite,
    check_mixtures,
    group_norm,
)

HEAD_DIM = 32  # channels that one attention head sees


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net.

    Args:
        resolution: H = W, a multiple of 2 for each level after the first.
        channels: C of each level, from the pictures' own side down; multiples of 32.
        blocks: residual blocks of each level on the way down; on the way up there is one more.
        attention_side: levels of this side and smaller have attention.
        text_layers: Transformer blocks over the caption.
        vocabulary: the number of text tokens there are.
        text_length: T, the tokens of a caption with its padding.
        low_resolution: side of the small pictures that an upsampler enlarges; 0 for none.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    resolution: int = 32
    channels: tuple[int, ...] = (32, 64, 128)
    blocks: int = 1
    attention_side: int = 16
    text_layers: int = 1
    vocabulary: int = 1024
    text_length: int = 28
    low_resolution: int = 0

    def __post_init__(self) -> None:
        if not self.channels or any(c < 1 or c % HEAD_DIM for c in self.channels):
            raise ValueError(f"Channels are multiples of {HEAD_DIM}, not {self.channels}.")
        halvings = 2 ** (len(self.channels) - 1)
        if self.resolution < 1 or self.resolution % halvings:
            raise ValueError(
                f"A U-Net of {len(self.channels)} levels halves pictures {len(self.channels) - 1} "
                f"times: their side must be a multiple of {halvings}, not {self.resolution}."
            )
        if self.blocks < 1 or self.text_layers < 0 or self.attention_side < 0:
            raise ValueError(
                "blocks must be at least 1, text_layers and attention_side at least 0; they are "
                f"{self.blocks}, {self.text_layers} and {self.attention_side}."
            )
        if not 0 <= self.low_resolution < self.resolution:
            raise ValueError(
                f"An upsampler's small pictures have a side below {self.resolution}, not "
                f"{self.low_resolution}."
            )
        if self.vocabulary < 3 or self.text_length < 2:
            raise ValueError(
                "Captions need a vocabulary of 3 tokens or more and a length of 2 or more, not "
                f"{self.vocabulary} and {self.text_length}."
            )

    @property
    def text_dim(self) -> int:
        """D: as many numbers as the lowest level has channels."""
        return self.channels[-1]


class TimeResidualBlock(ResidualBlock):
    """A residual block whose second normalisation is shifted and scaled by the time.

    Shapes: (B, in_channels, H, W) and (B, time_dim) → (B, out_channels, H, W). The last convolution
    starts at 0, so that a new block passes x on.
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__(in_channels, out_channels)
        self.modulation = nn.Linear(time_dim, 2 * out_channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b _ h w"], time: Float[Tensor, "b _"]
    ) -> Float[Tensor, "b _ h w"]:
        y = self.conv1(F.silu(self.norm1(x)))
        shift, scale = self.modulation(F.silu(time))[..., None, None].chunk(2, dim=1)
        y = self.norm2(y) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(y))


class CrossAttention(nn.Module):
    """Attention from places to tokens: each place receives a weighted mean of the tokens' values.

    Args:
        dim: C, of the places.
        text_dim: D, of the tokens.
        num_heads: C must be a multiple.
    """

    def __init__(self, dim: int, text_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(text_dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], text: TextTokens) -> Float[Tensor, "b n c"]:
        heads = (self.num_heads, -1)
        q = self.q(x).unflatten(2, heads).transpose(1, 2)  # (B, heads, N, C / heads)
        k, v = (
            part.unflatten(2, heads).transpose(1, 2) for part in self.kv(text.vectors).chunk(2, 2)
        )
        return self.out(attend(q, k, v, text.bias()).transpose(1, 2).flatten(2))


class TextAttention(nn.Module):
    """x + self-attention of the places, then + cross-attention to the caption's tokens.

    Shapes: (B, C, H, W) → (B, C, H, W). Both begin at 0.
    """

    def __init__(self, channels: int, text_dim: int) -> None:
        super().__init__()
        heads = channels // HEAD_DIM
        self.norm1, self.norm2 = group_norm(channels), group_norm(channels)
        self.own = Attention(channels, heads)
        self.cross = CrossAttention(channels, text_dim, heads)
        for layer in (self.own.out, self.cross.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "b c h w"], text: TextTokens) -> Float[Tensor, "b c h w"]:
        places = self.norm1(x).flatten(2).mT  # (B, H · W, C)
        x = x + self.own(places).mT.reshape(x.shape)
        places = self.norm2(x).flatten(2).mT
        return x + self.cross(places, text).mT.reshape(x.shape)


class UNetBlock(nn.Module):
    """A residual block, and attention where the level has it."""

    def __init__(
        self, in_channels: int, out_channels: int, config: UNetConfig, attention: bool
    ) -> None:
        super().__init__()
        self.residual = TimeResidualBlock(in_channels, out_channels, 4 * config.channels[0])
        self.attention = TextAttention(out_channels, config.text_dim) if attention else None

    def forward(
        self, x: Float[Tensor, "b _ h w"], time: Float[Tensor, "b _"], text: TextTokens
    ) -> Float[Tensor, "b _ h w"]:
        x = self.residual(x, time)
        return x if self.attention is None else self.attention(x, text)


class UNet(nn.Module):
    """(z, t, caption) → prediction of ε, x or v; an upsampler takes (…, low, low_t) as well."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, last, levels = config.channels[0], config.channels[-1], len(config.channels)
        sides = [config.resolution // 2**level for level in range(levels)]
        attention = [side <= config.attention_side for side in sides]
        self.time = TimeEmbedding(first, 4 * first)
        self.low_time = TimeEmbedding(first, 4 * first) if config.low_resolution else None
        self.text = TextEncoder(
            config.vocabulary,
            config.text_length,
            config.text_dim,
            config.text_layers,
            config.text_dim // HEAD_DIM,
        )
        self.first = nn.Conv2d(6 if config.low_resolution else 3, first, 3, padding=1)

        self.down, skips, c = nn.ModuleList(), [first], first  # skips: channels to come back to
        for level, channels in enumerate(config.channels):
            for _ in range(config.blocks):
                self.down.append(UNetBlock(c, channels, config, attention[level]))
                skips.append(c := channels)
            if level < levels - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle = nn.ModuleList(
            UNetBlock(last, last, config, with_attention) for with_attention in (True, False)
        )
        self.up = nn.ModuleList()
        for level, channels in reversed(list(enumerate(config.channels))):
            for _ in range(config.blocks + 1):
                self.up.append(UNetBlock(c + skips.pop(), channels, config, attention[level]))
                c = channels
            if level > 0:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))
        self.norm = group_norm(first)
        self.last = nn.Conv2d(first, 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(
        self,
        z: Float[Tensor, "b 3 h w"],
        t: Float[Tensor, " b"],
        caption: Int[Tensor, "b l"],
        low: Float[Tensor, "b 3 lh lw"] | None = None,
        low_t: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """The prediction for each mixture.

        Args:
            z: z_t, whose pixels are not bounded.
            t: the time of each, as numbers from 0 to about 1000; those of a rectified flow are
                multiplied by 1000 first.
            caption: token ids; `tokens.null_caption` for none.
            low: for an upsampler, the small pictures, some noise added.
            low_t: the time up to which it was added.

        Raises:
            ValueError: for pictures of another size or type, NaN, another number of times or
                captions, captions that are none, or small pictures where there should be none, or
                none where there should be some.
        """
        self._check(z, t, caption, low, low_t)
        time, text = self.time(t), self.text(caption)
        if low is not None and self.low_time is not None:
            time = time + self.low_time(low_t)
            large = F.interpolate(low, z.shape[2:], mode="bilinear", antialias=False)
            z = torch.cat([z, large], dim=1)  # (B, 6, H, W)
        x = self.first(z)
        skips = [x]
        for layer in self.down:
            x = layer(x, time, text) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, time, text)
        for layer in self.up:
            if isinstance(layer, UNetBlock):
                x = layer(torch.cat([x, skips.pop()], dim=1), time, text)
            else:
                x = layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.last(F.silu(self.norm(x)))

    def _check(
        self,
        z: Tensor,
        t: Tensor,
        caption: Tensor,
        low: Tensor | None,
        low_t: Tensor | None,
    ) -> None:
        side, low_side = self.config.resolution, self.config.low_resolution
        check_mixtures(z, self.first.weight, side)
        if t.shape != z.shape[:1] or len(caption) != len(z):
            raise ValueError(
                f"{len(z)} pictures need as many times and captions, not {tuple(t.shape)} times "
                f"and {len(caption)} captions."
            )
        check_finite("Times", t)
        if (low is None) != (low_side == 0) or (low_t is None) != (low_side == 0):
            kind = "enlarges small pictures: give low and low_t" if low_side else "takes no low"
            raise ValueError(f"This U-Net {kind}.")
        if low is not None and low_t is not None:
            wanted = (len(z), 3, low_side, low_side)
            if tuple(low.shape) != wanted or low_t.shape != t.shape:
                raise ValueError(
                    f"Small pictures have shape {wanted} and a time each, not {tuple(low.shape)} "
                    f"and {tuple(low_t.shape)}."
                )
            check_mixtures(low, self.first.weight, low_side)
            check_finite("Times", low_t)

"""The VQGANs that were released, network for network (Esser, Rombach & Ommer 2021).

`vqgan` trains a small model with the networks of `vqvae`. The checkpoints of "Taming Transformers",
which the world drew with in 2021, have others, laid out here so that `weights.load_taming` can fill
them, number for number:

    x → conv → levels of residual blocks, each but the last halves the side
             → block, attention, block → norm, swish, conv → 1×1 conv → z
    z_q → 1×1 conv → conv → block, attention, block
             → levels of residual blocks, each but the last doubles the side → norm, swish, conv → x̂

| symbol | name |
|---|---|
| \\|Z\\|, n_z | `codes`, `code_dim`: K and D of `vqvae` |
| f = 2^m | `shrink`; m is one less than the number of `multipliers` |
| E, G | `TamingEncoder`, `TamingDecoder`, with the 1×1 convolutions on either side of the codes |
| τ | `temperature` of `GumbelQuantizer` (Jang, Gu & Poole 2017) |

Differs from the paper in: the layout is that of its code, where the table in its appendix is less
exact. Of that code's quantizers, the first has β on the codebook term by default; ours has it on
the commitment. The Gumbel one adds noise even in evaluation; ours in training only, so that a
picture has the same tokens twice.

Letters: B batch, H and W picture, h and w grid of codes, K codes, D numbers in a code, C channels.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from t2ilearn.layers import ResidualBlock, SpatialAttention, group_norm
from t2ilearn.vqvae import Quantized, precise

_GROUPS, _EPS = 32, 1e-6  # of every group norm here
_QUANTIZERS = ("gradient", "gumbel")


@dataclass(frozen=True)
class TamingConfig:
    """Sizes of a VQGAN of "Taming Transformers".

    Args:
        resolution: side of the pictures it was trained on.
        channels: of the finest level.
        multipliers: one a level: its channels are so many times `channels`.
        blocks: residual blocks a level; the decoder has one more.
        attention_at: sides of the feature maps whose blocks are each followed by attention.
        codes: K.
        code_dim: D.
        quantizer: how the codes learn: "gradient", or by "gumbel" noise.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    resolution: int = 256
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention_at: tuple[int, ...] = (16,)
    codes: int = 1024
    code_dim: int = 256
    quantizer: str = "gradient"

    def __post_init__(self) -> None:
        if self.channels < 1 or self.channels % _GROUPS:
            raise ValueError(f"channels must be a multiple of {_GROUPS}, not {self.channels}.")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers are whole numbers from 1 up, not {self.multipliers}.")
        if self.resolution < self.shrink or self.resolution % self.shrink:
            raise ValueError(
                f"{len(self.multipliers)} levels halve the side {len(self.multipliers) - 1} times: "
                f"the resolution must be a multiple of {self.shrink}, not {self.resolution}."
            )
        if not set(self.attention_at) <= set(self.sides):
            raise ValueError(
                f"attention_at names sides of feature maps. They are {self.sides}, and not all of "
                f"{self.attention_at} is among them."
            )
        if self.quantizer not in _QUANTIZERS:
            raise ValueError(f"quantizer is one of {_QUANTIZERS}, not {self.quantizer!r}.")
        if min(self.codes - 1, self.code_dim, self.blocks) < 1:
            raise ValueError("At least two codes, one number in each, and one block, please.")

    @property
    def shrink(self) -> int:
        """f = H / h, how many pixels each way one code stands for."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def side(self) -> int:
        """h = w, the side of the grid of codes."""
        return self.resolution // self.shrink

    @property
    def sides(self) -> tuple[int, ...]:
        """The side of each level's feature maps, finest first."""
        return tuple(self.resolution // 2**i for i in range(len(self.multipliers)))

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each level's feature maps, finest first."""
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def cosine(self) -> bool:
        """Codes are compared by distance, not by direction."""
        return False

    @property
    def beta(self) -> float:
        """β, weight of the commitment."""
        return 0.25


# Checkpoints by their authors, all trained on 256 × 256: ImageNet, and OpenImages the last.
# https://github.com/CompVis/taming-transformers#overview-of-pretrained-models
RELEASED = {
    "f16-1024": TamingConfig(),
    "f16-16384": TamingConfig(codes=16384),
    "gumbel-f8": TamingConfig(
        multipliers=(1, 1, 2, 4), attention_at=(32,), codes=8192, quantizer="gumbel"
    ),
}


# --- the networks ------------------------------------------------------------------------------


class _Level(nn.Module):
    """Residual blocks on feature maps of one size, attention after each or none, a new size.

    Args:
        widths: channels before, between and after the blocks.
        attends: whether attention follows each block.
        resize: what halves or doubles the side in the end, or `nn.Identity`.
    """

    def __init__(self, widths: list[int], attends: bool, resize: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(*w, _GROUPS, _EPS) for w in pairwise(widths))
        self.attentions = nn.ModuleList(
            SpatialAttention(width, _GROUPS, _EPS) if attends else nn.Identity()
            for width in widths[1:]
        )
        self.resize = resize

    def forward(self, x: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b _ _ _"]:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resize(x)


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(width, width, _GROUPS, _EPS),
        SpatialAttention(width, _GROUPS, _EPS),
        ResidualBlock(width, width, _GROUPS, _EPS),
    )


def _halve(width: int) -> nn.Sequential:
    # Padded on the right and below alone, as TensorFlow does at stride 2; the code's ancestor, that
    # of Ho et al. (2020), was written there.
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))


def _double(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1))


class TamingEncoder(nn.Module):
    """(B, 3, H, W) → (B, D, h, w). H and W may be any multiples of f."""

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        width, last = config.channels, config.widths[-1]
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.levels = nn.ModuleList()  # the finest first
        for side, after in zip(config.sides, config.widths, strict=True):
            resize = _halve(after) if side > config.side else nn.Identity()
            widths = [width] + config.blocks * [after]
            self.levels.append(_Level(widths, side in config.attention_at, resize))
            width = after
        self.middle = _middle(last)
        self.norm_out = group_norm(last, _GROUPS, _EPS)
        self.conv_out = nn.Conv2d(last, config.code_dim, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.code_dim, config.code_dim, 1)

    def forward(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        x = self.middle(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))


class TamingDecoder(nn.Module):
    """(B, D, h, w) → (B, 3, H, W). Nothing clamps the picture to [−1, 1]."""

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.code_dim, 1)
        self.conv_in = nn.Conv2d(config.code_dim, width, 3, padding=1)
        self.middle = _middle(width)
        levels = []  # the coarsest first, as x meets them
        for side, after in zip(config.sides[::-1], config.widths[::-1], strict=True):
            resize = _double(after) if side < config.resolution else nn.Identity()
            widths = [width] + (config.blocks + 1) * [after]
            levels.append(_Level(widths, side in config.attention_at, resize))
            width = after
        self.levels = nn.ModuleList(levels[::-1])  # numbered as the encoder's
        self.norm_out = group_norm(width, _GROUPS, _EPS)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b 3 H W"]:
        x = self.middle(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


# --- the quantizer of the third checkpoint -----------------------------------------------------


class GumbelQuantizer(nn.Module):
    """A code is drawn rather than looked for: logits say how likely each is (Jang et al. 2017).

    In training the drawn code is argmax(logits + Gumbel noise), and the gradient that of the
    softmax at temperature τ. The noise comes from PyTorch's global generator of z's device, the
    one that `torch.manual_seed` sets. In evaluation the most likely code is taken, and no gradient
    reaches z.

    `Quantized.codebook` holds kl_weight · D_KL(q ‖ uniform), which keeps all codes likely at first;
    there is no commitment.

    Args:
        codes, code_dim: K and D.
        temperature: τ, an attribute that a training may lower as it goes.
        kl_weight: of the KL term; the released model was trained with 1e-8.
    """

    def __init__(
        self, codes: int, code_dim: int, temperature: float = 1.0, kl_weight: float = 5e-4
    ) -> None:
        super().__init__()
        self.temperature, self.kl_weight = temperature, kl_weight
        self.proj = nn.Conv2d(code_dim, codes, 1)
        self.embed = nn.Embedding(codes, code_dim)

    def forward(self, z: Float[Tensor, "b d h w"]) -> Quantized:
        logits = self.logits(self.project(z))
        if self.training:
            drawn = F.gumbel_softmax(logits, self.temperature, hard=True, dim=1)
            codes = drawn.argmax(1)
            z_q = torch.einsum("bkhw,kd->bdhw", drawn, self.rows())
        else:
            codes = logits.argmax(1)
            z_q = self.look_up(codes)
        log_q = logits.log_softmax(1)
        divergence = (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(1).mean()
        return Quantized(z_q, codes, self.kl_weight * divergence, z_q.new_zeros(()))

    def project(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """z in float32 or better."""
        return precise(z)

    def logits(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b k h w"]:
        """How likely each code is, before the softmax."""
        with torch.autocast(z.device.type, enabled=False):
            return self.proj(z)

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "b d h w"]) -> Int[Tensor, "b h w"]:
        """The most likely code."""
        return self.logits(z).argmax(1)

    def rows(self) -> Float[Tensor, "k d"]:
        """All K codes."""
        return self.embed.weight

    def look_up(self, codes: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        """Codes' numbers → the codes themselves."""
        return F.embedding(codes, self.rows()).movedim(-1, 1)

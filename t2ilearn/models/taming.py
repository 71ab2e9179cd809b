"""The VQGANs that were released, network for network (Esser, Rombach & Ommer 2021).

The checkpoints of "Taming Transformers" have larger networks than chapter 4's VQGAN. They are laid
out here so that a checkpoint fills them number for number (`pretrained.taming.load_taming`):

    x → conv → levels of residual blocks, each but the last halves the side
             → block, attention, block → norm, swish, conv → 1×1 conv → z
    z_q → 1×1 conv → conv → block, attention, block
             → levels of residual blocks, each but the last doubles the side → norm, swish, conv → x̂

`make_taming_vqgan` puts encoder, quantizer and decoder together: the whole is a `VQVAE`.

| symbol | name |
|---|---|
| \\|Z\\|, n_z | `codebook_size`, `code_dim`: K and D of `vqvae` |
| f = 2^m | `shrink`; m is one less than the number of `multipliers` |
| E, G | `TamingEncoder`, `TamingDecoder`, with the 1×1 convolutions next to the quantizer |
| τ | `temperature` of `GumbelQuantizer` (Jang, Gu & Poole 2017) |

Differs from the paper in: the layout is that of its code, where the table in its appendix is less
exact. Of that code's quantizers, the first has β on the codebook loss by default; ours has it on
the commitment loss. The Gumbel quantizer adds noise even in evaluation; ours in training only, so
that a picture always has the same tokens.

Letters: B batch, H and W picture, h and w grid of tokens, K code vectors, D numbers in each,
C channels.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .dvae import gumbel_noise, gumbel_softmax
from .layers import ResidualBlock, SpatialAttention, at_least_float32, check_pictures, group_norm
from .quantizers import Quantized, Quantizer, VectorQuantizer
from .vqvae import VQVAE

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
        codebook_size: K.
        code_dim: D.
        quantizer: how the codebook learns: "gradient", or by a "gumbel" softmax.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    resolution: int = 256
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention_at: tuple[int, ...] = (16,)
    codebook_size: int = 1024
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
        if min(self.codebook_size - 1, self.code_dim, self.blocks) < 1:
            raise ValueError(
                "codebook_size must be at least 2, code_dim and blocks at least 1; they are "
                f"{self.codebook_size}, {self.code_dim} and {self.blocks}."
            )

    @property
    def shrink(self) -> int:
        """f = H / h, how many pixels each way one token stands for."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def side(self) -> int:
        """h = w, the side of the grid of tokens."""
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
        """Code vectors are compared by distance, not by direction."""
        return False

    @property
    def beta(self) -> float:
        """β, weight of the commitment loss."""
        return 0.25

    def check_pictures(self, x: Tensor) -> None:
        """Raise ValueError if these are not pictures in [−1, 1] whose sides f divides."""
        check_pictures(x, multiple_of=self.shrink)


# Checkpoints by their authors, all trained on 256 × 256: ImageNet, and OpenImages the last.
# https://github.com/CompVis/taming-transformers#overview-of-pretrained-models
RELEASED = {
    "f16-1024": TamingConfig(),
    "f16-16384": TamingConfig(codebook_size=16384),
    "gumbel-f8": TamingConfig(
        multipliers=(1, 1, 2, 4), attention_at=(32,), codebook_size=8192, quantizer="gumbel"
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
        levels = []  # the coarsest first, as in `forward`
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


class GumbelQuantizer(Quantizer):
    """A token is sampled, not searched for: logits give the probability of each (Jang et al. 2017).

    In training the token is argmax(logits + Gumbel noise), and the gradient that of the softmax at
    temperature τ. In evaluation the likeliest token is taken, and no gradient reaches z.

    `Quantized.codebook_loss` holds kl_weight · D_KL(q ‖ uniform), which keeps all tokens likely at
    first; there is no commitment loss.

    Args:
        codebook_size, code_dim: K and D.
        temperature: τ, an attribute that a training may lower as it proceeds.
        kl_weight: of the KL term; the released model was trained with 1e-8.
    """

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        temperature: float = 1.0,
        kl_weight: float = 5e-4,
    ) -> None:
        super().__init__()
        self.temperature, self.kl_weight = temperature, kl_weight
        self.proj = nn.Conv2d(code_dim, codebook_size, 1)
        self.embed = nn.Embedding(codebook_size, code_dim)

    def forward(
        self,
        z: Float[Tensor, "b d h w"],
        noise: Float[Tensor, "b k h w"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        """Sample tokens in training, take the likeliest ones in evaluation.

        Args:
            noise: Gumbel noise, by `gumbel_noise`; None draws it from the generator.
            generator: on the CPU; None means PyTorch's global one.
        """
        logits = self.logits(self.project(z))  # (B, K, h, w)
        if self.training:
            if noise is None:
                noise = gumbel_noise(logits.shape, generator, logits.dtype).to(logits.device)
            y = gumbel_softmax(logits, noise, self.temperature, hard=True)
            indices = y.argmax(1)
            z_q = torch.einsum("bkhw,kd->bdhw", y, self.embeddings())
        else:
            indices = logits.argmax(1)
            z_q = self.lookup(indices)
        log_q = logits.log_softmax(1)
        kl = (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(1).mean()
        return Quantized(z_q, indices, self.kl_weight * kl, z_q.new_zeros(()))

    def project(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """z in float32 or better."""
        return at_least_float32(z)

    def logits(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b k h w"]:
        """The logits of every token at every place."""
        with torch.autocast(z.device.type, enabled=False):
            return self.proj(z)

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "b d h w"]) -> Int[Tensor, "b h w"]:
        """The likeliest token."""
        return self.logits(z).argmax(1)

    def embeddings(self) -> Float[Tensor, "k d"]:
        """The K code vectors."""
        return self.embed.weight


# --- the whole ---------------------------------------------------------------------------------


def make_taming_vqgan(config: TamingConfig) -> VQVAE:
    """A VQGAN in the layout of "Taming Transformers", with new weights.

    It takes pictures of any size that f divides. `decode_tokens` takes the tokens of pictures of
    the config's resolution, `decode_grid` those of any size.
    """
    encoder, decoder = TamingEncoder(config), TamingDecoder(config)
    kind = GumbelQuantizer if config.quantizer == "gumbel" else VectorQuantizer
    return VQVAE(encoder, kind(config.codebook_size, config.code_dim), decoder, config)

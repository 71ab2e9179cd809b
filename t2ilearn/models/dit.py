"""A diffusion Transformer on pixels: patches in, the clean picture out.

    caption → text blocks →  c_1 … c_T ┐
    z_t     → patches     →  p_1 … p_N ┴→ blocks, each modulated by t → patches of x̂

No tokenizer and no U-Net: the network sees the mixture z_t = t x + (1 − t) ε as a row of patches,
each projected to a vector, and predicts x̂. A picture lies on a small surface in the space of all
patches and noise does not, so x̂ passes through D numbers where ε and v would not (Li & He 2025).
`diffusion.jit_loss` trains it, and the samplers of `diffusion_samplers` draw with it.

Papers: JiT (Li & He 2025, "Back to Basics: Let Denoising Generative Models Denoise"), adaLN-Zero
(Peebles & Xie 2023, DiT), one modulation that all blocks share (Chen et al. 2024, PixArt-α).

| symbol | name |
|---|---|
| z_t, x̂ | `z`, what `DiT` returns |
| c | `caption` |
| γ, β, α | `scale`, `shift`, `gate` of `modulate` and `DiTBlock` |

Differs from the papers in: captions take the place of classes, as tokens before the patches; blocks
are GPT-2's (layer normalisation, GELU), where JiT has RMS normalisation, SwiGLU and rotary
positions; patches may overlap in the output (`overlap`).

Letters: B batch, C channels, H and W height and width, P side of a patch, N = (H / P) · (W / P)
patches, T tokens of a caption, D dimension of a token's vector.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .conditioning import TextEncoder, TextTokens, TimeEmbedding
from .layers import Attention, at_least_float32, check_finite, check_mixtures

HEAD_DIM = 32  # numbers of a vector that one attention head sees
TIME_SCALE = 1000.0  # t goes from 0 to 1, and the waves of its embedding are made for 0 … 1000


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a diffusion Transformer.

    Args:
        resolution: H = W.
        patch: P, which must divide the resolution.
        dim: D, a multiple of 32, the width of an attention head.
        num_layers: blocks over text and patches.
        text_layers: blocks over the text alone, before.
        vocabulary: the number of text tokens there are.
        text_length: T, the tokens of a caption with its padding.
        overlap: pixels by which a patch of x̂ reaches into its neighbours, where both are averaged.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    resolution: int = 64
    patch: int = 8
    dim: int = 192
    num_layers: int = 6
    text_layers: int = 1
    vocabulary: int = 1024
    text_length: int = 28
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.patch < 1 or self.resolution < 1 or self.resolution % self.patch:
            raise ValueError(
                f"Patches of {self.patch} pixels do not divide pictures of {self.resolution}."
            )
        if self.dim < 1 or self.dim % HEAD_DIM:
            raise ValueError(f"dim must be a multiple of {HEAD_DIM}, not {self.dim}.")
        if self.num_layers < 1 or self.text_layers < 0:
            raise ValueError(
                "num_layers must be at least 1 and text_layers at least 0; they are "
                f"{self.num_layers} and {self.text_layers}."
            )
        if self.vocabulary < 3 or self.text_length < 2:
            raise ValueError(
                "Captions need a vocabulary of 3 tokens or more and a length of 2 or more, not "
                f"{self.vocabulary} and {self.text_length}."
            )
        if not 0 <= self.overlap <= self.patch:
            raise ValueError(f"The overlap must be 0 … {self.patch}, not {self.overlap}.")

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        return self.dim // HEAD_DIM

    @property
    def side(self) -> int:
        """H / P: patches in a row."""
        return self.resolution // self.patch


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b 1 d"], scale: Float[Tensor, "b 1 d"]
) -> Float[Tensor, "b n d"]:
    """Adaptive layer normalisation: (1 + γ) · norm(x) + β, where γ and β depend on the time."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


class DiTBlock(nn.Module):
    """x + α₁ · attention(modulate(x)), then x + α₂ · MLP(modulate(x)) (Peebles & Xie 2023).

    The α are 0 at first, so that a new block changes nothing (adaLN-Zero).
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Parameter(
            torch.zeros(6, dim)
        )  # what this block adds to the shared one

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b 6 d"],
        bias: Float[Tensor, "b 1 1 n"],
    ) -> Float[Tensor, "b n d"]:
        """One block.

        Args:
            modulation: shift, scale and gate of both branches, at each picture's time.
            bias: see `layers.attend`.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (modulation + self.modulation).to(x.dtype).split(1, dim=1)  # (B, 1, D) each
        )
        x = torch.addcmul(x, gate1, self.attention(modulate(x, shift1, scale1), bias))
        return torch.addcmul(x, gate2, self.mlp(modulate(x, shift2, scale2)))


class ImageContext(NamedTuple):
    """What an image embedding tells the network besides the caption (chapter 10).

    Args:
        time: added to the vector of the time.
        tokens: K tokens behind those of the caption.
        given: where there is an embedding at all; elsewhere `tokens` are not attended to.
    """

    time: Float[Tensor, "b d"]
    tokens: Float[Tensor, "b k d"]
    given: Bool[Tensor, " b"]


class DiT(nn.Module):
    """(z, t, caption) → x̂."""

    places: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, heads, side = config.dim, config.num_heads, config.patch + 2 * config.overlap
        self.text = TextEncoder(
            config.vocabulary, config.text_length, dim, config.text_layers, heads
        )
        self.patches = nn.Linear(3 * config.patch**2, dim)
        self.register_buffer("places", sincos_2d(config.side, dim), persistent=False)
        self.time = TimeEmbedding(dim, dim, TIME_SCALE)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads) for _ in range(config.num_layers))
        self.last_modulation = nn.Linear(dim, 2 * dim)
        self.last = nn.Linear(dim, 3 * side**2)
        self.apply(_init)
        for layer in (self.modulation, self.last_modulation, self.last):
            nn.init.zeros_(layer.weight)

    def forward(
        self,
        z: Float[Tensor, "b 3 h w"],
        t: Float[Tensor, " b"],
        caption: Int[Tensor, "b l"],
        image: ImageContext | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """x̂ of each mixture.

        Args:
            z: z_t, whose pixels are not bounded.
            t: the time of each, 0 (noise) … 1 (picture).
            caption: token ids; `tokens.null_caption` for none.
            image: of an image embedding, if there is one.

        Raises:
            ValueError: for mixtures of another size or type, NaN, another number of times or
                captions, or captions that are none.
        """
        self._check(z, t, caption)
        text, time = self.text(caption), self.time(t)
        if image is not None:
            text, time = _with_image(text, image), time + image.time
        patches = self._patchify(z)
        c = F.silu(time)  # (B, D)
        modulation = self.modulation(c).unflatten(1, (6, -1))  # (B, 6, D)
        x = torch.cat([text.vectors, patches], dim=1)  # (B, T + N, D)
        bias = text.bias(others=patches.shape[1])  # (B, 1, 1, T + N)
        for block in self.blocks:
            x = block(x, modulation, bias)
        shift, scale = self.last_modulation(c).to(x.dtype).unsqueeze(1).chunk(2, dim=-1)
        x = modulate(x[:, -patches.shape[1] :], shift, scale)  # the patches alone
        return self._unpatchify(self.last(x))

    def _patchify(self, z: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Vectors of the patches, row by row, with their places added."""
        pixels = F.pixel_unshuffle(z, self.config.patch).flatten(2).mT  # (B, N, 3 P²)
        return self.patches(pixels) + self.places

    def _unpatchify(self, x: Float[Tensor, "b n _"]) -> Float[Tensor, "b 3 h w"]:
        """Patches at their places; where they overlap, their mean."""
        config, grid = self.config, (self.config.side, self.config.side)
        if config.overlap == 0:
            return F.pixel_shuffle(x.mT.unflatten(2, grid), config.patch)
        size, window = (config.resolution,) * 2, config.patch + 2 * config.overlap
        how = {"kernel_size": window, "stride": config.patch, "padding": config.overlap}
        x = at_least_float32(x)
        counts = F.fold(torch.ones_like(x[:1]).mT, size, **how)
        return F.fold(x.mT, size, **how) / counts

    def _check(self, z: Tensor, t: Tensor, caption: Tensor) -> None:
        side = self.config.resolution
        check_mixtures(z, self.patches.weight, side)
        if t.shape != z.shape[:1] or len(caption) != len(z):
            raise ValueError(
                f"{len(z)} pictures need as many times and captions, not {tuple(t.shape)} times "
                f"and {len(caption)} captions."
            )
        check_finite("Times", t)


def _with_image(text: TextTokens, image: ImageContext) -> TextTokens:
    """The tokens of a caption and of an image embedding."""
    given = image.given[:, None].expand(-1, image.tokens.shape[1])  # (B, K)
    vectors = torch.cat([text.vectors, image.tokens.to(text.vectors)], dim=1)
    return TextTokens(vectors, torch.cat([text.real, given], dim=1))


def sincos_2d(side: int, dim: int) -> Float[Tensor, "n {dim}"]:
    """Positions of a square grid, row by row: half of the numbers are waves of the row, half of the
    column (Dosovitskiy et al. 2021; DiT).

    Args:
        dim: D, a multiple of 4.
    """
    frequency = 10_000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angle = torch.arange(side)[:, None] * frequency  # (side, D / 4)
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)
    row, column = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([row, column], dim=2).flatten(0, 1)


def _init(module: nn.Module) -> None:
    """DiT's start: matrices by Xavier's rule, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)

"""VQ-VAE: pictures as a few discrete codes (van den Oord, Vinyals & Kavukcuoglu 2017).

    x → Encoder → z_e → nearest codebook row → z_q → Decoder → x̂

Equation 3 of the paper has three terms, and `vqvae_loss` returns them under their names:

    L = ‖x − x̂‖²  +  ‖sg[z_e] − e‖²  +  β ‖z_e − sg[e]‖²
        reconstruction   codebook            commitment

| symbol | name |
|---|---|
| z_e, z_q | `z`, `z_q`: the encoder's output and its nearest codes |
| e | `codebook`, K rows of width D |
| sg[·] | `.detach()` |
| β | `beta` |

Differs from the paper in: codes and encodings are compared on the unit sphere when
`config.cosine` (Yu 2022), dead codes are revived, and the codebook may follow its encodings by a
moving average instead of the codebook term (the paper's appendix A.1).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from t2ilearn.layers import ResidualBlock


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of a VQ-VAE; each entry of `channels` halves the picture's side once."""

    resolution: int = 64
    channels: tuple[int, ...] = (32, 64, 128)
    blocks: int = 2
    codes: int = 1024
    code_dim: int = 32
    quantizer: str = "ema"  # or "gradient", "fsq"
    cosine: bool = True
    beta: float = 0.25


class Quantized(NamedTuple):
    """z_q (B, D, h, w) with straight-through gradients, codes (B, h, w), and the two terms."""

    z_q: Tensor
    codes: Tensor
    codebook: Tensor
    commitment: Tensor


class VQVAEOutput(NamedTuple):
    """The reconstruction (B, 3, H, W) and what the quantizer said."""

    reconstruction: Tensor
    quantized: Quantized


class VQVAELoss(NamedTuple):
    """The three terms of Eq. 3, and their weighted sum."""

    reconstruction: Tensor
    codebook: Tensor
    commitment: Tensor
    total: Tensor


def _levels(channels: tuple[int, ...], blocks: int) -> list[int]:
    # Residual blocks are dear where the picture is large: one there, `blocks` at the bottom.
    return [1] * (len(channels) - 1) + [blocks]


class Encoder(nn.Sequential):
    """(B, 3, H, W) → (B, D, H / f, W / f) with f = 2 ** len(channels)."""

    def __init__(self, config: VQVAEConfig) -> None:
        layers: list[nn.Module] = []
        before = 3
        for width, count in zip(
            config.channels, _levels(config.channels, config.blocks), strict=True
        ):
            layers.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
            layers += [ResidualBlock(width, width) for _ in range(count)]
            before = width
        layers += [nn.GroupNorm(8, before), nn.SiLU(), nn.Conv2d(before, config.code_dim, 1)]
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """(B, D, h, w) → (B, 3, h · f, w · f); the mirror of the encoder."""

    def __init__(self, config: VQVAEConfig) -> None:
        channels = config.channels[::-1]
        counts = _levels(config.channels, config.blocks)[::-1]
        layers: list[nn.Module] = [nn.Conv2d(config.code_dim, channels[0], 3, padding=1)]
        for width, after, count in zip(channels, (*channels[1:], 0), counts, strict=True):
            layers += [ResidualBlock(width, width) for _ in range(count)]
            if after:
                layers.append(nn.ConvTranspose2d(width, after, 4, stride=2, padding=1))
        layers += [nn.GroupNorm(8, channels[-1]), nn.SiLU()]
        layers.append(nn.ConvTranspose2d(channels[-1], 3, 4, stride=2, padding=1))
        super().__init__(*layers)


class VectorQuantizer(nn.Module):
    """Nearest neighbours in a codebook that learns from the codebook term's gradient."""

    learns_by_gradient = True
    codebook: Tensor
    counts: Tensor

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.cosine = config.cosine
        rows = torch.randn(config.codes, config.code_dim)
        rows = F.normalize(rows, dim=1) if config.cosine else rows / config.code_dim**0.5
        self.register_buffer("counts", torch.ones(config.codes))
        self._make_codebook(rows)

    def _make_codebook(self, rows: Tensor) -> None:
        self.codebook = nn.Parameter(rows)

    def rows(self) -> Float[Tensor, "k d"]:
        """The codebook as it is compared: on the unit sphere if `cosine`."""
        return F.normalize(self.codebook, dim=1) if self.cosine else self.codebook

    def nearest(self, flat: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """argmin_k ‖z − e_k‖², written out so that no (N, K, D) tensor is made."""
        rows = self.rows()
        return ((rows**2).sum(1) - 2 * flat @ rows.T).argmin(1)

    def forward(self, z: Float[Tensor, "b d h w"]) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):  # distances need float32
            z = z.float()
            if self.cosine:
                z = F.normalize(z, dim=1)
            flat = z.permute(0, 2, 3, 1).flatten(0, 2)  # (B·h·w, D)
            codes = self.nearest(flat.detach())
            if self.training:
                self._observe(flat.detach(), codes)
            picked = self.rows()[codes].view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
            codebook = F.mse_loss(picked, z.detach())
            commitment = F.mse_loss(z, picked.detach())
            z_q = z + (picked - z).detach()  # straight through: the gradient is copied to z
        return Quantized(z_q, codes.view(z.shape[0], *z.shape[2:]), codebook, commitment)

    @torch.no_grad()
    def _observe(self, flat: Tensor, codes: Tensor) -> None:
        used = torch.bincount(codes, minlength=len(self.counts)).float()
        self.counts.lerp_(used, 0.01)

    @torch.no_grad()
    def replace(self, which: Int[Tensor, " m"], rows: Float[Tensor, "m d"]) -> None:
        """Overwrite codes, and forget what they had counted."""
        self.codebook[which] = rows
        self.counts[which] = 1.0


class EMAQuantizer(VectorQuantizer):
    """A codebook that follows the mean of its encodings by a moving average (appendix A.1)."""

    learns_by_gradient = False
    decay = 0.99
    sums: Tensor

    def _make_codebook(self, rows: Tensor) -> None:
        self.register_buffer("codebook", rows)
        self.register_buffer("sums", rows.clone())

    @torch.no_grad()
    def _observe(self, flat: Tensor, codes: Tensor) -> None:
        used = torch.bincount(codes, minlength=len(self.counts)).to(flat.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, flat)
        self.counts.lerp_(used, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total, size = self.counts.sum(), len(self.counts)
        smoothed = (self.counts + 1e-5) / (total + size * 1e-5) * total  # Laplace
        self.codebook.copy_(self.sums / smoothed[:, None])

    @torch.no_grad()
    def replace(self, which: Int[Tensor, " m"], rows: Float[Tensor, "m d"]) -> None:
        super().replace(which, rows)
        self.sums[which] = rows  # count 1, sum = the row: or the old mean comes back


class VQVAE(nn.Module):
    """Encoder, quantizer and decoder."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        kinds: dict[str, type[VectorQuantizer]] = {"ema": EMAQuantizer, "gradient": VectorQuantizer}
        if config.quantizer not in kinds:
            raise ValueError(f"Unknown quantizer {config.quantizer!r}; one of {', '.join(kinds)}.")
        self.quantizer: VectorQuantizer = kinds[config.quantizer](config)
        self.side = config.resolution // 2 ** len(config.channels)

    def encode(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d _ _"]:
        """Encodings z_e before quantisation."""
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % 2 ** len(self.config.channels):
            raise ValueError(f"Expected (B, 3, H, W) with H, W divisible; got {tuple(x.shape)}.")
        return self.encoder(x)

    def tokens(self, x: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b n"]:
        """Codes row by row."""
        return self.quantizer(self.encode(x)).codes.flatten(1)

    def decode_tokens(self, codes: Int[Tensor, "b n"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures from codes."""
        if codes.min() < 0 or codes.max() >= self.config.codes:
            raise ValueError(f"Codes are 0 … {self.config.codes - 1}.")
        z = self.quantizer.rows()[codes]  # (B, N, D)
        return self.decoder(z.transpose(1, 2).unflatten(2, (self.side, self.side)))

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> VQVAEOutput:
        quantized = self.quantizer(self.encode(x))
        return VQVAEOutput(self.decoder(quantized.z_q), quantized)

    @torch.no_grad()
    def _flat(self, x: Tensor, generator: torch.Generator) -> Tensor:
        z = self.encode(x)
        z = F.normalize(z, dim=1) if self.config.cosine else z
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        return flat[torch.randperm(len(flat), generator=generator)]

    def revive(self, x: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> int:
        """Move codes that nothing has used lately onto random encodings; returns how many."""
        dead = (self.quantizer.counts < 0.03).nonzero()[:, 0]
        flat = self._flat(x, generator)[: len(dead)]
        self.quantizer.replace(dead[: len(flat)], flat)
        return len(dead)

    def kmeans_start(
        self, x: Float[Tensor, "b 3 h w"], generator: torch.Generator, rounds: int = 5
    ) -> None:
        """Start the codebook at the centres of real encodings instead of at random."""
        flat = self._flat(x, generator)
        for _ in range(rounds):
            codes = self.quantizer.nearest(flat)
            sums = torch.zeros_like(self.quantizer.codebook).index_add_(0, codes, flat)
            counts = torch.bincount(codes, minlength=len(sums))
            empty = counts == 0
            rows = sums / counts.clamp(min=1)[:, None]
            spare = torch.randint(len(flat), (int(empty.sum()),), generator=generator)
            rows[empty] = flat[spare]
            self.quantizer.replace(torch.arange(len(rows)), rows)


def vqvae_loss(x: Float[Tensor, "b 3 h w"], output: VQVAEOutput, beta: float = 0.25) -> VQVAELoss:
    """The three terms of Eq. 3. A moving-average codebook takes no gradient: its term is shown,
    and moves nothing."""
    reconstruction = F.mse_loss(output.reconstruction.float(), x)
    codebook, commitment = output.quantized.codebook, output.quantized.commitment
    total = reconstruction + codebook + beta * commitment
    return VQVAELoss(reconstruction, codebook, commitment, total)

"""From a picture to a small grid of vectors and back: the autoencoder and the VAE.

    x → encoder → z → decoder → x̂                                        autoencoder
    x → encoder → μ, ln σ²;   z = μ + σ ε → decoder → x̂                  VAE

Papers: VAE (Kingma & Welling 2014). The networks are those of VQ-VAE (van den Oord, Vinyals &
Kavukcuoglu 2017), and `ImageTokenizer` is what VQ-VAE, VQGAN and dVAE have in common.

| symbol | name |
|---|---|
| x, x̂ | `x`, `reconstruction` |
| μ, ln σ² | `mean`, `log_variance` of q(z given x) |
| ε | `noise`, N(0, 1) |
| ½ Σ (μ² + σ² − 1 − ln σ²) | `kl`, the KL term, in closed form (appendix B) |

Differs from the papers in: squares are means over numbers, not sums; the VAE's bound is multiplied
by 2σ² of the decoder's Gaussian, so that the reconstruction term has weight 1.

Letters: B batch, H and W picture, h and w grid of vectors, N = h · w, D numbers in a vector,
K code vectors in a codebook.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .layers import GROUPS, at_least_float32, check_dtype, check_ids, check_pictures


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of a model that turns a picture into a grid of vectors, or of tokens.

    Args:
        resolution: side of the picture, H = W.
        channels: one entry a level; each level halves the side, so that h = H / 2^levels.
        blocks: residual blocks in the coarsest level; the finer levels, which cost more, have one.
        codebook_size: K, for a model with a codebook.
        code_dim: D.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    resolution: int = 64
    channels: tuple[int, ...] = (32, 64, 128)
    blocks: int = 2
    codebook_size: int = 1024
    code_dim: int = 32

    def __post_init__(self) -> None:
        if not self.channels or any(c < 1 or c % GROUPS for c in self.channels):
            raise ValueError(f"channels must be multiples of {GROUPS}, not {self.channels}.")
        factor = 2 ** len(self.channels)
        if self.resolution < factor or self.resolution % factor:
            raise ValueError(
                f"{len(self.channels)} levels halve the side {len(self.channels)} times: the "
                f"resolution must be a multiple of {factor}, not {self.resolution}."
            )
        if min(self.codebook_size - 1, self.code_dim, self.blocks) < 1:
            raise ValueError(
                "codebook_size must be at least 2, code_dim and blocks at least 1; they are "
                f"{self.codebook_size}, {self.code_dim} and {self.blocks}."
            )

    @property
    def side(self) -> int:
        """h = w, the side of the grid."""
        return self.resolution // 2 ** len(self.channels)

    def check_pictures(self, x: Tensor) -> None:
        """Raise ValueError if these are not pictures of this resolution, in [−1, 1]."""
        check_pictures(x, self.resolution)


# --- the networks ------------------------------------------------------------------------------


def _blocks_per_level(config: AutoencoderConfig) -> list[int]:
    return [1] * (len(config.channels) - 1) + [config.blocks]


class ResidualConvBlock(nn.Module):
    """x + f(x), where f is two 3×3 convolutions without any normalisation, and starts at 0.

    The blocks of the VQ-VAE paper have no normalisation either. In short trial runs on captioned
    shapes these learned faster than blocks with group norms, but diverged at a learning rate of
    2e-3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b _ h w"]:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Encoder(nn.Sequential):
    """(B, 3, H, W) → (B, outputs, h, w); by default D outputs."""

    def __init__(self, config: AutoencoderConfig, outputs: int | None = None) -> None:
        layers: list[nn.Module] = []
        before = 3
        for channels, count in zip(config.channels, _blocks_per_level(config), strict=True):
            layers.append(nn.Conv2d(before, channels, 4, stride=2, padding=1))
            layers += [ResidualConvBlock(channels) for _ in range(count)]
            before = channels
        layers += [nn.GroupNorm(GROUPS, before), nn.SiLU()]
        layers.append(nn.Conv2d(before, outputs or config.code_dim, 1))
        super().__init__(*layers)

    def forward(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b _ h w"]:
        """z of each picture. Raises ValueError for numbers of another type than the weights."""
        check_dtype(x, self[0].weight)  # type: ignore[arg-type]
        return super().forward(x)


class Decoder(nn.Sequential):
    """(B, D, h, w) → (B, outputs, H, W), the mirror image of the encoder.

    By default the outputs are 3, a picture. It is not clamped to [−1, 1].
    """

    def __init__(self, config: AutoencoderConfig, outputs: int = 3) -> None:
        widths, counts = config.channels[::-1], _blocks_per_level(config)[::-1]
        layers: list[nn.Module] = [nn.Conv2d(config.code_dim, widths[0], 3, padding=1)]
        for channels, after, count in zip(widths, (*widths[1:], 0), counts, strict=True):
            layers += [ResidualConvBlock(channels) for _ in range(count)]
            if after:
                layers.append(nn.ConvTranspose2d(channels, after, 4, stride=2, padding=1))
        layers += [nn.GroupNorm(GROUPS, widths[-1]), nn.SiLU()]
        layers.append(nn.ConvTranspose2d(widths[-1], outputs, 4, stride=2, padding=1))
        super().__init__(*layers)


# --- the autoencoder ---------------------------------------------------------------------------


class AutoencoderLoss(NamedTuple):
    """The loss of an autoencoder: one term."""

    reconstruction: Float[Tensor, ""]
    total: Float[Tensor, ""]


class Autoencoder(nn.Module):
    """An encoder, a bottleneck of (D, h, w) numbers, and a decoder."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The reconstruction x̂.

        Raises:
            ValueError: for pictures of another resolution, or with values outside [−1, 1].
        """
        self.config.check_pictures(x)
        return self.decoder(self.encoder(x))


def autoencoder_loss(
    x: Float[Tensor, "b 3 h w"], reconstruction: Float[Tensor, "b 3 h w"]
) -> AutoencoderLoss:
    """‖x − x̂‖², as a mean over pictures, channels and pixels."""
    error = F.mse_loss(at_least_float32(reconstruction), x)
    return AutoencoderLoss(error, total=error)


# --- the VAE -----------------------------------------------------------------------------------


class VAEOutput(NamedTuple):
    """x̂, and the Gaussian q(z | x) that the encoder predicts: its mean μ and ln σ²."""

    reconstruction: Float[Tensor, "b 3 H W"]
    mean: Float[Tensor, "b d h w"]
    log_variance: Float[Tensor, "b d h w"]


class VAELoss(NamedTuple):
    """The two terms of the evidence lower bound (ELBO), and their weighted sum."""

    reconstruction: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    total: Float[Tensor, ""]


class VAE(nn.Module):
    """An autoencoder whose encoder predicts a Gaussian, q(z | x) (Kingma & Welling 2014)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config, 2 * config.code_dim), Decoder(config)

    def forward(self, x: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> VAEOutput:
        """The reparameterisation trick: z = μ + σ ε with ε ~ N(0, 1), so that gradients reach μ
        and σ (section 2.4).

        Args:
            generator: on the CPU; ε is drawn from it.

        Raises:
            ValueError: for pictures of another resolution, or with values outside [−1, 1].
        """
        self.config.check_pictures(x)
        mean, log_variance = at_least_float32(self.encoder(x)).chunk(2, dim=1)  # (B, D, h, w) each
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
        z = mean + (log_variance / 2).exp() * noise
        return VAEOutput(self.decoder(z), mean, log_variance)

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
        """New pictures: z is drawn from the fixed prior N(0, 1) and decoded."""
        side, weight = self.config.side, next(self.decoder.parameters())
        z = torch.randn(count, self.config.code_dim, side, side, generator=generator)
        return self.decoder(z.to(weight))


def vae_loss(x: Float[Tensor, "b 3 h w"], output: VAEOutput, sigma: float = 0.1) -> VAELoss:
    """The negative ELBO (Eq. 7 with appendix B), multiplied by 2σ² and divided by the number of
    values in x.

    Args:
        sigma: standard deviation of the decoder's Gaussian, p(x | z). With a large σ the KL term
            dominates, and all pictures get the same z: posterior collapse.
    """
    mean, log_variance = output.mean, output.log_variance
    per_picture = (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1) / 2
    reconstruction = F.mse_loss(at_least_float32(output.reconstruction), x)
    kl = per_picture.mean() / x[0].numel()  # KL(q ‖ N(0, 1)), in nats per value of x
    total = reconstruction + 2 * sigma**2 * kl
    return VAELoss(reconstruction, kl, total)


# --- what VQ-VAE, VQGAN and dVAE have in common ------------------------------------------------


class ImageTokenizer(nn.Module):
    """A model that turns a picture into N = h · w tokens, and tokens into a picture."""

    config: Any  # its sizes: `resolution`, `side` and `codebook_size` at least

    def tokens(self, x: Float[Tensor, "b 3 H W"]) -> Int[Tensor, "b n"]:
        """The picture's tokens, row by row.

        Raises:
            ValueError: for pictures of a size that the model does not take, or with values outside
                [−1, 1].
        """
        raise NotImplementedError

    def decode_tokens(self, indices: Int[Tensor, "b n"]) -> Float[Tensor, "b 3 H W"]:
        """Tokens row by row → pictures, not clamped.

        Raises:
            ValueError: if their number is not h · w, one is outside 0 … K − 1, or they are not
                whole numbers.
        """
        side, last = self.config.side, self.config.codebook_size - 1
        if indices.ndim != 2 or indices.shape[1] != side**2:
            raise ValueError(
                f"A picture has {side}² tokens: (B, {side**2}), not {tuple(indices.shape)}."
            )
        check_ids("Tokens", indices)
        if indices.numel() and not 0 <= indices.min() <= indices.max() <= last:
            wrong = f"{indices.min().item()} … {indices.max().item()}"
            raise ValueError(f"Tokens are numbers from 0 to {last}; these are {wrong}.")
        return self.decode_grid(indices.unflatten(1, (side, side)))

    def decode_grid(self, indices: Int[Tensor, "b h w"]) -> Float[Tensor, "b 3 H W"]:
        """A grid of valid tokens → pictures, not clamped."""
        raise NotImplementedError

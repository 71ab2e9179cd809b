"""VQ-VAE: a picture as a small grid of tokens (van den Oord, Vinyals & Kavukcuoglu 2017).

    x → encoder → z → the nearest code vector e of a codebook → z_q → decoder → x̂

The loss has three terms (Eq. 3), and each one trains its own part:

    L  =  ‖x − x̂‖²   +   ‖sg[z] − e‖²   +   β ‖z − sg[e]‖²
        reconstruction     codebook           commitment
      encoder and decoder  the codebook only  the encoder only

| symbol | name |
|---|---|
| x, x̂ | `x`, `reconstruction` |
| z_e(x) | `z`, the encoder's output |
| e | a code vector: a row of the codebook, K × D; also the nearest one, for each place |
| z_q(x) | `z_q`, the decoder's input: the value of e with the gradient of z |
| sg[·] | `.detach()` |
| β | `beta` |

Differs from the paper in: squares are means over numbers, not sums; see also `quantizers`.

Letters: B batch, H and W picture, h and w grid of tokens, N = h · w, K code vectors, D numbers in
each.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .autoencoder import AutoencoderConfig, Decoder, Encoder, ImageTokenizer
from .layers import at_least_float32
from .quantizers import QUANTIZERS, Quantized, Quantizer, VectorQuantizer, make_quantizer


@dataclass(frozen=True)
class VQVAEConfig(AutoencoderConfig):
    """Sizes of a VQ-VAE.

    Args:
        resolution, channels, blocks, codebook_size, code_dim: see `AutoencoderConfig`. For "fsq" K
            must be the D-th power of a whole number: 512 = 8³.
        quantizer: how the codebook learns: "ema", "gradient", or not at all, "fsq".
        cosine: compare directions only; "fsq" ignores it.
        beta: β, weight of the commitment loss.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    quantizer: str = "ema"
    cosine: bool = True
    beta: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer is one of {QUANTIZERS}, not {self.quantizer!r}.")
        if self.beta < 0:
            raise ValueError(f"β must be 0 or more, not {self.beta}.")


class VQVAEOutput(NamedTuple):
    """x̂, and the quantizer's output."""

    reconstruction: Float[Tensor, "b 3 H W"]
    quantized: Quantized


class VQVAELoss(NamedTuple):
    """The three terms of Eq. 3, and their weighted sum."""

    reconstruction: Float[Tensor, ""]
    codebook_loss: Float[Tensor, ""]
    commitment_loss: Float[Tensor, ""]
    total: Float[Tensor, ""]


class VQVAE(ImageTokenizer):
    """Encoder, quantizer, decoder: `VQVAE.from_config(VQVAEConfig())`, or networks of your own.

    All that training changes is in parameters and buffers.

    Args:
        encoder: (B, 3, H, W) → (B, D, h, w).
        quantizer: (B, D, h, w) → `Quantized`.
        decoder: (B, D, h, w) → (B, 3, H, W).
        config: the sizes of the three, and the pictures that they take (`check_pictures`).
    """

    def __init__(
        self, encoder: nn.Module, quantizer: Quantizer, decoder: nn.Module, config: Any
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = encoder, decoder
        self.quantizer = quantizer

    @classmethod
    def from_config(cls, config: VQVAEConfig) -> "VQVAE":
        """A model with chapter 2's networks and new weights."""
        encoder, decoder = Encoder(config), Decoder(config)
        size = (config.codebook_size, config.code_dim)
        return cls(encoder, make_quantizer(config.quantizer, *size, config.cosine), decoder, config)

    def forward(self, x: Float[Tensor, "b 3 h w"], quantize: bool = True) -> VQVAEOutput:
        """Reconstruct pictures; in training mode an EMA codebook is updated.

        Args:
            quantize: False decodes z itself: for the first steps of a training, so that the
                codebook can be initialised from encodings that already represent pictures.

        Raises:
            ValueError: for pictures of a size that the model does not take, or with values outside
                [−1, 1].
        """
        z = self.encode(x)
        quantized = self.quantizer(z) if quantize else self.without_codebook(z)
        return VQVAEOutput(self.decoder(quantized.z_q), quantized)

    def without_codebook(self, z: Float[Tensor, "b d h w"]) -> Quantized:
        """z itself for the decoder, the tokens it would have, and both losses 0."""
        z = self.quantizer.project(z)
        # Data-parallel training waits for a gradient of every parameter, even a gradient of 0.
        unused = 0 * self.quantizer.embeddings().sum()
        return Quantized(z, self.quantizer.nearest(z), unused, z.new_zeros(()))

    def encode(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        """z, before it is quantized. Raises ValueError as `forward`."""
        self.config.check_pictures(x)
        return self.encoder(x)

    def tokens(self, x: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b n"]:
        """The picture's tokens, row by row. The codebook is not updated.

        Raises:
            ValueError: as `forward`.
        """
        return self.quantizer.nearest(self.quantizer.project(self.encode(x))).flatten(1)

    def decode_grid(self, indices: Int[Tensor, "b h w"]) -> Float[Tensor, "b 3 H W"]:
        """A grid of valid tokens → pictures, not clamped."""
        return self.decoder(self.quantizer.lookup(indices))

    @torch.no_grad()
    def kmeans_init(self, x: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> None:
        """Put the code vectors at the centres of these pictures' encodings; before training."""
        if isinstance(self.quantizer, VectorQuantizer):
            self.quantizer.kmeans_init(self.encode(x), generator)

    @torch.no_grad()
    def restart_dead_codes(self, x: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> int:
        """Move dead code vectors onto encodings of these pictures; returns how many.

        Call it every 50 steps or so, and not near the end: a new code vector needs some training.
        """
        if isinstance(self.quantizer, VectorQuantizer):
            return self.quantizer.restart_dead_codes(self.encode(x), generator)
        return 0


def vqvae_loss(x: Float[Tensor, "b 3 h w"], output: VQVAEOutput, beta: float = 0.25) -> VQVAELoss:
    """Eq. 3.

    Args:
        x: the pictures that were given to the model.
        output: what the model returned for them.
        beta: β. The paper finds no difference from 0.1 to 2.0.
    """
    reconstruction = F.mse_loss(at_least_float32(output.reconstruction), x)
    codebook_loss = output.quantized.codebook_loss
    commitment_loss = output.quantized.commitment_loss
    total = reconstruction + codebook_loss + beta * commitment_loss
    return VQVAELoss(reconstruction, codebook_loss, commitment_loss, total)

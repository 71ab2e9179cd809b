"""The discrete VAE, DALL·E's first stage: an encoder, a soft choice of tokens, and a decoder.

    x → encoder → l → y = softmax((l + g) / τ) → mixture of code vectors → decoder → μ, ln b

The encoder predicts how likely each of K code vectors is at each place. The Gumbel-softmax samples
from that in a way that gradients can pass. The loss is the negative evidence lower bound (ELBO) of
section 2.1 of Ramesh et al. (2021):

    L_dVAE  =  −ln p(x | y)  +  β · D_KL(q(k | x) ‖ uniform),     y = softmax((l + g) / τ)

Papers: DALL·E (Ramesh et al. 2021), Gumbel-softmax (Jang, Gu & Poole 2017).

| symbol | name |
|---|---|
| l, q(k given x) | `logits`, one for each code vector and place; their softmax |
| g | `noise`, Gumbel(0, 1), by `gumbel_noise` |
| τ | `temperature`, by `temperature_at`: 1 → 1/16 |
| y | the sample, by `gumbel_softmax` |
| β | `kl_weight`, by `kl_weight_at`: 0 → 6.6 |
| φ, ε | `map_pixels`, `EPSILON`: [−1, 1] → [ε, 1 − ε], Eq. 2 of the appendix |
| μ, ln b | `mean`, `log_scale` of the logit-Laplace distribution, Eq. 1 of the appendix |

Differs from the paper in: encoder and decoder are chapter 2's (strided convolutions, SiLU), and the
code vectors have D numbers; b is at least 1/4, because plain backgrounds would drive it to 0, and
the gradient of a pixel is proportional to 1/b (reconstructions of a small dVAE: 19.8 dB with 1/64,
22.5 dB with 1/4); a dVAE begins as an autoencoder (`DVAE._init_logits_from_codebook`); 8 × 8 tokens
instead of 32 × 32.

Letters: B batch, H and W picture, h and w grid of tokens, N = h · w, K code vectors, D numbers in
each.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .autoencoder import AutoencoderConfig, Decoder, Encoder, ImageTokenizer
from .layers import LEAST_TEMPERATURE, at_least_float32

EPSILON = 0.1  # ε: keeps the logit of a black or white pixel finite
MIN_LOG_SCALE = math.log(1 / 4)  # of ln b: some 20 of 255 grey levels
TEMPERATURE_START, TEMPERATURE_END = 1.0, 1 / 16  # τ at the start and at the end (section 2.1)
KL_WEIGHT = 6.6  # β at the end (appendix A.2)


# --- the Gumbel-softmax: a random choice that gradients can pass -------------------------------


def gumbel_noise(
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "..."]:
    """g = −ln(−ln u) with u uniform in (0, 1); argmax(l + g) is a sample from softmax(l).

    Args:
        generator: on the CPU; None means PyTorch's global one.
    """
    u = torch.rand(shape, generator=generator, dtype=dtype)
    tiny = torch.finfo(dtype).tiny
    return -(-u.clamp(min=tiny).log()).clamp(min=tiny).log()  # rand can return 0, never 1


def gumbel_softmax(
    logits: Float[Tensor, "b k *places"],
    noise: Float[Tensor, "b k *places"],
    temperature: float,
    hard: bool = False,
) -> Float[Tensor, "b k *places"]:
    """y = softmax((l + g) / τ) over the K code vectors (Jang et al. 2017, Eq. 2).

    Args:
        noise: g, from `gumbel_noise`.
        temperature: τ > 0. Towards 0 a sample becomes one-hot, and its gradient has a large
            variance; towards ∞ it becomes the uniform mixture of all code vectors.
        hard: straight through: the one-hot value of the largest entry, the gradient of y.

    Raises:
        ValueError: if τ is not above 0, or so small that numbers overflow.
    """
    if not LEAST_TEMPERATURE <= temperature < math.inf:
        least = f"above 0, not {temperature}, and at least {LEAST_TEMPERATURE:f}"
        raise ValueError(f"The Gumbel-softmax's temperature must be {least}.")
    y = ((at_least_float32(logits) + noise) / temperature).softmax(1)
    if hard:
        one_hot = torch.zeros_like(y).scatter(1, y.argmax(1, keepdim=True), 1.0)
        return y + (one_hot - y).detach()
    return y


# --- the model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DVAEConfig(AutoencoderConfig):
    """Sizes of a discrete VAE; see `AutoencoderConfig`."""


class DVAEOutput(NamedTuple):
    """The encoder's logits of the tokens, and the decoder's distribution of the picture."""

    logits: Float[Tensor, "b k h w"]
    mean: Float[Tensor, "b 3 H W"]
    log_scale: Float[Tensor, "b 3 H W"]


class DVAE(ImageTokenizer):
    """Encoder, Gumbel-softmax, decoder (section 2.1). `tokens` takes the likeliest ones."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config: DVAEConfig = config
        self.encoder = Encoder(config, outputs=config.codebook_size)
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.code_dim))
        self.decoder = Decoder(config, outputs=6)  # μ and ln b for red, green and blue
        self._init_logits_from_codebook()

    @torch.no_grad()
    def _init_logits_from_codebook(self) -> None:
        """At first, a token's logit is the product of its code vector and projected features.

        So a soft sample at τ = 1 passes that projection on, approximately, and the model begins as
        an autoencoder. With logits that are unrelated to the code vectors, only a few tokens would
        be used.
        """
        last = self.encoder[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        projection = nn.Conv2d(last.in_channels, self.config.code_dim, 1).weight[:, :, 0, 0]
        last.weight.copy_((self.codebook @ projection)[:, :, None, None])  # (K, C, 1, 1)
        nn.init.zeros_(last.bias)

    def forward(
        self,
        x: Float[Tensor, "b 3 H W"],
        temperature: float,
        noise: Float[Tensor, "b k h w"] | None = None,
        generator: torch.Generator | None = None,
    ) -> DVAEOutput:
        """Sample tokens softly, and predict the picture from them.

        Args:
            temperature: τ > 0.
            noise: Gumbel noise, by `gumbel_noise`; None draws it from the generator.
            generator: on the CPU; None means PyTorch's global one.

        Raises:
            ValueError: for pictures of another resolution or range, or τ ≤ 0.
        """
        logits = self.logits(x)  # (B, K, h, w)
        if noise is None:
            noise = gumbel_noise(logits.shape, generator, logits.dtype).to(logits.device)
        y = gumbel_softmax(logits, noise, temperature)
        mixture = torch.einsum("bkhw,kd->bdhw", y, self.codebook)
        return DVAEOutput(logits, *self.picture(mixture))

    def logits(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """l: the logits of every token at every place.

        Raises:
            ValueError: for pictures of another resolution, or with values outside [−1, 1].
        """
        self.config.check_pictures(x)
        return at_least_float32(self.encoder(x))

    def picture(
        self, mixture: Float[Tensor, "b d h w"]
    ) -> tuple[Float[Tensor, "b 3 H W"], Float[Tensor, "b 3 H W"]]:
        """μ and ln b of each value of the picture, in the space of logits."""
        mean, log_scale = at_least_float32(self.decoder(mixture)).chunk(2, dim=1)
        return mean, log_scale.clamp(min=MIN_LOG_SCALE)

    def tokens(self, x: Float[Tensor, "b 3 H W"]) -> Int[Tensor, "b n"]:
        """The likeliest tokens, row by row.

        Raises:
            ValueError: for pictures of another resolution, or with values outside [−1, 1].
        """
        return self.logits(x).argmax(1).flatten(1)

    def decode_grid(self, indices: Int[Tensor, "b h w"]) -> Float[Tensor, "b 3 H W"]:
        """A grid of valid tokens → pictures, not clamped: φ⁻¹(sigmoid(μ))."""
        mean, _ = self.picture(F.embedding(indices, self.codebook).movedim(-1, 1))
        return unmap_pixels(mean.sigmoid())


# --- the loss ----------------------------------------------------------------------------------


class DVAELoss(NamedTuple):
    """The two terms of the ELBO, each in nats per value of x, and their weighted sum."""

    reconstruction: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    total: Float[Tensor, ""]


def map_pixels(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """φ: [−1, 1] → [ε, 1 − ε] (appendix A.3, Eq. 2), where logits are finite."""
    return (1 - 2 * EPSILON) * (at_least_float32(x) + 1) / 2 + EPSILON


def unmap_pixels(y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """φ⁻¹: [ε, 1 − ε] → [−1, 1]; values outside [ε, 1 − ε] leave [−1, 1]."""
    return 2 * (y - EPSILON) / (1 - 2 * EPSILON) - 1


def logit_laplace(
    x: Float[Tensor, "*shape"], mean: Float[Tensor, "*shape"], log_scale: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """−ln p(x): the logit of x has a Laplace distribution around μ (appendix A.3, Eq. 1).

    Args:
        x: in (0, 1), for example from `map_pixels`.
        mean, log_scale: μ and ln b.

    Returns:
        Nats for each value. p is a density, so that this can be below 0.
    """
    distance = (x.logit() - mean).abs() / log_scale.exp()
    return math.log(2) + log_scale + (x * (1 - x)).log() + distance


def dvae_loss(
    x: Float[Tensor, "b 3 H W"], output: DVAEOutput, kl_weight: float = KL_WEIGHT
) -> DVAELoss:
    """The negative ELBO, divided by the number of values in x as in the paper (appendix A.2).

    Args:
        x: the pictures that were given to the model.
        output: what the model returned for them.
        kl_weight: β. A KL of one nat per token counts β · N / (3HW): β / 192, as in the paper.
    """
    reconstruction = logit_laplace(map_pixels(x), output.mean, output.log_scale).mean()
    log_q = output.logits.log_softmax(1)  # (B, K, h, w)
    per_token = (log_q.exp() * (log_q + math.log(log_q.shape[1]))).sum(1)  # nats: ln K − entropy
    kl = per_token.flatten(1).sum(1).mean() / x[0].numel()
    total = reconstruction + kl_weight * kl
    return DVAELoss(reconstruction, kl, total)


# --- schedules ---------------------------------------------------------------------------------


def temperature_at(share: float, until: float = 0.5) -> float:
    """τ after a share of the training: half a cosine from 1 to 1/16 (appendix A.2).

    It is a function of the share alone. If each step multiplied the last τ, the decay would be
    applied again and again.

    Args:
        share: of the steps that are done, in [0, 1].
        until: where 1/16 is reached; the paper's is 1/20 of its three million steps.
    """
    change = TEMPERATURE_END - TEMPERATURE_START
    return TEMPERATURE_START + change * _half_cosine(share / until)


def kl_weight_at(share: float, top: float = KL_WEIGHT, until: float = 0.1) -> float:
    """β after a share of the training: half a cosine from 0 to `top` (appendix A.2)."""
    return top * _half_cosine(share / until)


def _half_cosine(share: float) -> float:
    """From 0 to 1, with slope 0 at both ends."""
    return 0.5 - 0.5 * math.cos(math.pi * min(1.0, max(0.0, share)))

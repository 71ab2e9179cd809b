"""VQGAN: a VQ-VAE trained against a discriminator (Esser, Rombach & Ommer 2021).

    x → encoder → z → the nearest code vector → z_q → decoder → x̂ → discriminator → real or fake,
                                                                     one logit per patch

The model is chapter 2's `VQVAE`; its training is new (Eqs. 4 to 7):

    L    =  ‖x − x̂‖₁  +  d(x, x̂)  +  ‖sg[z] − e‖²  +  β ‖z − sg[e]‖²  +  λ · (−D(x̂))
             pixels      perceptual    codebook        commitment         generator loss
    L_D  =  ½ max(0, 1 − D(x))  +  ½ max(0, 1 + D(x̂))

    λ    =  ‖∇ (pixels + perceptual)‖  /  (‖∇ generator loss‖ + δ)

where both gradients are taken at the decoder's last layer.

| symbol | name |
|---|---|
| x, x̂ | `x`, `reconstruction` |
| z, e, z_q, β | as in `vqvae` |
| d | `lpips.perceptual_distance` (Zhang et al. 2018), in the features of a *trunk* |
| D | `Discriminator`: logits, one per patch (Isola et al. 2017) |
| L_D | `hinge_loss` (Lim & Ye 2017) or `non_saturating_loss` (Goodfellow et al. 2014) |
| −D(x̂) | `generator_loss` |
| λ | `adaptive_weight` |
| δ | `DELTA` |

Differs from the paper in: generator and discriminator take their steps together, from one forward
pass, where the paper's code alternates; squares and absolute values are means over numbers; the
discriminator is trained alone for some steps before the generator loss counts, and `disc_factor`
then rises slowly; λ may be fixed, and the discriminator's loss may be that of Goodfellow et al.
(2014), for comparison.

Letters: B batch, H and W picture, h' and w' grid of patches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .layers import at_least_float32, check_dtype
from .vqvae import VQVAE, VQVAEOutput

DELTA = 1e-4  # keeps λ finite where the generator loss has no gradient
MAX_ADAPTIVE_WEIGHT = 1e4  # largest λ, as in the paper's code
# The gradient of a mean over many pixels underflows in float16. A power of two changes no digit.
GRADIENT_SCALE = 2.0**12


# --- the discriminator -------------------------------------------------------------------------


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of a discriminator.

    Args:
        channels: of its first layer; each level doubles them, up to eight times as many.
        num_levels: how often it halves the side. The receptive field of one logit is then 16, 34
            or 70 pixels each way, for 1, 2 or 3 levels.

    Raises:
        ValueError: if one is below 1.
    """

    channels: int = 64
    num_levels: int = 3

    def __post_init__(self) -> None:
        if min(self.channels, self.num_levels) < 1:
            raise ValueError(
                "A discriminator has at least one channel and one level, not "
                f"{self.channels} and {self.num_levels}."
            )

    @property
    def patch(self) -> int:
        """The receptive field of one logit, in pixels each way."""
        seen = 1 + 3 + 3  # the last two layers have stride 1
        for _ in range(self.num_levels):
            seen = 2 * seen + 2
        return seen


class Discriminator(nn.Sequential):
    """PatchGAN (Isola et al. 2017): (B, 3, H, W) → logits (B, 1, h', w'), one per patch.

    A logit above 0 classifies the patch as real, below 0 as fake. No logit depends on the whole
    picture, so the discriminator judges local texture and not the arrangement of things.

    Raises:
        ValueError: for pictures smaller than a few patches, or of another type than the weights.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        widths = [config.channels * min(2**i, 8) for i in range(config.num_levels + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False), 1):
            stride = 2 if i < config.num_levels else 1
            layers += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),  # the norm has one
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        super().__init__(*layers)
        self.config = config
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 _ _"]:
        least = 3 * 2**self.config.num_levels
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < least:
            raise ValueError(
                f"This discriminator takes pictures (B, 3, H, W) with sides of at least {least}, "
                f"not {tuple(x.shape)}."
            )
        check_dtype(x, self[0].weight)  # type: ignore[arg-type]
        return super().forward(x)

    def with_frozen_weights(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 _ _"]:
        """The same logits, with a gradient for x and none for the discriminator's own weights."""
        weights = {name: p.detach() for name, p in self.named_parameters()}
        return torch.func.functional_call(self, weights, x)


# --- the losses of discriminator and generator -------------------------------------------------


class DiscriminatorLoss(NamedTuple):
    """The discriminator's loss: on real pictures, on reconstructions, and the sum."""

    real: Float[Tensor, ""]
    fake: Float[Tensor, ""]
    total: Float[Tensor, ""]


def hinge_loss(real: Float[Tensor, "*n"], fake: Float[Tensor, "*m"]) -> DiscriminatorLoss:
    """½ max(0, 1 − D(x)) + ½ max(0, 1 + D(x̂)): no gradient from logits beyond ±1.

    The loss is 1 for a discriminator that answers 0 everywhere (Lim & Ye 2017).
    """
    on_real = F.relu(1 - at_least_float32(real)).mean() / 2
    on_fake = F.relu(1 + at_least_float32(fake)).mean() / 2
    return DiscriminatorLoss(on_real, on_fake, total=on_real + on_fake)


def non_saturating_loss(real: Float[Tensor, "*n"], fake: Float[Tensor, "*m"]) -> DiscriminatorLoss:
    """½ −ln σ(D(x)) + ½ −ln(1 − σ(D(x̂))), the first GAN's (Goodfellow et al. 2014)."""
    on_real = F.softplus(-at_least_float32(real)).mean() / 2
    on_fake = F.softplus(at_least_float32(fake)).mean() / 2
    return DiscriminatorLoss(on_real, on_fake, total=on_real + on_fake)


LOSSES = {"hinge": hinge_loss, "non-saturating": non_saturating_loss}


def generator_loss(fake: Float[Tensor, "*n"], gan_loss: str = "hinge") -> Float[Tensor, ""]:
    """The generator's part of the GAN: −D(x̂), or −ln σ(D(x̂)) if `gan_loss` is
    "non-saturating"."""
    fake = at_least_float32(fake)
    return -fake.mean() if gan_loss == "hinge" else F.softplus(-fake).mean()


# --- the loss of the model ---------------------------------------------------------------------


@dataclass(frozen=True)
class VQGANLossConfig:
    """The weights of a VQGAN's loss, and when the discriminator takes part.

    Args:
        pixel_weight, perceptual_weight, disc_weight: weights of the terms; 0 leaves one out.
        adaptive: multiply `disc_weight` by λ; False keeps it fixed.
        gan_loss: "hinge" or "non-saturating".
        disc_start: the share of the training after which the discriminator is trained.
        disc_warmup: for this share of the training it is then trained alone; for as long again
            `disc_factor` rises from 0 to 1.

    Raises:
        ValueError: for a negative weight, another loss, or a share outside [0, 1].
    """

    pixel_weight: float = 1.0
    perceptual_weight: float = 1.0
    disc_weight: float = 0.8
    adaptive: bool = True
    gan_loss: str = "hinge"
    disc_start: float = 0.4
    disc_warmup: float = 0.05

    def __post_init__(self) -> None:
        if min(self.pixel_weight, self.perceptual_weight, self.disc_weight) < 0:
            raise ValueError(
                "pixel_weight, perceptual_weight and disc_weight must be 0 or more, not "
                f"{self.pixel_weight}, {self.perceptual_weight} and {self.disc_weight}."
            )
        if self.gan_loss not in LOSSES:
            raise ValueError(f"gan_loss is one of {', '.join(LOSSES)}, not {self.gan_loss!r}.")
        if not (0 <= self.disc_start <= 1 and 0 <= self.disc_warmup <= 1):
            raise ValueError(
                "disc_start and disc_warmup are shares of the training, from 0 to 1, not "
                f"{self.disc_start} and {self.disc_warmup}."
            )

    def disc_factor(self, progress: float) -> float:
        """The factor of the generator loss after this share of the training, from 0 to 1."""
        since = progress - self.disc_start - self.disc_warmup
        if progress < self.disc_start + self.disc_warmup:
            return 0.0
        return min(1.0, since / max(self.disc_warmup, 1e-9))


class VQGANLoss(NamedTuple):
    """The five terms of the model's loss, and their weighted sum."""

    pixels: Float[Tensor, ""]
    perceptual: Float[Tensor, ""]
    codebook_loss: Float[Tensor, ""]
    commitment_loss: Float[Tensor, ""]
    generator_loss: Float[Tensor, ""]
    total: Float[Tensor, ""]


def last_layer(decoder: nn.Module) -> Tensor:
    """The weight where λ compares gradients: that of the decoder's last convolution."""
    return [p for p in decoder.parameters() if p.ndim == 4][-1]


def adaptive_weight(
    picture_loss: Float[Tensor, ""], gan_loss: Float[Tensor, ""], last_layer: Tensor
) -> Float[Tensor, ""]:
    """λ: with it, both gradients have the same norm at the last layer (Eq. 7).

    Args:
        picture_loss: the weighted sum of the pixel and the perceptual term.
        gan_loss: the generator loss.
        last_layer: the weight of the decoder's last layer, by `last_layer`.

    Returns:
        λ, without a gradient, at most 10⁴.
    """
    norms = [
        at_least_float32(_gradient(GRADIENT_SCALE * loss, last_layer)).norm() / GRADIENT_SCALE
        for loss in (picture_loss, gan_loss)
    ]
    return (norms[0] / (norms[1] + DELTA)).clamp(0, MAX_ADAPTIVE_WEIGHT).detach()


def _gradient(loss: Float[Tensor, ""], weight: Tensor) -> Tensor:
    return torch.autograd.grad(loss, weight, retain_graph=True)[0]


def vqgan_loss(
    x: Float[Tensor, "b 3 h w"],
    output: VQVAEOutput,
    perceptual: Float[Tensor, " b"],
    generator_loss: Float[Tensor, ""],
    weight: Float[Tensor, ""] | float,
    config: VQGANLossConfig,
    beta: float = 0.25,
) -> VQGANLoss:
    """The model's loss.

    Args:
        x: the pictures that were given to the model.
        output: what the model returned for them.
        perceptual: d(x, x̂), a number a picture.
        generator_loss: −D(x̂), by the function of that name.
        weight: of the generator loss: λ · disc_weight · disc_factor.
        config: the other weights.
        beta: β, of the commitment loss.
    """
    pixels = (at_least_float32(output.reconstruction) - x).abs().mean()
    seen = perceptual.mean()
    _, _, codebook, commitment = output.quantized
    vq = codebook + beta * commitment
    pictures = config.pixel_weight * pixels + config.perceptual_weight * seen
    total = pictures + vq + weight * generator_loss
    return VQGANLoss(pixels, seen, codebook, commitment, generator_loss, total)


# --- one training step of generator and discriminator ------------------------------------------


class VQGANStep(NamedTuple):
    """All that one training step measures, for the flight recorder."""

    pixels: Float[Tensor, ""]
    perceptual: Float[Tensor, ""]
    codebook_loss: Float[Tensor, ""]
    commitment_loss: Float[Tensor, ""]
    generator_loss: Float[Tensor, ""]
    adaptive_weight: Float[Tensor, ""]  # λ
    discriminator_loss: Float[Tensor, ""]
    logits_real: Float[Tensor, ""]  # mean D(x)
    logits_fake: Float[Tensor, ""]  # mean D(x̂)
    total: Float[Tensor, ""]


class VQGANWithDiscriminator(nn.Module):
    """A VQGAN and its discriminator, trained together with opposite aims.

    Args:
        generator: the VQ-VAE whose reconstructions shall look real.
        discriminator: tells reconstructions from real pictures.
        loss_config: the weights of the losses.
        distance: (x, x̂) → d for each pair, such as `perceptual_distance` of some trunk.
    """

    def __init__(
        self,
        generator: VQVAE,
        discriminator: Discriminator,
        loss_config: VQGANLossConfig,
        distance: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.loss_config, self.distance = loss_config, distance

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        """The two networks whose gradients the training loop clips separately."""
        return self.generator, self.discriminator

    def forward(
        self, x: Float[Tensor, "b 3 h w"], progress: float, quantize: bool = True
    ) -> VQGANStep:
        """Both losses in one sum: neither has a gradient for the other network's weights.

        Args:
            x: real pictures.
            progress: the share of the training that is done, in [0, 1].
            quantize: as for `VQVAE.forward`.
        """
        G, D, config = self.generator, self.discriminator, self.loss_config
        output = G(x, quantize)
        fake = at_least_float32(output.reconstruction)
        seen = self.distance(x, fake) if config.perceptual_weight else x.new_zeros(len(x))

        gan = lambda_ = x.new_zeros(())
        disc_weight = config.disc_weight * config.disc_factor(progress)
        if disc_weight:
            gan = generator_loss(D.with_frozen_weights(fake), config.gan_loss)
            lambda_ = self._adaptive_weight(x, fake, seen, gan)
        ours = vqgan_loss(x, output, seen, gan, disc_weight * lambda_, config, G.config.beta)

        # Detached: the discriminator's loss has no gradient for the generator.
        theirs, *means = self._discriminator_loss(x, fake.detach(), progress)
        total = ours.total + theirs
        return VQGANStep(*ours[:-1], lambda_, theirs, means[0], means[1], total)

    def _adaptive_weight(self, x: Tensor, fake: Tensor, seen: Tensor, gan: Tensor) -> Tensor:
        """λ, or 1 where it is fixed."""
        config = self.loss_config
        if not config.adaptive:
            return x.new_tensor(1.0)
        pixels, perceptual = (fake - x).abs().mean(), seen.mean()
        pictures = config.pixel_weight * pixels + config.perceptual_weight * perceptual
        return adaptive_weight(pictures, gan, last_layer(self.generator.decoder))

    def _discriminator_loss(
        self, x: Tensor, fake: Tensor, progress: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The discriminator's loss, mean D(x) and mean D(x̂); all 0 before `disc_start`."""
        D, config = self.discriminator, self.loss_config
        if not config.disc_weight or progress < config.disc_start:
            # Data-parallel training waits for a gradient of every parameter, even a gradient of 0.
            unused = 0.0 * torch.stack([p.sum() for p in D.parameters()]).sum()
            return unused, x.new_zeros(()), x.new_zeros(())
        logits_real, logits_fake = D(x), D(fake)
        loss = LOSSES[config.gan_loss](logits_real, logits_fake).total
        return loss, logits_real.detach().float().mean(), logits_fake.detach().float().mean()

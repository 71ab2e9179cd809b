"""VQGAN: a VQ-VAE that has to convince a critic (Esser, Rombach & Ommer 2021).

    x → encoder → z → the nearest code → z_q → decoder → x̂ → critic → real or drawn, patch by patch

The model is chapter 2's; what is new is what it is trained for (Eqs. 4 to 7):

    L        =  ‖x − x̂‖₁  +  d(x, x̂)  +  ‖sg[z] − e‖²  +  β ‖z − sg[e]‖²  +  λ · (−D(x̂))
                 pixels      perceptual     codebook        commitment        adversarial
    L_critic =  ½ max(0, 1 − D(x))  +  ½ max(0, 1 + D(x̂))

    λ        =  ‖∇ (pixels + perceptual)‖  /  (‖∇ adversarial‖ + δ)

where both gradients are taken at the decoder's last layer.

| symbol | name |
|---|---|
| x, x̂ | `x`, `reconstruction` |
| z, e, z_q, β | as in `vqvae` |
| d | `perceptual_distance` (Zhang et al. 2018), in the features of a *trunk* |
| D | `Critic`: logits, one a patch (Isola et al. 2017) |
| λ | `adaptive_weight` |
| δ | `DELTA` |

Differs from the paper in: both players step at once, from one forward pass, where the paper's code
lets them take turns; squares and absolute values are means over numbers; the critic learns alone
for a while before the model feels it, and its say then rises slowly; λ may be fixed, and the
critic's loss the one of Goodfellow et al. (2014), for comparison. Given a `TamingConfig`, the
networks are those of the released checkpoints.

Letters: B batch, H and W picture, h and w grid of codes, N = h · w, K codes, L levels of a trunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from t2ilearn.taming import GumbelQuantizer, TamingConfig, TamingDecoder, TamingEncoder
from t2ilearn.vqvae import VQVAE, VectorQuantizer, VQVAEConfig, VQVAEOutput, precise

Trunk = Callable[[Tensor], Sequence[Tensor]]  # (B, 3, H, W) → feature maps, finest first

DELTA = 1e-4  # keeps λ finite where the critic has nothing to say
LARGEST_WEIGHT = 1e4  # of λ, as in the paper's code
# float16 cannot hear the gradients of a mean over many pixels. A power of two changes no digit.
_LOUD = 2.0**12
SLACK = 1e-3  # by so much may pixels leave [−1, 1]


class VQGAN(VQVAE):
    """Encoder, quantizer, decoder: chapter 2's networks, or those of the released checkpoints.

    Args:
        config: of a VQ-VAE, or the layout of "Taming Transformers".
    """

    config: Any  # either kind: what is asked of it below, both answer
    encoder: Any
    decoder: Any
    quantizer: Any

    def __init__(self, config: VQVAEConfig | TamingConfig) -> None:
        if isinstance(config, VQVAEConfig):
            super().__init__(config)
            return
        nn.Module.__init__(self)
        self.config = config
        self.encoder, self.decoder = TamingEncoder(config), TamingDecoder(config)
        if config.quantizer == "gumbel":
            self.quantizer = GumbelQuantizer(config.codes, config.code_dim)
        else:
            self.quantizer = VectorQuantizer(config.codes, config.code_dim)

    @property
    def last_layer(self) -> Tensor:
        """The weight where λ compares gradients: of the decoder's last convolution."""
        return [p for p in self.decoder.parameters() if p.ndim == 4][-1]

    def encode(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        """z, before it is quantized. Sides may be any multiples of f = H / h.

        Raises:
            ValueError: for pictures of another kind, with sides that f does not divide, or with
                values outside [−1, 1].
        """
        f = self.config.resolution // self.config.side
        if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
            raise ValueError(
                f"Pictures are float tensors of shape (B, 3, H, W); this is {x.dtype} of shape "
                f"{tuple(x.shape)}."
            )
        if not x.numel():
            raise ValueError(f"There is no picture in a batch of shape {tuple(x.shape)}.")
        if x.shape[2] % f or x.shape[3] % f:
            raise ValueError(
                f"One code stands for {f} × {f} pixels: both sides must be multiples of {f}, not "
                f"{x.shape[2]} × {x.shape[3]}."
            )
        low, high = x.amin().item(), x.amax().item()
        if not -1 - SLACK <= low <= high <= 1 + SLACK:
            raise ValueError(
                f"Pixels go from −1 to 1; these go from {low:.3g} to {high:.3g}. "
                "Bytes become pixels by x / 127.5 − 1."
            )
        return self.encoder(x)


# --- the critic --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CriticConfig:
    """Sizes of a critic.

    Args:
        width: channels of its first layer; each level doubles them, at most to eight times.
        levels: how often it halves the side. One logit then sees 16, 34 or 70 pixels of the
            picture each way, for 1, 2 or 3 levels.

    Raises:
        ValueError: if one is below 1.
    """

    width: int = 64
    levels: int = 3

    def __post_init__(self) -> None:
        if min(self.width, self.levels) < 1:
            raise ValueError("A critic needs one channel and one level at least.")

    @property
    def patch(self) -> int:
        """How many pixels, each way, one logit sees."""
        seen = 1 + 3 + 3  # the last two layers have stride 1
        for _ in range(self.levels):
            seen = 2 * seen + 2
        return seen


class Critic(nn.Sequential):
    """PatchGAN (Isola et al. 2017): (B, 3, H, W) → logits (B, 1, h', w'), one a patch.

    Above 0 it takes the patch for a piece of a real picture, below for a drawn one. It never sees
    the whole: that everything is in its place it cannot judge, and need not.

    Raises:
        ValueError: for pictures smaller than a few patches.
    """

    def __init__(self, config: CriticConfig) -> None:
        widths = [config.width * min(2**i, 8) for i in range(config.levels + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False), 1):
            stride = 2 if i < config.levels else 1
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
        least = 3 * 2**self.config.levels
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < least:
            raise ValueError(
                f"This critic wants pictures (B, 3, H, W) with sides of {least} at least, not "
                f"{tuple(x.shape)}."
            )
        return super().forward(x)

    def frozen(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 _ _"]:
        """The same logits, with a gradient for x and none for the critic's own weights."""
        weights = {name: p.detach() for name, p in self.named_parameters()}
        return torch.func.functional_call(self, weights, x)


class CriticLoss(NamedTuple):
    """What the critic minimises."""

    real: Float[Tensor, ""]
    fake: Float[Tensor, ""]
    total: Float[Tensor, ""]


def hinge_loss(real: Float[Tensor, "*n"], fake: Float[Tensor, "*m"]) -> CriticLoss:
    """½ max(0, 1 − D(x)) + ½ max(0, 1 + D(x̂)): once sure enough, the critic stops pushing.

    At 1 the critic knows nothing: it answers 0 to all (Lim & Ye 2017).
    """
    on_real = F.relu(1 - precise(real)).mean() / 2
    on_fake = F.relu(1 + precise(fake)).mean() / 2
    return CriticLoss(on_real, on_fake, total=on_real + on_fake)


def non_saturating_loss(real: Float[Tensor, "*n"], fake: Float[Tensor, "*m"]) -> CriticLoss:
    """½ −ln σ(D(x)) + ½ −ln(1 − σ(D(x̂))), the first GAN's (Goodfellow et al. 2014)."""
    on_real = F.softplus(-precise(real)).mean() / 2
    on_fake = F.softplus(precise(fake)).mean() / 2
    return CriticLoss(on_real, on_fake, total=on_real + on_fake)


# --- the perceptual distance -------------------------------------------------------------------


def perceptual_distance(
    trunk: Trunk,
    x: Float[Tensor, "b 3 h w"],
    y: Float[Tensor, "b 3 h w"],
    heads: Sequence[Float[Tensor, " _"]] | None = None,
) -> Float[Tensor, " b"]:
    """How differently a network's first levels respond to two pictures (Zhang et al. 2018, Eq. 1).

    At each place of each level the two feature vectors are made one long; their squared difference
    is averaged over places and summed over channels and levels.

    Args:
        trunk: pictures → feature maps of L levels. The gradient goes through it to y (and x).
        heads: one weight a channel, for each level; by default 1 / L throughout.

    Returns:
        d(x, y) for each of the B pairs.
    """
    pairs = [
        (F.normalize(precise(a), dim=1), F.normalize(precise(b), dim=1))
        for a, b in zip(trunk(x), trunk(y), strict=True)
    ]
    apart = [(a - b).square().mean((2, 3)) for a, b in pairs]  # L times (B, channels)
    if heads is None:
        return torch.stack([level.sum(1) for level in apart]).mean(0)
    return torch.stack([level @ w for level, w in zip(apart, heads, strict=True)]).sum(0)


class VGGTrunk(nn.Module):
    """Five levels of VGG-16. With the weights that Zhang et al. (2018) learned for its channels,
    which ship, the distance is the one known as LPIPS::

        trunk = VGGTrunk(torchvision.models.vgg16(weights="IMAGENET1K_V1").features)
        perceptual_distance(trunk, x, y, weights.lpips_heads())

    The call in the middle downloads 528 MB, which torchvision checks by hash.

    Args:
        features: the convolutional part of a VGG-16, as torchvision builds it.

    Raises:
        ValueError: if these are the layers of another network.
    """

    CUTS = (4, 9, 16, 23, 30)  # behind relu1_2, 2_2, 3_3, 4_3 and 5_3

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        kinds = "".join(type(layer).__name__[0] for layer in features)
        if kinds != "CRCRMCRCRMCRCRCRMCRCRCRMCRCRCRM":
            raise ValueError("These are not the layers of VGG-16, convolutions, ReLUs and pools.")
        starts = (0, *self.CUTS)
        self.levels = nn.ModuleList(
            nn.Sequential(*(_new_output(layer) for layer in features[a:b]))
            for a, b in zip(starts, self.CUTS, strict=False)
        )
        self.mean: Tensor
        self.spread: Tensor
        # ImageNet's mean colour and its spread, for pixels in [-1, 1].
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("spread", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Feature maps of the five levels, finest first."""
        x, maps = (x - self.mean) / self.spread, []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps


def _new_output(layer: nn.Module) -> nn.Module:
    """torchvision's ReLUs overwrite their input, which is a feature map that we keep."""
    return nn.ReLU() if isinstance(layer, nn.ReLU) else layer


# --- the two players ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """What a VQGAN is trained for.

    Args:
        pixels, perceptual, adversarial: weights of the terms; 0 leaves one out.
        adaptive: multiply the adversarial weight by λ; False keeps it fixed.
        loss: of the critic, "hinge" or "non-saturating".
        start: the share of the training after which the critic begins to learn.
        warm: for this share of the training it then learns alone; for as long again its say rises.

    Raises:
        ValueError: for a negative weight, another loss, or a share outside [0, 1].
    """

    pixels: float = 1.0
    perceptual: float = 1.0
    adversarial: float = 0.8
    adaptive: bool = True
    loss: str = "hinge"
    start: float = 0.4
    warm: float = 0.05

    def __post_init__(self) -> None:
        if min(self.pixels, self.perceptual, self.adversarial) < 0:
            raise ValueError("The weights of the terms must not be negative.")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is one of {', '.join(LOSSES)}, not {self.loss!r}.")
        if not (0 <= self.start <= 1 and 0 <= self.warm <= 1):
            raise ValueError("start and warm are shares of the training, from 0 to 1.")

    def say(self, progress: float) -> float:
        """How loud the critic is after this share of the training, from 0 to 1."""
        if progress < self.start + self.warm:
            return 0.0
        return min(1.0, (progress - self.start - self.warm) / max(self.warm, 1e-9))


LOSSES = {"hinge": hinge_loss, "non-saturating": non_saturating_loss}


class VQGANLoss(NamedTuple):
    """The terms of the model's loss, and their weighted sum."""

    pixels: Float[Tensor, ""]
    perceptual: Float[Tensor, ""]
    codebook: Float[Tensor, ""]
    commitment: Float[Tensor, ""]
    adversarial: Float[Tensor, ""]
    total: Float[Tensor, ""]


def adaptive_weight(
    pictures: Float[Tensor, ""], adversarial: Float[Tensor, ""], last_layer: Tensor
) -> Float[Tensor, ""]:
    """λ: both gradients arrive at the last layer equally strong (Eq. 7).

    Args:
        pictures: what x̂ should look like: the weighted sum of the pixel and the perceptual term.
        adversarial: the critic's opinion.
        last_layer: the decoder's last weight. Behind it is only the picture.

    Returns:
        λ, without a gradient, at most 10⁴.
    """
    norms = [
        precise(torch.autograd.grad(_LOUD * term, last_layer, retain_graph=True)[0]).norm() / _LOUD
        for term in (pictures, adversarial)
    ]
    return (norms[0] / (norms[1] + DELTA)).clamp(0, LARGEST_WEIGHT).detach()


def vqgan_loss(
    x: Float[Tensor, "b 3 h w"],
    output: VQVAEOutput,
    perceptual: Float[Tensor, " b"],
    adversarial: Float[Tensor, ""],
    weight: Float[Tensor, ""] | float,
    objective: Objective,
    beta: float = 0.25,
) -> VQGANLoss:
    """The model's loss.

    Args:
        x: the pictures that `output` is about.
        perceptual: d(x, x̂), a number a picture.
        adversarial: the critic's term, by `persuasion`.
        weight: of that term, λ and all else that it is multiplied with.
        objective: the other weights.
        beta: β, of the commitment.
    """
    pixels = (precise(output.reconstruction) - x).abs().mean()
    seen = perceptual.mean()
    _, _, codebook, commitment = output.quantized
    vq = codebook + beta * commitment
    total = objective.pixels * pixels + objective.perceptual * seen + vq + weight * adversarial
    return VQGANLoss(pixels, seen, codebook, commitment, adversarial, total)


def persuasion(fake: Float[Tensor, "*n"], loss: str = "hinge") -> Float[Tensor, ""]:
    """What the model minimises to look real: −D(x̂), or −ln σ(D(x̂))."""
    fake = precise(fake)
    return -fake.mean() if loss == "hinge" else F.softplus(-fake).mean()


class Step(NamedTuple):
    """All that one step of both players measures, for the flight recorder."""

    pixels: Float[Tensor, ""]
    perceptual: Float[Tensor, ""]
    codebook: Float[Tensor, ""]
    commitment: Float[Tensor, ""]
    adversarial: Float[Tensor, ""]
    weight: Float[Tensor, ""]  # λ
    critic: Float[Tensor, ""]  # the critic's loss
    real_logit: Float[Tensor, ""]  # mean D(x)
    fake_logit: Float[Tensor, ""]  # mean D(x̂)
    total: Float[Tensor, ""]


class Players(nn.Module):
    """A VQGAN and its critic, who want opposite things of one picture.

    Args:
        generator: the model.
        critic: its opponent.
        objective: what each is trained for.
        distance: (x, x̂) → d for each pair, such as `perceptual_distance` of some trunk.
    """

    def __init__(
        self,
        generator: VQGAN,
        critic: Critic,
        objective: Objective,
        distance: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.generator, self.critic = generator, critic
        self.objective, self.distance = objective, distance

    @property
    def players(self) -> tuple[nn.Module, nn.Module]:
        """Whose gradients are to be clipped apart; `training.train` asks for this."""
        return self.generator, self.critic

    def forward(self, x: Float[Tensor, "b 3 h w"], progress: float, quantize: bool = True) -> Step:
        """One step of both players. No gradient crosses from one to the other's weights.

        Args:
            progress: the share of the training that is behind us, in [0, 1].
            quantize: as for `VQVAE.forward`.
        """
        G, D, how = self.generator, self.critic, self.objective
        output = G(x, quantize)
        drawn = precise(output.reconstruction)
        seen = self.distance(x, drawn) if how.perceptual else x.new_zeros(len(x))
        adversarial = weight = x.new_zeros(())

        say = how.adversarial * how.say(progress)
        if say:
            adversarial = persuasion(D.frozen(drawn), how.loss)
            weight = x.new_tensor(1.0)
            if how.adaptive:
                pictures = how.pixels * (drawn - x).abs().mean() + how.perceptual * seen.mean()
                weight = adaptive_weight(pictures, adversarial, G.last_layer)
        ours = vqgan_loss(x, output, seen, adversarial, say * weight, how, G.config.beta)

        if how.adversarial and progress >= how.start:
            real, fake = D(x), D(drawn.detach())  # detached: the critic's loss leaves G alone
            theirs = LOSSES[how.loss](real, fake).total
            logits = real.detach().float().mean(), fake.detach().float().mean()
        else:  # every weight stays in the sum: data-parallel training waits for all of them
            theirs = 0.0 * torch.stack([p.sum() for p in D.parameters()]).sum()
            logits = x.new_zeros(()), x.new_zeros(())
        return Step(*ours[:-1], weight, theirs, *logits, total=ours.total + theirs)

"""Cutouts: altered squares of a picture, so that a gradient from CLIP draws what can be recognised.

    picture → C squares → s × s → affine map, perspective, colours, erasing, noise

A picture that only has to please CLIP as a whole becomes adversarial: noise that CLIP takes for a
star. It has to survive cropping, turning, recolouring and noise (Crowson et al. 2022, section 3.2).

| symbol | name |
|---|---|
| C | `CutoutConfig.number` |
| s | `side`, of CLIP's pictures |

Differs from the paper in: turned squares are filled up with grey, not with their border; hue is
turned about the grey axis, a linear map, because torchvision's own has no gradient.

Letters: B pictures, C cutouts of each, H and W height and width, s side of CLIP's pictures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class CutoutConfig:
    """How squares are cut out of a picture and altered before CLIP sees them.

    Args:
        number: C, cutouts a picture.
        smallest: the side of the smallest one, as a share of the picture's shorter side.
        power: sizes are smallest + (1 − smallest) · uniform^power: above 1 small ones prevail.
        degrees: of rotation at most; a tenth of the side of shift goes with it. 0 for neither.
        perspective: how far corners move, as a share of half the side.
        jitter: of saturation and brightness at most; of hue, as a share of a full turn.
        erasing: probability that a rectangle is erased.
        noise: the standard deviation of noise is uniform in [0, noise].

    Raises:
        ValueError: for a value out of range.
    """

    number: int = 32
    smallest: float = 0.5
    power: float = 1.0
    degrees: float = 15.0
    perspective: float = 0.2
    jitter: float = 0.02
    erasing: float = 0.1
    noise: float = 0.1

    def __post_init__(self) -> None:
        limits = {
            "smallest": (0.05, 1),
            "power": (0.05, 20),
            "degrees": (0, 180),
            "perspective": (0, 1),
            "jitter": (0, 0.5),
            "erasing": (0, 1),
            "noise": (0, 2),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be {low} … {high}, not {getattr(self, name)}.")
        if self.number < 1:
            raise ValueError(f"There must be at least one cutout, not {self.number}.")


def turn_hue(x: Float[Tensor, "b 3 h w"], share: float) -> Float[Tensor, "b 3 h w"]:
    """Colours turned about the axis of greys by a share of a full turn, clamped to [0, 1]."""
    c, s = math.cos(2 * math.pi * share), math.sin(2 * math.pi * share)
    same, next_, last = (1 + 2 * c) / 3, (1 - c) / 3 - s / 3**0.5, (1 - c) / 3 + s / 3**0.5
    rows = [[same, next_, last], [last, same, next_], [next_, last, same]]
    return torch.einsum("ij,bjhw->bihw", x.new_tensor(rows), x).clamp(0, 1)


class _TurnHue(nn.Module):
    """`turn_hue` by a random share of at most `most` in either direction."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        return turn_hue(x, self.most * (2 * torch.rand(()).item() - 1))


def augmentation(config: CutoutConfig) -> Callable[[Tensor], Tensor]:
    """What alters one cutout of every picture, at random: [−1, 1] → [−1, 1]."""
    from torchvision.transforms import v2  # its import takes a second, which other systems save

    moves: list[nn.Module] = []  # in [−1, 1], where the 0 that torchvision fills with is grey;
    colours: list[nn.Module] = []  # its own `fill` works in place and has no gradient
    bilinear = v2.InterpolationMode.BILINEAR
    if config.degrees:
        shift = (0.1, 0.1)
        affine = v2.RandomAffine(config.degrees, shift, interpolation=bilinear, fill=None)
        moves.append(v2.RandomApply([affine], p=0.8))
    if config.perspective:
        moves.append(v2.RandomPerspective(config.perspective, p=0.4, fill=None))
    if config.jitter:
        jitter = v2.ColorJitter(brightness=config.jitter, saturation=config.jitter)
        colours.append(v2.RandomApply([_TurnHue(config.jitter), jitter], p=0.7))
    if config.erasing:
        colours.append(v2.RandomErasing(config.erasing, scale=(0.02, 0.15), value=0.5))
    move, colour = nn.Sequential(*moves), nn.Sequential(*colours)
    return lambda x: 2 * colour((move(x) + 1) / 2) - 1


def make_cutouts(
    pictures: Float[Tensor, "b 3 h w"],
    side: int,
    config: CutoutConfig,
    generator: torch.Generator,
) -> Float[Tensor, "cb 3 {side} {side}"]:
    """C squares of every picture, resized to s × s and altered; cutout 1 of all pictures first.

    All pictures of the batch are cut and altered in the same way. Noise may leave [−1, 1].

    Args:
        side: s.
        generator: decides every random number; torchvision's transforms take none, so that
            torch's global one is seeded from it, and put back afterwards.
    """
    alter = augmentation(config)
    height, width = pictures.shape[2:]
    shorter = min(height, width)
    cutouts = []
    for u in torch.rand(config.number, 3, generator=generator).tolist():
        share = config.smallest + (1 - config.smallest) * u[0] ** config.power
        size = max(1, round(share * shorter))
        top, left = round(u[1] * (height - size)), round(u[2] * (width - size))
        square = pictures[:, :, top : top + size, left : left + size]
        square = F.interpolate(square, (side, side), mode="bilinear", antialias=True)
        cutouts.append(square)
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        out = torch.cat([alter(cutout) for cutout in cutouts])  # (C · B, 3, s, s)
    if config.noise:
        strength = config.noise * torch.rand(config.number, generator=generator)
        noise = torch.randn(out.shape, generator=generator).unflatten(0, (config.number, -1))
        noise = (strength.view(-1, 1, 1, 1, 1) * noise).flatten(0, 1)
        out = out + noise.to(out)
    return out

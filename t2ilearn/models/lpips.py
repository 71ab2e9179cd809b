"""The perceptual distance: pictures compared by the features of a network (Zhang et al. 2018).

    x, x̂ → trunk → feature maps of L levels → unit vectors → squared differences → d(x, x̂)

| symbol | name |
|---|---|
| x, x₀ | `x`, `y`, two batches of pictures |
| d | `perceptual_distance` (Eq. 1) |
| w_l | `channel_weights`, one weight per channel of level l |

With `VGGTrunk` and the weights that the authors learned for its channels, d is the distance known
as LPIPS. Any other trunk has weights 1 / L.

Differs from the paper in: nothing, given that trunk and those weights.

Letters: B batch, H and W picture, L levels of a trunk.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .layers import at_least_float32, check_dtype, check_pictures

Trunk = Callable[[Tensor], Sequence[Tensor]]  # (B, 3, H, W) → feature maps, finest first


def perceptual_distance(
    trunk: Trunk,
    x: Float[Tensor, "b 3 h w"],
    y: Float[Tensor, "b 3 h w"],
    channel_weights: Sequence[Float[Tensor, " _"]] | None = None,
) -> Float[Tensor, " b"]:
    """d(x, y): how much the features of two pictures differ (Zhang et al. 2018, Eq. 1).

    At each place of each level the two feature vectors are scaled to length 1. Their squared
    difference is averaged over places and summed over channels and levels.

    Args:
        trunk: pictures → feature maps of L levels. The gradient goes through it to y (and x).
        channel_weights: one weight a channel, for each level; by default 1 / L throughout.

    Returns:
        d(x, y) for each of the B pairs.

    Raises:
        ValueError: if x are no pictures in [−1, 1]; y, which a network may have drawn, may leave
            that range.
    """
    check_pictures(x)
    pairs = [
        (F.normalize(at_least_float32(a), dim=1), F.normalize(at_least_float32(b), dim=1))
        for a, b in zip(trunk(x), trunk(y), strict=True)
    ]
    levels = [(a - b).square().mean((2, 3)) for a, b in pairs]  # L times (B, channels)
    if channel_weights is None:
        return torch.stack([level.sum(1) for level in levels]).mean(0)
    return torch.stack([d @ w for d, w in zip(levels, channel_weights, strict=True)]).sum(0)


class VGGTrunk(nn.Module):
    """Five levels of VGG-16, the trunk of LPIPS. It downloads nothing::

        trunk = VGGTrunk(torchvision.models.vgg16(weights="IMAGENET1K_V1").features)
        perceptual_distance(trunk, x, y, channel_weights)

    The call of torchvision downloads 528 MB, and checks them by hash. The channel weights that
    Zhang et al. (2018) learned ship with this package (`pretrained.lpips.lpips_channel_weights`).

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
            raise ValueError(
                "These are not the layers of VGG-16 (convolutions, ReLUs and poolings): give "
                "torchvision.models.vgg16().features."
            )
        starts = (0, *self.CUTS)
        self.levels = nn.ModuleList(
            nn.Sequential(*(_new_output(layer) for layer in features[a:b]))
            for a, b in zip(starts, self.CUTS, strict=False)
        )
        self.mean: Tensor
        self.spread: Tensor
        # ImageNet's mean colour and its standard deviation, for pixels in [-1, 1].
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("spread", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Feature maps of the five levels, finest first.

        Raises:
            ValueError: for numbers of another type than the weights.
        """
        check_dtype(x, self.mean)
        x, maps = (x - self.mean) / self.spread, []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps


def _new_output(layer: nn.Module) -> nn.Module:
    """torchvision's ReLUs overwrite their input, which is a feature map that is still needed."""
    return nn.ReLU() if isinstance(layer, nn.ReLU) else layer

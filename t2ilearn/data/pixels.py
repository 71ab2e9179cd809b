"""Pictures as bytes and as floats: the one place that converts between them.

| symbol | name |
|---|---|
| v ∈ {0, …, 255} | a colour value as files store it |
| x ∈ [−1, 1] | a colour value as models use it |

    x = v / 127.5 − 1                        pictures_from_bytes
    v = round(127.5 · (x + 1)), clamped      bytes_from_pictures

Shapes: *batch any leading axes, h height, w width.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def pictures_from_bytes(
    values: UInt8[Tensor, "*batch 3 h w"] | Float[Tensor, "*batch 3 h w"],
) -> Float[Tensor, "*batch 3 h w"]:
    """x = v / 127.5 − 1.

    Args:
        values: from 0 to 255, as bytes; or as floats, where something was drawn or resampled on
            that scale. They stay as they are.

    Returns:
        A new tensor in [−1, 1], in float32 (a float64 stays a float64).
    """
    return _at_least_float32(values).div(127.5).sub_(1)


def bytes_from_pictures(pictures: Float[Tensor, "*batch 3 h w"]) -> UInt8[Tensor, "*batch 3 h w"]:
    """v = round(127.5 · (x + 1)), from 0 to 255.

    Args:
        pictures: in [−1, 1]; what lies outside is clamped.

    Raises:
        ValueError: if they are no floating numbers, or hold NaN.
    """
    if not pictures.is_floating_point() or pictures.isnan().any():
        what = "hold NaN" if pictures.is_floating_point() else f"are {pictures.dtype}"
        raise ValueError(f"Pictures are floating numbers in [−1, 1]; these {what}.")
    values = _at_least_float32(pictures.detach()).add(1).mul_(127.5)
    return values.round_().clamp_(0, 255).byte()


def _at_least_float32(values: Tensor) -> Tensor:
    """Bytes and half precision as float32: neither could hold the steps in between."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

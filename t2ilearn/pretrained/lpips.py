"""The learned weights of LPIPS, for the channels of VGG-16.

"The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (Zhang, Isola, Efros,
Shechtman & Wang 2018), Eq. 1: the squared differences of normalised feature maps are weighted
channel by channel and summed over the levels.

| symbol | name |
|---|---|
| w_l, one weight a channel of level l | `lpips_channel_weights()[l]` |

Differs from the paper in: nothing; these are the numbers that its authors released as version 0.1.
`models.lpips.perceptual_distance` takes them as `channel_weights`.

Letters: C channels of a level.
"""

import json

from jaxtyping import Float
from torch import Tensor

from t2ilearn.weights import ASSETS, WeightsError, read_tensors


def lpips_channel_weights() -> list[Float[Tensor, " c"]]:
    """w_l for the five levels of VGG-16, finest first; C is 64, 128, 256, 512 and 512.

    Raises:
        WeightsError: if the shipped file is damaged.
    """
    path = ASSETS / "lpips" / "vgg.safetensors"
    try:
        sha256 = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        raise WeightsError(
            f"{path.with_suffix('.json')} does not state the SHA-256 of {path.name}. Install "
            "t2ilearn again."
        ) from None
    tensors = read_tensors(path, sha256)
    return [tensors[name] for name in sorted(tensors)]  # (C,) each

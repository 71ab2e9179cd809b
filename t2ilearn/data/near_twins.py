"""Near twins: one picture in two files that do not have the same pixels.

A picture that was saved anew as JPEG, or in another size, has other pixels than before, and yet a
test on the one is no test if training saw the other. Both are shrunk to 8 × 8 pixels here and
compared, relative to the contrast that they have at this size:

    ‖a − b‖ ≤ 0.12 · max(‖a − mean a‖, ‖b − mean b‖) + 1/2      of 255, as root mean squares

The factor is larger for pictures of less than 64 pixels, which JPEG changes more.

Found are: JPEG from quality 75 (below 64 pixels from 90), WebP from quality 80, GIF, half and
double the size. Not found are other crops, mirrored pictures, and other colours. Pictures that
differ by less than this are taken for twins too; nothing is lost but a free choice of their split.
Pictures of one colour have no twins.

Letters: n pictures.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from t2ilearn.data.picture_files import shrink

GRID = 8  # pixels along each side of what is compared
TOLERANCE, ROUNDING = 0.12, 0.5  # of the contrast; of 255
_SIDE, _BLOCK = 64, 512


def thumbnail(picture: Image.Image) -> Float[Tensor, " 193"]:
    """The central square in 8 × 8 colours, and the share of contrast in which twins may differ."""
    small = F.avg_pool2d(shrink(picture, _SIDE).float(), _SIDE // GRID)  # (3, 8, 8)
    tolerance = TOLERANCE * max(1.0, _SIDE / min(picture.size))
    return torch.cat([small.flatten(), torch.tensor([tolerance])])


def twin_groups(thumbnails: Sequence[Float[Tensor, " 193"]]) -> list[int]:
    """The number of each picture's group: twins, and twins of twins, are in one."""
    rows = torch.stack(list(thumbnails))
    small, tolerance = rows[:, :-1], rows[:, -1]
    mean = small.mean(1)
    contrast = (small - mean[:, None]).square().mean(1).sqrt()
    flat = small.unflatten(1, (3, -1)).std(2).amax(1) < ROUNDING
    reach = (tolerance * contrast + ROUNDING).masked_fill(flat, -1)
    order = mean.argsort()
    small, mean, reach = small[order], mean[order], reach[order]
    group = list(range(len(rows)))

    def first(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    for start in range(0, len(rows), _BLOCK):
        end = min(start + _BLOCK, len(rows))
        # No farther apart than twins may be are their means, by which they are sorted.
        last = int(torch.searchsorted(mean, mean[end - 1] + reach.max(), right=True))
        apart = torch.cdist(small[start:end], small[start:last]) / small.shape[1] ** 0.5
        near = apart <= torch.maximum(reach[start:end, None], reach[None, start:last])
        for i, j in near.triu(1).nonzero().tolist():
            group[first(start + j)] = first(start + i)
    groups = [0] * len(rows)
    for place, row in enumerate(order.tolist()):
        groups[row] = first(place)
    return groups

"""The three token ids on which every tokenizer and every model that reads captions agree.

| symbol | name |
|---|---|
| ∅ | `null_caption`, the empty caption of classifier-free guidance (Ho & Salimans 2022) |

Differs from the paper in: ∅ is an ordinary caption with a token of its own.

Letters: B batch, T tokens of a caption.
"""

import torch
from jaxtyping import Int
from torch import Tensor

PAD, END, NULL = 0, 1, 2  # padding, the end of a caption, and "no caption"


def null_caption(n: int, length: int) -> Int[Tensor, "{n} {length}"]:
    """The empty caption ∅, n times: guidance calls a model without a caption unconditional.

    Args:
        n: the number of captions.
        length: T, at least 2.
    """
    ids = torch.full((n, length), PAD, dtype=torch.int64)
    ids[:, 0], ids[:, 1] = NULL, END
    return ids

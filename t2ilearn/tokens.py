"""The three token ids on which every tokenizer and every model that reads captions agree."""

import torch
from jaxtyping import Int
from torch import Tensor

PAD, END, NULL = 0, 1, 2  # fills up, ends a caption, stands for "no caption at all"


def null_caption(n: int, length: int) -> Int[Tensor, "{n} {length}"]:
    """The caption that says nothing, n times: what guidance calls unconditional."""
    ids = torch.full((n, length), PAD, dtype=torch.int64)
    ids[:, 0], ids[:, 1] = NULL, END
    return ids

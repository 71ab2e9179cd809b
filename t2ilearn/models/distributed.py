"""Data-parallel training: what the models exchange when several processes train together.

Each process (*rank*) has its own part of a batch. Accelerate averages the gradients; statistics
that are no gradients, such as the counts of a codebook, are exchanged here. With one process every
function returns its argument unchanged.

Differs from a paper in: nothing, there is none; these are `torch.distributed`'s own collectives.

Letters: B batch of one process, D channels or dimensions, h and w grid.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def num_ranks() -> int:
    """The number of processes that train together, each on its own part of a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of all processes' tensors, the same in each of them. Changes x in place."""
    if num_ranks() > 1:
        dist.all_reduce(x)
    return x


def broadcast_from_first_rank(x: Tensor) -> Tensor:
    """The first process's tensor, in every process. Changes x in place."""
    if num_ranks() > 1:
        dist.broadcast(x, src=0)
    return x


def gather_ranks(z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b_all d h w"]:
    """The tensors of the joint batch, in the order of the processes, in every process."""
    if num_ranks() == 1:
        return z
    parts = [torch.empty_like(z, memory_format=torch.contiguous_format) for _ in range(num_ranks())]
    dist.all_gather(parts, z.contiguous())
    return torch.cat(parts)


class _GatherRanks(torch.autograd.Function):
    """Forward: the parts of all processes, one below the other. Backward: each process receives
    the sum of the gradients that all of them have for its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(num_ranks())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.clone()).chunk(num_ranks())[own_rank()]


def gather_with_gradient(x: Float[Tensor, "b d"]) -> Float[Tensor, "b_all d"]:
    """The rows of the joint batch in every process, through which gradients flow back to whoever
    made them. Every process has the same number of rows."""
    return x if num_ranks() == 1 else _GatherRanks.apply(x)

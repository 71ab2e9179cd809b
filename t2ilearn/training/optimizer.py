"""The optimiser, its learning rate and the clipping of gradients.

Papers: AdamW (Loshchilov & Hutter 2019), cosine schedule (Loshchilov & Hutter 2017), gradient
clipping (Pascanu et al. 2013).

| symbol | name |
|---|---|
| η | `learning_rate_at(config, step)`, at most `TrainConfig.learning_rate` |
| β₁, β₂ | `betas` |
| λ | `TrainConfig.weight_decay` |
| ‖∇‖ | what `clip_gradients` returns, before clipping |

Differs from the papers in: β₂ = 0.99, a memory that suits runs of a few thousand steps; weight
decay on matrices and kernels only.

Another optimiser belongs into `make_optimizer` and nowhere else. Its state has to consist of
tensors, since a checkpoint stores tensors only.
"""

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from t2ilearn.training.config import TrainConfig

BETAS = (0.9, 0.99)


def make_optimizer(
    model: nn.Module, config: TrainConfig, betas: tuple[float, float] = BETAS
) -> torch.optim.Optimizer:
    """AdamW that decays matrices and kernels, but no bias and no normalisation's gain.

    Raises:
        ValueError: if the model has no parameter to train.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("The model has no parameter to train: all have requires_grad=False.")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = {p.device.type for p in trained} <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero (Loshchilov & Hutter 2017, Eq. 5)."""
    warmup = min(config.warmup_steps, config.steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all groups of parameters the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(model: nn.Module, limit: float, accelerator: Accelerator) -> Tensor:
    """Scale each network's gradient down to the norm `limit`; returns the first one's norm before.

    A model of networks with losses of their own lists them as `networks`; any other is one.
    """
    accelerator.unscale_gradients()
    networks = getattr(model, "networks", (model,))
    return [nn.utils.clip_grad_norm_(network.parameters(), limit) for network in networks][0]

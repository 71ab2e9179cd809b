"""Averaged weights: what is evaluated and shipped (Polyak & Juditsky 1992).

    average = μ · average + (1 − μ) · weights

| symbol | name |
|---|---|
| μ | `ema_decay_at(config, step)`, at most `TrainConfig.ema_decay` |

Differs from the paper in: the average is exponential, and its decay warms up.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from t2ilearn.training.config import TrainConfig
from t2ilearn.training.wrappers import plain_key


def ema_decay_at(config: TrainConfig, step: int) -> float:
    """μ at a step: a short memory at first, because the average begins at random weights."""
    return min(config.ema_decay, (1 + step) / (10 + step))


class AveragedWeights:
    """Exponential moving average of a model's parameters.

    Buffers are the model's own: a count or a codebook that is already a running mean would lag
    twice if it were averaged again.

    `live` and `values` map each parameter's name, without what wrappers add to it, to the
    parameter and to its average.
    """

    def __init__(self, model: nn.Module) -> None:
        self.live = {plain_key(model, name): p for name, p in model.named_parameters()}
        self.values: dict[str, Tensor] = {n: p.detach().clone() for n, p in self.live.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """values ← decay · values + (1 − decay) · live."""
        torch._foreach_lerp_(list(self.values.values()), list(self.live.values()), 1 - decay)

    @torch.no_grad()
    def store(self) -> None:
        """Overwrite the model's parameters by their averages."""
        for name, parameter in self.live.items():
            parameter.copy_(self.values[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the model has the averages; afterwards its own values again."""
        kept = {name: p.detach().clone() for name, p in self.live.items()}
        self.store()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.live.items():
                    parameter.copy_(kept[name])

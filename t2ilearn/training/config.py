"""What decides a run, and the check that it makes sense."""

from dataclasses import dataclass, fields

import torch

_WHOLE = ("steps", "batch_size", "warmup_steps", "seed")


@dataclass(frozen=True)
class TrainConfig:
    """What decides a run. `batch_size` is for the recipe's `make_batch`, on each process."""

    steps: int
    batch_size: int
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 100
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0


def check_run(config: TrainConfig) -> None:
    """Raise `ValueError` if a config, or what the caller has set in torch, makes no sense."""
    for field in fields(config):
        value, whole = getattr(config, field.name), field.name in _WHOLE
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{field.name} must be {kind}, not {value!r}.")
    for name in ("steps", "batch_size", "learning_rate", "gradient_clip"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be above 0, not {getattr(config, name)}.")
    for name in ("weight_decay", "warmup_steps", "seed"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must be at least 0, not {getattr(config, name)}.")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), not {config.ema_decay}.")
    _check_torch()


def _check_torch() -> None:
    """Raise `ValueError` where a global setting of torch would change the run unseen.

    Random numbers, learning rates and losses have the default dtype. Autocast keeps its copies of
    the weights until the outermost block ends, so that within one a run would compute with those
    of its first step.
    """
    if torch.get_default_dtype() != torch.float32:
        raise ValueError(
            f"torch's default dtype is {torch.get_default_dtype()}, and training expects "
            "torch.float32, else the same arguments would give another run. Call "
            "torch.set_default_dtype(torch.float32) before you build the model. To train a model "
            "in double precision, call model.double() and make batches in float64."
        )
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    if depth > 0:
        raise ValueError(
            "Training was started within torch.autocast, which would change its precision. Call "
            'train outside of that block, and choose by its argument: precision="bf16", for '
            "example."
        )

"""Models inside wrappers: `torch.compile`, `DataParallel`, `DistributedDataParallel`.

A wrapper keeps the model under a name of its own, and that name shows in every key of its state:
`_orig_mod.0.weight`, `module.0.weight`. Checkpoints and results have the plain keys, so that a run
can begin compiled and go on plain.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def _inner_name(module: nn.Module | None) -> str | None:
    """The name under which a wrapper keeps what it wraps; None for any other module."""
    if isinstance(module, DataParallel | DistributedDataParallel):
        return "module"
    # By its attribute: to import the class of compiled modules takes a second.
    return "_orig_mod" if module is not None and "_orig_mod" in module._modules else None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside all wrappers around it; wrapped parts of it stay wrapped."""
    while (name := _inner_name(model)) is not None:
        model = model.get_submodule(name)
    return model


def is_data_parallel(model: nn.Module) -> bool:
    """Whether a wrapper around the model shares the batch among devices or processes."""
    while (name := _inner_name(model)) is not None:
        if name == "module":
            return True
        model = model.get_submodule(name)
    return False


def plain_key(model: nn.Module, key: str) -> str:
    """A key of `model.state_dict()` without the names that wrappers inside the model add."""
    kept: list[str] = []
    module: nn.Module | None = model
    for part in key.split("."):
        if part != _inner_name(module):
            kept.append(part)
        module = module._modules.get(part) if module is not None else None
    return ".".join(kept)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` under plain keys."""
    return {plain_key(model, key): tensor for key, tensor in model.state_dict().items()}


def load_plain_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors under plain keys into a model whose parts may be wrapped."""
    model.load_state_dict({key: state[plain_key(model, key)] for key in model.state_dict()})

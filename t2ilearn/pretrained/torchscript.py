"""Tensors of a TorchScript archive, read without running its program.

OpenAI released CLIP as TorchScript: a zip with a program (`code/`), its constants, and a pickle of
the module that holds the weights. `torch.jit.load` would compile the program. Here only the pickle
is read, by `torch.load(weights_only=True)`: the classes that it names, all of them below
`__torch__`, are read as empty objects with attributes (`_Module`), and the tensors among these
attributes are the weights. Their names are the paths to them, as in a `state_dict`.

| name | what it is |
|---|---|
| `read_torchscript` | path → tensors by name |
"""

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2ilearn.pretrained.checkpoints import check_tensor, check_zip, reason_of
from t2ilearn.weights import WeightsError

_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
_DEPTH = 32  # modules within modules, at most


class _Module:
    """In the place of a compiled module: keeps its attributes and has no behaviour."""


class _List:
    """In the place of a function that marks a list's type: returns the list."""

    def __new__(cls, values: Any = (), *_: Any) -> Any:
        return values


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive; nothing that it holds is run.

    Returns:
        Tensors on the CPU, by the names that they have in the module's `state_dict`.

    Raises:
        WeightsError: if the file is missing or damaged, holds no tensors, or names a class or
            function other than modules and what rebuilds tensors.
    """
    try:
        sizes = check_zip(path)
        content, stubs = _without_program(path)
        with torch.serialization.safe_globals(stubs):
            module = torch.load(content, map_location="cpu", weights_only=True)
        found = _named_tensors(module, "", _DEPTH)
        state = {name: check_tensor(name, t, sizes).clone() for name, t in found.items()}
    except WeightsError as error:
        raise WeightsError(f"{path} is not loaded: {error}.") from None
    except (zipfile.BadZipFile, FileNotFoundError) as error:
        raise WeightsError(f"{path} is missing, truncated or damaged ({error}).") from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise WeightsError(reason_of(path, error)) from None
    if not state:
        raise WeightsError(f"{path} is not loaded: there are no tensors in it.")
    return state


def _without_program(path: Path) -> tuple[io.BytesIO, list[Any]]:
    """The archive as `torch.save` would have written it, and stubs for the classes it names."""
    kept = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(kept, "w") as target:
        for name in source.namelist():
            root, _, inside = name.partition("/")
            if inside in ("data.pkl", "version", "byteorder") or inside.startswith("data/"):
                target.writestr(name, source.read(name))
        program = source.read(f"{root}/data.pkl")
    kept.seek(0)
    named = [str(arg) for op, arg, _ in pickletools.genops(program) if op.name == "GLOBAL"]
    stubs = [_stub(*name.split(" ")) for name in dict.fromkeys(named)]
    return kept, [stub for stub in stubs if stub is not None]


def _stub(module: str, name: str) -> Any:
    """A stand-in for a name of TorchScript; None for any other, which `torch.load` then judges."""
    if module == "__torch__" or module.startswith("__torch__."):
        return type(name, (_Module,), {"__module__": module, "__qualname__": name})
    if module == "torch.jit._pickle" and name in _LISTS:
        return type(name, (_List,), {"__module__": module, "__qualname__": name})
    return None


def _named_tensors(module: Any, prefix: str, depth: int) -> dict[str, Tensor]:
    """The tensors among a module's attributes, and among those of the modules within it."""
    if not isinstance(module, _Module):
        raise WeightsError("its pickle holds no module")
    if depth == 0:
        raise WeightsError(f"modules lie more than {_DEPTH} deep in each other")
    found: dict[str, Tensor] = {}
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, _Module):
            found |= _named_tensors(value, f"{prefix}{name}.", depth - 1)
    return found

"""Checkpoints of PyTorch and Lightning, read without running what they hold.

A file of `torch.save` is a zip of two things: the numbers, and a pickle that says which tensor is
made of which numbers. A pickle is a program that may call any function, so the file of a stranger
may do anything to the computer that opens it. `torch.load(weights_only=True)` knows only functions
that build tensors and refuses all others by name. Lightning's files name more than that: callbacks,
configurations, numpy scalars. Each name in `STUBBED` is read as an empty object instead; the code
behind the name is neither imported nor called.

| name | what it is |
|---|---|
| `STUBBED` | the allow-list: names that become `_Stub`s, since no tensor depends on them |
| `MAPPINGS` | such names too, of objects that are filled like a dictionary |
| `read_checkpoint` | path → tensors by name |

`torch.load` checks neither the checksums of the zip, nor that a part is as long as the pickle says,
nor that a tensor repeats no number (a stride of 0 makes any size of one number), so
`read_checkpoint` does.
"""

import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2ilearn.weights import WeightsError, without_wrappers

STUBBED = {  # module → names in it
    "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor": "LearningRateMonitor",
    "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping": "EarlyStopping",
    "lightning.pytorch.callbacks.lr_monitor": "LearningRateMonitor",
    "lightning.pytorch.callbacks.model_checkpoint": "ModelCheckpoint",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode BooleanNode FloatNode IntegerNode StringNode",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    # What these objects hold: types as values, and bytes, which some versions of torch read.
    "typing": "Any",
    "builtins": "bool dict float int list set str tuple",
    "_codecs": "encode",
}
MAPPINGS = {
    "collections": "defaultdict",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "lightning.pytorch.utilities.parsing": "AttributeDict",
}
_SHOWN = 200  # characters of an error of torch


class _Stub:
    """In the place of an object that is no tensor: accepts any arguments and state, keeps none."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _MappingStub(_Stub):
    """In the place of another class of dictionaries: makes an ordinary one."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def _classes(listed: dict[str, str], base: type) -> list[Any]:
    """Classes that `torch.load` takes for those of the listed names."""
    return [
        type(name, (base,), {"__module__": module, "__qualname__": name})
        for module, names in listed.items()
        for name in names.split()
    ]


_STUBS = _classes(STUBBED, _Stub) + _classes(MAPPINGS, _MappingStub)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file that `torch.save` wrote; nothing that it holds is run.

    Args:
        path: a `.ckpt`, `.pth` or `.pt` file of PyTorch 1.6 or later.

    Returns:
        The tensors of its `state_dict`, or, if it has none, those at its top, on the CPU. What
        data-parallel training and torch.compile put before names is taken off.

    Raises:
        WeightsError: if the file is missing, truncated, damaged, of another kind, without tensors,
            or names a function or class that is not on the allow-list.
    """
    path = Path(path)
    _check_kind(path)
    try:
        sizes = check_zip(path)
        if is_torchscript(path):
            raise WeightsError(
                "it is TorchScript, a program with its weights inside. OpenAI's CLIP is read by "
                "`pretrained.clip.load_clip`, from this file or from model.safetensors of Hugging "
                "Face; of a VQGAN fetch the last.ckpt"
            )
        with torch.serialization.safe_globals(_STUBS):
            # Mapped into memory, optimiser states that no one uses take none.
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        return _tensors(content, sizes)
    except WeightsError as error:
        raise WeightsError(f"{path} is not loaded: {error}.") from None
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{path} is truncated or damaged ({error}). Fetch it again.") from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise WeightsError(reason_of(path, error)) from None


def reason_of(path: Path, error: Exception) -> str:
    """What `torch.load` refused, without its advice to load the file with `weights_only=False`."""
    text = str(error)
    refused = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", text)  # as torch words it
    if refused:
        return (
            f"{path} is not loaded: its pickle refers to {refused[1]}, which is refused: it is not "
            "on the list of names that are known to be harmless."
        )
    text = text.rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0][:_SHOWN]
    hint = " Or it was saved with another `pickle_protocol` than torch.save's own, 2."
    return (
        f"{path} is damaged: it makes no sense as a checkpoint ({type(error).__name__}: {text})."
        + (hint if text.startswith("Unsupported operand") else "")
    )


def _check_kind(path: Path) -> None:
    """Raise `WeightsError` unless a file begins like a zip."""
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; give the checkpoint in it.")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise WeightsError(f"There is no file {path}.") from None
    if start.startswith(b"PK\x03\x04"):
        return
    if len(start) < 64:
        raise WeightsError(f"{path} is truncated: {len(start)} bytes. Fetch it again.")
    if start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5":
        raise WeightsError(
            f"{path} is a bare pickle, as PyTorch wrote before 1.6. Save it anew where it is "
            "trusted: torch.save(torch.load(path, weights_only=True), path)."
        )
    raise WeightsError(f"{path} is no checkpoint of PyTorch: it begins with {start[:16]!r}.")


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip that `torch.jit.save` wrote."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.partition("/")[2] == "constants.pkl" for name in file.namelist())


def check_zip(path: Path) -> set[int]:
    """The sizes in bytes of the parts of a zip, if it is whole and of `torch.save`'s layout.

    Raises:
        WeightsError: if another program wrote it.
        BadZipFile: if a checksum is wrong.
    """
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
        roots = {name.partition("/")[0] for name in names}
        if len(roots) != 1 or f"{next(iter(roots))}/data.pkl" not in names:
            raise WeightsError("it is a zip, but not one that torch.save wrote")
        # Nor may a small file fill the memory.
        # Only TorchScript's program is compressed by PyTorch itself, and nothing reads that.
        parts = [e for e in file.infolist() if not e.filename.partition("/")[2].startswith("code/")]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in parts):
            raise WeightsError("something compressed it after torch.save; take the original")
        damaged = file.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"bad CRC-32 for {damaged!r}")
        return {entry.file_size for entry in file.infolist()}


def _tensors(content: Any, sizes: set[int]) -> dict[str, Tensor]:
    """The named tensors of a checkpoint's content, no longer mapped to its file."""
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {
        without_wrappers(name): check_tensor(name, tensor, sizes).clone()
        for name, tensor in (state.items() if isinstance(state, dict) else ())
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    if not tensors:
        raise WeightsError(
            "there are no named tensors in it, neither in `state_dict` nor at its top"
        )
    return tensors


def check_tensor(name: str, tensor: Tensor, sizes: set[int]) -> Tensor:
    """A dense tensor on the CPU whose numbers are a part of the file, each used at most once."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized:
        kind = f"{type(tensor).__name__} of {tensor.dtype}"
        raise WeightsError(f"{name} is no plain tensor but a {kind}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise WeightsError(f"{name} is stored as {tensor.layout} on {tensor.device}")
    stored = tensor.untyped_storage().nbytes()
    if stored not in sizes:
        raise WeightsError(f"{name} should lie in a part of {stored} bytes, and there is none")
    if tensor.numel() * tensor.element_size() > stored:
        raise WeightsError(
            f"{name}, of size {tuple(tensor.shape)}, does not fit its part of {stored} bytes"
        )
    return tensor.detach()

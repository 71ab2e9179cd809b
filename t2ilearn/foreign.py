"""Other people's checkpoints, read without running what they hold.

A checkpoint of PyTorch is a zip of two things: the numbers, and a pickle that says which tensor is
made of which. A pickle is a program, which may call any function of this computer. The reader here
knows three: "make a dictionary", "this tensor lies there" and "this is a parameter". All else is
refused by name, except objects of the libraries that trained the model, which become empty stubs.
"""

import io
import math
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_KINDS = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_STUBBED = ("pytorch_lightning.", "lightning.", "omegaconf.", "numpy.")
# What pickled objects of those libraries name besides: stubs too, and as idle. Old pickles have
# Python 2's words for int and str.
_STUBBED_TOO = {"_codecs.encode", "collections.defaultdict", "typing.Any"} | {
    f"builtins.{name}"
    for name in ("bool", "dict", "float", "int", "list", "long", "set", "str", "tuple", "unicode")
}


class WeightsError(RuntimeError):
    """Weights that cannot be used; the message names the file, the reason and the remedy."""


class _Stub:
    """In the place of an object that is no tensor: takes everything, keeps and calls nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Stub":
        return super().__new__(cls)

    def _ignore(self, *_: Any) -> None:
        """What a pickle does to an object after it is made."""

    __init__ = __call__ = __setstate__ = __setitem__ = append = extend = add = _ignore


class _Entries(dict):
    """An ordered dictionary without the attributes that torch hangs on it."""

    def __setstate__(self, state: object) -> None:
        pass


class _Storage(NamedTuple):
    """Where numbers lie in the archive, of what kind and how many."""

    key: str
    kind: torch.dtype
    numbers: int


class _Described(NamedTuple):
    """A tensor as a pickle describes it. Nothing of this is believed until `_Archive.tensor`."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries, lists, words, numbers and descriptions of tensors.

    What a pickle may call are methods of this object and classes of this file, to which it can
    attach nothing that outlives it.
    """

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full == "collections.OrderedDict":
            return _Entries
        if full in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return self._describe
        if full == "torch._utils._rebuild_parameter":
            return self._parameter
        if module == "torch" and name in _KINDS:
            return _KINDS[name]
        if full.startswith(_STUBBED) or full in _STUBBED_TOO:
            return _Stub
        raise WeightsError(f"this pickle wants to run {full}; refused")

    def _describe(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Described:
        return _Described(storage, offset, size, stride)

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, numbers = pid
        return _Storage(key, kind, numbers)


class _Archive:
    """A zip written by `torch.save`, open for reading."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self.file = file
        found = [name for name in file.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(found) != 1:
            raise WeightsError("it is a zip, but not one that torch.save wrote")
        self.root = found[0].removesuffix("data.pkl")
        self.storages: dict[_Storage, Tensor] = {}

    def holds(self, part: str) -> bool:
        return self.root + part in self.file.namelist()

    def read(self, part: str) -> bytearray:
        """The bytes of one part; uncompressed, so that a small file cannot fill the memory."""
        entry = self.file.getinfo(self.root + part)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise WeightsError("something compressed it after torch.save; take the original")
        return bytearray(self.file.read(entry))

    def tensor(self, described: _Described) -> Tensor:
        """The tensor that was described, if what was said about it can be true."""
        storage, offset, size, stride = described
        for number in (storage.numbers, offset, *size, *stride):
            if type(number) is not int or number < 0:
                raise WeightsError(f"{number!r} is no size, place or stride of a tensor")
        if storage not in self.storages:
            data = self.read(f"data/{storage.key}")
            if len(data) != storage.numbers * storage.kind.itemsize:
                raise WeightsError(
                    f"part {storage.key} has not the {storage.numbers} numbers stated"
                )
            whole = torch.frombuffer(data, dtype=storage.kind) if data else torch.empty(0)
            self.storages[storage] = whole.to(storage.kind)
        # No more numbers than there are, either: strides of 0 could make any size of one.
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) > 0 and max(last + 1, math.prod(size)) > storage.numbers:
            raise WeightsError(
                f"a tensor of size {size} does not fit its {storage.numbers} numbers"
            )
        return self.storages[storage].as_strided(size, stride, offset)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file that `torch.save` wrote; nothing that it holds is run.

    Args:
        path: a `.ckpt`, `.pth` or `.pt` file of PyTorch 1.6 or later.

    Returns:
        The tensors of its `state_dict`, or, if it has none, those at its top, on the CPU.

    Raises:
        WeightsError: if the file is missing, truncated, damaged, of another kind, without tensors,
            or wants to run something.
    """
    path = Path(path)
    _check_kind(path)
    try:
        with zipfile.ZipFile(path) as file:
            return _tensors(_Archive(file))
    except WeightsError as error:
        raise WeightsError(f"{path} is not loaded: {error}.") from None
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{path} is truncated or damaged ({error}). Fetch it again.") from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise WeightsError(
            f"{path} is damaged: it makes no sense ({type(error).__name__}: {error})."
        ) from None


def _tensors(archive: _Archive) -> dict[str, Tensor]:
    if archive.holds("constants.pkl"):
        raise WeightsError(
            "it is TorchScript, a program with its weights inside. Fetch the weights alone: for "
            "OpenAI's CLIP model.safetensors from Hugging Face, for a VQGAN its last.ckpt"
        )
    if archive.holds("byteorder") and archive.read("byteorder").decode() != sys.byteorder:
        raise WeightsError("its numbers are stored in another byte order than this computer's")
    content = _Unpickler(io.BytesIO(archive.read("data.pkl"))).load()
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {
        name: archive.tensor(described)
        for name, described in state.items()
        if isinstance(name, str) and isinstance(described, _Described)
    }
    if not tensors:
        raise WeightsError(
            "there are no named tensors in it, neither in `state_dict` nor at its top"
        )
    return tensors


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

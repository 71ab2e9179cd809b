"""Weights as two small files: the tensors, and a card that tells where they come from.

    assets/NAME.safetensors   tensors, and in the header the schema, the stage and the configs;
                              reading it runs no code
    assets/NAME.json          the card: configs, data, settings, legs, metrics, SHA-256 of the file

`load` checks one file against the other, so that damage is reported here and does not show up as
strange pictures. `make_config` builds a model's config from the header, and `load_into` is strict:
every tensor of the model comes from the file, and none is left over.
"""

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from t2ilearn.weights.card import (
    SCHEMA,
    Card,
    Header,
    check_against_header,
    is_name,
    read_header,
)
from t2ilearn.weights.fields import Place, WeightsError, plain, read_fields

T = TypeVar("T")
ASSETS = Path(__file__).parent.parent / "assets"
METADATA_KEY = "t2ilearn"  # of the header, for the schema, the stage and the configs
_PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
_WRAPPERS = ("module", "_orig_mod")
_MOST_FAULTS = 20  # that one message lists
_LARGEST_HEADER = 100 * 2**20  # safetensors' own limit, in bytes


class Weights(NamedTuple):
    """Tensors by name (floating ones in float32, on the CPU), their card, and their file."""

    state: dict[str, Tensor]
    card: Card
    path: Path


def available(directory: Path | None = None) -> tuple[str, ...]:
    """Names of the weights in a directory (by default those that ship)."""
    return tuple(sorted(path.stem for path in (directory or ASSETS).glob("*.safetensors")))


def figure(value: object) -> str:
    """A metric as a person reads it: a share with its interval, or a number of few digits."""
    if isinstance(value, dict) and {"value", "half_width"} <= set(value):
        return f"{100 * value['value']:.1f} ± {100 * value['half_width']:.1f} %"
    if isinstance(value, dict) and {"value", "low", "high"} <= set(value):
        return f"{value['value']:.4g} ({value['low']:.4g} … {value['high']:.4g})"
    if isinstance(value, dict):
        return ", ".join(f"{name} {figure(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def save(directory: str | Path, card: Card, state: Mapping[str, Tensor], half: bool = True) -> Path:
    """Write `card.name`.safetensors and `card.name`.json; the card on disk gains the SHA-256.

    Args:
        directory: made if it does not exist.
        card: its `sha256` is ignored, all else is checked.
        state: a model's `state_dict()`.
        half: store floating tensors as float16, except where a value would overflow.

    Returns:
        The path of the tensors' file.

    Raises:
        WeightsError: if a tensor holds NaN or infinity, the name is not a plain file name, or the
            card has a field that `load` would refuse.
        OSError: for example on a full disk; older weights and their card are then untouched.
    """
    directory = Path(directory)
    name = card.name
    if not is_name(name):
        raise WeightsError(f"{name!r} is no name for weights: use no folder and no suffix.")
    bad = [key for key, t in state.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise WeightsError(f"{name} is not saved: NaN or infinity in {', '.join(bad)}.")
    facts = dataclasses.replace(card, sha256="").to_json()
    stored = {key: _stored(tensor, half) for key, tensor in state.items()}
    data = to_bytes(stored, header_metadata(card))
    text = json.dumps(
        {**facts, "sha256": hashlib.sha256(data).hexdigest()}, indent=2, ensure_ascii=False
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.safetensors"
    write_together({path: data, path.with_suffix(".json"): (text + "\n").encode("utf-8")})
    return path


def header_metadata(card: Card) -> dict[str, str]:
    """What the header of the weights' file says about the model: schema, stage and configs."""
    header = plain(Header(SCHEMA, card.stage, card.configs), Place(f"card {card.name}"))
    return {METADATA_KEY: json.dumps(header, ensure_ascii=False)}


def load(name_or_path: str | Path) -> Weights:
    """Weights by the name they ship under, or from a .safetensors file beside its card.

    Raises:
        WeightsError: if the name is unknown (the nearest ones are listed), the file is a pickle,
            truncated, no safetensors file or made by the first edition; if the card is missing,
            has a field that is missing, unknown or wrong, or belongs to another file.
    """
    path = find(name_or_path)
    data = _read(path)
    metadata = _check_layout(path, data).get("__metadata__")
    card = read_card(path.with_suffix(".json"))
    digest = hashlib.sha256(data).hexdigest()
    if digest != card.sha256:
        raise WeightsError(
            f"{path} is not the file its card describes: its SHA-256 begins {digest[:12]}, the "
            f"card's field sha256 is {card.sha256[:12]}…. Fetch both files again."
        )
    place = Place(f"card {path.with_suffix('.json')}")
    header = read_header(metadata.get(METADATA_KEY) if metadata else None, str(path))
    check_against_header(card, header, place)
    state = _parse(path, data)
    numbers = sum(tensor.numel() for tensor in state.values())
    if card.parameters > numbers:
        expected = f"at most {numbers:,}, as many numbers as the weights have"
        place.key("parameters").refuse(card.parameters, expected)
    floats = {key: t.float() if t.is_floating_point() else t for key, t in state.items()}
    return Weights(floats, dataclasses.replace(card, configs=header.configs), path)


def read_card(path: str | Path) -> Card:
    """A card without its weights, checked field by field.

    Raises:
        WeightsError: if the file is missing, is not JSON, was made by the first edition, or has a
            field that is missing, unknown, or of a wrong type or range.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"The card {path} is missing; weights come with one.") from None
    except OSError as error:
        raise WeightsError(f"The card {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"The card {path} is not readable as JSON: {error}.") from None
    return Card.from_json(values, str(path))


def make_config(kind: type[T], weights: Weights) -> T:
    """The config of a model, as the header of its weights states it.

    Args:
        kind: the config's dataclass; lists become tuples where it has tuples.
        weights: as `load` returns them: the configs on their card are those of the header.

    Raises:
        WeightsError: if the header has no such config, or naming the field that is missing,
            unknown or of another type, or if the sizes do not fit together.
    """
    place = Place(f"header of {weights.path}", "configs")
    configs = weights.card.configs
    if kind.__name__ not in configs:
        place.key(kind.__name__).refuse_missing(configs)
    return read_fields(kind, configs[kind.__name__], place.key(kind.__name__))


def load_into(model: nn.Module, weights: Weights) -> None:
    """Copy weights into a model, in place, on whatever device it is.

    Raises:
        WeightsError: naming the tensors that are missing, left over, or of another shape or kind,
            or if torch's default dtype is not float32. The model is then unchanged.
    """
    check_default_dtype()
    check_state(weights.state, model.state_dict(), type(model).__name__)
    model.load_state_dict(weights.state, strict=True)


def check_default_dtype() -> None:
    """Raise `WeightsError` unless torch makes tensors of float32, as all weights here expect."""
    if torch.get_default_dtype() != torch.float32:
        raise WeightsError(
            f"torch's default dtype is {torch.get_default_dtype()}, and these models compute in "
            "torch.float32. Call torch.set_default_dtype(torch.float32) first; to compute in "
            "another precision, convert the loaded model, as in model.double()."
        )


def without_wrappers(name: str) -> str:
    """A tensor's name without what `DataParallel` ("module.") and `torch.compile`
    ("_orig_mod.") put before the names of what they wrap."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def check_state(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], owner: str) -> None:
    """Raise `WeightsError` with the differences between two sets of names, shapes and kinds."""
    if state.keys() != wanted.keys():
        _check_prefixes(state, wanted, owner)
    faults = [f"missing {key}" for key in wanted if key not in state]
    faults += [f"left over {key}" for key in state if key not in wanted]
    for key in (key for key in wanted if key in state):
        have, want = state[key], wanted[key]
        if have.shape != want.shape:
            faults.append(f"{key} is {tuple(have.shape)}, not {tuple(want.shape)}")
        elif have.is_floating_point() != want.is_floating_point():
            faults.append(f"{key} is {have.dtype}, not {want.dtype}")
    if len(faults) > _MOST_FAULTS:
        faults[_MOST_FAULTS:] = [f"and {len(faults) - _MOST_FAULTS} more"]
    if faults:
        raise WeightsError(f"The weights do not fit {owner}:\n  " + "\n  ".join(faults))


def _check_prefixes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], owner: str) -> None:
    """Raise `WeightsError` if names differ by nothing but what a wrapper put before them."""
    plain_state, plain_wanted = (set(map(without_wrappers, names)) for names in (state, wanted))
    if plain_state == plain_wanted and plain_wanted == wanted.keys():
        raise WeightsError(
            f"The weights do not fit {owner}: their names, such as {next(iter(state))}, hold what "
            "DataParallel or torch.compile puts before them. Save the state_dict() of the model "
            "within: model.module, or model._orig_mod."
        )
    if plain_state == plain_wanted and plain_state == state.keys():
        raise WeightsError(
            f"The weights do not fit {owner}, for it is wrapped by DataParallel or torch.compile. "
            "Give the model within: model.module, or model._orig_mod."
        )
    prefix = next(iter(state), "").partition(".")[0] + "."
    if {name.removeprefix(prefix) for name in state if name.startswith(prefix)} == wanted.keys():
        raise WeightsError(
            f"The weights do not fit {owner}: every name begins with {prefix}, as in a larger "
            "model. Take that off, or save the part alone."
        )


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file as stored, checked against a digest if one is given.

    Raises:
        WeightsError: if the file is missing, a pickle, truncated, damaged or of another digest.
    """
    data = _read(path)
    _check_layout(path, data)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise WeightsError(f"{path} is damaged: its SHA-256 is not {sha256[:12]}…")
    return _parse(path, data)


def to_bytes(state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as a safetensors file. Each is copied, since tied tensors may not share memory."""
    copies = {key: t.detach().cpu().contiguous().clone() for key, t in state.items()}
    return safetensors.save(copies, metadata)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or the next start, sees the old one or the new, whole.

    Raises:
        OSError: for example on a full disk; the old file is then untouched.
    """
    write_together({path: data})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write files that belong together, each as `write_atomically`: none is replaced before all
    are on the disk.

    Raises:
        OSError: for example on a full disk; the old files are then untouched.
    """
    partials = {path: path.with_name(path.name + ".partial") for path in files}
    try:
        for path, data in files.items():
            with open(partials[path], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, partial in partials.items():
            os.replace(partial, path)
    except OSError:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise


def claim_new(path: str | Path) -> Path:
    """An empty file under this name or, where that is taken, the next free one: star.png,
    star-2.png, star-3.png. So nothing that is there is overwritten, by whatever runs beside it.

    Raises:
        OSError: if no file can be made there.
    """
    path = Path(path)
    for name in chain([path.name], (f"{path.stem}-{n}{path.suffix}" for n in count(2))):
        try:
            open(path.with_name(name), "xb").close()
        except FileExistsError:
            continue
        return path.with_name(name)
    raise AssertionError("there are always more numbers")


def _stored(tensor: Tensor, half: bool) -> Tensor:
    """The tensor as it goes to disk: float16 if asked for and if all its values fit."""
    if not (half and tensor.is_floating_point()):
        return tensor
    small = tensor.half()
    return small if small.isfinite().all() else tensor


def find(name_or_path: str | Path) -> Path:
    """The .safetensors file of weights that ship, by their name, or of others, by their path.

    Raises:
        WeightsError: if there is no such file; the nearest names are listed.
    """
    text = str(name_or_path)
    path = Path(name_or_path)
    is_path = isinstance(name_or_path, Path) or path.name != text or path.suffix != ""
    if is_path:
        if path.suffix == "" and not path.is_file():
            path = path.with_name(path.name + ".safetensors")
        if not path.is_file():
            raise WeightsError(f"There is no file {path}.")
        return path
    names = available()
    if text in names:
        return ASSETS / f"{text}.safetensors"
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    listed = ", ".join(names) or "none yet"
    raise WeightsError(f"No weights are called {text!r}.{hint} What ships: {listed}.")


def _read(path: Path) -> bytes:
    """A file's bytes, unless it is a pickle by its name or its first bytes."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise WeightsError(f"There is no file {path}.") from None
    # b"PK" opens the zip that torch.save writes, b"\x80" a bare pickle of protocol 2 or later.
    looks_pickled = data[:4] == b"PK\x03\x04" or (data[:1] == b"\x80" and data[1:2] in b"\2\3\4\5")
    if data[8:9] != b"{" and (path.suffix in _PICKLES or looks_pickled):
        raise WeightsError(
            f"{path} is a pickle, and opening one runs whatever code it holds. Ask for a "
            "safetensors file instead."
        )
    return data


def _check_layout(path: Path, data: bytes) -> dict[str, Any]:
    """The header of a file; `WeightsError` if it has not the layout and length of safetensors.

    The file begins with the header's length as eight bytes, then the header as JSON with each
    tensor's place behind it. https://huggingface.co/docs/safetensors
    """
    if not data:
        raise WeightsError(f"{path} is truncated: it is empty. Fetch it again.")
    header_end = 8 + int.from_bytes(data[:8], "little")
    if len(data) >= 9 and (data[8:9] != b"{" or header_end > _LARGEST_HEADER):
        raise WeightsError(f"{path} is not a safetensors file.")
    if len(data) < max(9, header_end):
        raise WeightsError(f"{path} is truncated: it ends inside its header. Fetch it again.")
    try:
        header = json.loads(data[8:header_end])
        _ = header.get("__metadata__", {}).get(METADATA_KEY)  # an object, if it is there
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        expected = header_end + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise WeightsError(f"{path} is not a safetensors file: its header is damaged.") from None
    if len(data) < expected:
        raise WeightsError(
            f"{path} is truncated: {len(data):,} of {expected:,} bytes. Fetch it again."
        )
    return header


def _parse(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors of a file whose layout was checked."""
    try:
        return safetensors.load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"{path} is damaged: {error}.") from None

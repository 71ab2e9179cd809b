"""Weights as two small files: the tensors, and a card that says where they come from.

    assets/NAME.safetensors   tensors only; reading them runs no code
    assets/NAME.json          the card: config, data, steps, metrics, SHA-256 of the tensors

`load` checks one against the other, so that damage shows here and not as a strange picture, and
`load_into` is strict: every tensor of the model comes from the file, and none is left over.
`load_taming` does the same for a checkpoint of "Taming Transformers".
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from t2ilearn.foreign import WeightsError, read_checkpoint
from t2ilearn.taming import RELEASED
from t2ilearn.vqgan import VQGAN

ASSETS = Path(__file__).parent / "assets"
_PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
_MOST_FAULTS = 20  # that one message lists
_LARGEST_HEADER = 100 * 2**20  # safetensors' own limit, in bytes


class Weights(NamedTuple):
    """Tensors by name (floating ones in float32, on the CPU) and the card they came with."""

    state: dict[str, Tensor]
    card: dict[str, Any]


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


def save(
    directory: str | Path,
    name: str,
    state: Mapping[str, Tensor],
    card: Mapping[str, Any],
    half: bool = True,
) -> Path:
    """Write NAME.safetensors and NAME.json; the card gains `sha256`.

    Args:
        directory: made if it does not exist.
        name: the name that `load` takes, without a suffix.
        state: a model's `state_dict()`.
        card: anything that JSON can say.
        half: store floating tensors as float16, except where a value would overflow.

    Returns:
        The path of the tensors' file.

    Raises:
        WeightsError: if a tensor holds NaN or infinity, or the name is not a plain file name.
        TypeError: if JSON cannot say what the card holds.
    """
    directory = Path(directory)
    if not name or Path(name).name != name or name.endswith((".safetensors", ".json")):
        raise WeightsError(f"{name!r} is no name for weights: no folders and no suffix, please.")
    bad = [key for key, t in state.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise WeightsError(f"{name} is not saved: NaN or infinity in {', '.join(bad)}.")
    data = to_bytes({key: _stored(tensor, half) for key, tensor in state.items()})
    facts = {**card, "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.safetensors"
    write_atomically(path, data)
    write_atomically(path.with_suffix(".json"), text.encode("utf-8"))
    return path


def load(name_or_path: str | Path) -> Weights:
    """Weights by the name they ship under, or from a .safetensors file beside its card.

    Raises:
        WeightsError: if the name is unknown (the nearest ones are listed), the file is a pickle,
            truncated or no safetensors file, or the card is missing or tells of another file.
    """
    path = find(name_or_path)
    data = _read(path)
    _check_layout(path, data)
    card = _read_card(path.with_suffix(".json"))
    digest = hashlib.sha256(data).hexdigest()
    if digest != card["sha256"]:
        raise WeightsError(
            f"{path} is not the file its card describes: its SHA-256 begins {digest[:12]}, the "
            f"card says {str(card['sha256'])[:12]}. Fetch both files again."
        )
    state = _parse(path, data)
    floats = {key: t.float() if t.is_floating_point() else t for key, t in state.items()}
    return Weights(floats, card)


def lpips_heads() -> list[Tensor]:
    """The weights of LPIPS for the channels of VGG-16, finest level first (Zhang et al. 2018)."""
    state = load(ASSETS / "lpips" / "vgg.safetensors").state
    return [state[name] for name in sorted(state)]


def load_into(model: nn.Module, weights: Weights) -> None:
    """Copy weights into a model, in place, on whatever device it is.

    Raises:
        WeightsError: naming the tensors that are missing, left over, or of another shape or kind.
            The model is then unchanged.
    """
    check_state(weights.state, model.state_dict(), type(model).__name__)
    model.load_state_dict(weights.state, strict=True)


def check_state(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], owner: str) -> None:
    """Raise `WeightsError` with the differences between two sets of names, shapes and kinds."""
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


def to_bytes(state: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file. Each is copied, since tied tensors may not share memory."""
    copies = {key: t.detach().cpu().contiguous().clone() for key, t in state.items()}
    return safetensors.save(copies)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or the next start, sees the old one or the new, whole.

    Raises:
        OSError: for example on a full disk; the old file is then untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


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


def _check_layout(path: Path, data: bytes) -> None:
    """Raise `WeightsError` if a file has not the layout and length of safetensors.

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
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        expected = header_end + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise WeightsError(f"{path} is not a safetensors file: its header is damaged.") from None
    if len(data) < expected:
        raise WeightsError(
            f"{path} is truncated: {len(data):,} of {expected:,} bytes. Fetch it again."
        )


def _parse(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors of a file whose layout was checked."""
    try:
        return safetensors.load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"{path} is damaged: {error}.") from None


def _read_card(path: Path) -> dict[str, Any]:
    """A card with the SHA-256 it must have."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"The card {path} is missing; weights come with one.") from None
    except ValueError as error:
        raise WeightsError(f"The card {path} is not readable as JSON: {error}.") from None
    if not isinstance(card, dict) or not isinstance(card.get("sha256"), str):
        raise WeightsError(f"The card {path} does not state the SHA-256 of its weights.")
    return card


# --- "Taming Transformers" ---------------------------------------------------------------------

_DROPPED = ("loss.",)  # critic and perceptual trunk; optimisers lie beside the state_dict
_OWN = {"quantizer.counts"}  # how often we used each code lately: no file knows
_TAMING = (  # ours, theirs; applied one after the other
    (r"^encoder\.quant_conv", "quant_conv"),
    (r"^decoder\.post_quant_conv", "post_quant_conv"),
    (r"^quantizer\.codebook", "quantize.embedding.weight"),
    (r"^quantizer", "quantize"),
    (r"^encoder\.levels\.(\d)\.resize\.1", r"encoder.down.\1.downsample.conv"),
    (r"^decoder\.levels\.(\d)\.resize\.1", r"decoder.up.\1.upsample.conv"),
    (r"^encoder\.levels", "encoder.down"),
    (r"^decoder\.levels", "decoder.up"),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.middle\.0", ".mid.block_1"),
    (r"\.middle\.1", ".mid.attn_1"),
    (r"\.middle\.2", ".mid.block_2"),
    (r"\.skip\.", ".nin_shortcut."),
    (r"\.out\.", ".proj_out."),
)


def taming_key(ours: str) -> str:
    """The name that a checkpoint of "Taming Transformers" gives to a tensor of our `VQGAN`."""
    for pattern, theirs in _TAMING:
        ours = re.sub(pattern, theirs, ours)
    return ours


def load_taming(path: str | Path, name: str = "f16-16384") -> VQGAN:
    """A released VQGAN of "Taming Transformers", in evaluation mode on the CPU.

    Args:
        path: the authors' `last.ckpt`.
        name: which model that is, one of `taming.RELEASED`.

    Raises:
        WeightsError: if the name is unknown, the file cannot be read (see `read_checkpoint`), or
            its tensors are not exactly those of that model.
    """
    if name not in RELEASED:
        raise WeightsError(
            f"No released VQGAN is called {name!r}. There are: {', '.join(RELEASED)}."
        )
    found = {k: t for k, t in read_checkpoint(path).items() if not k.startswith(_DROPPED)}
    with torch.device("meta"):  # sizes only: the file's own tensors become the parameters
        model = VQGAN(RELEASED[name])
    wanted = {key: t for key, t in model.state_dict().items() if key not in _OWN}
    owner = f"{name!r}; {path} is a checkpoint of another configuration"
    check_state(found, {taming_key(key): t for key, t in wanted.items()}, owner)
    state = {key: found[taming_key(key)].float().contiguous() for key in wanted}
    for key in _OWN & model.state_dict().keys():
        state[key] = torch.ones(model.state_dict()[key].shape)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()

"""Checkpoints: what a stopped or killed run goes on from.

    checkpoint-*.safetensors   weights, their average, the optimiser's moments
    checkpoint.json            which of these files counts, its SHA-256, and all that is no tensor

Killed at any moment, a run finds a whole checkpoint again: the old one or the new one.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from t2ilearn.weights import WeightsError, read_tensors, to_bytes, write_atomically

FORMAT = 2  # the first edition wrote format 1: tensors and loss terms had other names


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why, what is kept and what to do."""


def save_checkpoint(run_dir: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a checkpoint and remove what it replaces.

    The tensors' file is named after its content and `checkpoint.json` names that file: replacing
    this one small file is what makes the new checkpoint count.

    Raises:
        OSError: for example on a full disk; the old checkpoint then stays.
    """
    data = to_bytes(tensors)
    digest = hashlib.sha256(data).hexdigest()
    file = run_dir / f"checkpoint-{digest[:12]}.safetensors"
    listing = {**facts, "format": FORMAT, "file": file.name, "sha256": digest}
    text = json.dumps(listing, allow_nan=False)
    existed = file.exists()
    write_atomically(file, data)
    try:
        write_atomically(run_dir / "checkpoint.json", text.encode("utf-8"))
    except OSError:
        if not existed:
            file.unlink(missing_ok=True)
        raise
    for old in {*run_dir.glob("checkpoint-*"), *run_dir.glob("*.partial")} - {file}:
        old.unlink(missing_ok=True)


def damaged(run_dir: Path, reason: Exception | str) -> TrainingError:
    """What to raise where a checkpoint is not what it should be, with the reason and the cure."""
    listing = run_dir / "checkpoint.json"
    text = f"it lacks {reason}" if isinstance(reason, KeyError) else str(reason).rstrip(".")
    return TrainingError(
        f"The checkpoint {listing} is damaged: {text}. Remove {listing.name}, or pass "
        "resume=False, to start this run over."
    )


def load_checkpoint(run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and facts of the checkpoint in a folder; None if there is none.

    Raises:
        TrainingError: if it is damaged, or made by the first edition of t2ilearn.
    """
    listing = run_dir / "checkpoint.json"
    if not listing.exists():
        return None
    try:
        facts = json.loads(listing.read_text(encoding="utf-8"))
        if facts["format"] != 1:
            if facts["format"] != FORMAT:
                raise ValueError(
                    f"it has format {facts['format']}, and this version reads format {FORMAT}"
                )
            return read_tensors(run_dir / facts["file"], facts["sha256"]), facts
    except (ValueError, KeyError, TypeError, RecursionError, WeightsError) as error:
        raise damaged(run_dir, error) from None
    raise TrainingError(
        f"The checkpoint {listing} was made by the first edition of t2ilearn, whose tensors and "
        "loss terms have other names. Finish that run with the version that began it, use another "
        "folder, or pass resume=False to start this run over."
    )

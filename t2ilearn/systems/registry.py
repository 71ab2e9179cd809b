"""All systems, in one place: what exists, what can draw here, and how it is loaded and trained.

Drawing, evaluation, studio, Play page, README table, command line and comparison ask this file
and hold no list of their own.
"""

import difflib
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import nn

from t2ilearn import weights
from t2ilearn.systems.base import System, shortened
from t2ilearn.systems.stage import Job, Stage
from t2ilearn.training import TrainingError
from t2ilearn.weights import Card, WeightsError

SYSTEMS: dict[str, type[System]] = {}  # those that draw, in the order of the book
PLANS: dict[str, tuple[Stage, ...]] = {}  # what `train NAME` runs, judges and readers first
STAGES: dict[str, Stage] = {}
DEFAULT_PRESET = "book"
QUALITY = "test-full, as drawn"  # the figure by which the best system is chosen

S = TypeVar("S", bound=type[System])


def register(system: S) -> S:
    """Class decorator: make a system known everywhere."""
    SYSTEMS[system.name] = system
    if system.stages:
        register_plan(system.name, (*system.stages, *system.also_trains), system.stages)
    return system


def register_plan(
    name: str, stages: tuple[Stage, ...], plan: tuple[Stage, ...] | None = None
) -> None:
    """Make trainings known: `train NAME` runs the plan, `--stage` any of the stages."""
    PLANS[name] = stages if plan is None else plan
    STAGES.update({stage.name: stage for stage in stages})


class Source(NamedTuple):
    """A system's class and the weights of each of its stages."""

    system: type[System]
    preset: str
    files: dict[str, Path]


def find(name: str | Path) -> Source:
    """A system by its name ("vqvae", "vqvae-tiny"), or by the folder of its last stage's run.

    A system that is built on weights without a training of its own has those it needs as stages.

    Raises:
        ValueError: if there is no such system.
        WeightsError: if its weights are not there.
    """
    known = {_name_of(s, p): (s, p) for s in SYSTEMS.values() for p in _presets(s)}
    if str(name) not in known:
        return _find_run(Path(name))
    system, preset = known[str(name)]
    files = {s.name: weights.find(s.weights_name(preset)) for s in system.stages}
    return Source(system, preset, files)


def _presets(system: type[System]) -> list[str]:
    """The presets of a system, the default one first."""
    if not system.stages:
        return [DEFAULT_PRESET]
    return sorted(system.stages[-1].presets, key=lambda preset: preset != DEFAULT_PRESET)


def _name_of(system: type[System], preset: str) -> str:
    """A system's name with its preset: "vqvae", "vqvae-tiny"."""
    return system.name if preset == DEFAULT_PRESET else f"{system.name}-{preset}"


def _find_run(folder: Path) -> Source:
    """The system whose last stage was trained in a folder.

    The stages before it are those that it was trained on top of, by their SHA-256: in the folders
    beside it, or among the weights that ship.
    """
    stage, _, preset = folder.name.rpartition("-")
    systems = [s for s in SYSTEMS.values() if s.stages and s.stages[-1].name == stage]
    if not systems or not os.path.isdir(folder):  # also where no file could have such a name
        near = difflib.get_close_matches(str(folder), names(), n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        unknown = shortened(str(folder))
        raise ValueError(
            f"Unknown system {unknown}.{hint} It is one of {', '.join(names())}, or the folder of "
            "the last stage that you trained, such as runs/prior-tiny."
        )
    system, files = systems[0], {}
    last = folder / f"{folder.name}.safetensors"
    parents = weights.read_card(last.with_suffix(".json")).parents
    for each in system.stages[:-1]:
        files[each.name] = _parent(each, preset, folder.parent, parents)
    return Source(system, preset, {**files, stage: last})


def _parent(stage: Stage, preset: str, runs: Path, parents: Mapping[str, str]) -> Path:
    """The weights of an earlier stage, by the SHA-256 that a later one's card names; any, where the
    later one was not trained on top of it."""
    wanted, candidates = parents.get(stage.name), [stage.file_in(runs, preset)]
    if stage.weights_name(preset) in weights.available():
        candidates.append(weights.find(stage.weights_name(preset)))
    found = {}
    for path in candidates:
        if path.is_file():
            found[path] = weights.read_card(path.with_suffix(".json")).sha256
            if wanted in (None, found[path]):
                return path
    seen = ", ".join(f"{path} is {digest[:8]}" for path, digest in found.items()) or "none is there"
    if wanted is None:
        raise WeightsError(
            f"There are no weights of {stage.weights_name(preset)} beside this run or among those "
            f"that ship. Train them first, into {runs}."
        )
    raise WeightsError(
        f"The weights of {stage.weights_name(preset)} that this run was trained on top of "
        f"({str(wanted)[:8]}) are missing: {seen}. With others its tokens would mean something "
        "else. Train the last stage again."
    )


def load(name: str | Path | None = None) -> System:
    """A complete text-to-image system.

    Args:
        name: see `find`; None for the best that ships.

    Raises:
        ValueError: if there is no such system.
        WeightsError: if weights are missing or damaged, or were trained on top of others.
    """
    source = find(best() if name is None else name)
    digests = tuple(_digest(path) for path in source.files.values())
    return _loaded(source.system.load, tuple(source.files.items()), digests)


def _digest(path: Path) -> str:
    """The SHA-256 of weights and of the tokenizer of their captions, by their card."""
    card = weights.read_card(path.with_suffix(".json"))
    return card.sha256 + (card.tokenizer["sha256"] if card.tokenizer else "")


@lru_cache(maxsize=4)
def _loaded(
    load_system: Callable[[Mapping[str, Path]], System],
    files: tuple[tuple[str, Path], ...],
    digests: tuple[str, ...],
) -> System:
    """A system from its files. The digests are part of the key: retrained weights load anew."""
    return load_system(dict(files))


def names() -> list[str]:
    """Every system that can draw with what ships, by name."""
    return [_name_of(s, p) for s in SYSTEMS.values() for p in _presets(s) if _ships(s, p)]


def _ships(system: type[System], preset: str) -> bool:
    """Whether the weights of all its stages ship at a preset."""
    shipped = weights.available()
    return all(stage.weights_name(preset) in shipped for stage in system.stages)


def title(name: str) -> str:
    """What tables and menus call a system: its title and, in brackets, its preset."""
    source = find(name)
    return source.system.title if not source.files else f"{source.system.title} ({source.preset})"


def card_of(name: str) -> Card | None:
    """The card of a system's last stage; None if it has no weights."""
    files = list(find(name).files.values())
    return weights.read_card(files[-1].with_suffix(".json")) if files else None


def best() -> str:
    """The shipped system with the highest alignment on its own card, at the default preset."""
    ranked = []
    for name in names():
        card = card_of(name)
        if card is not None and card.preset == DEFAULT_PRESET and QUALITY in card.metrics:
            figure = card.metrics[QUALITY]
            ranked.append((figure["value"] if isinstance(figure, dict) else figure, name))
    return max(ranked)[1] if ranked else next(iter(names()))


def load_part(name: str | Path, part: str | None = None) -> nn.Module:
    """One trained model by the name of its weights, in evaluation mode.

    Args:
        name: such as "vqvae-book", or a path.
        part: which of its networks, such as "discriminator"; None for the main one.

    Raises:
        WeightsError: if there are no such weights, or they were made by no known stage.
        ValueError: if they hold no such part.
    """
    stored = weights.load(name)
    if stored.card.stage not in STAGES:
        known = ", ".join(STAGES)
        raise WeightsError(
            f"{stored.path} was made by the stage {stored.card.stage!r}, which is unknown here. "
            f"The stages are: {known}."
        )
    parts = STAGES[stored.card.stage].build(stored)
    if part is None:
        return next(iter(parts.values()))
    if part not in parts:
        raise ValueError(f"{name} has no part {part!r}; its parts are: {', '.join(parts)}.")
    return parts[part]


def load_parent(job: Job, stage: str) -> nn.Module:
    """The trained model of a stage that a run is on top of, in evaluation mode.

    Raises:
        TrainingError: if it was trained anew since the run began.
    """
    path = job.parents[stage]
    if weights.read_card(path.with_suffix(".json")).sha256 != job.digests[stage]:
        raise TrainingError(
            f"{path} was trained anew while {job.name} was trained on top of what it was before. "
            f"Remove {job.folder} and train it again."
        )
    return load_part(path)

"""What `t2ilearn train` does: every stage of a plan that is missing, in order, from nothing.

    train_system("vqvae", "tiny")                    # VQ-VAE, then the prior over its tokens
    train_system("vqvae", "tiny", stage="prior")     # the prior alone, over tokens that are there
    train_system("all", "book")                      # everything that ships

A stage counts as done if its folder holds weights whose card was measured, by the same settings
and on top of the same weights. One that was stopped goes on at its checkpoint.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from t2ilearn import weights
from t2ilearn.systems.registry import PLANS, STAGES
from t2ilearn.systems.stage import OWN_PICTURES, Job, Stage, make_job, run_job
from t2ilearn.training import TrainingError


class Step(NamedTuple):
    """One stage of a plan: whether it is done, and how long it took elsewhere."""

    stage: Stage
    done: bool
    minutes: float | None  # measured, where the shipped weights' card states it
    device: str


def stages_of(system: str, stage: str | None, preset: str) -> tuple[Stage, ...]:
    """The stages that a command names, in order.

    Raises:
        ValueError: for an unknown system or stage, or one without this preset.
    """
    if system == "all":
        found = tuple(dict.fromkeys(s for plan in PLANS.values() for s in plan))
        chosen = tuple(s for s in found if preset in s.presets or s.one_size)
    elif system in PLANS:
        chosen = PLANS[system]
    else:
        raise ValueError(
            f"There is nothing to train under the name {system!r}. There are: "
            f"{', '.join(PLANS)}, or all."
        )
    if stage is not None:
        if stage not in STAGES:
            raise ValueError(f"Unknown stage {stage!r}. There are: {', '.join(STAGES)}.")
        chosen = (STAGES[stage],)
    for each in chosen:
        if preset not in each.presets and not each.one_size:
            known = ", ".join(each.presets)
            raise ValueError(f"{each.name} has no preset {preset!r}. There are: {known}.")
    return chosen


def train_system(
    system: str,
    preset: str = "tiny",
    runs: Path | str | None = None,
    *,
    stage: str | None = None,
    data: Path | str | None = None,
    steps: int | None = None,
    precision: str | None = None,
    progress: bool = True,
) -> Path:
    """Train what a system needs, each stage by its recipe; see `stage.train_stage`.

    Args:
        system: one of `registry.PLANS`, or "all".
        preset: "tiny" or "book".
        runs: the folder for runs; an interrupted run is resumed from there. By default "runs", or
            "runs/NAME" for a data folder of that name.
        stage: this one alone.
        data: a folder of pictures of your own to train on instead of the recipe's world.
        steps: fewer or more steps than the recipes'.
        precision: "no", "bf16" or "fp16"; by default what suits the device.

    Returns:
        The weights of the last stage; of a stage that was stopped, its partial weights, and the
        stages after it are not begun.

    Raises:
        ValueError: for an unknown system, stage or preset, or a stage that cannot learn from a
            folder.
        FolderError: if the folder of pictures is not in order.
        TrainingError: if a run's folder holds a run that learned from something else, or the
            weights that a single stage needs are missing.
    """
    folder, path = runs_folder(runs, data), Path()
    for each in stages_of(system, stage, preset):
        size = size_of(each, preset)
        parents = parents_of(each, size, folder, own_only=data is not None)
        job = make_job(each, size, folder, parents, data, steps, precision, progress)
        check_parents(job)
        if stage is None and is_done(job):
            path = each.file_in(folder, size)
            continue
        path = run_job(job, _command(system, each, size, data, steps, precision))
        if not weights.read_card(path.with_suffix(".json")).metrics:
            return path
    return path


def plan(
    system: str,
    preset: str = "tiny",
    runs: Path | str | None = None,
    *,
    stage: str | None = None,
    data: Path | str | None = None,
    steps: int | None = None,
) -> Iterator[Step]:
    """What `train_system` would do, without doing it; arguments and errors as there."""
    folder, to_train = runs_folder(runs, data), set[str]()
    for each in stages_of(system, stage, preset):
        size, done = size_of(each, preset), False
        if not to_train & set(each.trained_on):
            parents = parents_of(each, size, folder, own_only=data is not None)
            job = make_job(each, size, folder, parents, data, steps)
            check_parents(job)
            done = stage is None and is_done(job)
        if not done:
            to_train.add(each.name)
        yield Step(each, done, *_took(each.weights_name(size)))


def _took(name: str) -> tuple[float | None, str]:
    """Minutes and device of the training that made shipped weights; None if they do not ship."""
    if name not in weights.available():
        return None, ""
    card = weights.read_card(weights.find(name).with_suffix(".json"))
    return card.minutes, card.device


def runs_folder(runs: Path | str | None, data: Path | str | None) -> Path:
    """The folder for runs: by default "runs", or "runs/NAME" for a data folder of that name."""
    if runs is not None:
        return Path(runs)
    return Path("runs") if data is None else Path("runs", Path(data).resolve().name)


def size_of(stage: Stage, preset: str) -> str:
    """The preset by which a stage is trained: this one, or its only one."""
    return preset if preset in stage.presets else next(iter(stage.presets))


def is_done(job: Job) -> bool:
    """Whether a run's folder holds measured weights by these settings, of these data, on top of
    these weights."""
    file = job.stage.file_in(job.runs, job.preset)
    if not file.is_file():
        return False
    card = weights.read_card(file.with_suffix(".json"))
    same = json.dumps(card.settings) == json.dumps(job.settings()) and card.data == job.data()
    return bool(card.metrics) and same and card.parents == job.digests


def check_parents(job: Job) -> None:
    """Raise `TrainingError` where a run and the weights under it learn from different pictures of
    your own: these would be drawn with the tokens of others."""
    mine = job.data()
    for name, path in job.parents.items():
        theirs = weights.read_card(path.with_suffix(".json")).data
        same = theirs.get(OWN_PICTURES) == mine.get(OWN_PICTURES)
        if STAGES[name].trains_on_folders and not same:
            raise TrainingError(
                f"{path} learned from {_pictures(theirs)}, and {job.name} is to learn from "
                f"{_pictures(mine)}. Train {name} on these first, or name another folder with "
                "--runs."
            )


def _pictures(data: dict[str, Any]) -> str:
    """What was learned from, as an error calls it."""
    if OWN_PICTURES in data:
        return f"own pictures ({data[OWN_PICTURES][:8]})"
    return f"the world {data['world']}"


def parents_of(stage: Stage, preset: str, runs: Path, own_only: bool = False) -> dict[str, Path]:
    """The weights that a stage needs: from the folder of runs, else those that ship.

    Args:
        own_only: those from the folder of runs alone, save for stages that own pictures cannot
            train, such as readers.

    Raises:
        TrainingError: if they are not there.
    """
    found = {}
    for name in stage.trained_on:
        parent = STAGES[name]
        size = size_of(parent, preset)
        own, shipped = parent.file_in(runs, size), parent.weights_name(size)
        may_ship = not (own_only and parent.trains_on_folders)
        if own.is_file():
            found[name] = own
        elif may_ship and shipped in weights.available():
            found[name] = weights.find(shipped)
        else:
            raise TrainingError(
                f"{stage.name} is trained on top of {name}, and there are no weights of it in "
                f"{own.parent}. Train the whole system (leave --stage out), or {name} first, into "
                "the same folder of runs."
            )
    return found


def _command(
    system: str,
    stage: Stage,
    preset: str,
    data: Path | str | None,
    steps: int | None,
    precision: str | None,
) -> str:
    """The line that repeats a stage."""
    home = system if system in PLANS else next(n for n, p in PLANS.items() if stage in p)
    line = f"t2ilearn train {home} --preset {preset} --stage {stage.name}"
    line += f" --data {Path(data).name}" if data is not None else ""
    line += f" --steps {steps}" if steps is not None else ""
    return line + (f" --precision {precision}" if precision else "")

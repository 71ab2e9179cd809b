"""What a system is measured by: alignment, floors and ceilings, distances, the best of many.

Works for everything that `registry` knows: a system is asked for one picture of each caption of
the test sets of the worlds that it learned, and the worlds' judges read them.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from t2ilearn.data.grammar import WORLDS
from t2ilearn.data.interface import CaptionedPictures
from t2ilearn.judging.alignment import aligned, binding, measured, score
from t2ilearn.judging.counting import NO_OTHER, other_captions
from t2ilearn.judging.metrics import Interval, bootstrap
from t2ilearn.judging.reader import load_reader
from t2ilearn.judging.report import CHUNK, distances, rounded, share
from t2ilearn.systems.base import Options, Request, System
from t2ilearn.weights import check_default_dtype, write_atomically

MOST = 8  # drawings a caption, of which the best is kept


@torch.no_grad()
def evaluate_system(
    system: System,
    worlds: tuple[CaptionedPictures, ...] | None = None,
    n: int = 2000,
    keep: str | Path | None = None,
) -> dict[str, Any]:
    """Every figure of a system.

    Args:
        worlds: by default those that it learned, at its resolution.
        n: pictures of each test set.
        keep: a JSON file that gets the figures as they come; an evaluation that was stopped goes
            on from it.

    Raises:
        WeightsError: if torch's default dtype is not float32.
        ValueError: if `keep` is a file of something else.
        OSError: if it cannot be written.
    """
    check_default_dtype()
    if worlds is None:
        worlds = tuple(WORLDS[name](system.resolution) for name in system.worlds)  # type: ignore[call-arg]
    kept = Kept(keep, {"weights": system.weights_id, "n": n})
    for world in worlds:
        if world.judge is None:
            kept.measure(f"{world.name}: likelihood", system.likelihood, world, n)
            continue
        kept.measure(f"{world.name}: ceiling", _ceiling, system, world, n)
        for manner, options in system.manners().items():
            kept.measure(f"{world.name}: {manner}", _drawn, system, world, manner, options, n)
        if world.reader is not None:
            kept.measure(f"{world.name}: best of many", best_of, system, world, n)
    return {name: value for figures in kept.parts.values() for name, value in figures.items()}


class Kept:
    """The parts of an evaluation that are measured, in memory and, if a file is named, there.

    Raises:
        ValueError: if the file is of something else.
    """

    def __init__(self, file: str | Path | None, about: dict[str, Any]) -> None:
        self.file, self.about = None if file is None else Path(file), about
        self.parts: dict[str, dict[str, Any]] = {}
        if self.file is None or not self.file.exists():
            return
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            self.parts = {name: dict(figures) for name, figures in found.pop("parts").items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{self.file} is no file of figures: name another one.") from None
        if found != about:
            raise ValueError(
                f"{self.file} holds figures of {found}, and these are of {about}: name another one."
            )

    def measure(self, part: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        """Measure a part that is missing, and write the file anew."""
        if part in self.parts:
            return
        self.parts[part] = function(*arguments)
        if self.file is not None:
            text = json.dumps({**self.about, "parts": self.parts}, indent=2, ensure_ascii=False)
            write_atomically(self.file, text.encode("utf-8"))


def draw_each(system: System, captions: list[str], options: Options, seed: int = 0) -> Tensor:
    """One drawing of each caption, in batches, with a progress bar if it takes long."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    with tqdm(total=len(captions), desc="drawing", unit="picture", delay=2) as bar:
        for start in range(0, len(captions), CHUNK):
            request = Request(tuple(captions[start : start + CHUNK]), options=options)
            parts.append(system.generate(request, generator))
            bar.update(len(parts[-1]))
    return torch.cat(parts)


def _named(world: CaptionedPictures, what: str, *rest: str) -> str:
    """The name of a figure: a world with one measure does not repeat its name."""
    return world.label + ", ".join([*([] if what == "judge" else [what]), *rest])


def _ceiling(system: System, world: CaptionedPictures, n: int) -> dict[str, Any]:
    """What the judge reads in real pictures, and in those that went through the tokenizer."""
    metrics: dict[str, Any] = {}
    judge = load_reader(world.judge or "")
    for name in world.reconstruction_sets:
        real, groups = world.test_set(name, n), world.groups(name, n)
        kinds = {"real pictures": real.pictures}
        if (best := system.ceiling(real.pictures)) is not None:
            kinds["reconstructions"] = best
        suffix = [name] if len(world.reconstruction_sets) > 1 else []
        for kind, pictures in kinds.items():
            for what, right in measured(judge, pictures, real.captions, type(world)).items():
                asked = kind if what == "judge" else f"{what} on {kind}"
                metrics[world.label + ", ".join([f"ceiling: {asked}", *suffix])] = share(
                    right, groups
                )
    return metrics


def _drawn(
    system: System, world: CaptionedPictures, manner: str, options: Options, n: int
) -> dict[str, Any]:
    """Drawings of each test set by one manner of sampling."""
    judge, metrics = load_reader(world.judge or ""), dict[str, Any]()
    for name in world.test_sets:
        captions, groups = world.test_scenes(name, n)[1], world.groups(name, n)
        began = time.perf_counter()
        pictures = draw_each(system, captions, options)
        seconds = time.perf_counter() - began
        for what, right in measured(judge, pictures, captions, type(world)).items():
            metrics[_named(world, what, name, manner)] = share(right, groups)
        if name != world.test_sets[0]:
            continue
        others = other_captions(captions, groups)
        rows, shuffled = list(others), [captions[other] for other in others.values()]
        for what, right in measured(judge, pictures[rows], shuffled, type(world)).items():
            asked = "captions shuffled" if what == "judge" else f"{what}, captions shuffled"
            belong = None if groups is None else groups[rows]
            figure = share(right, belong) if rows else NO_OTHER
            metrics[f"{world.label}floor: {asked}, {manner}"] = figure
        pace = round(seconds / len(captions), 4)
        metrics[f"{world.label}seconds a picture in batches, {manner}"] = pace
        metrics |= distances(judge, world, {f", {manner}": pictures}, n)
        if world.reader is not None and len((bound := binding(judge, pictures, captions)).right):
            metrics[f"{world.label}binding, {manner}"] = share(bound.right, bound.rows)
    real = world.test_set(world.test_sets[0], n).pictures
    return metrics | distances(judge, world, {", floor (real)": real}, n)


def best_of(system: System, world: CaptionedPictures, n: int = 2000) -> dict[str, Any]:
    """Best of 1, 2, 4 and 8: the training reader chooses among drawings, eight a caption of the
    first test set, and the judge says whether the kept ones are right. The interval is a
    bootstrap's over the captions, for eight drawings of one caption are no eight captions."""
    name = world.test_sets[0]
    captions = [c for c in world.test_scenes(name, max(1, n // MOST))[1] for _ in range(MOST)]
    pictures = draw_each(system, captions, list(system.manners().values())[-1])
    kind = type(world)
    marks = score(load_reader(world.reader or ""), pictures, captions, kind).view(-1, MOST)
    right = aligned(load_reader(world.judge or ""), pictures, captions, kind).view(-1, MOST)
    generator, metrics = torch.Generator().manual_seed(0), dict[str, Any]()
    for count in (1, 2, 4, MOST):
        best = marks.unflatten(1, (-1, count)).argmax(2, keepdim=True)
        # A caption's share of groups whose best is right.
        each = right.unflatten(1, (-1, count)).gather(2, best).double().mean((1, 2))
        value, low, high = bootstrap(lambda x: x.mean().item(), each, generator=generator)
        figure = rounded(Interval(value, max(0.0, low), min(1.0, high)))
        metrics[f"{world.label}{name}, best of {count} by the reader"] = figure
    return metrics

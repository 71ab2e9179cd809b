"""Exercises that answer back: a stub in the notebook, a check that names the mistake, a solution.

    exercise("2.3")                      # the task, with hint and solution folded away

    def straight_through(z, e):
        return None                      # the reader's lines

    check("2.3", straight_through)       # "Right.", or the misconception that fits

A check is a comparison. `measure` calls an answer on fixed inputs and returns what matters of it:
values, or gradients. What it measures on the reader's answer is compared with what it measures on
the solution and on each known mistake. So a mistake is found by what it *does*, however it is
written.

The code of a chapter's exercises is in `chapterNN.py`, their words are in `chapterNN.toml`. Besides
short exercises there are long ones: a *build*, whose class is graded in steps (`builds`), a
*derivation* with a worked solution, and an *experiment* with a recorded result (`experiments`).
"""

import inspect
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2ilearn.lessons.answers import Answer, Code, NotYet, piece, stub

FOLDER = Path(__file__).parent
KINDS = ("short", "build", "derivation", "experiment")


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Args:
        id: chapter and number, "2.3".
        title: a few words.
        stars: its difficulty, 1 to 3.
        minutes: an estimate of the time that it takes.
        task: what to do, in Markdown.
        hint: a nudge, in Markdown.
        moral: the message after "Right".
        mistakes: the message for each wrong answer in `code.mistakes`, by its name.
        code: see `Code`.
        kind: one of `KINDS`.
        worked: a derivation's or an experiment's worked solution, in Markdown.
        steps: of a build, exercises of their own.

    Raises:
        ValueError: if words and code do not fit together.
    """

    id: str
    title: str
    stars: int
    minutes: int
    task: str
    hint: str
    moral: str
    mistakes: Mapping[str, str]
    code: Code = field(repr=False)
    kind: str = "short"
    worked: str = ""
    steps: tuple["Exercise", ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS or (self.kind == "build") != bool(self.steps):
            raise ValueError(f"Exercise {self.id}: its kind is one of {KINDS}; a build has steps.")
        if self.mistakes.keys() != self.code.mistakes.keys() or self.stars not in (1, 2, 3):
            odd = ", ".join(self.mistakes.keys() ^ self.code.mistakes.keys())
            raise ValueError(f"Exercise {self.id}: one to three stars, and words for: {odd}.")

    @property
    def chapter(self) -> int:
        """The chapter that it belongs to."""
        return int(self.id.split(".")[0])

    @property
    def name(self) -> str:
        """What the reader's function is called."""
        return self.code.solution.__name__

    @property
    def stub(self) -> str:
        """The cell that the reader fills in."""
        call = f'check("{self.id}", {self.name})'
        if self.steps:
            return f"{stub(self.code)}\n\n\n{call}"
        body = "pass  # your lines" if self.code.in_place else "return None  # your lines"
        arguments = ", ".join(inspect.signature(self.code.solution).parameters)
        return f"def {self.name}({arguments}):\n    {body}\n\n\n{call}"

    @property
    def head(self) -> str:
        """Number, title, kind, difficulty, minutes."""
        kind = "" if self.kind == "short" else f", {self.kind}"
        return f"Exercise {self.id}: {self.title} {'★' * self.stars} ({self.minutes} min{kind})"

    def __repr__(self) -> str:
        return f"{self.head}\n\n{self.task}"

    def _repr_markdown_(self) -> str:
        """For notebooks: the task, and hint and solution folded away."""
        from t2ilearn.figures import show_source  # matplotlib is slow to import

        solution = show_source(self.code.solution, docstrings=False).data
        parts = [f"**{self.head}**", self.task]
        for number, step in enumerate(self.steps, 1):
            head = f"**Step {number}: {step.title}** (`{step.name}`, {step.minutes} min)."
            parts.append(f"{head} {step.task.strip()}")
        hints = [f"{n}. {step.hint.strip()}" for n, step in enumerate(self.steps, 1)]
        parts.append(_folded("Hints" if hints else "Hint", "\n\n".join([self.hint, *hints])))
        if self.worked:
            parts.append(_folded("Worked solution", self.worked))
        return "\n\n".join((*parts, _folded("Solution", solution)))


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


@dataclass(frozen=True)
class Verdict:
    """The result of a check and its message."""

    right: bool
    message: str


@dataclass
class _Guarded:
    """An answer, watched: it must return something, and leave its arguments as they were."""

    answer: Answer
    in_place: bool
    returned: list[Any] = field(default_factory=list)

    @property
    def owner(self) -> type | None:
        """The reader's class, if the answer is one of its methods."""
        return getattr(self.answer, "owner", None)

    def __call__(self, *arguments: Any) -> Any:
        before = [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments]
        try:
            result = self.answer(*arguments)
        except NotYet:
            raise
        except Exception as error:
            raise NotYet(f"It stops with {type(error).__name__}: {error}") from None
        if self.in_place:
            return result
        if result is None or result is NotImplemented or result is ...:
            raise NotYet("It waits: the function returns nothing yet.")
        for old, new in zip(before, arguments, strict=True):
            if isinstance(new, Tensor) and not _alike([old], [new.detach()]):
                raise NotYet(
                    "It changes its argument in place. Whoever calls it will be surprised: "
                    "compute something new, or clone first."
                )
        self.returned.append(result)
        numbers = isinstance(result, list) and all(isinstance(x, int | float) for x in result)
        return torch.tensor(result) if numbers else result


def judge(task: Exercise, answer: Any) -> Verdict:
    """Hold an answer against the solution and the known mistakes."""
    if not callable(answer):
        return Verdict(False, f'Give the function itself: check("{task.id}", {task.name}).')
    code = task.code
    want = _numbers(code.measure(code.solution))
    watched = _Guarded(answer, code.in_place)
    try:
        got = _numbers(code.measure(watched))
    except NotYet as stop:
        return Verdict(False, str(stop))
    except Exception:  # the answer is nothing that `measure` can use
        what = type(watched.returned[-1]).__name__ if watched.returned else "nothing"
        return Verdict(False, f"What it returns ({what}) is not what the task asks for.")
    if _alike(got, want):
        return Verdict(True, f"Right. {task.moral}".strip())
    for name, mistake in code.mistakes.items():
        if _alike(got, _numbers(code.measure(mistake))):
            return Verdict(False, task.mistakes[name])
    return Verdict(False, _difference(got, want))


def _numbers(measured: Any) -> list[Tensor]:
    """What was measured, as tensors of float64."""
    if isinstance(measured, list | tuple):
        return [tensor for part in measured for tensor in _numbers(part)]
    return [torch.as_tensor(measured).detach().double()]


def _alike(a: list[Tensor], b: list[Tensor]) -> bool:
    same = len(a) == len(b) and all(x.shape == y.shape for x, y in zip(a, b, strict=True))
    return same and all(
        torch.allclose(x, y, rtol=1e-5, atol=1e-5, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def _difference(got: list[Tensor], want: list[Tensor]) -> str:
    """Where an answer departs from the solution, where no known mistake fits."""
    if len(got) != len(want):
        return f"Not yet: it returns {len(got)} things, and {len(want)} are asked for."
    for x, y in zip(got, want, strict=True):
        if x.shape != y.shape:
            return f"Not yet: its shape is {tuple(x.shape)}, and should be {tuple(y.shape)}."
        if x.isnan().any() and not y.isnan().any():
            return "Not yet: there is a NaN in it. Is 0 divided by 0, or a logarithm taken of 0?"
        if not _alike([x], [y]):
            at = int((x - y).abs().nan_to_num(torch.inf).argmax())
            near, right = x.flatten()[at].item(), y.flatten()[at].item()
            return f"Not yet: the check finds {near:.5g} where it should find {right:.5g}."
    return "Not yet."


def words(chapter: int) -> dict[str, Any]:
    """The words of a chapter's lessons: its exercises and its quiz; empty if it has none."""
    path = FOLDER / f"chapter{chapter:02d}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@cache
def exercises(chapter: int) -> tuple[Exercise, ...]:
    """The exercises of a chapter; none if there is no such chapter here."""
    rows = words(chapter).get("exercise", ())
    codes = import_module(f"t2ilearn.lessons.chapter{chapter:02d}").EXERCISES if rows else {}
    return tuple(_from_words(row, codes[row["id"]]) for row in rows)


def _from_words(row: dict[str, Any], code: Code) -> Exercise:
    """An exercise from its words and its code; a build's steps are numbered, "2.5.1"."""
    rows, words = row.get("step", ()), {k: v for k, v in row.items() if k != "step"}
    steps = tuple(
        Exercise(**each, id=f"{row['id']}.{n}", stars=row["stars"], code=step)
        for n, (each, step) in enumerate(zip(rows, code.steps, strict=True), 1)
    )
    return Exercise(**words, code=code, steps=steps)


def exercise(number: str) -> Exercise:
    """The exercise of that number, such as "2.3".

    Raises:
        ValueError: if there is none.
    """
    chapter = str(number).partition(".")[0]
    known = exercises(int(chapter)) if chapter.isdecimal() else ()
    for found in known:
        if found.id == number:
            return found
    there = ", ".join(e.id for e in known) or "none in that chapter"
    raise ValueError(f"There is no exercise {number!r}; there are: {there}.")


def check(number: str, answer: Any, step: int | None = None) -> None:
    """Print the result of checking an answer.

    Args:
        number: the exercise's, such as "2.3".
        answer: the reader's function, or for a build the reader's class.
        step: of a build, the one step to check; by default all.

    Raises:
        ValueError: if there is no such exercise, or it has no such step.
    """
    task = exercise(number)
    if not task.steps:
        print(f"Exercise {task.id} {'★' * task.stars}: {judge(task, answer).message}")
        return
    if step is not None and not 1 <= step <= len(task.steps):
        raise ValueError(f"Exercise {number} has steps 1 to {len(task.steps)}, and no {step}.")
    print(f"Exercise {task.id} {'★' * task.stars}")
    verdicts = [_judge_step(each, answer) for each in task.steps]
    for n, (each, verdict) in enumerate(zip(task.steps, verdicts, strict=True), 1):
        if step in (None, n):
            print(f"  step {n}, {each.name}: {verdict.message}")
    print(f"  {sum(verdict.right for verdict in verdicts)} of {len(verdicts)} steps are right.")


def _judge_step(step: Exercise, answer: Any) -> Verdict:
    if not isinstance(answer, type):
        return Verdict(False, "Give the class itself, not an object made from it.")
    try:
        return judge(step, piece(answer, step.code))
    except NotYet as stop:
        return Verdict(False, str(stop))

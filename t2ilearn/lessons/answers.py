"""What exercises and builds have in common: solutions with known mistakes, and readers' answers.

| name | what |
|---|---|
| `Code` | a solution, what to measure on an answer, and wrong answers by name |
| `NotYet` | raised where an answer cannot be graded yet |
| `Piece`, `piece` | one method of a reader's class, as an answer |
| `stub` | the empty class of a build |
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Answer = Callable[..., Any]


class Code(NamedTuple):
    """A solution, what to measure on an answer, wrong answers by name, whether answers change
    their arguments in place and return nothing, and the steps of a build."""

    solution: Answer
    measure: Callable[[Answer], Any]
    mistakes: Mapping[str, Answer]
    in_place: bool = False
    steps: tuple["Code", ...] = ()


class NotYet(Exception):
    """The answer cannot be graded; the message says why."""


class Piece:
    """A method of a reader's class, and the class, of which `super()` and helpers are part."""

    def __init__(self, owner: type, method: Answer) -> None:
        self.owner, self.method = owner, method

    def __call__(self, *arguments: Any) -> Any:
        return self.method(*arguments)


def piece(answer: type, step: Code) -> Piece:
    """The method of a reader's class that a step grades.

    Raises:
        NotYet: if the class does not have it.
    """
    name = step.solution.__name__
    if name not in vars(answer):
        raise NotYet(f"It waits: the class has no method `{name}` yet.")
    return Piece(answer, vars(answer)[name])


def stub(code: Code) -> str:
    """The empty class that the reader fills in."""
    lines = [f"class {code.solution.__name__}(torch.nn.Module):"]
    for number, step in enumerate(code.steps, 1):
        first = "super().__init__()" if step.in_place else "return None"
        shown = _without_annotations(step.solution)
        lines += [
            f"    def {step.solution.__name__}({shown}):",
            f"        {first}  # step {number}",
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


def _without_annotations(function: Answer) -> str:
    """A function's arguments with their defaults, as a reader writes them."""
    parameters = inspect.signature(function).parameters.values()
    empty = inspect.Parameter.empty
    return ", ".join(p.name if p.default is empty else f"{p.name}={p.default}" for p in parameters)

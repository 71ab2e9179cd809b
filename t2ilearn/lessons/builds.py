"""Long exercises that build a class in graded steps, each of which passes on its own.

    class MyVQVAE(torch.nn.Module):
        def nearest(self, z):
            return None  # the reader's lines for step 2

    check("2.5", MyVQVAE)            # one line for each step
    check("2.5", MyVQVAE, step=2)    # that step alone

A step is one method of the class. It is graded inside a class that takes all other steps' methods
from the reference solution. So step 4 can be right while step 2 is still empty, and a mistake is
reported at the step in which it was made. The reader's own helper methods stay available.

| to have | call |
|---|---|
| a step's method put among the reference's others | `graft` |
| the code of a whole build | `build` |
| the reader's class, or the solution while it is unfinished | `own_or_solution` |
"""

import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from t2ilearn.lessons.answers import Answer, Code, NotYet, piece
from t2ilearn.lessons.exercises import exercise, judge


class Step(NamedTuple):
    """One method of the class, what to measure on a class that has it, and wrong versions of it."""

    method: str
    measure: Callable[[type], Any]
    mistakes: Mapping[str, Answer]


def graft(reference: type, step: str, methods: tuple[str, ...], method: Any) -> type:
    """A class with one step's method from an answer, and the other steps' from the reference.

    Args:
        reference: the solution's class.
        step: the name of the method that is graded.
        methods: the names of all steps' methods.
        method: the answer, perhaps a `Piece` with the class that it comes from.
    """
    owner = getattr(method, "owner", None) or reference

    def graded(self: Any, *arguments: Any) -> Any:
        return method(self, *arguments)

    others = {name: vars(reference)[name] for name in methods if name != step}
    # The reference's own `__init__` needs its class among the bases; the reader's must not find it.
    own = owner is reference or step == "__init__"
    bases = (owner,) if own else (owner, reference)
    return type("Graft", bases, {**others, step: graded})


def build(reference: type[nn.Module], *steps: Step) -> Code:
    """The code of a build: its reference solution, and a `Code` for each step."""
    methods = tuple(step.method for step in steps)

    def code(step: Step) -> Code:
        def measure(answer: Answer) -> Any:
            return step.measure(graft(reference, step.method, methods, answer))

        solution = vars(reference)[step.method]
        return Code(solution, measure, step.mistakes, in_place=step.method == "__init__")

    return Code(reference, lambda answer: None, {}, steps=tuple(map(code, steps)))


def own_or_solution(number: str, answer: type) -> Answer:
    """The reader's class if it passes every step; else the reference solution, and says so."""
    task = exercise(number)
    for step in task.steps:
        try:
            right = judge(step, piece(answer, step.code)).right
        except NotYet:
            right = False
        if not right:
            text = (
                f"{answer.__name__} does not pass step {step.id.rpartition('.')[2]} yet; what "
                "follows uses the reference solution."
            )
            print(textwrap.fill(text, 88))
            return task.code.solution
    print(f"{answer.__name__} passes all {len(task.steps)} steps; what follows uses it.")
    return answer

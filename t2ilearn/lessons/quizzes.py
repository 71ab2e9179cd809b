"""Quizzes as data: five questions a chapter, each choice with its reason.

The questions stand in `chapterNN.toml` beside this file. In a notebook, `show_quiz(2)` is a widget;
any other front end takes `[question.as_dict() for question in quiz(2)]`, which is plain JSON.
"""

from dataclasses import asdict, dataclass
from typing import Any

from t2ilearn.lessons.exercises import words

LETTERS = "ABCDEF"


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Args:
        text: the question, plain text.
        choices: two to six, in the order in which they are shown.
        right: the place of the right one, from 0.
        reasons: one for each choice: why it is wrong, or why it is right.

    Raises:
        ValueError: if these do not fit together.
    """

    text: str
    choices: tuple[str, ...]
    right: int
    reasons: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.choices)
        if not 2 <= count <= len(LETTERS) or not 0 <= self.right < count:
            raise ValueError(f"{self.text!r}: two to six choices, and a right one among them.")
        if len(self.reasons) != count or not all(map(str.strip, (self.text, *self.reasons))):
            raise ValueError(f"{self.text!r}: a reason for each choice, and no empty ones.")
        if len(set(self.choices)) != count:
            raise ValueError(f"{self.text!r}: a choice stands there twice.")

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, as JSON has them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def quiz(chapter: int) -> list[Question]:
    """The questions of a chapter.

    Raises:
        ValueError: if the chapter has none, or they are not in order.
    """
    rows = words(chapter).get("question")
    if not rows:
        raise ValueError(f"There is no quiz for chapter {chapter}.")
    return [
        Question(
            row["text"], tuple(row["choices"]), LETTERS.index(row["right"]), tuple(row["reasons"])
        )
        for row in rows
    ]


def show_quiz(chapter: int) -> Any:
    """A chapter's questions as a `t2ilearn.widgets.Quiz`.

    Raises:
        ValueError: if the chapter has none.
    """
    from t2ilearn.widgets import quiz as widget  # ipywidgets wait until somebody wants to see them

    asked = [
        widget.Question(q.text, dict(zip(q.choices, q.reasons, strict=True)), LETTERS[q.right])
        for q in quiz(chapter)
    ]
    return widget.Quiz(asked)

"""Quizzes as data: five questions a chapter, each choice with its reason.

The questions stand in `chapterNN.toml` beside this file. In a notebook, `show_quiz(2)` is a widget;
any other front end takes `[question.as_dict() for question in quiz(2)]`, which is plain JSON.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t2ilearn.lessons.exercises import words

LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Question:
    """A question with two to eight choices.

    Args:
        ask: the question. `*emphasis*` and `` `code` `` are shown as such, here and below.
        choices: each choice with its reason, in the order in which they are shown: why it is wrong,
            or why it is right.
        right: the letter of the right choice; the first is "A".

    Raises:
        ValueError: if no choice is the right one, a text is empty, or one holds TeX, which a widget
            cannot show.
    """

    ask: str
    choices: Mapping[str, str]
    right: str

    def __post_init__(self) -> None:
        texts = [self.ask, *self.choices, *self.choices.values()]
        letters = LETTERS[: len(self.choices)]
        if not 2 <= len(self.choices) <= len(LETTERS):
            fault = f"{len(self.choices)} choices, not 2 … {len(LETTERS)}."
        elif self.right not in [*letters]:
            fault = f"no right answer: right is one of {', '.join(letters)}, not {self.right!r}."
        elif not all(map(str.strip, texts)):
            fault = "a text is empty, or a choice has no reason."
        elif any(text.count("$") > 1 for text in texts):
            fault = "it holds TeX: write it in plain letters, K or β."
        else:
            return
        raise ValueError(f"{self.ask!r}: {fault}")

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Question":
        """A question from what `as_dict` made of it.

        Raises:
            ValueError: as for any question, or if a part is missing.
        """
        try:
            ask, pairs, right = (plain[key] for key in ("ask", "choices", "right"))
            choices = {str(text): str(reason) for text, reason in pairs}
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"ask, choices with reasons, and right, not {plain!r:.60}.") from None
        if len(choices) != len(pairs):
            raise ValueError(f"{ask!r}: a choice stands there twice.")
        known = isinstance(right, int) and 0 <= right < len(LETTERS)
        return cls(ask, choices, LETTERS[right] if known else str(right))

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, as JSON has them; `right` counts from 0."""
        choices = [list(pair) for pair in self.choices.items()]
        return {"ask": self.ask, "choices": choices, "right": LETTERS.index(self.right)}


def quiz(chapter: int) -> list[Question]:
    """The questions of a chapter.

    Raises:
        ValueError: if the chapter has none, or one does not fit together.
    """
    rows = words(chapter).get("question")
    if not rows:
        raise ValueError(f"There is no quiz for chapter {chapter}.")
    return [
        Question.from_dict(
            {
                "ask": row["text"],
                "choices": list(zip(row["choices"], row["reasons"], strict=True)),
                "right": LETTERS.index(row["right"]),
            }
        )
        for row in rows
    ]

"""A quiz in which every choice is answered, the wrong ones with the reason why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import traitlets

from t2ilearn.widgets.base import Widget, joined, listed

LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Question:
    """A question with its choices, in order.

    Args:
        ask: the question. `*emphasis*` and `` `code` `` are shown as such, here and below.
        choices: each choice with what is to be said to those who take it.
        right: the letter of the right choice; the first is "A".
    """

    ask: str
    choices: Mapping[str, str]
    right: str


class Quiz(Widget):
    """Questions with two to eight choices each, by mouse, Tab and Enter, or the letters.

    Args:
        questions: five in a chapter.
        title: what stands above them.

    Raises:
        ValueError: if a question has no right answer or no reason for a choice, or holds TeX,
            which a widget cannot show.
    """

    _esm = joined("shared", "quiz")
    title = traitlets.Unicode().tag(sync=True)
    questions = listed()

    def __init__(self, questions: Sequence[Question], title: str = "Quiz") -> None:
        asked = [
            {
                "ask": question.ask,
                "choices": [list(pair) for pair in question.choices.items()],
                "right": LETTERS.find(question.right) if len(question.right) == 1 else -1,
            }
            for question in questions
        ]
        fallback = f"{title}: {len(asked)} questions, each choice answered with its reason."
        super().__init__(questions=asked, title=title, fallback=fallback)

    @traitlets.validate("questions")
    def _check_questions(self, proposal: Any) -> list:
        if not proposal["value"]:
            raise ValueError("A quiz needs at least one question.")
        for number, question in enumerate(proposal["value"], 1):
            try:
                ask, choices, right = (question[key] for key in ("ask", "choices", "right"))
                texts = [ask, *(text for pair in choices for text in pair)]
            except (TypeError, KeyError):
                raise ValueError(f"Question {number} lacks ask, choices or right.") from None
            if not 2 <= len(choices) <= len(LETTERS):
                raise ValueError(f"Question {number} has {len(choices)} choices, not 2 … 8.")
            if right not in range(len(choices)):
                letters = ", ".join(LETTERS[: len(choices)])
                raise ValueError(
                    f"Question {number} has no right answer: right is one of {letters}."
                )
            if any(len(pair) != 2 for pair in choices) or not all(t.strip() for t in texts):
                raise ValueError(f"Question {number}: a text is empty, or a choice has no reason.")
            if any(text.count("$") > 1 for text in texts):
                raise ValueError(f"Question {number} holds TeX: write it in plain letters, K or β.")
        return proposal["value"]

"""A quiz in which every choice is answered, the wrong ones with the reason why."""

from collections.abc import Sequence
from typing import Any

import traitlets

from t2ilearn.lessons.quizzes import Question
from t2ilearn.widgets.base import Widget, joined, listed


class Quiz(Widget):
    """Questions with two to eight choices each, by mouse, Tab and Enter, or the letters.

    Args:
        questions: five in a chapter.
        title: what stands above them.

    Raises:
        ValueError: if there are none.
    """

    _esm = joined("shared", "quiz")
    title = traitlets.Unicode().tag(sync=True)
    questions = listed()

    def __init__(self, questions: Sequence[Question], title: str = "Quiz") -> None:
        fallback = f"{title}: {len(questions)} questions, each choice answered with its reason."
        asked = [question.as_dict() for question in questions]
        super().__init__(questions=asked, title=title, fallback=fallback)

    @traitlets.validate("questions")
    def _check_questions(self, proposal: Any) -> list:
        if not proposal["value"]:
            raise ValueError("A quiz needs at least one question.")
        return [Question.from_dict(plain).as_dict() for plain in proposal["value"]]

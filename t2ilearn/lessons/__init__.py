"""What every chapter needs once: the gradient ledger, exercises, quizzes, budget cards.

| to have the reader | call |
|---|---|
| predict which loss term moves what | `ledger(model, terms).matches(prediction)` |
| do an exercise | `exercise("2.3")`, then `check("2.3", my_function)` |
| answer a quiz | `show_quiz(2)`; `quiz(2)` is the list of its `Question`s |
| know what a chapter costs | `card(2)` |

Nothing here trains, and no model file imports any of it.
"""

from typing import Any

from t2ilearn.lessons.budget import card
from t2ilearn.lessons.exercises import check, exercise
from t2ilearn.lessons.ledger import ledger
from t2ilearn.lessons.quizzes import Question, quiz

__all__ = ["Question", "card", "check", "exercise", "ledger", "quiz", "show_quiz"]


def show_quiz(chapter: int) -> Any:
    """A chapter's questions as a `t2ilearn.widgets.Quiz`.

    Raises:
        ValueError: if the chapter has none.
    """
    from t2ilearn.widgets import Quiz  # ipywidgets wait until somebody wants to see them

    return Quiz(quiz(chapter))

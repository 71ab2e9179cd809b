"""Widgets that teach: one JavaScript file each for JupyterLab, Colab and the book's own pages.

| to play with | widget |
|---|---|
| codes, cells, loss terms; a codebook that collapses | `CodebookLab` |
| what the encoder hears past a step without a slope | `StraightThrough` |
| attention as a weighted average | `AttentionLab` |
| how logits become a draw | `LogitViewer` |
| which copy is the nearest, and who says so | `DistanceRanking` |
| what two players want of a logit | `HingeLab` |
| λ over a recorded run, and computed | `AdaptiveWeight` |
| what a critic thinks, patch by patch | `critic.patch_maps`, which makes `Frames` |
| a draw that gradients can pass, and its price | `GumbelLab` |
| a picture written code by code, and where each query looks | `TokenSampler` |
| pictures made beforehand, by one or two sliders | `Frames` |
| five questions, each wrong choice answered | `Quiz` |

All that a widget shows travels in its state, so that a page without Python can show it as well.
What the reader changes stays in the page; what Python assigns (`lab.beta = 1`) starts it anew.
The arithmetic is in JavaScript functions that the tests hold against this package.
"""

from t2ilearn.lessons.quizzes import Question
from t2ilearn.widgets.critic import AdaptiveWeight, HingeLab
from t2ilearn.widgets.labs import AttentionLab, CodebookLab, LogitViewer, StraightThrough
from t2ilearn.widgets.pictures import DistanceRanking, Frames
from t2ilearn.widgets.quiz import Quiz
from t2ilearn.widgets.stream import GumbelLab, TokenSampler

__all__ = [
    "AdaptiveWeight",
    "AttentionLab",
    "CodebookLab",
    "DistanceRanking",
    "Frames",
    "GumbelLab",
    "HingeLab",
    "LogitViewer",
    "Question",
    "Quiz",
    "StraightThrough",
    "TokenSampler",
]

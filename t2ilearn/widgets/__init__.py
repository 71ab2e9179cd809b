"""Widgets that teach: one JavaScript file each for JupyterLab, Colab and the book's own pages.

| to play with | widget |
|---|---|
| code vectors, cells, loss terms; a codebook that collapses | `CodebookLab` |
| the gradient that the encoder gets through a step function | `StraightThrough` |
| attention as a weighted average | `AttentionLab` |
| sampling from logits: temperature, top-k, top-p, guidance | `LogitViewer` |
| which copy is the nearest, by three distances | `DistanceRanking` |
| the losses of generator and discriminator for a logit | `HingeLab` |
| λ over a recorded run, and computed | `AdaptiveWeight` |
| the logits of a discriminator, patch by patch | `discriminator.patch_maps`, which makes `Frames` |
| Gumbel-softmax samples, and their gradients | `GumbelLab` |
| a picture sampled token by token, with attention | `TokenSampler` |
| pictures made beforehand, by one or two sliders | `Frames` |
| five questions, each wrong choice answered | `Quiz` |

All that a widget shows travels in its state, so that a page without Python can show it as well.
What the reader changes stays in the page; what Python assigns (`lab.beta = 1`) starts it anew.
The arithmetic is in JavaScript functions that the tests compare with this package.
"""

from t2ilearn.lessons.quizzes import Question
from t2ilearn.widgets.discriminator import AdaptiveWeight, HingeLab
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

"""The systems of the book, one file each, behind one interface.

| to | call |
|---|---|
| list what can draw | `names()` |
| load one | `load("vqvae")`, `load("runs/prior-tiny")` |
| load one network | `load_part("vqgan-book", "discriminator")` |
| train | `train_system("vqvae", "tiny")` |
| measure | `evaluate_system(load("vqvae"))` |
| rank pictures by CLIP | `rank(pictures, "a small red star")` |
| add one | a file like `vqvae`: a `System` under `@register` |
"""

from t2ilearn.systems import (  # noqa: F401, I001  (the book's order)
    readers,
    vqvae,
    vqgan,
    dalle,
    clip,
    vqgan_clip,
    diffusion,
    dalle2,
)
from t2ilearn.systems.base import (
    Caption,
    Candidates,
    Options,
    Prompt,
    Request,
    Scorer,
    System,
    rerank,
)
from t2ilearn.systems.evaluation import evaluate_system
from t2ilearn.systems.plan import plan, train_system
from t2ilearn.systems.registry import (
    PLANS,
    STAGES,
    SYSTEMS,
    best,
    card_of,
    find,
    load,
    load_part,
    names,
    register,
    title,
)
from t2ilearn.systems.reranking import rank

__all__ = [
    "PLANS",
    "STAGES",
    "SYSTEMS",
    "Candidates",
    "Caption",
    "Options",
    "Prompt",
    "Request",
    "Scorer",
    "System",
    "best",
    "card_of",
    "evaluate_system",
    "find",
    "load",
    "load_part",
    "names",
    "plan",
    "rank",
    "register",
    "rerank",
    "title",
    "train_system",
]

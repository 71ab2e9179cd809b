"""A trained CLIP as a judge of candidates: for every system, for notebooks, and for VQGAN-CLIP.

    rank(pictures, "a small red star")           # the pictures from the most similar to the least
    clip_scorers(system)                         # {"clip": …} where weights for its worlds are

Ramesh et al. 2021, section 2.5: of many drawings keep those that CLIP finds most similar to the
caption. The stage `clip` serves here; `clip-score` is kept for measuring.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from t2ilearn import weights
from t2ilearn.data import CaptionTokenizer, Tokenizer, WordTokenizer
from t2ilearn.data.together import worlds_in
from t2ilearn.judging.clip import similarity
from t2ilearn.models.clip import CLIP
from t2ilearn.models.layers import check_pictures
from t2ilearn.systems.base import Candidates, Scorer, System
from t2ilearn.systems.registry import STAGES, load_part
from t2ilearn.weights import Card, WeightsError

STAGE = "clip"  # the stage whose weights rerank


class TrainedCLIP(NamedTuple):
    """A model, the tokenizer of its captions, and the worlds that it learned."""

    model: CLIP
    text_tokenizer: Tokenizer
    worlds: tuple[str, ...]

    def similarity(
        self, pictures: Float[Tensor, "b 3 h w"], captions: Sequence[str]
    ) -> Float[Tensor, " b"]:
        """The cosine of each picture and its caption. Raises as `judging.clip.similarity`."""
        return similarity(self.model, self.text_tokenizer.encode, pictures, captions)


class Ranking(NamedTuple):
    """Numbers of pictures, the most similar first, and the cosine of each picture, as given."""

    order: Int[Tensor, " n"]
    similarity: Float[Tensor, " n"]


def rank(
    pictures: Float[Tensor, "n 3 h w"], caption: str, clip: str | Path | None = None
) -> Ranking:
    """Pictures ordered by how well they fit a caption.

    Args:
        pictures: in [−1, 1]; those of another size than the model's are resized.
        clip: weights by name or path, such as "clip-book"; by default those that ship.

    Raises:
        ValueError: for pictures of another shape or range.
        CaptionError: for a caption that the model's tokenizer cannot encode, or a longer one than
            its context.
        WeightsError: if there are no such weights.
    """
    check_pictures(pictures)
    trained = load_clip(shipped_clip() if clip is None else clip)
    found = trained.similarity(pictures, [caption] * len(pictures))
    return Ranking(found.argsort(descending=True, stable=True), found)


def shipped_clip(worlds: Sequence[str] = ()) -> str:
    """The name of the weights that ship for some worlds.

    Raises:
        WeightsError: if there are none.
    """
    stage, shipped = STAGES[STAGE], weights.available()
    for name in (stage.weights_name(preset) for preset in sorted(stage.presets)):
        if name in shipped:
            card = weights.read_card(weights.find(name).with_suffix(".json"))
            if set(worlds) <= set(worlds_in(card.data["world"])):
                return name
    for_these = f" for {' and '.join(worlds)}" if worlds else ""
    raise WeightsError(
        f"No weights of {STAGE}{for_these} ship. Train them (t2ilearn train {STAGE}), and name "
        "their file."
    )


def load_clip(name: str | Path) -> TrainedCLIP:
    """A trained CLIP by the name or path of its weights.

    Raises:
        WeightsError: if they are missing or damaged, or of another stage.
    """
    path = weights.find(name)
    card = weights.read_card(path.with_suffix(".json"))
    return _loaded(path, card.sha256)


@lru_cache(maxsize=2)
def _loaded(path: Path, sha256: str) -> TrainedCLIP:
    """A model from its file. The digest is part of the key: a retrained one loads anew."""
    model, card = load_part(path), weights.read_card(path.with_suffix(".json"))
    if not isinstance(model, CLIP):
        raise WeightsError(f"{path} holds {type(model).__name__} of stage {card.stage}, no CLIP.")
    tokenizer = load_text_tokenizer(path, card)
    return TrainedCLIP(model.requires_grad_(False), tokenizer, worlds_in(card.data["world"]))


def clip_scorers(system: System) -> dict[str, Callable[[System], Scorer]]:
    """The scorer "clip", if weights ship that learned all worlds of a system."""
    if not system.worlds:
        return {}
    try:
        name = shipped_clip(system.worlds)
    except WeightsError:
        return {}
    return {"clip": lambda _: clip_scorer(load_clip(name))}


def clip_scorer(trained: TrainedCLIP) -> Scorer:
    """How similar CLIP finds a picture and its caption."""

    def scorer(among: Candidates) -> Tensor:
        texts = [c if isinstance(c, str) else c.text for c in among.captions]
        return trained.similarity(among.pictures, texts)

    return scorer


def load_text_tokenizer(file: Path, card: Card) -> Tokenizer:
    """The tokenizer through which a model learned its captions, by its card.

    Raises:
        WeightsError: if its file is not the one that the model learned from.
    """
    if card.tokenizer is None:
        return WordTokenizer()
    path = file.with_name(card.tokenizer["file"])
    try:
        tokenizer = CaptionTokenizer.load(path, card.tokenizer["length"])
    except ValueError as error:
        raise WeightsError(str(error)) from None
    if hashlib.sha256(path.read_bytes()).hexdigest() != card.tokenizer["sha256"]:
        raise WeightsError(f"{path} is not the tokenizer that this model learned from.")
    return tokenizer

"""What a CLIP is measured by: retrieval, hard negatives, and recognition without training for it.

    retrieval        of n pictures and their n captions, does each find its own?  (R@1, both ways)
    hard negatives   does a picture prefer its caption to the same with two things exchanged?
    zero-shot        which of all concepts does a drawing show?  (Radford et al. 2021, section 3.1)

| symbol | name |
|---|---|
| u_i · v_j | `similarity`, the cosine of a picture's and a caption's embedding |
| R@1 | the share whose most similar partner is its own |

A model that reads a caption as a bag of words is right on half of the hard negatives. Chance for
R@1 is one in n.

Letters: B pictures, n of a test set, E dimension of the shared space.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from t2ilearn.data import CaptionedPictures, Emoji, Shapes, TinyShapes, parse
from t2ilearn.data.captions import INVERSE, TEMPLATES, Stated, describe
from t2ilearn.data.emoji_captions import describe_emoji
from t2ilearn.judging.counting import NO_OTHER
from t2ilearn.judging.report import CHUNK, share
from t2ilearn.models.clip import CLIP
from t2ilearn.models.layers import check_pictures

RETRIEVED = 1000  # pictures, and as many captions
_DRAWS = 2  # times as many scenes are drawn, since some come twice
_PROMPTS = (0, 2, 4)  # forms of a caption whose embeddings are averaged for zero-shot recognition

Encode = Callable[[list[str]], Int[Tensor, "b t"]]  # captions → token ids


@torch.no_grad()
def embed_pictures(model: CLIP, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
    """Embeddings of length 1, in chunks; pictures of another size are resized.

    Raises:
        ValueError: for pictures of another shape or type, NaN, or values outside [−1, 1].
    """
    check_pictures(pictures)
    side = model.image_tower.config.resolution
    parts = []
    for part in pictures.split(CHUNK):
        if part.shape[-1] != side:
            part = F.interpolate(part, (side, side), mode="bilinear", antialias=True).clamp(-1, 1)
        parts.append(model.encode_image(part))
    return torch.cat(parts)


@torch.no_grad()
def embed_captions(model: CLIP, encode: Encode, captions: Sequence[str]) -> Float[Tensor, "b e"]:
    """Embeddings of length 1, in chunks.

    Raises:
        CaptionError: if a caption cannot be encoded, or is too long.
    """
    return torch.cat([model.encode_text(ids) for ids in encode(list(captions)).split(CHUNK)])


def similarity(
    model: CLIP, encode: Encode, pictures: Float[Tensor, "b 3 h w"], captions: Sequence[str]
) -> Float[Tensor, " b"]:
    """The cosine of each picture and its caption, in [−1, 1]: what reranking sorts by, and with a
    model that nothing else has used, a CLIP score.

    Raises:
        ValueError: if there are not as many captions as pictures.
        CaptionError: as `embed_captions`.
    """
    if len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures but {len(captions)} captions.")
    different = list(dict.fromkeys(captions))
    text = embed_captions(model, encode, different)
    rows = torch.tensor([different.index(caption) for caption in captions])
    return (embed_pictures(model, pictures) * text[rows]).sum(1)


def evaluate_clip(
    model: CLIP, encode: Encode, world: CaptionedPictures, n: int = 2000
) -> dict[str, Any]:
    """Every figure of a model, on each world that it learned; shares have their intervals.

    Args:
        n: pictures of each set; for retrieval at most `RETRIEVED`.
    """
    metrics: dict[str, Any] = {}
    for part in world.worlds:
        for name in part.test_sets:
            if name != "test-partial":  # captions that leave things out fit several pictures
                metrics |= retrieval(model, encode, part, name, min(n, RETRIEVED))
        if isinstance(part, Shapes) and not isinstance(part, TinyShapes):  # that has one object
            metrics |= hard_negatives(model, encode, part, n)
        if isinstance(part, Emoji):
            metrics |= zero_shot(model, encode, part, n)
    return metrics


# --- retrieval ---------------------------------------------------------------------------------


def retrieval(
    model: CLIP, encode: Encode, world: CaptionedPictures, name: str, n: int
) -> dict[str, Any]:
    """R@1 both ways among at most n different scenes of a test set, each with its full caption.
    Pictures with one caption are each other's partners, too."""
    scenes, captions = world.test_scenes(name, _DRAWS * n)
    groups = world.groups(name, _DRAWS * n)
    kept = first_of_each(scenes)[:n]
    captions = [captions[row] for row in kept.tolist()]
    pictures = world.pictures(scenes[kept], torch.Generator().manual_seed(6000))
    image, text = embed_pictures(model, pictures), embed_captions(model, encode, captions)
    cosine, belong = image @ text.T, None if groups is None else groups[kept]
    metrics: dict[str, Any] = {}
    for what, dim in (("caption of a picture", 1), ("picture of a caption", 0)):
        best = cosine.argmax(dim).tolist()
        right = torch.tensor([captions[i] == own for i, own in zip(best, captions, strict=True)])
        enough = len(set(captions)) > 1
        metrics[f"{world.label}R@1, {what}, {name}"] = share(right, belong) if enough else NO_OTHER
    return {**metrics, f"{world.label}candidates, {name}": len(kept)}


def first_of_each(scenes: Int[Tensor, "n facts"]) -> Int[Tensor, " m"]:
    """The rows in which each different scene comes first, in order."""
    different, number = scenes.unique(dim=0, return_inverse=True)
    first = torch.full((len(different),), len(scenes))
    first.scatter_reduce_(0, number, torch.arange(len(scenes)), "amin")
    return first.sort().values


# --- hard negatives ----------------------------------------------------------------------------


def exchanged(stated: Stated, what: str) -> Stated | None:
    """What a caption of two objects would state if two things were exchanged.

    Args:
        what: "relation" (above becomes below) or "attributes": size, pattern and colour of the
            two objects change places.

    Returns:
        None where that would state the same, or there is one object.

    Raises:
        ValueError: for another word.
    """
    if what not in ("relation", "attributes"):
        raise ValueError(f"Exchange 'relation' or 'attributes', not {what!r}.")
    if stated.relation is None:
        return None
    first, second = stated.objects
    if what == "relation":
        changed = replace(stated, relation=INVERSE[stated.relation])
    else:
        objects = (replace(second, shape=first.shape), replace(first, shape=second.shape))
        changed = replace(stated, objects=objects)
    return None if changed.canonical() == stated.canonical() else changed


def hard_negatives(
    model: CLIP, encode: Encode, world: Shapes, n: int = 2000, name: str = "test-full"
) -> dict[str, Any]:
    """How often a picture is more similar to its caption than to the caption with two things
    exchanged; both sentences have one form."""
    scenes, captions = world.test_scenes(name, n)
    pictures = world.pictures(scenes, torch.Generator().manual_seed(6000))
    image = embed_pictures(model, pictures)
    metrics = {}
    for what in ("relation", "attributes"):
        rows, right, wrong = [], [], []
        for row, caption in enumerate(captions):
            stated = parse(caption)
            if (changed := exchanged(stated, what)) is not None:
                rows.append(row)
                right.append(describe(stated, row % TEMPLATES))
                wrong.append(describe(changed, row % TEMPLATES))
        own, other = (
            (image[rows] * embed_captions(model, encode, texts)).sum(1) for texts in (right, wrong)
        )
        metrics[f"{world.label}right before {what} exchanged, {name}"] = share(own > other)
    return metrics


# --- zero-shot recognition ---------------------------------------------------------------------


def zero_shot(
    model: CLIP, encode: Encode, world: Emoji, n: int = 2000, name: str = "held-out"
) -> dict[str, Any]:
    """Which concept a drawing shows, among all concepts: first, and among the first five. The
    intervals are over pairs of concept and style."""
    concepts = concept_embeddings(model, encode, world)
    scenes, _ = world.test_scenes(name, n)
    image = embed_pictures(model, world.test_set(name, n).pictures)
    best = (image @ concepts.T).topk(5, dim=1).indices  # (n, 5)
    found: Bool[Tensor, "n 5"] = best == scenes[:, :1]
    groups = world.groups(name, n)
    return {
        f"{world.label}zero-shot concept, {name}": share(found[:, 0], groups),
        f"{world.label}zero-shot concept in the first five, {name}": share(found.any(1), groups),
    }


def concept_embeddings(model: CLIP, encode: Encode, world: Emoji) -> Float[Tensor, "concepts e"]:
    """One embedding a concept: the mean over several forms of its caption, of length 1 again
    (prompt ensembling, section 3.1.4)."""
    names = [phrases[0] for phrases in world.phrases]
    forms = [
        embed_captions(model, encode, [describe_emoji(name, template=form) for name in names])
        for form in _PROMPTS
    ]
    return F.normalize(torch.stack(forms).mean(0), dim=1)

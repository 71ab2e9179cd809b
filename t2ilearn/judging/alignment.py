"""Caption alignment: the share of pictures in which everything that the caption states is right.

The judge answers one question a column of facts; a caption states some of these facts. A picture
is *aligned* if the judge can read it and every stated fact is among the answers that count: the
likeliest one, or, for emoji concepts, any of the five likeliest.

Letters: B pictures, C columns of facts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from t2ilearn.data.grammar import ReadCaption
from t2ilearn.data.interface import WorldClass
from t2ilearn.data.shapes import FIELDS, Shapes
from t2ilearn.judging.reader import Reader, read

CHUNK = 250  # pictures that a reader is shown at once

Facts = list[tuple[int, int]]  # (column, value)


def facts_of(captions: Sequence[str | ReadCaption], world: WorldClass = Shapes) -> list[Facts]:
    """What each caption states. Every distinct caption is parsed once.

    Args:
        captions: texts of the world, or captions that were read before.

    Raises:
        CaptionError: if a caption cannot be parsed.
    """
    known: dict[str, Facts] = {}
    for caption in captions:
        text, stated = (caption, None) if isinstance(caption, str) else (caption.text, caption)
        if text not in known:
            known[text] = world.facts(world.read(text) if stated is None else stated.stated)
    return [known[c if isinstance(c, str) else c.text] for c in captions]


def matches(facts: Sequence[int], stated: Any) -> bool:
    """Whether facts read from a picture fulfil everything that a caption of shapes states."""
    return all(facts[column] == value for column, value in Shapes.facts(stated))


@torch.no_grad()
def aligned(
    judge: Reader,
    pictures: Float[Tensor, "b 3 h w"],
    captions: Sequence[str | ReadCaption],
    world: WorldClass = Shapes,
) -> Bool[Tensor, " b"]:
    """For each picture: is it readable, and is everything that its caption states right?

    Raises:
        CaptionError: if a caption cannot be parsed.
        ValueError: if there are not as many captions as pictures.
    """
    if len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures but {len(captions)} captions.")
    rows, right = facts_of(captions, world), []
    for start in range(0, len(pictures), CHUNK):
        answers = judge(pictures[start : start + CHUNK])
        readable, found = _answers(answers, rows[start : start + CHUNK], world.first_answers)
        right += [can and all(facts) for can, facts in zip(readable, found, strict=True)]
    return torch.tensor(right, dtype=torch.bool)


def _answers(
    answers: list[Tensor], rows: list[Facts], first_answers: Any
) -> tuple[list[bool], list[list[bool]]]:
    """Which pictures are readable, and for each of them which stated facts are right."""
    known = answers[0][:, :-1]  # the last answer is "unreadable"
    readable = (known.amax(1) >= answers[0][:, -1]).tolist()
    best = []  # of each column, the answers that count
    for column, logits in enumerate([known, *answers[1:]]):
        best.append(logits.topk(first_answers.get(column, 1), dim=1).indices.tolist())
    found = [[v in best[c][i] for c, v in facts] for i, facts in enumerate(rows)]
    return readable, found


@torch.no_grad()
def measured(
    judge: Reader,
    pictures: Float[Tensor, "b 3 h w"],
    captions: Sequence[str | ReadCaption],
    world: WorldClass,
) -> dict[str, Bool[Tensor, " b"]]:
    """What a world reports of pictures (`world.measures`): which of them are right, by each.

    A picture whose caption does not state what a measure asks for counts as wrong there.
    """
    rows = facts_of(captions, world)
    found: dict[str, list[Tensor]] = {name: [] for name in world.measures}
    for start in range(0, len(pictures), CHUNK):
        part, facts = pictures[start : start + CHUNK], rows[start : start + CHUNK]
        answers = judge(part)
        for name, asked in world.measures.items():
            if asked is None:
                found[name].append(aligned(judge, part, captions[start : start + CHUNK], world))
                continue
            column, first = asked
            wanted = [[pair for pair in row if pair[0] == column] for row in facts]
            readable, right = _answers(answers, wanted, {column: first})
            each = zip(readable, right, strict=True)
            found[name].append(torch.tensor([can and bool(r) and all(r) for can, r in each]))
    none = torch.zeros(0, dtype=torch.bool)
    return {name: torch.cat([none, *parts]) for name, parts in found.items()}


@torch.no_grad()
def score(
    reader: Reader,
    pictures: Float[Tensor, "b 3 h w"],
    captions: Sequence[str | ReadCaption],
    world: WorldClass = Shapes,
) -> Float[Tensor, " b"]:
    """log p(everything the caption states | picture): what reranking sorts by."""
    logs = [logits.log_softmax(1) for logits in reader(pictures)]
    rows = facts_of(captions, world)
    sums = [
        torch.stack([logs[c][i, value] for c, value in row]).sum() for i, row in enumerate(rows)
    ]
    return torch.stack(sums)


class Binding(NamedTuple):
    """Whether attributes are at their own objects, and the row of the picture of each answer."""

    right: Bool[Tensor, " m"]
    rows: Int[Tensor, "m 1"]


def binding(
    reader: Reader, pictures: Float[Tensor, "n 3 h w"], captions: Sequence[str | ReadCaption]
) -> Binding:
    """Attribute binding: one answer for each pair of colours, or of shapes, that a caption of
    shapes gives to its two objects and that the picture shows. True: each is at its own object;
    False: they are exchanged.

    A model that assigns attributes to objects at random gets half of them right, however sharp
    its pictures are.
    """
    answers, rows = [], []
    seen: Int[Tensor, "n 11"] = read(reader, pictures).facts
    for number, (row, stated) in enumerate(zip(seen.tolist(), facts_of(captions), strict=True)):
        said = dict(stated)  # column of FIELDS → value
        for name in ("colour", "shape"):
            columns = [FIELDS.index(f"{name}_{slot}") for slot in (1, 2)]
            wanted = [said.get(column) for column in columns]
            found = [row[column] for column in columns]
            if wanted[0] != wanted[1] and found in (wanted, wanted[::-1]):
                answers.append(found == wanted)
                rows.append([number])
    numbers = torch.tensor(rows, dtype=torch.int64).reshape(-1, 1)
    return Binding(torch.tensor(answers, dtype=torch.bool), numbers)

"""The gradient ledger: which loss term moves which part of a model, asked of autograd.

    book = ledger(model, vqvae_loss(x, model(x)))
    book                                              # ✓ moves, · does not, – has no parameters
    book.matches({"reconstruction": "encoder decoder", "codebook_loss": "codebook", ...})

A term *moves* a part if the gradient of that term alone, with respect to the part's parameters, is
not zero. What changes in the forward pass, such as a codebook that follows moving averages, is
moved by no term, and the ledger says so.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from t2ilearn.lessons.exercises import words

NAMES = {"quantizer": "codebook"}  # what the book calls a part, where the code says otherwise
ORDER = ("encoder", "codebook", "decoder")  # the order of the forward pass; others follow
FREE = "it has no parameters, so no term can move it; if it changes, then in the forward pass"

READINGS = {"total", "adaptive_weight", "logits_real", "logits_fake"}  # sums and readings


@dataclass(frozen=True)
class Cell:
    """What one term does to one part.

    Args:
        norm: length of the gradient with respect to all the part's parameters.
        finding: how autograd accounts for it, as half a sentence.
        free: the part has no parameters that want a gradient.
        idle: nothing could flow: the part is free, or the term a constant.
    """

    norm: float
    finding: str
    free: bool = False
    idle: bool = False

    @property
    def moves(self) -> bool:
        """Whether a step down the term would change the part. NaN moves: it ruins."""
        return self.norm != 0

    def entry(self, norms: bool = False) -> str:
        """✓ or the norm, · or –."""
        if self.moves:
            return f"{self.norm:.2g}" if norms else "✓"
        return "–" if self.free else "·"


@dataclass(frozen=True)
class Comparison:
    """A prediction compared with a ledger: `right`, or one sentence for each wrong cell."""

    cells: int
    wrong: list[str]

    @property
    def right(self) -> bool:
        """Whether every cell was predicted."""
        return not self.wrong

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        if self.right:
            return f"All {self.cells} cells right."
        head = f"{self.cells - len(self.wrong)} of {self.cells} cells right. Look again at:"
        return "\n".join([head, *(f"  {sentence}" for sentence in self.wrong)])


@dataclass(frozen=True)
class Ledger:
    """Rows are loss terms, columns a model's parts: `ledger["codebook_loss", "encoder"].moves`."""

    terms: tuple[str, ...]
    parts: tuple[str, ...]
    cells: dict[tuple[str, str], Cell] = field(repr=False)
    reasons: Mapping[tuple[str, str], tuple[bool, str]] = field(default_factory=dict, repr=False)

    def __getitem__(self, place: tuple[str, str]) -> Cell:
        return self.cells[place]

    def moved(self, term: str) -> set[str]:
        """The parts that a term moves."""
        return {part for part in self.parts if self.cells[term, part].moves}

    def text(self, norms: bool = False) -> str:
        """The table as text.

        Args:
            norms: write the gradients' lengths in place of ✓.
        """
        first = max(map(len, self.terms))
        lines = [" ".join([" " * first, *self.parts])]
        for term in self.terms:
            row = [self.cells[term, p].entry(norms).center(len(p)) for p in self.parts]
            lines.append(" ".join([term.ljust(first), *row]).rstrip())
        return "\n".join([*lines, *self._footnotes()])

    def _footnotes(self) -> list[str]:
        free = [p for p in self.parts if all(self.cells[t, p].free for t in self.terms)]
        return [f"– {part}: {FREE}." for part in free]

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        """For notebooks; pointing at a cell shows why."""
        head = "".join(f'<th scope="col">{html.escape(p)}</th>' for p in self.parts)
        rows = ""
        for term in self.terms:
            rows += f'<tr><th scope="row">{html.escape(term)}</th>'
            for part in self.parts:
                cell = self.cells[term, part]
                title = f"{'moves' if cell.moves else 'does not move'}: {cell.finding}"
                rows += f'<td title="{html.escape(title)}">{cell.entry()}</td>'
            rows += "</tr>"
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._footnotes())
        caption = "<caption>✓ the term moves the part, · it does not</caption>"
        return f"<table>{caption}<tr><td></td>{head}</tr>{rows}</table>{notes}"

    def matches(self, prediction: Mapping[str, str | Iterable[str]]) -> Comparison:
        """Compare a prediction with the ledger.

        Args:
            prediction: for each term the parts that it moves, as one string with blanks between
                ("encoder decoder") or as a list; "" for none.

        Raises:
            ValueError: if a term is missing, or a term or part is not in the ledger.
        """
        predicted = {t: set(p.split() if isinstance(p, str) else p) for t, p in prediction.items()}
        unknown = (set(predicted) - set(self.terms)) | (
            set().union(*predicted.values()) - set(self.parts)
        )
        missing = [term for term in self.terms if term not in predicted]
        if unknown or missing:
            raise ValueError(
                f"Predict the terms {', '.join(self.terms)}, each with some of the parts "
                f"{', '.join(self.parts)}"
                + (f"; unknown here: {', '.join(sorted(map(str, unknown)))}" if unknown else "")
                + (f"; without a prediction: {', '.join(missing)}" if missing else "")
                + "."
            )
        wrong = [
            self._mend(term, part)
            for term in self.terms
            for part in self.parts
            if self.cells[term, part].moves != (part in predicted[term])
        ]
        return Comparison(len(self.cells), wrong)

    def _mend(self, term: str, part: str) -> str:
        """Why a cell is as it is."""
        cell = self.cells[term, part]
        as_a_rule, why = self.reasons.get((term, part), (None, ""))
        if cell.idle or as_a_rule != cell.moves:
            why = cell.finding
        verb = "moves" if cell.moves else "does not move"
        name = term.removesuffix("_loss").replace("_", " ")
        return (
            f"The {name} {'loss' if term.endswith('_loss') else 'term'} {verb} the {part}: {why}."
        )


@cache
def reasons_for(loss: str) -> dict[tuple[str, str], tuple[bool, str]]:
    """Whether each term of a loss moves each part as a rule, and why: from the lessons' words.

    Args:
        loss: the name of the loss's class, such as "VQVAELoss". One that no chapter explains has
            no reasons.
    """
    return {
        (term, part): (row["moves"], row["why"])
        for chapter in range(1, 100)
        for row in words(chapter).get("reason", ())
        if loss in row["loss"]
        for term in row["term"]
        for part in row["part"]
    }


def parts_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """A model's parts by the book's names: its children, and "own" for what belongs to none.

    Children without parameters count too if they hold buffers: a codebook may be one. Of a
    generator with its discriminator, the generator is taken apart in turn.
    """
    children = dict(model.named_children())
    if "generator" in children:
        children = {**dict(children.pop("generator").named_children()), **children}
    parts: dict[str, list[Tensor]] = {
        NAMES.get(name, name): [*child.parameters()]
        for name, child in children.items()
        if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None
    }
    own = dict(model.named_parameters(recurse=False))
    if "codebook" in own:  # a dVAE's is a part like any other
        parts["codebook"] = [own.pop("codebook")]
    if own:
        parts["own"] = [*own.values()]
    names = [*(n for n in ORDER if n in parts), *(n for n in parts if n not in ORDER)]
    return {name: parts[name] for name in names}


def ledger(
    model: nn.Module,
    terms: Any,
    parts: Mapping[str, nn.Module | Sequence[Tensor]] | None = None,
    reasons: Mapping[tuple[str, str], tuple[bool, str]] | None = None,
) -> Ledger:
    """Ask autograd, term by term, which parts of a model would move.

    Args:
        model: the model whose output the terms were computed from.
        terms: a loss function's NamedTuple of scalars; `READINGS`, such as `total`, are left out.
        parts: modules, or lists of parameters, by name; by default `parts_of(model)`.
        reasons: whether and why, by (term, part); by default those of the
            chapter that explains the terms.

    Raises:
        ValueError: if a term is no scalar, or there is none.
    """
    given = parts_of(model) if parts is None else parts
    groups: dict[str, list[Tensor]] = {}
    for name, group in given.items():
        tensors = group.parameters() if isinstance(group, nn.Module) else group
        groups[name] = [p for p in tensors if p.requires_grad]
    names = tuple(name for name in terms._fields if name not in READINGS)
    if not names or any(getattr(terms, name).numel() != 1 for name in names):
        raise ValueError("A ledger needs loss terms, each of them a single number.")
    cells = {
        (term, part): _cell(getattr(terms, term), parameters)
        for term in names
        for part, parameters in groups.items()
    }
    known = reasons_for(type(terms).__name__) if reasons is None else reasons
    return Ledger(names, tuple(groups), cells, known)


def _cell(term: Tensor, parameters: list[Tensor]) -> Cell:
    if not parameters:
        return Cell(0.0, FREE, free=True, idle=True)
    if not term.requires_grad:
        return Cell(0.0, "the term is a constant here", idle=True)
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    reached = [gradient for gradient in found if gradient is not None]
    if not reached:
        return Cell(0.0, "no path leads from the term back to it")
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in reached))
    return Cell(norm, "a gradient arrives" if norm else "its gradient is 0")

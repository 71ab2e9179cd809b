"""Diagrams of pipelines and blocks, as SVG that reads on light and dark pages and on a phone.

    Diagram(
        [
            Box("x", "picture x", "B × 3 × 64 × 64", at=(0, 0), kind="data"),
            Box("encoder", "encoder", "4 convolutions", at=(0, 1)),
            Box("loss", "reconstruction loss", at=(1, 0), kind="loss"),
        ],
        [Arrow("x", "encoder"), Arrow("x", "loss", dashed=True)],
        alt="The picture goes through the encoder; the reconstruction loss compares …",
    )

Boxes stand on a grid, columns from left to right and rows from above. Two columns are as wide as a
phone of 320 pixels. A wider diagram never gets smaller letters than are readable: it scrolls in its
own frame instead, so prefer tall diagrams to wide ones. The chapters' own diagrams are in the
lessons' modules, such as `lessons.chapter02_diagrams`; this file only draws.

| kind | meaning | look |
|---|---|---|
| "data" | a tensor, with its shape | rounded, without a fill |
| "module" | a network that is trained | blue |
| "frozen" | a network or table that is not trained here | grey, with the word "frozen" |
| "table" | a learned table, such as a codebook | green |
| "loss" | a loss term | orange |
| "operation" | something without parameters | a thin outline |

A full arrow is a path of the forward pass. A dashed one says what a loss compares. An orange one
with `gradient=True` is a path of a gradient, which runs backwards.
"""

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLUMN, ROW = 158, 92  # units between the middles of neighbouring boxes
BOX_WIDTH, LINE = 134, 15  # of a box, and of a line of its text
MARGIN = 14
INK = "currentColor"  # the page's own colour of text, light or dark
HUES = {
    "data": INK,
    "module": "#0072B2",
    "frozen": INK,
    "table": "#009E73",
    "loss": "#D55E00",
    "operation": INK,
}
MOST_COLUMNS = 4
SMALLEST = 0.82  # the smallest scale: letters of 13 units keep 10.7 pixels


@dataclass(frozen=True)
class Box:
    """One box.

    Args:
        name: how arrows refer to it.
        text: what stands in it.
        note: a second, smaller line, such as a shape.
        at: column and row, from 0; halves are allowed.
        kind: see the table at the top of this file.
    """

    name: str
    text: str
    note: str = ""
    at: tuple[int | float, int | float] = (0, 0)
    kind: str = "module"

    def __post_init__(self) -> None:
        if self.kind not in HUES:
            raise ValueError(f"The kind of a box is one of {', '.join(HUES)}, not {self.kind!r}.")

    @property
    def lines(self) -> list[str]:
        """The text, wrapped."""
        return textwrap.wrap(self.text, 17)

    @property
    def notes(self) -> list[str]:
        """The note, wrapped; a frozen part says so."""
        words = f"{self.note}, frozen".removeprefix(", ") if self.kind == "frozen" else self.note
        return textwrap.wrap(words, 21)

    @property
    def height(self) -> int | float:
        """In units."""
        return LINE * len(self.lines) + (LINE - 2) * len(self.notes) + 12


@dataclass(frozen=True)
class Arrow:
    """An arrow from one box to another.

    Args:
        start, end: names of boxes.
        label: what it carries.
        dashed: for what is compared or copied and not computed from.
        bend: moves the middle of the arrow sideways by so many units, around other boxes.
        gradient: for a gradient's path, against the direction of the forward pass.
    """

    start: str
    end: str
    label: str = ""
    dashed: bool = False
    bend: int | float = 0
    gradient: bool = False


class Diagram:
    """Boxes and arrows. Notebooks show it; `svg()` is its source.

    Args:
        boxes, arrows: what to draw.
        alt: what the diagram shows, in whole sentences, for readers who cannot see it.
        row: units between the middles of neighbouring rows.

    Raises:
        ValueError: if an arrow names no box, two boxes share a name or a place, there are more
            than four columns, or there is no alternative text.
    """

    def __init__(
        self, boxes: Sequence[Box], arrows: Sequence[Arrow], alt: str, row: int | float = ROW
    ) -> None:
        self.row = row
        self.boxes = {box.name: box for box in boxes}
        self.arrows, self.alt = tuple(arrows), alt
        if len(self.boxes) != len(boxes) or len({box.at for box in boxes}) != len(boxes):
            raise ValueError("Every box needs a name and a place of its own.")
        unknown = {n for a in arrows for n in (a.start, a.end)} - set(self.boxes)
        if unknown:
            raise ValueError(f"Arrows name boxes that are not there: {', '.join(sorted(unknown))}.")
        if max(box.at[0] for box in boxes) > MOST_COLUMNS - 1:
            raise ValueError(f"A phone shows at most {MOST_COLUMNS} columns side by side.")
        if len(alt.split()) < 5:
            raise ValueError("Say in whole sentences what the diagram shows (alt).")

    @property
    def size(self) -> tuple[int | float, int | float]:
        """Width and height in units."""
        columns = max(box.at[0] for box in self.boxes.values())
        rows = max(box.at[1] for box in self.boxes.values())
        left, right = self._overhang()
        return (
            columns * COLUMN + BOX_WIDTH + 2 * MARGIN + left + right,
            (rows + 1) * self.row + 2 * MARGIN,
        )

    def middle(self, box: Box) -> tuple[int | float, int | float]:
        """The middle of a box in units, before the margin."""
        return box.at[0] * COLUMN + BOX_WIDTH / 2, box.at[1] * self.row + self.row / 2

    def _overhang(self) -> tuple[int | float, int | float]:
        """Room for arrows that bend out to the left and to the right of all boxes."""
        most = max(box.at[0] for box in self.boxes.values()) * COLUMN + BOX_WIDTH
        left = right = 0.0
        for arrow in self.arrows:
            (x0, y0, x1, y1), (cx, _) = self._route(arrow)
            if arrow.bend and y0 != y1:
                label = 6 * len(arrow.label) + 8 if arrow.label else 0  # a letter is about six wide
                middle = (x0 + 2 * cx + x1) / 4
                left = max(left, label - middle if arrow.bend < 0 else 0)
                right = max(right, middle + label - most if arrow.bend > 0 else 0)
        return left, right

    def svg(self) -> str:
        """The drawing as one SVG element."""
        width, height = self.size
        key = f"t2i{abs(hash_of(self.alt)):x}"
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'role="img" aria-label="{html.escape(self.alt)}" class="t2i-diagram" '
            f'style="width:100%;min-width:{SMALLEST * width:.0f}px;max-width:{width:g}px;'
            'height:auto;font-family:sans-serif">',
            f"<title>{html.escape(self.alt)}</title>",
            f'<defs><marker id="{key}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{INK}"/>'
            f'</marker><marker id="{key}g" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" '
            f'fill="{HUES["loss"]}"/></marker></defs>',
            f'<g transform="translate({MARGIN + self._overhang()[0]:g} {MARGIN})">',
            *(self._arrow(arrow, key) for arrow in self.arrows),
            *(self._box(box) for box in self.boxes.values()),
            "</g></svg>",
        ]
        return "".join(parts)

    def html(self) -> str:
        """The drawing in a frame that scrolls sideways where the page is too narrow for it."""
        focus = ' tabindex="0"' if SMALLEST * self.size[0] > 290 else ""  # for the arrow keys
        return f'<div style="overflow-x:auto"{focus}>{self.svg()}</div>'

    def _box(self, box: Box) -> str:
        x, y = self.middle(box)
        hue = HUES[box.kind]
        fill = {"data": 0, "operation": 0, "frozen": 0.1}.get(box.kind, 0.16)
        radius = {"data": min(box.height / 2, 20), "loss": 2}.get(box.kind, 6)
        dash = ' stroke-dasharray="5 3"' if box.kind == "frozen" else ""
        thick = 1 if box.kind == "operation" else 1.8
        rect = (
            f'<rect x="{x - BOX_WIDTH / 2:g}" y="{y - box.height / 2:g}" width="{BOX_WIDTH}" '
            f'height="{box.height:g}" rx="{radius:g}" fill="{hue}" fill-opacity="{fill}" '
            f'stroke="{hue}" stroke-width="{thick}"{dash}/>'
        )
        top = y - box.height / 2 + 6
        words = []
        for number, line in enumerate(box.lines):
            at = top + LINE * (number + 0.75)
            words.append(_text(x, at, line, 13, INK, bold=box.kind != "data"))
        for number, line in enumerate(box.notes):
            at = top + LINE * len(box.lines) + (LINE - 2) * (number + 0.75)
            words.append(_text(x, at, line, 11, INK))
        return rect + "".join(words)

    def _route(self, arrow: Arrow) -> tuple[tuple[float, ...], tuple[float, float]]:
        """The ends of an arrow as x, y, x, y, and the point that its curve bends towards."""
        start, end = self.boxes[arrow.start], self.boxes[arrow.end]
        (x0, y0), (x1, y1) = self.middle(start), self.middle(end)
        half, right, below = BOX_WIDTH / 2, 1 if x1 > x0 else -1, 1 if y1 > y0 else -1
        if y0 == y1:  # from side to side
            x0, x1 = x0 + right * half, x1 - right * (half + 2)
            return (x0, y0, x1, y1), ((x0 + x1) / 2, y0 + 2 * arrow.bend)
        if x0 != x1:  # round a corner: out above or below, and in by the side
            y0, x1 = y0 + below * start.height / 2, x1 - right * (half + 2)
            return (x0, y0, x1, y1), (x0, y1)
        if arrow.bend:  # around the boxes between: out of a side, and in again by the same
            side = 1 if arrow.bend > 0 else -1
            x0, x1 = x0 + side * half, x1 + side * (half + 2)
            return (x0, y0, x1, y1), (x0 + 2 * arrow.bend, (y0 + y1) / 2)
        y0, y1 = y0 + below * start.height / 2, y1 - below * (end.height / 2 + 2)
        return (x0, y0, x1, y1), (x0, (y0 + y1) / 2)

    def _arrow(self, arrow: Arrow, key: str) -> str:
        (x0, y0, x1, y1), (cx, cy) = self._route(arrow)
        dash = ' stroke-dasharray="4 4"' if arrow.dashed or arrow.gradient else ""
        hue, head = (HUES["loss"], f"{key}g") if arrow.gradient else (INK, key)
        path = (
            f'<path d="M{x0:g} {y0:g}Q{cx:g} {cy:g} {x1:g} {y1:g}" fill="none" '
            f'stroke="{hue}" stroke-width="{2 if arrow.gradient else 1.5}"{dash} '
            f'marker-end="url(#{head})"/>'
        )
        x, y = (x0 + 2 * cx + x1) / 4, (y0 + 2 * cy + y1) / 4  # half-way along the curve
        if not arrow.label:
            return path
        if y0 == y1:
            return path + _text(x, y - 5, arrow.label, 11, INK)
        if arrow.bend < 0:
            return path + _text(x - 5, y + 4, arrow.label, 11, INK, anchor="end")
        return path + _text(x + 5, y + 4, arrow.label, 11, INK, anchor="start")

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """For notebooks and the book's pages: the drawing, and its words as plain text."""
        return {"text/html": self.html(), "text/plain": f"Diagram: {self.alt}"}


def _text(
    x: int | float,
    y: int | float,
    words: str,
    size: int,
    fill: str,
    bold: bool = False,
    anchor: str = "middle",
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" '
        f'text-anchor="{anchor}"{weight}>'
        f"{html.escape(words)}</text>"
    )


def hash_of(text: str) -> int:
    """A number that depends on the text alone, on every machine and in every process."""
    value = 0
    for letter in text:
        value = (value * 131 + ord(letter)) % (2**31 - 1)
    return value

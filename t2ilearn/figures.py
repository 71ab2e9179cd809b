"""Figures of the chapters: pictures in a grid, curves, bars, maps of numbers, and source code.

| to show | call |
|---|---|
| pictures with their captions | `grid` |
| losses over steps, or any number over another | `curves` |
| a few numbers, between floor and ceiling | `bars` |
| how often each index is used | `usage` |
| attention, masks, any matrix | `matrix` |
| a figure with a caption | `captioned` |
| the source in the package | `show_source` |

Each returns a matplotlib Figure that a notebook shows once, as the last line of a cell. Grounds
are transparent and all writing is mid-grey, so that pages read by day and in dark mode. Notebooks
keep a caption beside its picture as well, as plain and as alternative text.

Letters: B pictures, H and W their height and width.
"""

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from jaxtyping import Float, Int, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from t2ilearn.judging.metrics import codebook_usage, perplexity

if TYPE_CHECKING:
    from IPython.display import Markdown

GREY = "#767676"  # 4.5 : 1 against white, 4.1 : 1 against a dark page
# Three to one or better against white and black, apart for colour-blind eyes (after Okabe & Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676", "#8C6D1F")
DPI = 100
NOT_LOSSES = ("gradient_norm", "learning_rate")


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. Closed, so that a notebook shows it where it is returned and
    not a second time."""
    figure = plt.figure(figsize=(width, height), dpi=DPI)
    figure.patch.set_alpha(0)
    plt.close(figure)
    return figure


def _axes(figure: Figure, ticks: bool = True) -> Axes:
    """Axes all in grey, without a box."""
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=GREY, length=3 if ticks else 0)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    for side, spine in axes.spines.items():
        spine.set_color(GREY)
        spine.set_visible(ticks and side in ("left", "bottom"))
    return axes


def _lines(caption: str, width: float) -> str:
    """A caption in lines of like length that a figure so many inches wide has room for."""
    room = max(44, int(15.5 * width))  # letters of nine points
    lines = math.ceil(len(caption) / room)
    return textwrap.fill(caption, min(room, len(caption) // max(lines, 1) + 8))


def _with_caption(figure: Figure, caption: str) -> Figure:
    """The same figure, whose caption a notebook also keeps as alternative text."""
    mimebundle = {"text/plain": f"Figure: {caption}"}, {"image/png": {"alt": caption}}
    figure.__dict__["_repr_mimebundle_"] = lambda **_: (
        mimebundle
    )  # IPython asks objects, not classes
    return figure


def captioned(figure: Figure, message: str) -> Figure:
    """The same figure with a caption below it, a statement about what it shows."""
    figure.draw_without_rendering()  # a layout may still move things
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()  # all in inches
    place = ((box.x0 + box.x1) / 2 / width, (box.y0 - 0.1) / height)
    text = _lines(message, box.x1 - box.x0)
    figure.text(*place, text, color=GREY, fontsize=9, ha="center", va="top")
    return _with_caption(figure, message)


def grid(
    pictures: Float[Tensor, "b 3 h w"],
    titles: Sequence[str] | None = None,
    columns: int = 8,
    caption: str | None = None,
) -> Figure:
    """Pictures in [−1, 1] row by row, enlarged without smoothing.

    Args:
        titles: one a picture, wrapped above it; "" for none.
        columns: pictures in a row, at most.
        caption: a statement about the figure, below all of them.

    Raises:
        ValueError: if these are no pictures, or the titles are not as many.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not len(pictures):
        raise ValueError(f"Pictures have shape (B ≥ 1, 3, H, W), not {tuple(pictures.shape)}.")
    if columns < 1:
        raise ValueError(f"columns must be 1 or more, not {columns}.")
    if titles is not None and len(titles) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures but {len(titles)} titles.")
    columns = min(columns, len(pictures))
    cell, gap, line = 1.28, 0.1, 0.15  # inches: 128 pixels are 2 × 64 and 4 × 32
    wrapped = [textwrap.fill(title, 21) for title in titles or [""] * len(pictures)]
    rows = [wrapped[i : i + columns] for i in range(0, len(wrapped), columns)]
    heads = [line * max(t.count("\n") + bool(t) for t in row) for row in rows]  # inches
    width = columns * (cell + gap)
    text = _lines(caption, width) if caption else ""
    foot = 0.1 + line * (text.count("\n") + 1) if caption else 0
    height = len(rows) * (cell + gap) + sum(heads) + foot
    figure, shown = _figure(width, height), pictures.detach().float().cpu().clamp(-1, 1)
    top = height
    for number, title in enumerate(wrapped):
        row, column = divmod(number, columns)
        if column == 0:
            top -= heads[row] + cell + gap
        place = (column * (cell + gap) / width, (top + gap / 2) / height)
        axes = figure.add_axes((*place, cell / width, cell / height), xticks=[], yticks=[])
        axes.imshow((shown[number].movedim(0, -1).numpy() + 1) / 2, interpolation="nearest")
        axes.set_title(title, fontsize=8, color=GREY, pad=3)
        for spine in axes.spines.values():  # a white picture ends somewhere on a white page
            spine.set(color=GREY, linewidth=0.5)
    if not caption:
        return figure
    figure.text(0.5, 0.02 / height, text, color=GREY, fontsize=9, ha="center", va="bottom")
    return _with_caption(figure, caption)


def curves(
    points: Mapping[str, Sequence[float | int]],
    names: Sequence[str] | None = None,
    log: bool = False,
    x: str = "step",
    ylabel: str | None = None,
) -> Figure:
    """Lines over steps, each labelled at its end.

    Args:
        points: `TrainResult.curves`, the "curves" of a flight.json, or any lists of one length.
        names: which lines; by default all loss terms.
        log: a logarithmic vertical axis.
        x: the name of what runs along the horizontal axis.

    Raises:
        ValueError: if a name is not among the points.
    """
    names = [n for n in points if n not in (x, *NOT_LOSSES)] if names is None else names
    for name in (x, *names):
        if name not in points:
            raise ValueError(f"There is no {name!r} among the curves {', '.join(points)}.")
    figure = _figure(6.4, 3.2)
    axes = _axes(figure)
    marker = "o" if len(points[x]) <= 15 else None
    for name, colour in zip(names, COLOURS * (len(names) // len(COLOURS) + 1), strict=False):
        axes.plot(points[x], points[name], color=colour, linewidth=1.6, marker=marker, ms=4)
    axes.set(yscale="log" if log else "linear", xlabel=x, ylabel=ylabel)
    # Where lines end close together, their labels move apart, from the lowest up.
    axes.autoscale_view()  # settles the limits, which are otherwise only known when drawn
    bottom = -1.0
    to_height = axes.transScale + axes.transLimits
    last = {name: to_height.transform((points[x][-1], points[name][-1]))[1] for name in names}
    for name in sorted(names, key=lambda n: last[n]):
        bottom = max(last[name], bottom + 0.08)
        colour = COLOURS[list(names).index(name) % len(COLOURS)]
        axes.text(1.02, bottom, name, color=colour, transform=axes.transAxes, va="center")
    return figure


def bars(
    values: Mapping[str, float | int],
    floor: float | int | None = None,
    ceiling: float | int | None = None,
    digits: int = 2,
    xlabel: str | None = None,
) -> Figure:
    """Horizontal bars with their numbers, between floor and ceiling.

    Args:
        floor: the score without any information.
        ceiling: the score of real pictures.
        digits: decimals of the numbers.
    """
    figure = _figure(6.4, 0.5 + 0.36 * len(values))
    axes = _axes(figure, ticks=False)
    places = list(range(len(values)))[::-1]  # the first on top
    axes.barh(places, list(values.values()), height=0.6, color=COLOURS[0])
    axes.set_yticks(places, list(values))
    right = max(*values.values(), ceiling or 0)
    for place, value in zip(places, values.values(), strict=True):  # in one column, clear of lines
        number = f"{value:.{digits}f}"
        axes.text(1.12 * right, place, number, color=GREY, va="center", ha="right", fontsize=9)
    for name, at in (("floor", floor), ("ceiling", ceiling)):
        if at is not None:
            axes.axvline(at, color=COLOURS[1], linewidth=1.2, linestyle="--")
            axes.text(at, len(values) - 0.45, name, color=COLOURS[1], ha="center", fontsize=9)
    axes.set_xlabel(xlabel or "")
    axes.set_xticks([])
    return figure


def usage(indices: Int[Tensor, "..."], size: int) -> Figure:
    """How often each of `size` indices occurs, the most used first.

    Raises:
        ValueError: if an index is not 0 … size − 1.
    """
    share, even = codebook_usage(indices, size), perplexity(indices, size)
    counts = indices.flatten().bincount(minlength=size).sort(descending=True).values
    figure = _figure(6.4, 2.4)
    axes = _axes(figure)
    axes.fill_between(range(size), counts.tolist(), step="mid", color=COLOURS[0])
    axes.set(xlabel="indices, the most used first", ylabel="uses", xlim=(-0.5, size - 0.5))
    note = f"{share:.0%} of {size} codes used, perplexity {even:.0f}"
    axes.text(1, 0.92, note, color=GREY, transform=axes.transAxes, ha="right")
    return figure


def matrix(
    values: Shaped[Tensor, "rows columns"],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    digits: int | None = None,
) -> Figure:
    """A matrix as a map, 0 pale and the largest dark; row i is drawn as the i-th line from above.

    Args:
        rows, columns: labels.
        digits: write the numbers too, with so many decimals.
    """
    height, width = values.shape
    figure = _figure(min(6.4, 1.2 + 0.45 * width), min(6.4, 0.8 + 0.45 * height))
    axes = _axes(figure, ticks=False)
    shown = values.detach().float().cpu()
    top = max(float(shown.max()), 1e-12)
    axes.imshow(shown.numpy(), cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
    axes.set_xticks(range(width) if columns else [], columns)
    axes.set_yticks(range(height) if rows else [], rows)
    axes.tick_params(axis="x", labelrotation=45)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if digits is not None:
        for i, row in enumerate(shown.tolist()):
            for j, value in enumerate(row):
                ink = "white" if value > 0.6 * top else "black"
                axes.text(j, i, f"{value:.{digits}f}", ha="center", va="center", color=ink)
    return figure


def show_source(*objects: Callable | type, docstrings: bool = True) -> "Markdown":
    """The source of functions, methods or classes, as code that every front end colours itself.

    Chapters show the code that runs, never a copy of it.

    Args:
        docstrings: False leaves them out.

    Raises:
        ValueError: if something has no source, for example because it was not written in Python.
    """
    from IPython.display import Markdown

    blocks = []
    for thing in objects:
        try:
            source = textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))
        except (TypeError, OSError):
            raise ValueError(f"{thing!r} has no Python source to show.") from None
        text = source if docstrings else _without_docstrings(source)
        blocks.append(f"# {thing.__module__.replace('.', '/')}.py\n{text.rstrip()}")
    body = "\n\n".join(blocks)
    return Markdown(f"```python\n{body}\n```")


def _without_docstrings(source: str) -> str:
    """Python source without docstrings, except where one is all there is."""
    lines, gone = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or len(node.body) < 2:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            gone |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
            if not lines[(first.end_lineno or 0)].strip():  # the blank line after it
                gone.add((first.end_lineno or 0) + 1)
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in gone)

"""What the widgets have in common: their JavaScript, made one file, and checks of their numbers.

A widget's JavaScript is written in several small files, which tests can import one by one. Every
host wants a single module, so `joined` puts them together: it drops the lines that import and the
word `export` before functions and constants. No name may therefore be declared twice.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import anywidget
import traitlets

FOLDER = Path(__file__).parent
MAX_STATE = 300_000  # bytes: a chapter holds several widgets, and pages should open at once


def joined(*names: str) -> str:
    """One ESM module made of files of this folder, each after those that it imports.

    Args:
        names: files without ".js"; the last one has the `export default` that anywidget wants.
    """
    sources = [(FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in names]
    text = "\n".join(re.sub(r"^import [^;]*;\n", "", s, flags=re.MULTILINE) for s in sources)
    return re.sub(r"^export (?=function|const)", "", text, flags=re.MULTILINE)


class Widget(anywidget.AnyWidget):
    """A widget whose state is all there is: what Python gave it, checked, rounded and small.

    `fallback` is the text that stands where widgets cannot be shown.

    Raises:
        ValueError: if the state is too large for a page.
    """

    _css = (FOLDER / "shared.css").read_text(encoding="utf-8")
    fallback = traitlets.Unicode().tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        own = set(self.traits(sync=True)) - set(anywidget.AnyWidget.class_trait_names())
        size = len(json.dumps({name: getattr(self, name) for name in own}))
        if size > MAX_STATE:
            raise ValueError(
                f"This widget's state takes {size // 1000} KB and may take {MAX_STATE // 1000}: "
                "give it fewer, smaller or more compressed pictures, or fewer numbers."
            )

    def __repr__(self) -> str:
        return self.fallback


def listed() -> Any:
    """A trait that travels to the page, for a list that a validator checks."""
    return traitlets.List().tag(sync=True)


def numbers(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Numbers of a list or tensor, rounded to six digits, for JSON.

    Raises:
        ValueError: if there are none, or one is not finite or outside low … high.
    """
    try:
        given = [float(v) for v in value]
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a list of numbers, not {value!r:.60}.") from None
    for v in given:
        if not math.isfinite(v) or not low <= v <= high:
            inside = "finite" if math.isinf(low) else f"between {low:g} and {high:g}"
            raise ValueError(f"{name} must be {inside}, not {v}.")
    if not given:
        raise ValueError(f"{name} must hold at least one number.")
    return [float(f"{v:.6g}") for v in given]


def points(value: Any, name: str, limit: float, least: int = 1) -> list[list[float]]:
    """Points of the plane, from a list of pairs or a tensor (n, 2).

    Raises:
        ValueError: if they are not pairs, fewer than `least`, or a coordinate is beyond ± limit.
    """
    rows = [numbers(row, f"a point of {name}", -limit, limit) for row in value]
    if len(rows) < least or any(len(row) != 2 for row in rows):
        raise ValueError(f"{name} must be {least} or more points of two numbers each.")
    return rows

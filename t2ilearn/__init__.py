"""t2ilearn: a textbook you can run, on how machines learned to draw from words.

`t2ilearn.draw("a small red star")` draws; every chapter has its own module.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Drawing", "draw", "redraw"]

if TYPE_CHECKING:
    from t2ilearn.drawing import Drawing, draw, redraw


def __getattr__(name: str) -> Any:
    """Import torch only when something is drawn, so that `import t2ilearn` is instant."""
    if name in __all__:
        from t2ilearn import drawing

        return getattr(drawing, name)
    raise AttributeError(f"module 't2ilearn' has no attribute {name!r}")

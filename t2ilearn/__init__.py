"""t2ilearn: a textbook you can run, on how machines learned to draw from words.

`t2ilearn.draw("a small red star")` draws, `t2ilearn.studio()` opens a studio in a notebook; every
chapter has its own module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Drawing", "draw", "redraw", "studio"]

if TYPE_CHECKING:
    from t2ilearn.drawing import Drawing, draw, redraw
    from t2ilearn.studio import studio


def __getattr__(name: str) -> Any:
    """Import torch only when something is drawn, so that `import t2ilearn` is instant."""
    if name == "studio":
        return import_module("t2ilearn.studio")  # which can be called, as its function can
    if name in __all__:
        from t2ilearn import drawing

        return getattr(drawing, name)
    raise AttributeError(f"module 't2ilearn' has no attribute {name!r}")

"""A studio for notebooks: type a caption, press Draw, keep what you like.

    import t2ilearn
    t2ilearn.studio()

Whatever goes wrong is said in a sentence under the buttons. Runs on ipywidgets 7.7 and 8.
"""

import html
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ipywidgets as widgets
import torch

from t2ilearn.data import CaptionedPictures
from t2ilearn.data.grammar import WORLDS
from t2ilearn.drawing import Drawing, draw
from t2ilearn.systems import registry

CAPTION = "a small red star above a large striped blue ring"
REMEMBERED = 6  # drawings in the history


class Studio(widgets.VBox):
    """Caption, system, seed and count; Draw, Surprise me and Save; the last drawings.

    Args:
        folder: where Save puts its files, `CAPTION-SEED.png`; none is overwritten.
    """

    def __init__(self, folder: str | Path = "drawings") -> None:
        self.folder, self.drawings = Path(folder), list[Drawing]()
        wide = {"description_width": "initial"}
        self.caption = widgets.Text(
            value=CAPTION, description="Caption", layout=widgets.Layout(width="95%"), style=wide
        )
        self.system = widgets.Dropdown(
            options=registry.names(), value=registry.best(), description="System", style=wide
        )
        self.seed = widgets.BoundedIntText(
            value=0, min=0, max=2**31 - 1, description="Seed", style=wide
        )
        self.count = widgets.BoundedIntText(value=4, min=1, max=8, description="Count", style=wide)
        self.draw_button = widgets.Button(description="Draw", button_style="primary")
        self.surprise_button = widgets.Button(description="Surprise me")
        self.save_button = widgets.Button(description="Save", disabled=True)
        self.message, self.picture, self.history = widgets.HTML(), widgets.HTML(), widgets.VBox()
        self.draw_button.on_click(lambda _: self._safely(self._draw))
        self.surprise_button.on_click(lambda _: self._safely(self._surprise))
        self.save_button.on_click(lambda _: self._safely(self._save))
        self._dice = torch.Generator().manual_seed(0)
        self._worlds: dict[str, CaptionedPictures] = {}
        buttons = widgets.HBox([self.draw_button, self.surprise_button, self.save_button])
        settings = widgets.HBox([self.system, self.seed, self.count])
        self._say("Type a caption and press Draw.")
        super().__init__(
            [self.caption, settings, buttons, self.message, self.picture, self.history]
        )

    def _say(self, text: str) -> None:
        """Under the buttons, and to those who listen to the page."""
        self.message.value = f'<p role="status" aria-live="polite">{html.escape(text)}</p>'

    def _safely(self, act: Any) -> None:
        """Do something; an error becomes a sentence."""
        self.draw_button.disabled = self.surprise_button.disabled = True
        try:
            act()
        except Exception as error:
            self._say(str(error) or f"That did not work: {type(error).__name__}.")
        finally:
            self.draw_button.disabled = self.surprise_button.disabled = False

    def _draw(self) -> None:
        self._say("Drawing …")
        new = draw(
            self.caption.value,
            system=self.system.value,
            seed=self.seed.value,
            count=self.count.value,
        )
        if self.drawings:
            older = (widgets.HTML(self.drawings[-1]._repr_html_()), *self.history.children)
            self.history.children = older[: REMEMBERED - 1]
        self.drawings = [*self.drawings, new][-REMEMBERED:]
        self.picture.value = new._repr_html_()
        self.save_button.disabled = False
        self._say(f"Drawn: {new.verdict()}.")

    def _surprise(self) -> None:
        """A random caption of a world that the system learned."""
        names = registry.load(self.system.value).worlds
        if not names:
            raise ValueError("This system learned pictures of your own: type a caption of theirs.")
        name = names[int(torch.randint(len(names), (1,), generator=self._dice))]
        world = self._worlds.setdefault(name, WORLDS[name]())
        scene = world.scenes(1, generator=self._dice)
        (self.caption.value,) = world.mixed_captions(scene, self._dice)
        self._say("A caption for you. Press Draw.")

    def _save(self) -> None:
        drawing = self.drawings[-1]
        name = re.sub(r"\W+", "-", drawing.request.caption.lower()).strip("-")[:80]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = drawing.save_new(self.folder / f"{name}-{drawing.request.seed}.png")
        self._say(f"Saved as {path.as_posix()}; t2ilearn redraw repeats it.")


def studio(folder: str | Path = "drawings") -> Studio:
    """A studio to show in a notebook.

    Args:
        folder: where Save puts its files.
    """
    return Studio(folder)


class _Callable(ModuleType):
    """Python names this module `t2ilearn.studio` once it is imported, and so does the book its
    function: calling either opens a studio."""

    def __call__(self, folder: str | Path = "drawings") -> Studio:
        return studio(folder)


sys.modules[__name__].__class__ = _Callable

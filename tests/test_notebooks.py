"""One command stores a chapter, and stores the same bytes again in the same environment.

Two executions are compared with each other and not with the stored file: another processor rounds
sums in its own way, and a picture's bytes show it. `tests/test_book.py` says whether the stored
file belongs to the code at hand, and nbval whether its text is still what the code prints.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import conftest
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = ROOT / "notebooks" / "01_pictures.ipynb"
# One of every kind of output: a drawing from the weights, a figure, frames.
CELLS = ("setup", "imports", "draw", "break-scores", "break-figure", "toy-helper", "toy-widget")


def store(folder: Path, **environment: str) -> bytes:
    """Store cells of the chapter by the command of `make notebooks`, called from such a shell."""
    chapter = {cell.id: cell for cell in nbformat.read(CHAPTER, as_version=4).cells}
    missing = [key for key in CELLS if key not in chapter]
    assert not missing, f"{CHAPTER.name} has no {missing} any more; name others in CELLS"
    code = [chapter[key].source for key in CELLS] + [conftest.TOY_CELL.strip()]
    cells = [new_code_cell(source, id=f"cell-{n}") for n, source in enumerate(code)]
    folder.mkdir()
    path = folder / CHAPTER.name
    path.write_text(nbformat.writes(new_notebook(cells=cells)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "run_notebooks.py", path],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path.read_bytes()


@pytest.mark.slow
def test_cells_that_are_executed_twice_are_stored_with_the_same_bytes(tmp_path):
    once = store(tmp_path / "once")
    # What may differ from shell to shell must not matter: the command pins it.
    twice = store(tmp_path / "twice", PYTHONHASHSEED="7", OMP_NUM_THREADS="2", MPLBACKEND="svg")
    stored, again = (nbformat.reads(text.decode(), as_version=4) for text in (once, twice))
    for first, second in zip(stored.cells, again.cells, strict=True):
        assert first == second, f"{first.id} gives other outputs when it runs again"
    assert once == twice

    data = [out.get("data", {}) for cell in stored.cells for out in cell.outputs]
    assert any("image/png" in kinds for kinds in data), "no figure"
    assert any("base64" in kinds.get("text/html", "") for kinds in data), "no drawing"
    assert stored.metadata.t2ilearn.made_from.weights
    (state,) = stored.metadata.widgets.values()
    names = {model["model_name"] for model in state["state"].values()}
    assert {"AnyModel", "IntSliderModel", "LinkModel"} <= names
    assert all(re.fullmatch("0{24}[0-9a-f]{8}", name) for name in state["state"])

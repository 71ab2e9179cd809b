"""One command stores a chapter, and stores the same bytes again in the same environment.

Two executions are compared with each other and not with the stored file: another processor rounds
sums in its own way, and a picture's bytes show it. `tests/test_book.py` says whether the stored
file belongs to the code at hand, and nbval whether its text is still what the code prints.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = ROOT / "notebooks" / "01_pictures.ipynb"  # the fastest, with figures and widgets
MEASURED = "nbval-ignore-output"  # the tag of cells that print seconds or what a machine has


def store_again(folder: Path, **environment: str) -> nbformat.NotebookNode:
    """Store a copy of the chapter by the command of `make notebooks`, called from such a shell."""
    folder.mkdir()
    path = Path(shutil.copy(CHAPTER, folder))
    written = nbformat.read(path, as_version=4)
    for cell in written.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    del written.metadata["widgets"], written.metadata["t2ilearn"]  # nothing is left to copy
    path.write_text(nbformat.writes(written), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "run_notebooks.py", path],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return nbformat.read(path, as_version=4)


def compared(notebook: nbformat.NotebookNode) -> bytes:
    """The notebook's bytes, without the outputs of cells that measure the machine."""
    for cell in notebook.cells:
        if MEASURED in cell.metadata.get("tags", []):
            cell.outputs = []
    return nbformat.writes(notebook).encode("utf-8")


@pytest.mark.slow
def test_a_chapter_that_is_executed_twice_is_stored_with_the_same_bytes(tmp_path):
    once = store_again(tmp_path / "once")
    # What may differ from shell to shell must not matter: the command pins it.
    twice = store_again(tmp_path / "twice", PYTHONHASHSEED="7", OMP_NUM_THREADS="2")
    for first, second in zip(once.cells, twice.cells, strict=True):
        if MEASURED not in first.metadata.get("tags", []):
            assert first == second, f"{first.id} gives other outputs when it runs again"
    outputs = [output for cell in once.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert once.metadata.widgets and once.metadata.t2ilearn.made_from.weights
    assert compared(once) == compared(twice)

"""Execute chapters in order and store their outputs, the same bytes every time.

    python tools/run_notebooks.py notebooks/01_pictures.ipynb ...
    python tools/run_notebooks.py --stale   # those whose stored outputs belong to other code or
                                            # weights; goes on where it was stopped

What would differ from run to run is pinned: one thread, no timings or progress bars, widget ids
from a counter, cell ids from the cell's place where it has none, figures without the plotting
library's version, heavy ones in 256 colours, and no record of this machine's Python.

The notebook's metadata then say what the outputs were made from (`made_from`), so that a test can
tell without running anything whether they still belong to the code.
"""

import argparse
import base64
import hashlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image
from tqdm import tqdm

ASSETS = Path(__file__).resolve().parent.parent / "t2ilearn" / "assets"
PINNED = {
    "OMP_NUM_THREADS": "1",  # sums in one order
    "TQDM_DISABLE": "1",
    "T2ILEARN_REHEARSAL": "",  # whole trainings, where tests take a tenth of the steps
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # a shell's own shows no figures
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "SOURCE_DATE_EPOCH": "0",  # dates inside PDF and SVG figures
}
HEAVY = 40_000  # bytes of a figure
# Runs in the kernel before the first cell.
PRELUDE = """
def _number_widgets():
    import itertools, types
    import comm.base_comm
    numbers = itertools.count(1)
    uuid4 = lambda: types.SimpleNamespace(hex=f"{next(numbers):032x}")
    comm.base_comm.uuid = types.SimpleNamespace(uuid4=uuid4)
_number_widgets()
def _note_weights():
    import os, sys
    notes = os.open(os.environ["T2ILEARN_OPENED_WEIGHTS"], os.O_WRONLY | os.O_APPEND)
    def note(event, args):
        if event == "open" and str(args[0]).endswith(".safetensors"):
            os.write(notes, f"{os.path.abspath(args[0])}\\n".encode())
    sys.addaudithook(note)
_note_weights()
import matplotlib as _m
_m.rcParams["svg.hashsalt"] = "t2ilearn"
from matplotlib_inline.config import InlineBackend as _b
_b.instance(parent=get_ipython()).print_figure_kwargs = {
    "bbox_inches": "tight", "metadata": {"Software": None}
}
del _number_widgets, _note_weights, _m, _b
"""


class Client(NotebookClient):
    """A client that runs the prelude unseen, before the notebook's first cell."""

    async def async_start_new_kernel_client(self):
        """Start the kernel, run the prelude and wait for it."""
        client = await super().async_start_new_kernel_client()
        reply = await client.execute(PRELUDE, store_history=False, silent=True, reply=True)
        if reply["content"]["status"] != "ok":
            raise RuntimeError("\n".join(reply["content"]["traceback"]))
        return client


def forget_addresses(output: nbformat.NotebookNode) -> None:
    """Replace memory addresses, as in "<Figure at 0x7f46…>", in an output's text by 0x0."""
    for holder, key in ((output, "text"), (output.get("data", {}), "text/plain")):
        if key in holder:
            holder[key] = re.sub(r"\b0x[0-9a-f]{6,}\b", "0x0", holder[key])


def lighten(output: nbformat.NotebookNode) -> None:
    """Store a heavy figure with 256 colours, a quarter of the bytes: a page stays below 3 MB."""
    data = output.get("data", {})
    if len(data.get("image/png", "")) * 3 / 4 <= HEAVY:
        return
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as figure:
        few = figure.convert("RGBA").quantize(256, Image.Quantize.FASTOCTREE, dither=0)
        buffer = io.BytesIO()
        few.save(buffer, "PNG", optimize=True, dpi=figure.info.get("dpi"))
    data["image/png"] = base64.b64encode(buffer.getvalue()).decode("ascii") + "\n"


def code_digest(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the code cells' sources, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode("utf-8")).hexdigest()


def weights_digests(names: list[str]) -> dict[str, str]:
    """SHA-256 of the shipped weights of these names; of missing ones, an empty text."""
    paths = {name: ASSETS / f"{name}.safetensors" for name in names}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
        for name, path in paths.items()
    }


def stale(notebook: nbformat.NotebookNode) -> str:
    """Why the stored outputs do not belong to the code and weights at hand; empty if they do."""
    made_from = notebook.metadata.get("t2ilearn", {}).get("made_from")
    if made_from is None:
        return "nothing says what its outputs were made from"
    if made_from["code"] != code_digest(notebook):
        return "its code has changed since its outputs were stored"
    now = weights_digests(list(made_from["weights"]))
    changed = [name for name, digest in made_from["weights"].items() if now[name] != digest]
    return f"other weights ship now: {', '.join(changed)}" if changed else ""


def execute(path: Path, on_cell: Callable[[], object] = lambda: None) -> None:
    """Run one notebook in its own folder and write it back with its outputs.

    `on_cell` is called after every cell of code.

    Raises nbclient.exceptions.CellExecutionError, and writes nothing, when a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    for number, cell in enumerate(notebook.cells):
        cell.setdefault("id", f"{path.stem}-{number:03d}")
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("widgets", None)
    client = Client(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=True,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_executed=lambda **_: on_cell(),
    )
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "opened"
        notes.touch()
        client.execute(env={**os.environ, "T2ILEARN_OPENED_WEIGHTS": str(notes)})
        opened = [Path(line) for line in notes.read_text(encoding="utf-8").splitlines()]
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            forget_addresses(output)
            lighten(output)
    used = sorted({weights.stem for weights in opened if weights.parent == ASSETS})
    notebook.metadata["t2ilearn"] = {
        "made_from": {"code": code_digest(notebook), "weights": weights_digests(used)}
    }
    # JupyterLab writes these two as the kernel says them, and marks what differs as unsaved.
    # `make lab` keeps Python's version out of what the kernel says, for it differs among readers.
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    notebook.metadata["language_info"].pop("version", None)
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")


def main() -> int:
    """Execute every notebook named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks; by default all chapters")
    parser.add_argument("--stale", action="store_true", help="only those that are out of date")
    asked = parser.parse_args()
    os.environ.update(PINNED)
    folder = Path(__file__).resolve().parent.parent / "notebooks"
    paths = [path.resolve() for path in asked.paths] or sorted(folder.glob("*.ipynb"))
    notebooks = {path: nbformat.read(path, as_version=4) for path in paths}
    if asked.stale:
        notebooks = {path: each for path, each in notebooks.items() if stale(each)}
    cells = {
        path: sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in each.cells)
        for path, each in notebooks.items()
    }
    with tqdm(total=sum(cells.values()), unit="cell", disable=None) as bar:
        for path in notebooks:
            bar.set_description(path.stem)
            execute(path, bar.update)
            bar.write(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Execute chapters in order and store their outputs, the same bytes every time.

    python tools/run_notebooks.py notebooks/01_pictures.ipynb ...

What would differ from run to run is pinned: one thread, no timings or progress bars, widget ids
from a counter, cell ids from the cell's place where it has none, figures without the plotting
library's version, and no record of this machine's Python.
"""

import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PINNED = {
    "OMP_NUM_THREADS": "1",  # sums in one order
    "TQDM_DISABLE": "1",
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "SOURCE_DATE_EPOCH": "0",  # dates inside PDF and SVG figures
}
# Runs in the kernel before the first cell.
PRELUDE = """
def _number_widgets():
    import itertools, types
    import comm.base_comm
    numbers = itertools.count(1)
    uuid4 = lambda: types.SimpleNamespace(hex=f"{next(numbers):032x}")
    comm.base_comm.uuid = types.SimpleNamespace(uuid4=uuid4)
_number_widgets()
import matplotlib as _m
_m.rcParams["svg.hashsalt"] = "t2ilearn"
from matplotlib_inline.config import InlineBackend as _b
_b.instance(parent=get_ipython()).print_figure_kwargs = {
    "bbox_inches": "tight", "metadata": {"Software": None}
}
del _number_widgets, _m, _b
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


def execute(path: Path) -> None:
    """Run one notebook in its own folder and write it back with its outputs.

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
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            forget_addresses(output)
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")


def main() -> int:
    """Execute every notebook named on the command line, or all of them."""
    os.environ.update(PINNED)
    folder = Path(__file__).resolve().parent.parent / "notebooks"
    paths = [Path(name).resolve() for name in sys.argv[1:]] or sorted(folder.glob("*.ipynb"))
    for path in paths:
        began = time.perf_counter()
        execute(path)
        size = path.stat().st_size / 2**20
        print(f"{path.name}: {time.perf_counter() - began:.0f} s, {size:.2f} MiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

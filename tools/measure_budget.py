"""Measure what the chapters cost, and write the budget that their cards show.

    python tools/measure_budget.py             # executes every notebook in a copy: minutes each
    python tools/measure_budget.py 2 2-lab     # these alone
    python tools/measure_budget.py --missing   # those that were not measured as they are now
    python tools/measure_budget.py --words     # counts words, keeps what was measured before

Notebooks are executed as `run_notebooks.py` does, on one thread, and not written back. A chapter
whose cells have changed since it was executed loses its measured figures with `--words`: they are
somebody else's.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from tqdm import tqdm

import run_notebooks

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("machine_minutes", "memory_gb", "machine")


def chapters() -> dict[str, Path]:
    """The notebooks by chapter, "2" and "2-lab"; appendices have no card."""
    paths = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return {str(int(p.name[:2])) + "-lab" * p.stem.endswith("_lab"): p for p in paths}


def count_words(cells: Sequence[nbformat.NotebookNode]) -> int:
    """Words in the text of cells: code and HTML tags left out, a formula as one word."""
    count = 0
    for cell in cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"```.*?```", " ", cell.source, flags=re.DOTALL)
            text = re.sub(r"\$\$.*?\$\$(?:\s*\([\w-]+\))?|\$[^$]*\$", " F ", text, flags=re.DOTALL)
            text = re.sub(r"<[^>]+>", " ", text)
            count += len([word for word in text.split() if re.search(r"\w", word)])
    return count


def fingerprint(cells: Sequence[nbformat.NotebookNode]) -> str:
    """SHA-256 of the sources, in order."""
    return hashlib.sha256("\0".join(cell.source for cell in cells).encode("utf-8")).hexdigest()


def measured(path: Path, found: dict) -> bool:
    """Whether a record holds figures of the notebook as it is now."""
    cells = fingerprint(nbformat.read(path, as_version=4).cells)
    return found.get("cells") == cells and found.get("machine_minutes") is not None


def measure(path: Path, execute: bool) -> dict:
    """The budget of one notebook; None for what was not measured."""
    cells = nbformat.read(path, as_version=4).cells
    found = {"words": count_words(cells), **dict.fromkeys(MEASURED), "cells": fingerprint(cells)}
    if execute:
        # A process of its own, so that its children's peak memory is this kernel's alone.
        command = [sys.executable, __file__, "--execute", str(path)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found |= json.loads(said.splitlines()[-1])
    return found


def execute_here(path: Path) -> dict:
    """Execute a copy of a notebook and say how long it took and how much memory, at the peak."""
    os.environ.update(run_notebooks.PINNED)
    with TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(path.read_bytes())
        began = time.perf_counter()
        run_notebooks.execute(copy)
        minutes = (time.perf_counter() - began) / 60
    memory = None
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, else KiB
        memory = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9, 2)
    machine = f"{platform.machine()} CPU, 1 thread"
    return {"machine_minutes": round(minutes, 2), "memory_gb": memory, "machine": machine}


def main() -> int:
    """Measure the chapters named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("numbers", nargs="*", help="2 or 2-lab; by default all")
    parser.add_argument("--words", action="store_true", help="count words only")
    parser.add_argument("--missing", action="store_true", help="what lacks measured figures")
    parser.add_argument("--execute", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.execute:
        print(json.dumps(execute_here(asked.execute)))
        return 0
    from t2ilearn.lessons.budget import RECORD  # brings torch, which an execution here can spare

    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    wanted = {
        number: path
        for number, path in chapters().items()
        if (not asked.numbers or number in asked.numbers)
        and not (asked.missing and measured(path, record.get(number, {})))
    }
    for number, path in tqdm(wanted.items(), unit="notebook"):
        before, found = record.get(number, {}), measure(path, execute=not asked.words)
        if asked.words and before.get("cells") == found["cells"]:
            found |= {name: before[name] for name in MEASURED}
        record[number] = found
        tqdm.write(f"{path.name}: {found}")
        # After each, so that `--missing` goes on where this is stopped.
        text = json.dumps({key: record[key] for key in chapters() if key in record}, indent=1)
        RECORD.write_text(text + "\n", encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Recorded results of the experiments in the labs, and the program that repeats them.

    recorded("2.7")                              # a table: means over seeds, smallest and largest
    recorded("2.7").rows                         # one dictionary for each training
    python -m t2ilearn.lessons.experiments 2.7   # trains anew, and writes the record

A reader compares their own measurements with the record, which stands in `experiments.json`.
Another processor rounds sums in another order, so the numbers of a single training may differ.
"""

import html
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("experiments.json")
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
INITIALISATIONS = ("random", "k-means")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Record:
    """An experiment's trainings.

    Args:
        settings: the names of what was changed, of which the last is the seed.
        measures: the names of what was measured.
        rows: one dictionary for each training, with all these names.
        machine: what it ran on.
    """

    settings: tuple[str, ...]
    measures: tuple[str, ...]
    rows: list[dict[str, Any]]
    machine: str

    def means(self) -> Iterator[tuple[dict[str, Any], dict[str, tuple[float, float, float]]]]:
        """For each combination of settings, over its seeds: mean, smallest and largest value of
        each measure."""
        kept = self.settings[:-1]
        keys = dict.fromkeys(tuple(row[name] for name in kept) for row in self.rows)
        for key in keys:
            same = [row for row in self.rows if tuple(row[name] for name in kept) == key]
            found = {}
            for name in self.measures:
                values = [row[name] for row in same]
                found[name] = sum(values) / len(values), min(values), max(values)
            yield dict(zip(kept, key, strict=True)), found

    def _lines(self) -> list[list[str]]:
        head = [*self.settings[:-1], *self.measures]
        lines = [[name.replace("_", " ") for name in head]]
        for setting, found in self.means():
            cells = [_shown(mean, low, high) for mean, low, high in found.values()]
            lines.append([*map(str, setting.values()), *cells])
        return lines

    def _note(self) -> str:
        seeds = len({row[self.settings[-1]] for row in self.rows})
        return f"mean of {seeds} seeds (smallest … largest); {self.machine}"

    def __repr__(self) -> str:
        lines = self._lines()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        rows = ["  ".join(map(str.rjust, line, widths)) for line in lines]
        return "\n".join([*rows, self._note()])

    def _repr_html_(self) -> str:
        """For notebooks."""
        head, *rows = self._lines()
        top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        caption = f"<caption>{html.escape(self._note())}</caption>"
        return f"<table>{caption}<tr>{top}</tr>{body}</table>"


def _shown(mean: float, low: float, high: float) -> str:
    digits = 2 if high <= 1 else 1 if high < 50 else 0
    return f"{mean:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def recorded(number: str) -> Record:
    """The recorded result of an experiment, such as "2.7".

    Raises:
        ValueError: if there is none.
    """
    stored = json.loads(RECORD.read_text(encoding="utf-8"))
    if number not in stored:
        raise ValueError(f"No recorded experiment {number!r}; there are: {', '.join(stored)}.")
    facts = stored[number]
    names = (tuple(facts["settings"]), tuple(facts["measures"]))
    return Record(*names, facts["rows"], facts["machine"])


def codebook_usage_trials() -> dict[str, Any]:
    """Experiment 2.7: usage of a codebook by learning rate and initialisation, on three seeds."""
    from t2ilearn.lessons.trials import usage_trial  # brings training, which a record can spare

    rows = []
    for seed, rate, start in product(SEEDS, LEARNING_RATES, INITIALISATIONS):
        found = usage_trial(rate, start, seed)
        rows.append(
            {
                "learning_rate": rate,
                "initialisation": start,
                "seed": seed,
                "usage": round(found.usage, 4),
                "perplexity": round(found.perplexity, 2),
                "psnr": round(found.psnr, 2),
            }
        )
    return {
        "settings": ["learning_rate", "initialisation", "seed"],
        "measures": ["usage", "perplexity", "psnr"],
        "rows": rows,
        "machine": f"{platform.machine()} CPU, 1 thread",
    }


EXPERIMENTS: dict[str, Callable[[], dict[str, Any]]] = {"2.7": codebook_usage_trials}


def main(arguments: Sequence[str]) -> int:
    """Repeat the named experiments, or all of them, and write the record."""
    import torch

    torch.set_num_threads(1)
    stored = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for number in arguments or EXPERIMENTS:
        stored[number] = EXPERIMENTS[number]()
        print(f"experiment {number}: {len(stored[number]['rows'])} trainings", flush=True)
    text = json.dumps(stored, indent=1) + "\n"
    RECORD.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

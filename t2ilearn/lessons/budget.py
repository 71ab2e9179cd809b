"""Budget cards: what a notebook costs its reader in minutes, and the machine in minutes and memory.

Reading is a count of the words in the text at 200 a minute, code left out. Machine minutes and
peak memory are those of one execution of the notebook, from first cell to last. Both are written
by `tools/measure_budget.py` into `budget.json` beside this file. Minutes for exercises are the
exercises' own estimates. What has not been measured is shown as "not measured".

A card also names the shipped weights that a notebook uses, and the command that trained each.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from t2ilearn import weights as shipped
from t2ilearn.lessons.exercises import exercises

RECORD = Path(__file__).with_name("budget.json")
WORDS_A_MINUTE = 200


@dataclass(frozen=True)
class Card:
    """The budget of a chapter.

    Args:
        name: "chapter 2" or "the lab of chapter 2".
        exercises: the minutes of each of the chapter's exercises.
        words: in its text.
        machine_minutes: of one execution; None if it has not been measured.
        memory_gb: peak resident memory of the kernel in that execution, 10⁹ bytes.
        machine: what it was executed on.
        cells: SHA-256 of the cells' sources that were measured.
        commands: what trained the weights that the notebook uses, by their names.
    """

    name: str
    exercises: tuple[int, ...]
    words: int
    machine_minutes: float | None
    memory_gb: float | None
    machine: str | None
    cells: str
    commands: Mapping[str, str] = field(default_factory=dict)

    @property
    def reading_minutes(self) -> int:
        """Words at 200 a minute."""
        return round(self.words / WORDS_A_MINUTE)

    def rows(self) -> dict[str, str]:
        """The card's lines by name."""
        minutes, memory = self.machine_minutes, self.memory_gb
        return {
            "reading": f"{self.reading_minutes} min ({self.words:,} words)",
            "exercises": f"about {sum(self.exercises)} min ({len(self.exercises)}, in the lab)",
            "machine": "not measured" if minutes is None else f"{minutes:.1f} min ({self.machine})",
            "memory": "not measured" if memory is None else f"{memory:.1f} GB at the peak",
            **self.commands,
        }

    def __repr__(self) -> str:
        return "\n".join(f"{name:12}{value}" for name, value in self.rows().items())

    def _repr_html_(self) -> str:
        """For notebooks."""
        rows = (
            f'<tr><th scope="row">{name}</th><td>{self._cell(name, value)}</td></tr>'
            for name, value in self.rows().items()
        )
        what = ", and what trained its weights" if self.commands else ""
        caption = f"<caption>What {self.name} costs{what}</caption>"
        return f"<table>{caption}{''.join(rows)}</table>"

    def _cell(self, name: str, value: str) -> str:
        text = html.escape(value)
        return f"<code>{text}</code>" if name in self.commands else text


def card(chapter: int, lab: bool = False, weights: Sequence[str] = ()) -> Card:
    """The recorded budget of a chapter's reading notebook, or of its lab.

    Args:
        lab: whether the lab is meant.
        weights: names of the shipped weights that it uses.

    Raises:
        ValueError: if there is no record of it.
        WeightsError: if no weights of such a name ship.
    """
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    key = f"{chapter}-lab" if lab else str(chapter)
    if key not in record:
        raise ValueError(f"No budget of chapter {key}; there are: {', '.join(record)}.")
    name = f"the lab of chapter {chapter}" if lab else f"chapter {chapter}"
    commands = {each: shipped.load(each).card.command for each in weights}
    minutes = tuple(each.minutes for each in exercises(chapter))
    return Card(name, minutes, **record[key], commands=commands)

"""Finished chapters are readable: the Flesch–Kincaid grade of their prose, and its measurement."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell

import readability

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
DONE = ("02_vqvae", "02_vqvae_lab")  # a chapter is added here when its text has been rewritten
HARDEST = 11  # the grade that no finished chapter may exceed
LONGEST = 4500  # words of a reading notebook
MOST_SLIDESHOWS = 3  # in the two notebooks of a chapter


@pytest.mark.parametrize("name", DONE)
def test_the_prose_of_a_finished_chapter_is_not_too_hard(name):
    text = readability.prose(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells)
    found = readability.measure(text)
    assert found.words > 500, "the patterns find no prose any more"
    assert found.grade <= HARDEST, f"run python tools/readability.py {name}"
    assert found.words / found.sentences <= 20


@pytest.mark.parametrize("name", [name for name in DONE if not name.endswith("_lab")])
def test_a_finished_reading_notebook_is_not_too_long(name):
    import measure_budget

    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    assert measure_budget.count_words(cells) < LONGEST


@pytest.mark.parametrize("name", [name for name in DONE if not name.endswith("_lab")])
def test_a_finished_chapter_has_a_pipeline_diagram_and_at_most_three_slideshows(name):
    slideshows, diagrams = 0, []
    for each in (name, f"{name}_lab"):
        book = json.loads((NOTEBOOKS / f"{each}.ipynb").read_text(encoding="utf-8"))
        (states,) = book["metadata"]["widgets"].values()
        slideshows += sum("frames" in model["state"] for model in states["state"].values())
        outputs = [o for c in book["cells"] for o in c.get("outputs", [])]
        diagrams += [
            "t2i-diagram" in "".join(o.get("data", {}).get("text/html", "")) for o in outputs
        ]
    assert slideshows <= MOST_SLIDESHOWS
    assert sum(diagrams) >= 2, "a pipeline, and each new block"


@pytest.mark.parametrize("name", DONE)
def test_a_finished_chapter_calls_no_private_function(name):
    """Neither in its cells nor in the source that it shows."""
    named_tuples = {"_asdict", "_replace"}  # public, in spite of their names
    for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells:
        shown = [cell.source] if cell.cell_type == "code" else []
        for output in cell.get("outputs", []):
            shown.append(output.get("data", {}).get("text/markdown", ""))
        found = set(re.findall(r"(?<!\w)_[a-z]\w*(?=\()", "\n".join(shown))) - named_tuples
        assert not found, f"{name}, {cell.id}: {found}"


# ---------------------------------------------------------------- the measure itself


def test_code_formulas_tables_and_addresses_are_no_prose():
    text = (
        "# A heading that is long\n\nThe cat sat on the mat. See [this page](https://a.example/b).\n\n"
        "| a | table |\n|---|---|\n\n```python\nno = prose\n```\n\n$$x = y$$\n\n"
        "> *A common mistake.* The value $x$ is `z`, it is small."
    )
    found = readability.prose([new_markdown_cell(text), new_code_cell("more = code")])
    assert found.split("\n") == [
        "The cat sat on the mat. See this page.",
        "*A common mistake.* The value $x$ is `z`, it is small.",
    ]
    assert [*readability.sentences(found)] == [
        "The cat sat on the mat.",
        "See this page.",
        "*A common mistake.",
        "The value is , it is small.",
    ]


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("cat", 1),
        ("encoder", 3),
        ("reparameterisation", 8),
        ("straight-through", 2),
        ("quantizer", 3),
    ],
)
def test_syllables_of_known_and_unknown_words(word, count):
    assert readability.syllables(word) == count


def test_the_grade_is_kincaids_formula():
    found = readability.measure("The cat sat on the mat. It is a good cat.")
    assert (found.words, found.sentences, found.syllables) == (11, 2, 11)
    assert found.grade == pytest.approx(0.39 * 5.5 + 11.8 - 15.59)


def test_abbreviations_do_not_end_a_sentence():
    assert len([*readability.sentences("Eq. 2.3 is short. Yu et al. Wrote it too.")]) == 2

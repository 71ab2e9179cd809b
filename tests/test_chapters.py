"""Each chapter is a reading notebook and a lab, and both have the parts that the template asks for.

Parts are cell tags: what a reader finds in one chapter is found under the same name in the next.
"""

import ast
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CHAPTERS = sorted({path.stem.removesuffix("_lab") for path in NOTEBOOKS.glob("*.ipynb")})
READING = {
    "part-card": True,  # True: every chapter has it
    "part-result": True,
    "part-predict": True,
    "part-break": False,
    "part-toy": False,
    "part-terms": False,
    "part-architecture": False,
    "part-summary": True,
    "part-quiz": True,
    "part-next": True,
    "part-references": True,
}
LAB = {
    "part-card": True,
    "part-train": False,
    "part-failures": False,
    "part-paper": False,
    "part-exercises": True,
    "part-references": False,
}
KINDS = [(name, READING) for name in CHAPTERS] + [(f"{name}_lab", LAB) for name in CHAPTERS]


def cells(name: str) -> list[dict]:
    """The cells of a notebook, each with its source as one string."""
    book = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [{**cell, "source": "".join(cell["source"])} for cell in book["cells"]]


def parts(name: str) -> list[str]:
    """The parts of a notebook, in the order in which they begin."""
    tags = [t for cell in cells(name) for t in cell["metadata"].get("tags", [])]
    return [tag for tag in dict.fromkeys(tags) if tag.startswith("part-")]


@pytest.mark.parametrize("name, template", KINDS, ids=[name for name, _ in KINDS])
def test_a_notebook_has_the_parts_of_the_template_in_order(name, template):
    found = parts(name)
    assert not set(found) - set(template), "a part that the template does not know"
    missing = [part for part, always in template.items() if always and part not in found]
    assert not missing
    assert found == [part for part in template if part in found]


@pytest.mark.parametrize("name, template", KINDS, ids=[name for name, _ in KINDS])
def test_the_card_lists_the_parts_that_are_there(name, template):
    """The card names each part that the notebook has, and no other."""
    card = next(c for c in cells(name) if "part-card" in c["metadata"].get("tags", []))
    (row,) = re.findall(r"^\| \*\*Parts\*\* \| (.*) \|$", card["source"], re.MULTILINE)
    named = {
        "part-result": "the result first",
        "part-predict": "a prediction",
        "part-break": "breaking it",
        "part-toy": "a toy world",
        "part-summary": "summary",
        "part-quiz": "quiz",
        "part-train": "training",
        "part-failures": "when it fails",
        "part-paper": "paper against code",
        "part-exercises": "exercises",
    }
    for part, words in named.items():
        if part in template:
            assert (words in row) == (part in parts(name)), words


@pytest.mark.parametrize("name", CHAPTERS)
def test_five_questions_and_at_least_four_exercises(name):
    from t2ilearn.lessons import quiz

    number = int(name.split("_")[0])
    assert len(quiz(number)) == 5
    assert any(f"show_quiz({number})" in cell["source"] for cell in cells(name))
    checked = {
        found
        for cell in cells(f"{name}_lab")
        if cell["cell_type"] == "code"
        for found in re.findall(rf'^check\("({number}\.\d+)"', cell["source"], re.MULTILINE)
    }
    assert len(checked) >= 4


@pytest.mark.parametrize("name", [name for name, _ in KINDS])
def test_the_budget_card_is_shown(name):
    assert card_call(name)


# ---------------------------------------------------------------- figures


def card_call(name: str) -> ast.Call:
    """The call of `card` in a notebook, of the right chapter."""
    number, lab = int(name.split("_")[0]), ",lab=True" if name.endswith("_lab") else ""
    (source,) = [c["source"] for c in cells(name) if re.match(r"card\(\s*\d", c["source"])]
    assert re.sub(r"\s", "", source).startswith(f"card({number}{lab}")
    return ast.parse(source).body[0].value


@pytest.mark.parametrize("name", [name for name, _ in KINDS])
def test_every_figure_has_a_caption(name):
    """Pictures of figures, and frames: the caption is stored beside them, as text."""
    shown = [
        (cell["id"], output)
        for cell in cells(name)
        if cell["cell_type"] == "code"
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    assert shown
    for cell, output in shown:
        text = "".join(output["data"]["text/plain"])
        assert re.match(r"Figure: \S+ \S+", text), f"{name}, {cell}: captioned(…) or caption="
        assert output["metadata"]["image/png"]["alt"] in text
    book = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    (widgets,) = book["metadata"]["widgets"].values()
    for state in (model["state"] for model in widgets["state"].values()):
        if "frames" in state:
            assert all(state["captions"]) and len(state["captions"]) == len(state["frames"])
            assert state["title"] != "Frames"


@pytest.mark.parametrize("name", [name for name, _ in KINDS])
def test_the_card_names_the_command_behind_every_figure(name):
    """The cell itself, and for all weights that it uses the command on their card."""
    title = next(c["source"] for c in cells(name) if "part-card" in c["metadata"].get("tags", []))
    assert "| **Figures** | each is made by the cell above it, with the weights" in title
    (named,) = [k.value for k in card_call(name).keywords if k.arg == "weights"]
    book = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    used = book["metadata"]["t2ilearn"]["made_from"]["weights"]
    assert sorted(ast.literal_eval(named)) == sorted(used)


@pytest.mark.parametrize("name", [name for name, _ in KINDS])
def test_a_recorded_run_is_shown_with_the_command_that_made_it(name):
    for cell in cells(name):
        for run in re.findall(r'ASSETS / "flights" / "([\w-]+)"', cell["source"]):
            command = f'load("{run}").card.command'
            assert command in " ".join(c["source"] for c in cells(name)), f"{cell['id']}: {run}"

"""On Colab: a chapter's first cell fetches what is missing and nothing else, and the chapters and
their widgets run on the older versions that wait there.

Here, and nowhere else, `make test` executes the reading chapters: one execution shows that their
text is what the code prints (nbval) and that they run on Colab's versions. The labs, which train,
are given to nbval by the Makefile, with the versions installed here.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
READING = [path for path in CHAPTERS if not path.stem.endswith("_lab")]
COLAB = ("ipywidgets==7.7.1", "anywidget==0.9.21", "ipython_genutils==0.2.0")


# ---------------------------------------------------------------- the first cell


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def first_cell(request, monkeypatch):
    """A function that runs a chapter's first code cell: (is t2ilearn there, does pip succeed) →
    the commands that it gave."""
    notebook = nbformat.read(request.param, as_version=4)
    source = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    code = compile(source, request.param.name, "exec")

    def run(there: bool, pip_succeeds: bool) -> list[list[str]]:
        commands = []

        def find_spec(name, package=None):
            assert name == "t2ilearn"
            return SimpleNamespace() if there or (commands and pip_succeeds) else None

        def stub(command, **options):
            commands.append(command)
            return SimpleNamespace(returncode=0 if pip_succeeds else 1)

        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", find_spec)
            patch.setattr(subprocess, "run", stub)
            exec(code, {"__name__": "__main__"})
            exec(code, {"__name__": "__main__"})  # readers run it again
        return commands

    return run


def test_the_first_cell_leaves_a_clone_alone(first_cell):
    assert first_cell(there=True, pip_succeeds=False) == []


def test_the_first_cell_fetches_the_package_once_and_replaces_nothing(first_cell):
    (command,) = first_cell(there=False, pip_succeeds=True)
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert not set(command) & {"-U", "--upgrade", "--force-reinstall", "--pre"}
    (source,) = [word for word in command[4:] if not word.startswith("-")]
    assert source.startswith("git+https://") and "[" not in source  # no extras


def test_the_first_cell_raises_an_explanation_without_a_network(first_cell):
    with pytest.raises(RuntimeError, match=r"not installed.*make lab"):
        first_cell(there=False, pip_succeeds=False)


# ---------------------------------------------------------------- its older versions

# Every widget in the order of __all__, with arguments where it does not do without.
CONSTRUCT = """
import json
import anywidget, ipywidgets, torch
from t2ilearn import widgets

assert ipywidgets.__version__ == "7.7.1", ipywidgets.__file__
assert anywidget.__version__ == "0.9.21", anywidget.__file__
from t2ilearn.data import WordTokenizer
from t2ilearn.models.dalle import DALLE
from t2ilearn.models.dvae import DVAE, DVAEConfig
from t2ilearn.models.transformer import PriorConfig
from t2ilearn.systems.tokens import TokenSystem
from t2ilearn.widgets.stream import record_drawing

words = WordTokenizer()
sizes = {"codebook_size": 16, "side": 4, "dim": 16, "num_layers": 1, "num_heads": 1}
sizes = PriorConfig(**sizes, vocabulary=words.vocabulary)
decoder = DVAE(DVAEConfig(resolution=16, channels=(16, 16), blocks=1, codebook_size=16, code_dim=8))
system = TokenSystem(decoder.eval(), DALLE(sizes).eval(), words, "", ())
written = record_drawing(system, "a red star", torch.zeros(16, dtype=torch.int64))
asked = widgets.Question("Two?", {"yes": "It is.", "no": "Count again."}, "A")
needs = {
    "Quiz": {"questions": [asked]},
    "TokenSampler": {"drawings": [written]},
    "Frames": {"pictures": torch.zeros(2, 3, 8, 8), "axes": {"step": [0, 1]}},
}
made = 0
for name in widgets.__all__:
    kind = getattr(widgets, name)
    if not issubclass(kind, ipywidgets.DOMWidget):
        continue
    try:
        widget = kind(**needs.get(name, {}))
    except TypeError as error:
        raise SystemExit(f"{name}: {error}; give tests/test_colab.py its arguments")
    json.dumps({key: value for key, value in widget.get_state().items() if key != "layout"})
    bundle = widget._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "application/vnd.jupyter.widget-view+json" in data, name
    made += 1
print("made", made)
"""


@pytest.fixture(scope="module")
def colab_packages(request, tmp_path_factory) -> Path | None:
    """Colab's widget packages in a folder, kept between runs; None where none can be fetched."""
    cache = getattr(request.config, "cache", None)
    shelf = Path(cache.mkdir("colab-widgets")) if cache else tmp_path_factory.mktemp("colab")
    folder = shelf / re.sub(r"\W+", "-", COLAB[0])
    if not (folder / "complete").exists():
        options = ["--quiet", "--no-deps", "--retries", "1", "--timeout", "10", "--upgrade"]
        pip = [sys.executable, "-m", "pip", "install", *options, "--target", folder, *COLAB]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:]
            here = "the reading chapters are executed with the versions installed here instead"
            warnings.warn(f"{', '.join(COLAB)} cannot be fetched, {here}: {said}", stacklevel=1)
            return None
        (folder / "complete").touch()
    return folder


def environment(packages: Path | None) -> dict[str, str]:
    """The environment of a process that finds these packages before the installed ones."""
    if packages is None:
        return dict(os.environ)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (packages, ROOT)))}


@pytest.mark.slow
def test_every_widget_can_be_made_on_colabs_versions(colab_packages):
    if colab_packages is None:
        pytest.skip(f"{', '.join(COLAB)} are not here and cannot be fetched")
    done = subprocess.run(
        [sys.executable, "-c", CONSTRUCT],
        env=environment(colab_packages),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split("made ")[1]) > 0


# Run after a chapter, in its kernel. Every widget there can be shown on Colab: its page is this
# package's own, or comes with Colab.
VERSIONS = """
import anywidget, ipywidgets

assert ipywidgets.__version__ == "7.7.1", ipywidgets.__file__
assert anywidget.__version__ == "0.9.21", anywidget.__file__
"""
STATES = """
import ipywidgets

_all = getattr(ipywidgets.widgets.widget, "_instances", None)  # 8; 7 has Widget.widgets
for _one in list((ipywidgets.Widget.widgets if _all is None else _all).values()):
    if isinstance(_one, ipywidgets.DOMWidget):
        _state = _one.get_state()
        assert "_esm" in _state or _state["_view_module"] == "@jupyter-widgets/controls", _one
"""
# `tell` is what a front end does when a button is pressed.
PLAY = """
import ipywidgets


def tell(widget, **data):
    widget._handle_msg({"content": {"data": data}, "buffers": []})


def press(button):
    tell(button, method="custom", content={"event": "click"})


def choose(widget, **state):
    tell(widget, method="update", state=state, buffer_paths=[])


def inside(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from inside(child)
"""
PRESS = {
    "01_pictures": """
import t2ilearn

studio = t2ilearn.studio()
choose(studio.caption, value="a large red star")
choose(studio.count, value=1)
press(studio.draw_button)
assert "a large red star" in studio.picture.value, studio.message.value
assert "data:image/png" in studio.picture.value
""",
    "02_vqvae": """
painter = list(inside(live_painter(vqvae, tokens[0])))
(shown,) = [part for part in painter if isinstance(part, ipywidgets.HTML)]
(hand,) = [part for part in painter if isinstance(part, ipywidgets.BoundedIntText)]
square, *_, again = [part for part in painter if isinstance(part, ipywidgets.Button)]
other = (int(square.description) + 1) % K
before = shown.value
assert "0 of 64 tokens are replaced" in before
choose(hand, value=other)
press(square)
assert square.description == str(other)
assert "1 of 64 tokens are replaced" in shown.value
assert shown.value.split("<p")[0].split("src=")[1] != before.split("<p")[0].split("src=")[1]
press(again)
assert shown.value == before
""",
}
# What labs show beyond their chapters, in cells that need nothing but the lab's imports.
LAB_CELLS = {
    "01_pictures": ["studio-box"],
    "02_vqvae": ["book-record"],
    "03_priors": ["record"],
    "04_vqgan": [],
    "05_dalle": ["codes-record"],
}


# nbval compares text, not whether a widget is shown: this is for its conftest.py.
SHOWN = """
import pytest

VIEW = "application/vnd.jupyter.widget-view+json"


def views(outputs):
    return sum(VIEW in output.get("data", {}) for output in outputs)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    done = yield
    shown, stored = views(item.test_outputs), views(item.cell.get("outputs", []))
    assert shown == stored, f"cell {item.cell.id} shows {shown} widgets, and {stored} are stored"
    return done
"""


def shorten_texts(notebook: nbformat.NotebookNode) -> None:
    """Stored texts of widgets as ipywidgets 7 gives them: 110 characters, the rest cut off.

    A cell after each compares the whole text.
    """
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = data.get("text/plain", "")
            is_cut = text.endswith("…")  # by ipywidgets 8 itself, as 7 does
            is_view = "application/vnd.jupyter.widget-view+json" in data
            if is_view and len(text) > 110 and not is_cut:
                assert output.output_type == "execute_result", f"{cell.id}: `_` is another"
                data["text/plain"] = text[:110] + "…"
                whole = f"assert repr(_) == {text!r}, repr(_)"
                cells.append(new_code_cell(whole, id=f"{cell.id}-whole"))
    notebook.cells = cells


def colab_run(name: str, on_colab: bool) -> nbformat.NotebookNode:
    """A chapter, its lab's cells that only show a widget, and cells that press buttons and check.

    The outputs stay: they are what nbval compares with.
    """
    chapter, lab = (
        nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
        for stem in (name, f"{name}_lab")
    )
    added = {cell.id: cell for cell in lab.cells}
    for key in ("imports", *LAB_CELLS[name]):
        assert key in added, f"{name}_lab has no cell {key} any more; name another in LAB_CELLS"
        added[key].id = f"lab-{key}"
        chapter.cells.append(added[key])
    hand = {"play": PLAY + PRESS.get(name, ""), "states": STATES}
    hand |= {"versions": VERSIONS} if on_colab else {}
    chapter.cells += [new_code_cell(source, id=key) for key, source in hand.items()]
    if on_colab:
        shorten_texts(chapter)
    return chapter


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in READING])
def test_a_chapter_prints_what_is_stored_and_its_buttons_work_on_colabs_versions(
    name, colab_packages, tmp_path
):
    path = tmp_path / f"{name}.ipynb"
    notebook = colab_run(name, on_colab=colab_packages is not None)
    path.write_text(nbformat.writes(notebook), encoding="utf-8")
    (tmp_path / "conftest.py").write_text(SHOWN, encoding="utf-8")
    options = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout", "120", "--color=no"]
    options += ["--nbval-sanitize-with", ROOT / "tests" / "nbval.cfg", "--rootdir", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, path],
        cwd=tmp_path,
        env=environment(colab_packages),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    assert re.search(rf"^{cells} passed", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_test_gives_nbval_every_notebook_that_is_not_executed_here():
    command = ["make", "--dry-run", "test", f"VENV={sys.prefix}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    given = set(re.findall(r"notebooks/\w+\.ipynb", said.partition("--nbval")[2]))
    assert given | {f"notebooks/{path.name}" for path in READING} == {
        f"notebooks/{path.name}" for path in CHAPTERS
    }

"""The book builds from stored outputs without warnings, and its pages have what they should."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

import run_notebooks

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def pages(built) -> Path:
    """The folder of built pages; the build itself is the test."""
    status, said, folder = built
    warnings = "\n".join(line for line in said.splitlines() if re.search("WARNING|ERROR", line))
    assert status == 0, f"{warnings}\n{said[-2000:]}"
    return folder


@pytest.mark.slow
def test_every_page_is_built(pages):
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    entries = [entry for part in toc["parts"] for entry in part["chapters"]]
    entries += [section for entry in entries for section in entry.get("sections", [])]
    names = [toc["root"], *(entry["file"] for entry in entries)]
    for name in names:
        page = (pages / f"{name}.html").read_text(encoding="utf-8")
        assert "Traceback (most recent call last)" not in page, name
        titles = re.findall(r"<h1>(?:(?!</h1>).)*headerlink", page, re.DOTALL)
        assert len(titles) == 1, f"{name} has one title"  # the theme hides a second for print
        shown = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)  # widgets' states
        for picture in re.findall(r"<img[^>]*>", shown):
            (text,) = re.findall(r'alt="([^"]*)"', picture) or [""]
            says = text and not re.search(r"\.(png|webp|svg)$", text)  # more than a file's name
            assert says, f"{name}: {picture[:90]} says nothing"


@pytest.mark.slow
def test_api_page_shows_functions_and_their_source(pages):
    api = (pages / "book" / "api.html").read_text(encoding="utf-8")
    names = (
        *("data.captions.encode", "models.vqvae.vqvae_loss", "models.sampling.sample"),
        *("weights.files.load", "systems.registry.load"),
    )
    for name in names:
        assert f'id="t2ilearn.{name}"' in api, name
    assert "viewcode-link" in api


# ---------------------------------------------------------------- stored outputs


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_stored_outputs_belong_to_the_code_and_the_weights(path):
    why = run_notebooks.stale(nbformat.read(path, as_version=4))
    assert not why, f"{path.name}: {why}; run make notebooks"


def test_stale_outputs_are_reported_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(run_notebooks, "ASSETS", tmp_path)
    (tmp_path / "toy.safetensors").write_bytes(b"weights")
    notebook = new_notebook(cells=[new_code_cell("1 + 1")])
    assert "nothing says" in run_notebooks.stale(notebook)
    code, weights = run_notebooks.code_digest(notebook), run_notebooks.weights_digests(["toy"])
    notebook.metadata["t2ilearn"] = {"made_from": {"code": code, "weights": weights}}
    assert run_notebooks.stale(notebook) == ""
    (tmp_path / "toy.safetensors").write_bytes(b"other weights")
    assert run_notebooks.stale(notebook) == "other weights ship now: toy"
    (tmp_path / "toy.safetensors").unlink()
    assert run_notebooks.stale(notebook) == "other weights ship now: toy"
    notebook.cells[0].source = "1 + 2"
    assert "its code has changed" in run_notebooks.stale(notebook)


@pytest.mark.slow
def test_a_chapter_with_widgets_is_stored_with_the_same_bytes_twice(store_toy, tmp_path):
    seen = []
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
        store_toy(tmp_path / name / "toy.ipynb")
        seen.append((tmp_path / name / "toy.ipynb").read_bytes())
    assert seen[0] == seen[1]
    stored = nbformat.reads(seen[0].decode(), as_version=4)
    (state,) = stored.metadata.widgets.values()
    names = {model["model_name"] for model in state["state"].values()}
    assert {"AnyModel", "IntSliderModel", "LinkModel"} <= names
    assert all(re.fullmatch("0{24}[0-9a-f]{8}", name) for name in state["state"])

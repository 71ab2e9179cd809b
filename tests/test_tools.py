"""Tools that take minutes go on where they were stopped, and do nothing twice."""

import base64
import io
import sys
from types import SimpleNamespace

import nbformat
import pytest
from PIL import Image

import build_emoji
import make_play
import make_strip
import measure_budget
import run_notebooks


def a_drawing(caption):
    """What `make_strip.drawn` returns, without drawing."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), caption.split()[1]).save(buffer, "PNG")
    png = base64.b64encode(buffer.getvalue()).decode()
    return {"png": png, "aligned": caption == "a red star", "score": -1.0}


def stopping_after(count, function, said):
    """The function, which stops as if by Ctrl-C after so many calls."""

    def stopped(*arguments):
        if len(said) == count:
            raise KeyboardInterrupt
        said.append(arguments)
        return function(*arguments)

    return stopped


def test_the_strip_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    said, captions = [], ["a red star", "a blue star", "a green star"]
    monkeypatch.setattr(make_strip.registry, "names", list)
    monkeypatch.setattr(make_strip, "drawn", stopping_after(2, a_drawing, said))
    with pytest.raises(KeyboardInterrupt):
        make_strip.Drawings(tmp_path / "kept.json")(captions)
    monkeypatch.setattr(make_strip, "drawn", stopping_after(9, a_drawing, said))
    found = make_strip.Drawings(tmp_path / "kept.json")(captions)
    assert [each for (each,) in said] == captions  # each drawn once
    colours = [each["picture"].getpixel((0, 0)) for each in found]
    assert colours == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]
    assert [each["aligned"] for each in found] == [True, False, False]


def test_drawings_by_other_weights_are_not_taken_up(monkeypatch, tmp_path):
    monkeypatch.setattr(make_strip.registry, "names", list)
    monkeypatch.setattr(make_strip, "drawn", a_drawing)
    make_strip.Drawings(tmp_path / "kept.json")(["a red star"])
    monkeypatch.setattr(make_strip, "BEST_OF", 3)
    with pytest.raises(ValueError, match="name another one"):
        make_strip.Drawings(tmp_path / "kept.json")


def test_the_play_page_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    said = []

    def part(name, worlds):
        return {"title": name, "rows": {}}

    systems = SimpleNamespace(
        names=lambda: ["vqvae", "vqgan"], load=lambda name: SimpleNamespace(weights_id="1234")
    )
    monkeypatch.setattr(make_play, "registry", systems)
    monkeypatch.setattr(make_play, "part", stopping_after(1, part, said))
    with pytest.raises(KeyboardInterrupt):
        make_play.page(tmp_path / "kept.json")
    monkeypatch.setattr(make_play, "part", stopping_after(99, part, said))
    text = make_play.page(tmp_path / "kept.json")
    assert [name for name, _ in said] == ["vqvae", "vqgan"]  # each drawn once
    assert '"title": "vqvae"' in text and '"title": "vqgan"' in text


@pytest.mark.parametrize("code, executed", [("1 + 1", 0), ("1 + 2", 1)], ids=["same", "changed"])
def test_stale_executes_what_has_changed(monkeypatch, tmp_path, code, executed):
    path, said = tmp_path / "a.ipynb", []
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    made_from = {"code": run_notebooks.code_digest(notebook), "weights": {}}
    notebook.metadata["t2ilearn"] = {"made_from": made_from}
    notebook.cells[0].source = code
    nbformat.write(notebook, path)
    monkeypatch.setattr(run_notebooks, "execute", lambda path, on_cell: said.append(path))
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "--stale", str(path)])
    for name in run_notebooks.PINNED:  # main sets them for its kernels
        monkeypatch.setenv(name, "")
    assert run_notebooks.main() == 0
    assert len(said) == executed


def test_missing_measures_what_has_changed_or_was_never_measured(tmp_path):
    path = tmp_path / "a.ipynb"
    cells = [nbformat.v4.new_code_cell("1 + 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    found = {"cells": measure_budget.fingerprint(cells), "machine_minutes": 0.1}
    assert measure_budget.measured(path, found)
    assert not measure_budget.measured(path, {})
    assert not measure_budget.measured(path, {**found, "machine_minutes": None})
    assert not measure_budget.measured(path, {**found, "cells": "others"})


def test_a_kept_package_is_checked_before_it_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(build_emoji.shutil, "which", lambda name: None)
    source = build_emoji.SOURCES[0]
    with pytest.raises(build_emoji.BuildError, match="npm client is not installed"):
        build_emoji.fetch(source, tmp_path)
    name = f"{source.package.lstrip('@').replace('/', '-')}-{source.version}.tgz"
    (tmp_path / name).write_bytes(b"cut")
    with pytest.raises(build_emoji.BuildError, match="not the pinned tarball"):
        build_emoji.fetch(source, tmp_path)

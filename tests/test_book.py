"""The book builds from what is stored, with every warning an error, and says what it should."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
JUPYTER_BOOK = Path(sys.executable).parent / "jupyter-book"


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """The folder of built pages; the build itself is the test."""
    if not JUPYTER_BOOK.exists():
        pytest.skip("Jupyter Book is not installed: pip install -e '.[book]'")
    out = tmp_path_factory.mktemp("book")
    command = [JUPYTER_BOOK, "build", ".", "-W", "-n", "--keep-going", "--path-output", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = done.stdout + done.stderr
    warnings = "\n".join(line for line in said.splitlines() if re.search("WARNING|ERROR", line))
    assert done.returncode == 0, f"{warnings}\n{said[-2000:]}"
    return out / "_build" / "html"


@pytest.mark.slow
def test_every_page_is_built(pages):
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    names = [toc["root"], *(e["file"] for part in toc["parts"] for e in part["chapters"])]
    for name in names:
        page = (pages / f"{name}.html").read_text(encoding="utf-8")
        assert "Traceback (most recent call last)" not in page, name
        titles = re.findall(r"<h1>(?:(?!</h1>).)*headerlink", page, re.DOTALL)
        assert len(titles) == 1, f"{name} has one title"  # the theme hides a second for print
        for picture in re.findall(r"<img[^>]*>", page):
            assert re.search(r'alt="[^"]+"', picture), f"{name}: {picture[:90]} says nothing"


@pytest.mark.slow
def test_api_page_shows_functions_and_their_source(pages):
    api = (pages / "book" / "api.html").read_text(encoding="utf-8")
    for name in ("data.captions.encode", "vqvae.vqvae_loss", "prior.sample", "weights.load"):
        assert f'id="t2ilearn.{name}"' in api, name
    assert "viewcode-link" in api

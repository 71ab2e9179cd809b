"""What every test shares: shapes checked at run time, two cores kept apart, no network; the built
book, and a browser to look at it.

Order matters: the import hook must be in place before anything imports t2ilearn, and the thread
counts before anything imports torch.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist puts one worker on each core
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["TQDM_DISABLE"] = "1"  # as when the chapters were stored
os.environ.setdefault("T2ILEARN_REHEARSAL", "1")  # labs train a tenth of their steps (`trials`)
os.environ["HF_HUB_OFFLINE"] = "1"  # peers are built from configs, never fetched

import jaxtyping

jaxtyping.install_import_hook("t2ilearn", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

ROOT = Path(__file__).resolve().parent.parent
LOOPBACK = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "", None}


class NetworkBlocked(OSError):
    """A test reached for another machine; everything in this repository works offline."""


def _refuse_other_hosts(address: object) -> None:
    """Raise NetworkBlocked for an address (host, port, ...) beyond this machine."""
    if isinstance(address, tuple) and address[0] not in LOOPBACK:
        raise NetworkBlocked(f"tests run offline, but something connects to {address!r}")


@pytest.fixture(autouse=True, scope="session")
def offline():
    """Connections to other hosts, and look-ups of their names, raise NetworkBlocked."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex
    lookup = socket.getaddrinfo

    def guarded_connect(self, address):
        _refuse_other_hosts(address)
        return connect(self, address)

    def guarded_connect_ex(self, address):
        _refuse_other_hosts(address)
        return connect_ex(self, address)

    def guarded_lookup(host, *args, **kwargs):
        _refuse_other_hosts((host.decode() if isinstance(host, bytes) else host,))
        return lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        yield


def pytest_collection_modifyitems(items):
    """Skip what wants a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The CPU, and a CUDA device where one is at hand: the same test on both."""
    return torch.device(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """No shape checks at run time: what a reader meets is the package's own message."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


# ---------------------------------------------------------------- the built book


def build_book(source: Path, out: Path) -> tuple[int, str]:
    """Build a book with every warning an error: Jupyter Book's exit status and what it said."""
    program = Path(sys.executable).parent / "jupyter-book"
    if not program.exists():
        pytest.skip("Jupyter Book is not installed: pip install -e '.[book]'")
    command = [program, "build", source, "-W", "-n", "--keep-going", "--path-output", out]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> tuple[int, str, Path]:
    """Exit status, words and folder of the book's build; workers of one run share one build."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # common to all workers of this run
    out, result = base / "shared-book", base / "shared-book.json"
    try:
        out.mkdir()
    except FileExistsError:  # another worker builds, or has built
        deadline = time.monotonic() + 300
        while not result.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        status, said = json.loads(result.read_text(encoding="utf-8"))
    else:
        status, said = 1, "the build was cut off"
        try:
            status, said = build_book(ROOT, out)
        finally:
            partial = result.with_suffix(".partial")
            partial.write_text(json.dumps([status, said]), encoding="utf-8")
            partial.rename(result)
    return status, said, out / "_build" / "html"


# ---------------------------------------------------------------- a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextlib.contextmanager
def headless_browser():
    """The system's Chromium, which reaches this machine only; a skip, or in CI a failure, without.

    While it is open, no other asyncio loop can run in this thread (nbclient wants one).
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    missing = None if found else "no Chromium here (Debian: apt-get install chromium)"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing = "playwright is not installed: pip install -e '.[test]'"
    if missing and os.environ.get("T2ILEARN_BROWSER") == "required":
        pytest.fail(f"T2ILEARN_BROWSER=required, but {missing}")
    if missing:
        pytest.skip(f"tests in a browser: {missing}")
    arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser():
    """One browser for the tests of a file."""
    with headless_browser() as browser:
        yield browser


@pytest.fixture
def empty_browser(browser):
    """The browser of the file, for a test whose pages close when it ends."""
    yield browser
    for context in browser.contexts:
        context.close()


# A small notebook with what a chapter's widgets need: one script, keyboard, a linked slider.
TOY_CELL = """
import anywidget
import ipywidgets
import traitlets


class Dial(anywidget.AnyWidget):
    value = traitlets.Int(3).tag(sync=True)
    _esm = \"\"\"
    function render({ model, el }) {
      const button = document.createElement("button");
      const says = document.createElement("p");
      says.setAttribute("aria-live", "polite");
      button.textContent = "more";
      says.className = "toy-says";
      const more = () => { model.set("value", model.get("value") + 1); model.save_changes(); };
      const show = () => { says.textContent = "value " + model.get("value"); };
      button.className = "toy-more";
      button.addEventListener("click", more);
      button.addEventListener("keydown", (e) => { if (e.key === "ArrowUp") more(); });
      model.on("change:value", show);
      el.append(button, says);
      show();
    }
    export default { render };
    \"\"\"


dial = Dial()
slider = ipywidgets.IntSlider(3, 0, 9, description="value")
link = ipywidgets.jslink((slider, "value"), (dial, "value"))
play = ipywidgets.Play(min=0, max=9)
ipywidgets.VBox([slider, play, dial])
"""


@pytest.fixture(scope="session")
def store_toy():
    """A function that stores the toy notebook, with outputs and widget state, at a path."""

    def store(path: Path) -> None:
        import nbformat
        from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

        text = new_markdown_cell("# Toy\n\n$x^2$", id="text")
        notebook = new_notebook(cells=[text, new_code_cell(TOY_CELL.strip(), id="dial")])
        path.write_text(nbformat.writes(notebook), encoding="utf-8")
        tool = [sys.executable, ROOT / "tools" / "run_notebooks.py", path]
        done = subprocess.run(tool, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    return store

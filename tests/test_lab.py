"""`make lab` serves chapter 1 on this machine only, to whoever holds the token. A signed notebook
shows its stored widgets there before any cell runs, and is not marked as unsaved."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import conftest
import pytest

ROOT = Path(__file__).resolve().parent.parent
READY = (Path(sys.prefix) / ".has-lab").exists() and shutil.which("make") is not None
CHAPTER = "notebooks/01_pictures.ipynb"


def status(url: str) -> tuple[int, bytes]:
    """The HTTP status and the body of a page; 0 while nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""
    except (urllib.error.URLError, ConnectionError):
        return 0, b""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address (with token) that a running `make lab` prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("lab") / "log"
    command = ["make", "lab", f"VENV={sys.prefix}", f"PORT={port}"]
    environment = {**os.environ, "BROWSER": "true"}  # the command that opens no window
    with log.open("w", encoding="utf-8") as file:
        server = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and server.poll() is None:
            said = log.read_text(encoding="utf-8")
            if found := re.search(rf"http://127\.0\.0\.1:{port}/\S+token=\w+", said):
                break
            time.sleep(0.2)
        else:
            pytest.fail(f"make lab did not come up:\n{log.read_text(encoding='utf-8')[-2000:]}")
        yield found[0]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.skipif(not READY, reason="not run by make test, or no JupyterLab here")
def test_make_lab_serves_chapter_one_behind_its_token(lab):
    assert CHAPTER in lab
    base, token = re.match(r"(http://[^/]+)/.*token=(\w+)", lab).groups()
    assert status(lab)[0] == 200
    code, body = status(f"{base}/api/contents/{CHAPTER}?token={token}")
    assert code == 200 and json.loads(body)["content"]["cells"]
    assert status(f"{base}/api/contents/{CHAPTER}")[0] == 403


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def signed(store_toy, tmp_path):
    """The address of a JupyterLab of its own that opens the toy notebook, signed."""
    store_toy(tmp_path / "toy.ipynb")
    # The same settings that `make lab` gives the kernel; everything else is made anew.
    settings = f"{sys.prefix}/etc/ipython/ipython_kernel_config.py"
    subprocess.run(["make", settings, f"VENV={sys.prefix}"], cwd=ROOT, check=True)
    places = ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    environment = {**os.environ, **{name: str(tmp_path / name) for name in places}}
    jupyter = Path(sys.executable).parent / "jupyter"
    trust = [jupyter, "trust", tmp_path / "toy.ipynb"]
    subprocess.run(trust, env=environment, check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    options += [f"--ServerApp.port={port}", "--IdentityProvider.token=toy"]
    command = [jupyter, "lab", *options, f"--ServerApp.root_dir={tmp_path}"]
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while status(f"http://127.0.0.1:{port}/api/status?token=toy")[0] != 200:
            if time.monotonic() > deadline or server.poll() is not None:
                pytest.fail((tmp_path / "log").read_text(encoding="utf-8")[-2000:])
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/toy.ipynb?token=toy"
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.skipif(not READY, reason="not run by make test, or no JupyterLab here")
def test_a_signed_notebook_shows_its_stored_widgets_and_stays_saved(signed):
    asked = []
    with conftest.headless_browser() as browser:
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(signed)
        says = page.locator(".toy-says")
        says.wait_for(timeout=90_000)  # no cell has run
        assert says.inner_text() == "value 3"
        idle = page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
        idle.wait_for(timeout=60_000)  # the kernel has said what it is
        page.wait_for_timeout(1000)
        assert page.locator(".jp-mod-dirty").count() == 0
        page.locator(".toy-more").press("ArrowUp")
        assert says.inner_text() == "value 4"
        assert page.locator(".widget-readout").inner_text() == "4"
    own = signed.split("/lab/")[0]
    assert [url for url in asked if not url.startswith((own, "data:", "blob:"))] == []

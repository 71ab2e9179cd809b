"""`make lab` serves chapter 1 on this machine only, behind a token. A signed chapter shows its
stored widgets there before any cell runs, and is not marked as unsaved."""

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
from typing import NamedTuple

import conftest
import pytest

ROOT = Path(__file__).resolve().parent.parent
READY = (Path(sys.prefix) / ".has-lab").exists() and shutil.which("make") is not None
CHAPTER = "notebooks/01_pictures.ipynb"
ALIVE = "notebooks/02_vqvae.ipynb"  # its widgets are dragged, slid and clicked
# Notes, in a file, the addresses that Jupyter's server and its kernel look up or connect to.
NOTES = """
import os, sys


def note(event, args):
    where = {"socket.connect": args[-1:], "socket.getaddrinfo": args[:1]}.get(event)
    if where:
        host = where[0][0] if isinstance(where[0], tuple) else where[0]
        with open(os.environ["T2ILEARN_NOTED"], "a", encoding="utf-8") as file:
            file.write(f"{host.decode() if isinstance(host, bytes) else host or ''}\\n")


sys.addaudithook(note)
"""


def status(url: str) -> tuple[int, bytes]:
    """The HTTP status and the body of a page; 0 while nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""
    except (urllib.error.URLError, ConnectionError):
        return 0, b""


class Lab(NamedTuple):
    address: str  # with token, as `make lab` prints it
    noted: Path  # the hosts that server and kernel reach for


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A running `make lab` over copies of the chapters, of which one is signed.

    Everything of Jupyter's own is made anew, but for the settings that the Makefile makes.
    """
    clone, own = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("own")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "notebooks", clone / "notebooks")
    (own / "site").mkdir()
    (own / "site" / "sitecustomize.py").write_text(NOTES, encoding="utf-8")
    places = ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    environment = {**os.environ, **{name: str(own / name) for name in places}}
    environment |= {"PYTHONPATH": str(own / "site"), "T2ILEARN_NOTED": str(own / "noted")}
    environment |= {"BROWSER": "true"}  # the command that opens no window
    trust = [Path(sys.executable).parent / "jupyter", "trust", clone / ALIVE]
    subprocess.run(trust, env=environment, check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = own / "log"
    # Nothing is installed from the copy, and one signed chapter is enough.
    done = [f"--assume-old={sys.prefix}/{stamp}" for stamp in (".has-lab", ".trusted")]
    command = ["make", "lab", *done, f"VENV={sys.prefix}", f"PORT={port}"]
    with log.open("w", encoding="utf-8") as file:
        server = subprocess.Popen(
            command, cwd=clone, stdout=file, stderr=file, env=environment, start_new_session=True
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
        yield Lab(found[0], own / "noted")
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.skipif(not READY, reason="not run by make test, or no JupyterLab here")
def test_make_lab_serves_chapter_one_behind_its_token(lab):
    assert CHAPTER in lab.address
    base, token = re.match(r"(http://[^/]+)/.*token=(\w+)", lab.address).groups()
    assert status(lab.address)[0] == 200
    code, body = status(f"{base}/api/contents/{CHAPTER}?token={token}")
    assert code == 200 and json.loads(body)["content"]["cells"]
    assert status(f"{base}/api/contents/{CHAPTER}")[0] == 403


# ---------------------------------------------------------------- in a browser


@pytest.mark.slow
@pytest.mark.skipif(not READY, reason="not run by make test, or no JupyterLab here")
def test_a_signed_chapter_shows_its_widgets_before_any_cell_runs_and_stays_saved(lab):
    address, noted = lab.address.replace(CHAPTER, ALIVE), lab.noted
    text = (ROOT / ALIVE).read_text(encoding="utf-8")
    stored = json.loads(text)
    counts = [c["execution_count"] for c in stored["cells"] if c["cell_type"] == "code"]
    wanted = text.count('"_anywidget_id"')
    asked, sent = [], []
    with conftest.headless_browser() as browser:
        from playwright.sync_api import expect

        expect.set_options(timeout=20_000)
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))

        def listen(wire):
            wire.on("framesent", lambda m: sent.append(m.encode() if isinstance(m, str) else m))

        page.on("websocket", listen)
        page.goto(address)
        idle = page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
        idle.wait_for(timeout=90_000)  # the kernel has said what it is
        shown = "document.querySelectorAll('.t2i[role=group]').length"
        page.wait_for_function(f"{shown} >= {wanted} && {wanted} > 0", timeout=90_000)
        page.locator(".widget-toggle-buttons").first.wait_for(timeout=30_000)  # the live painter's
        page.wait_for_timeout(1000)
        assert page.locator(".jp-mod-dirty").count() == 0

        stairs = page.get_by_role("group", name="Straight-through estimator", exact=True).first
        says = stairs.locator("[aria-live]")
        expect(says).to_have_text(re.compile(r"^z = −?\d"))
        before = says.inner_text()
        stairs.get_by_role("slider", name="Encoding z").press("ArrowRight")
        expect(says).not_to_have_text(before)  # it speaks when it rests
        expect(says).to_have_text(re.compile(r"^z = −?\d"))

        frames = page.get_by_role("group", name=re.compile("painter")).first
        says, picture = frames.locator("[aria-live]"), frames.locator("img")
        expect(says).to_contain_text("Frame 1 of")
        before = picture.get_attribute("src")
        frames.locator("input[type=range]").last.click()  # the mouse, half-way
        expect(says).not_to_contain_text("Frame 1 of")
        expect(says).to_contain_text("Frame ")
        assert picture.get_attribute("src") != before

        prompts = page.locator(".jp-CodeCell .jp-InputArea-prompt").all_text_contents()
        assert prompts == [f"[{count}]:" for count in counts]
        assert page.locator(".jp-mod-dirty").count() == 0
    assert any(b"kernel_info_request" in message for message in sent)
    assert not any(b"execute_request" in message for message in sent)
    own = address.split("/lab/")[0]
    assert [url for url in asked if not url.startswith((own, "data:", f"blob:{own}"))] == []
    reached = set(noted.read_text(encoding="utf-8").splitlines())
    assert "127.0.0.1" in reached and reached <= conftest.LOOPBACK

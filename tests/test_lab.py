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

import conftest
import pytest

ROOT = Path(__file__).resolve().parent.parent
READY = (Path(sys.prefix) / ".has-lab").exists() and shutil.which("make") is not None
CHAPTER = "notebooks/01_pictures.ipynb"
ALIVE = ROOT / "notebooks" / "02_vqvae.ipynb"  # its widgets are dragged, slid and clicked
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
def signed(tmp_path):
    """A JupyterLab of its own, as `make lab` sets it up, that opens a signed copy of a chapter: its
    address, and the file of addresses that server and kernel reach for."""
    shelf, noted = tmp_path / "shelf", tmp_path / "noted"
    shelf.mkdir()
    shutil.copy(ALIVE, shelf)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOTES, encoding="utf-8")
    # The settings of `make lab`; everything else of Jupyter's is made anew.
    settings = ("etc/ipython/ipython_kernel_config.py", "share/jupyter/lab/settings/overrides.json")
    made = [f"{sys.prefix}/{name}" for name in settings]
    subprocess.run(["make", *made, f"VENV={sys.prefix}"], cwd=ROOT, check=True)
    places = ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    environment = {**os.environ, **{name: str(tmp_path / name) for name in places}}
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "T2ILEARN_NOTED": str(noted)}
    jupyter = Path(sys.executable).parent / "jupyter"
    trust = [jupyter, "trust", shelf / ALIVE.name]
    subprocess.run(trust, env=environment, check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    options += [f"--ServerApp.port={port}", "--IdentityProvider.token=chapter"]
    command = [jupyter, "lab", *options, f"--ServerApp.root_dir={shelf}"]
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while status(f"http://127.0.0.1:{port}/api/status?token=chapter")[0] != 200:
            if time.monotonic() > deadline or server.poll() is not None:
                pytest.fail((tmp_path / "log").read_text(encoding="utf-8")[-2000:])
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/{ALIVE.name}?token=chapter", noted
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.skipif(not READY, reason="not run by make test, or no JupyterLab here")
def test_a_signed_chapter_shows_its_widgets_before_any_cell_runs_and_stays_saved(signed):
    address, noted = signed
    stored = json.loads(ALIVE.read_text(encoding="utf-8"))
    counts = [c["execution_count"] for c in stored["cells"] if c["cell_type"] == "code"]
    wanted = ALIVE.read_text(encoding="utf-8").count('"_anywidget_id"')
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

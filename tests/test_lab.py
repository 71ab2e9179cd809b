"""`make lab` serves chapter 1 on this machine only, to whoever holds the token."""

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

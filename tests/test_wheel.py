"""The built wheel draws from another folder, with nothing of the checkout in sight."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def run(*command, **options) -> subprocess.CompletedProcess[str]:
    """Run a command and return it finished; what it said is the failure's message."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without an isolated environment and so without a network."""
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out)
    run(*build, ROOT, cwd=out)
    (path,) = out.glob("t2ilearn-*-py3-none-any.whl")
    return path


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> dict:
    """Options for `run`: another working folder, with the unpacked wheel first on the path."""
    site, cwd = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--target", site, wheel, cwd=cwd)
    return {"cwd": cwd, "env": {**os.environ, "PYTHONPATH": str(site)}}


def test_wheel_holds_package_weights_and_licences(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for path in (ROOT / "t2ilearn").rglob("*"):
        if path.is_file() and path.suffix in {".py", ".safetensors", ".json", ".js", ".typed"}:
            assert path.relative_to(ROOT).as_posix() in names
    assert {n.rsplit("/", 1)[-1] for n in names} >= {"LICENSE", "LICENSE-TEXT"}
    assert not [n for n in names if n.startswith(("tests/", "book/", "notebooks/", "tools/"))]


def test_wheel_is_what_python_finds_there(elsewhere):
    done = run(sys.executable, "-c", "import t2ilearn; print(t2ilearn.__file__)", **elsewhere)
    assert Path(done.stdout.strip()).is_relative_to(elsewhere["env"]["PYTHONPATH"])


def test_wheel_draws_in_another_folder(elsewhere):
    if not list((ROOT / "t2ilearn" / "assets").glob("*.safetensors")):
        pytest.skip("no weights ship yet")
    out = elsewhere["cwd"] / "star.png"
    draw = (sys.executable, "-m", "t2ilearn", "draw", "a small red star above a large blue ring")
    run(*draw, "--count", 1, "--seed", 3, "--out", out, **elsewhere)
    with Image.open(out) as picture:
        assert picture.width >= 64 and len(picture.convert("RGB").getcolors(2**20)) > 2
        assert any("red star" in str(value) for value in picture.info.values())

"""Commands, tables and error messages of the page "Pictures of your own" work as printed."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from t2ilearn import weights
from t2ilearn.cli import app
from t2ilearn.data import CaptionError, Folder, FolderError
from t2ilearn.data.bpe import ROOM
from t2ilearn.data.caption_tables import read_table
from t2ilearn.drawing import draw
from t2ilearn.systems import token_training
from t2ilearn.systems.plan import train_system
from t2ilearn.systems.registry import STAGES

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "book" / "own_pictures.md").read_text(encoding="utf-8")


def block(language: str, begin: str = "") -> str:
    """The one fenced block in this language that begins with this regular expression."""
    (found,) = re.findall(rf"^```{language}\n({begin}.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder in which the page's Python block has run."""
    home = tmp_path_factory.mktemp("home")
    (home / "faces.py").write_text(block("python"), encoding="utf-8")
    subprocess.run([sys.executable, "faces.py"], cwd=home, check=True)
    return home


@pytest.fixture(scope="module")
def runs(home) -> Path:
    """The runs of the page's two commands, with few steps and small models."""
    commands = re.findall(r"^t2ilearn (train .+) --steps \d+$", PAGE, re.MULTILINE)
    assert [re.search(r"--stage (\w+)", command)[1] for command in commands] == ["vqvae", "prior"]
    sizes = {
        "vqvae": {"channels": (8, 8), "codebook_size": 32, "code_dim": 4},
        "prior": {"codebook_size": 32, "dim": 16, "num_layers": 1, "num_heads": 2},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setitem(token_training.PICTURES_PER_WORLD, "folder", 64)
        for name, smaller in sizes.items():
            recipe = STAGES[name].presets["tiny"]
            recipe = replace(recipe, model=replace(recipe.model, **smaller))
            recipe = replace(recipe, train=replace(recipe.train, batch_size=8))
            patch.setitem(STAGES[name].presets, "tiny", recipe)
        for command in commands:
            done = CliRunner().invoke(app, [*shlex.split(command), "--steps", "4"])
            assert done.exit_code == 0, done.exception
    return home / "runs" / "faces"


def test_the_python_block_makes_sixty_faces_and_the_table_on_the_page(home):
    folder = home / "my" / "faces"
    world = Folder(folder, 32)
    assert "60 distinct pictures" in repr(world)
    assert len({*world.captions, *world.test_captions}) == 60
    table = (folder / "captions.csv").read_text(encoding="utf-8")
    assert table.startswith(block("text", "file,caption"))
    assert 1 <= len(world.test_captions) <= 15


def test_all_tables_on_the_page_hold_the_same_rows(home, tmp_path):
    found = []
    for name, begin in (
        ("captions.csv", "file,caption"),
        ("metadata.csv", "file_name,text"),
        ("metadata.jsonl", r'\{"file_name"'),
    ):
        folder = tmp_path / name.replace(".", " ")
        folder.mkdir()
        for picture in ("00.png", "01.png"):
            shutil.copy(home / "my" / "faces" / picture, folder)
        (folder / name).write_text(block("text", begin), encoding="utf-8")
        assert not read_table(folder).faults
        found.append(Folder(folder, 16).fingerprint())
    assert len(set(found)) == 1


def test_the_page_shows_the_error_for_its_bad_rows(home, monkeypatch):
    monkeypatch.chdir(home)
    table = home / "my" / "faces" / "captions.csv"
    kept = table.read_bytes()
    try:
        table.write_bytes(kept + block("text", "60.png").encode())
        with pytest.raises(FolderError) as caught:
            train_system("vqvae", data=Path("my/faces"), progress=False)
    finally:
        table.write_bytes(kept)
    message = f"FolderError: {caught.value}".replace("my\\faces\\", "my/faces/")
    assert message == block("text", "FolderError").rstrip()


def test_the_captions_on_the_page_are_drawn_or_refused_as_stated(home, runs, monkeypatch):
    monkeypatch.chdir(home)
    caption, system = re.search(r'^t2ilearn draw "(.*)" --with (\S+)$', PAGE, re.MULTILINE).groups()
    assert (home / system).resolve() == (runs / "prior-tiny").resolve()
    drawing = draw(caption, system=system)
    assert drawing.pictures.shape == (4, 3, 32, 32) and drawing.aligned == []
    for other in ("a happy pink hat", "a purple cat"):
        assert f'"{other}"' in PAGE
        assert len(draw(other, system=system, count=1).pictures) == 1
    room = rf"room for {ROOM} tokens"
    refusal = re.search(
        rf'{room}.*"([^"]+)" has (\d+) tokens here,\s+and at most (\d+) fit', PAGE, re.S
    )
    with pytest.raises(CaptionError, match=f"has {refusal[2]} tokens; at most {refusal[3]} fit"):
        draw(refusal[1], system=system)
    assert len(draw(caption, system=system, count=1, best_of=4).pictures) == 1


def test_cards_are_where_the_page_says_and_hold_the_rows_of_its_table(home, runs):
    for name in re.findall(r"`(runs/faces/\S+\.json)`", PAGE):
        assert (home / name).is_file()
    cards = [weights.load(runs / n / f"{n}.safetensors").card for n in ("vqvae-tiny", "prior-tiny")]
    held = {**cards[0].metrics, **cards[1].metrics}
    rows = re.findall(r"^\| ([^|]+) \| [\d.]+ \|", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        assert row.replace(", own captions", "") in held
    assert not any("aligned" in name or "judge" in name for name in held)

"""What the page "Pictures of your own" tells a reader to do works, word by word."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from t2ilearn import recipes, weights
from t2ilearn.data import CaptionError, Folder, FolderError
from t2ilearn.data.bpe import ROOM
from t2ilearn.drawing import draw
from t2ilearn.recipes import RECIPES, train_system

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "book" / "own_pictures.md").read_text(encoding="utf-8")


def block(language: str, begin: str = "") -> str:
    """The one fenced block in that language that begins so."""
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
    """The runs of the page's two commands, in a few steps and with a small prior."""
    commands = re.findall(r"^t2ilearn train (\w+) --data (\S+) --steps \d+$", PAGE, re.MULTILINE)
    assert commands == [("vqvae", "my/faces"), ("prior", "my/faces")]
    recipe = RECIPES["prior", "tiny"]
    small = replace(recipe, model=replace(recipe.model, width=32, depth=1, heads=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setitem(recipes.CODES_PER_WORLD, "folder", 64)
        patch.setitem(RECIPES, ("prior", "tiny"), small)
        for system, data in commands:
            train_system(system, data=data, steps=8, progress=False)
    return home / "runs" / "faces"


def test_the_folder_holds_sixty_faces_and_the_table_the_page_shows(home):
    folder = home / "my" / "faces"
    world = Folder(folder, 32)
    assert "60 distinct pictures" in repr(world)
    assert len({*world.captions, *world.test_captions}) == 60
    table = (folder / "captions.csv").read_text(encoding="utf-8")
    assert table.startswith(block("text", "file,caption"))
    assert 1 <= len(world.test_captions) <= 15


def test_bad_rows_are_told_as_the_page_says(home, monkeypatch):
    monkeypatch.chdir(home)
    table = home / "my" / "faces" / "captions.csv"
    kept = table.read_bytes()
    try:
        table.write_bytes(kept + block("text", "60.png").encode())
        with pytest.raises(FolderError) as caught:
            train_system("vqvae", data=Path("my/faces"), progress=False)
    finally:
        table.write_bytes(kept)
    said = f"FolderError: {caught.value}".replace("my\\faces\\", "my/faces/")
    assert said == block("text", "FolderError").rstrip()


def test_drawing_and_what_it_refuses(home, runs, monkeypatch):
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


def test_cards_lie_where_the_page_says_and_hold_its_rows(home, runs):
    for name in re.findall(r"`(runs/faces/\S+\.json)`", PAGE):
        assert (home / name).is_file()
    cards = [weights.load(runs / n / f"{n}.safetensors").card for n in ("vqvae-tiny", "prior-tiny")]
    held = cards[0]["metrics"] | cards[1]["metrics"]
    rows = re.findall(r"^\| ([^|]+) \| [\d.]+ \|", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        assert row.replace(", own captions", "") in held
    assert not any("aligned" in name or "judge" in name for name in held)

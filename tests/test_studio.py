"""The studio, driven as a reader would: values are set and buttons pressed."""

import subprocess
import sys

import pytest
from PIL import Image

import t2ilearn
from t2ilearn import studio as module
from t2ilearn.data import TinyShapes, parse
from t2ilearn.drawing import redraw
from t2ilearn.systems import registry

TINY = "vqvae-tiny"


@pytest.fixture
def studio(tmp_path):
    made = t2ilearn.studio(tmp_path / "kept")
    made.system.value, made.count.value = TINY, 2
    made.caption.value = "a large red star"
    return made


def test_importing_the_package_imports_neither_widgets_nor_torch():
    code = "import sys, t2ilearn; print({'ipywidgets', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "code",
    [
        "import t2ilearn; t2ilearn.studio(); from t2ilearn import studio; studio()",
        "import t2ilearn.studio; t2ilearn.studio(); t2ilearn.studio.studio()",
    ],
)
def test_the_name_calls_however_it_is_imported(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_system_is_offered_and_the_best_is_chosen():
    made = t2ilearn.studio()
    assert tuple(made.system.options) == tuple(registry.names())
    assert made.system.value == registry.best()


def test_draw_shows_pictures_and_a_verdict(studio):
    assert studio.save_button.disabled and not studio.picture.value
    studio.draw_button.click()
    assert "data:image/png" in studio.picture.value
    assert "a large red star" in studio.picture.value
    assert "2 pictures as stated" in studio.message.value
    assert 'role="status"' in studio.message.value
    assert not studio.save_button.disabled and not studio.draw_button.disabled


def test_seed_and_count_decide_the_pictures(studio):
    seen = []
    for seed in (1, 1, 2):
        studio.seed.value = seed
        studio.draw_button.click()
        seen.append(studio.picture.value)
    assert seen[0] == seen[1] != seen[2]
    assert len(studio.drawings[-1].pictures) == 2


def test_surprise_writes_a_caption_that_can_be_drawn(studio):
    captions = set()
    for _ in range(6):
        studio.surprise_button.click()
        captions.add(studio.caption.value)
        parse(studio.caption.value)
    assert len(captions) > 3
    studio.draw_button.click()
    assert "as stated" in studio.message.value


def test_surprise_takes_captions_from_any_world_the_system_learned(studio, monkeypatch):
    class Learned:
        worlds = ("shapes", "foxes")

    class Foxes(TinyShapes):
        def mixed_captions(self, scenes, generator):
            return ["a fox"] * len(scenes)

    monkeypatch.setattr(module.registry, "load", lambda name: Learned)
    monkeypatch.setitem(module.WORLDS, "foxes", Foxes)
    captions = []
    for _ in range(12):
        studio.surprise_button.click()
        captions.append(studio.caption.value)
    assert 1 < captions.count("a fox") < 11


def test_every_world_that_a_shipped_system_learned_is_known():
    for name in registry.names():
        assert set(registry.load(name).worlds) <= set(module.WORLDS)
    assert "emoji" in module.WORLDS


def test_history_keeps_the_last_drawings_the_newest_first(studio, monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 3)
    for seed in range(4):
        studio.seed.value = seed
        studio.draw_button.click()
    assert len(studio.drawings) == module.REMEMBERED
    assert len(studio.history.children) == module.REMEMBERED - 1
    assert studio.history.children[0].value == studio.drawings[-2]._repr_html_()
    assert studio.history.children[-1].value == studio.drawings[0]._repr_html_()


def test_save_writes_a_file_that_redraw_repeats(studio):
    studio.seed.value = 3
    studio.draw_button.click()
    studio.save_button.click()
    (path,) = studio.folder.iterdir()
    assert path.name == "a-large-red-star-3.png" and path.name in studio.message.value
    assert Image.open(path).size == (64, 32)
    assert redraw(path).request.seed == 3


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a mauve star", "Unknown word"),
        ("a red small star", "Expected"),
        ("", "empty"),
        ("<script>alert(1)</script>", "&lt;script&gt;"),
    ],
)
def test_a_bad_caption_is_answered_with_a_sentence(studio, capsys, caption, said):
    studio.draw_button.click()
    before = studio.picture.value
    studio.caption.value = caption
    studio.draw_button.click()
    assert said in studio.message.value and "<script" not in studio.message.value
    assert "Traceback" not in studio.message.value
    assert studio.picture.value == before, "the last drawing stays"
    assert not studio.draw_button.disabled
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_a_sentence_too(studio):
    studio.folder.write_text("a file, not a folder", encoding="utf-8")
    studio.draw_button.click()
    studio.save_button.click()
    assert "kept" in studio.message.value and not studio.save_button.disabled


def test_an_error_without_a_message_gets_one(studio, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(module, "draw", broken)
    studio.draw_button.click()
    assert "RuntimeError" in studio.message.value

"""From a caption to a file and back, through Python and the command line."""

import errno
import inspect
import json
import re

import pytest
import torch
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

import t2ilearn
from t2ilearn import cli, drawing
from t2ilearn.data import CaptionError
from t2ilearn.weights import WeightsError

CAPTION = "a small red star on a white background"


@pytest.fixture(scope="module")
def drawn():
    return t2ilearn.draw(CAPTION, system="vqvae-tiny", seed=3, count=2)


def test_same_seed_same_pictures(drawn):
    again = t2ilearn.draw(CAPTION, system="vqvae-tiny", seed=3, count=2)
    other = t2ilearn.draw(CAPTION, system="vqvae-tiny", seed=4, count=2)
    assert torch.equal(drawn.pictures, again.pictures)
    assert not torch.equal(drawn.pictures, other.pictures)
    assert drawn.pictures.shape == (2, 3, 32, 32) and drawn.pictures.abs().max() <= 1


def test_redraw_repeats_a_file(drawn, tmp_path):
    path = drawn.save(tmp_path / "star.png")
    assert torch.equal(drawing.redraw(path).pictures, drawn.pictures)
    stored = json.loads(Image.open(path).info["t2ilearn"])
    assert stored["caption"] == CAPTION and stored["seed"] == 3
    assert stored["weights"] == drawn.weights_id and stored["system"] == "vqvae-tiny"


def test_best_of_asks_the_training_reader(monkeypatch):
    """The candidate with the highest score is kept, and the judge has no say in it."""
    asked = []

    def score(reader, pictures, captions):
        asked.append(reader)
        values = torch.zeros(len(pictures))
        values[5] = 1.0
        return values

    everything = t2ilearn.draw(CAPTION, system="vqvae-tiny", count=8)
    monkeypatch.setattr(drawing, "score", score)
    kept = t2ilearn.draw(CAPTION, system="vqvae-tiny", count=2, best_of=4)
    assert torch.equal(kept.pictures[1], everything.pictures[5])
    assert asked == [drawing.load_reader("reader")]


def test_html_escapes_the_caption(drawn):
    from dataclasses import replace

    evil = replace(drawn, request=replace(drawn.request, caption='"><script>alert(1)</script>'))
    assert "<script" not in evil._repr_html_()
    assert "&lt;script&gt;" in evil._repr_html_()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"caption": "a mauve star"}, "Unknown word"),
        ({"system": "dalle9"}, "Unknown system"),
        ({"count": 0}, "count"),
        ({"count": 65}, "count"),
        ({"best_of": 0}, "count"),
        ({"seed": -1}, "seed"),
        ({"guidance_scale": -0.1}, "guidance scale"),
        ({"guidance_scale": float("nan")}, "guidance scale"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.5}, "top-p"),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        t2ilearn.draw(**{"caption": CAPTION, "system": "vqvae-tiny", **arguments})


def test_foreign_and_damaged_files(drawn, tmp_path):
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    with pytest.raises(ValueError, match="not drawn by t2ilearn"):
        drawing.redraw(plain)
    with pytest.raises(FileNotFoundError):
        drawing.redraw(tmp_path / "missing.png")
    text = tmp_path / "text.png"
    text.write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match="not a readable picture"):
        drawing.redraw(text)
    facts = drawn.metadata()
    for change in ({"seed": "three"}, {"caption": 5}, {"colour": 1}, {"count": None}):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("t2ilearn", json.dumps({**facts, **change}))
        Image.new("RGB", (8, 8)).save(plain, pnginfo=info)
        with pytest.raises(ValueError, match="damaged"):
            drawing.redraw(plain)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("t2ilearn", json.dumps({**facts, "weights": "00000000"}))
    Image.new("RGB", (8, 8)).save(plain, pnginfo=info)
    with pytest.raises(WeightsError, match="other|installed"):
        drawing.redraw(plain)


def test_a_full_disk_keeps_the_old_file(drawn, tmp_path, monkeypatch):
    path = drawn.save(tmp_path / "star.png")
    before = path.read_bytes()

    def full(self, target, **_):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        drawn.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_only_png(drawn, tmp_path):
    with pytest.raises(ValueError, match=r"\.png"):
        drawn.save(tmp_path / "star.jpg")


# --- the command line ---


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_draw_and_redraw(tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    result = run("draw", CAPTION, "--with", "vqvae-tiny", "--count", 2, "--out", first)
    assert result.exit_code == 0, result.output
    assert re.search(r"[012] of 2 pictures as stated", result.output)
    assert run("redraw", first, "--out", second).exit_code == 0
    assert Image.open(first).tobytes() == Image.open(second).tobytes()


def test_errors_are_for_people(monkeypatch, capsys, tmp_path):
    for arguments in (
        ["draw", "a purpel star"],
        ["draw", CAPTION, "--with", "nothing"],
        ["draw", CAPTION, "--with", "vqvae-tiny", "--out", str(tmp_path / "no" / "where.png")],
        ["redraw", str(tmp_path / "missing.png")],
        ["train", "vqvae", "--preset", "huge"],
        ["draw"],
        ["paint"],
    ):
        monkeypatch.setattr("sys.argv", ["t2ilearn", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        assert stop.value.code == 2, arguments
        assert "Traceback" not in output.err and 10 < len(output.err) < 1000


def test_terminal_picture(drawn):
    text = cli.terminal_picture(drawn, width=40)
    lines = text.split("\n")
    assert all(line.count("▀") == 40 for line in lines) and len(lines) == 10


def test_weights_are_listed():
    result = run("weights")
    assert result.exit_code == 0 and "judge" in result.output


def test_the_command_line_has_the_defaults_of_python():
    """Typed twice, so that `--help` need not import torch."""
    command, python = inspect.signature(cli.draw), inspect.signature(t2ilearn.draw)
    assert command.parameters.keys() - python.parameters.keys() == {"out"}
    for name in command.parameters.keys() - {"out", "caption"}:
        assert command.parameters[name].default == python.parameters[name].default, name
    request = drawing.Request("a star")
    for name, parameter in python.parameters.items():
        if name != "caption":
            assert getattr(request, name) == parameter.default, name


@pytest.mark.parametrize("system", [name for name in drawing.SYSTEMS if name != "vqvae-tiny"])
def test_every_system_draws(system):
    drawn = t2ilearn.draw("a large blue star", system=system, count=2)
    assert len(drawn.pictures) == 2 and drawn.pictures.std() > 0.05


def test_one_system_draws_both_worlds(tmp_path):
    """A pair of concept and style that training never held, and back from its file."""
    caption = "a dodo, outline, on a sky background"
    drawn = t2ilearn.draw(caption, count=2, best_of=2, seed=1)
    assert drawn.pictures.shape == (2, 3, 64, 64) and len(drawn.aligned) == 2
    again = drawing.redraw(drawn.save(tmp_path / "dodo.png"))
    assert torch.equal(again.pictures, drawn.pictures)
    with pytest.raises(CaptionError, match="Nearest known: dodo"):
        t2ilearn.draw("a dodp, outline")
    with pytest.raises(CaptionError, match="Unknown word 'dodo'"):
        t2ilearn.draw(caption, system="vqvae-tiny")


def test_best_of_emoji_asks_the_prior_and_no_judge(monkeypatch):
    """Of each three the likeliest for the caption is kept; the judge looks afterwards."""
    seen = {}

    def likelihood(prior, codes, caption):
        seen["codes"] = codes
        return torch.tensor([0.0, 2.0, 1.0, 5.0, 3.0, 4.0])

    monkeypatch.setattr(drawing, "log_likelihood", likelihood)
    monkeypatch.setattr(drawing, "score", None)
    kept = t2ilearn.draw("a fox, flat", count=2, best_of=3).pictures
    vqvae = drawing.load_system("vqvae").vqvae
    assert torch.equal(kept, vqvae.decode_tokens(seen["codes"]).clamp(-1, 1)[[1, 3]])

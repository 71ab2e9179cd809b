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
from t2ilearn.dalle import beginning
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
        ({"top_k": 0}, "top-k must be 1 … 256, not 0"),
        ({"top_k": 257}, "top-k must be 1 … 256, not 257"),
        ({"scorer": "judge"}, "A scorer is one of reader, likelihood, not 'judge'"),
        ({"caption": ""}, "empty|says nothing|word"),
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
    wrong = ({"seed": "three"}, {"caption": 5}, {"colour": 1}, {"count": None})
    for change in (*wrong, {"start": 5}, {"start": ["a"]}, {"top_k": "x"}, {"scorer": [1]}):
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
    own = {"out", "finish", "rows"}
    assert command.parameters.keys() - python.parameters.keys() == own
    rows = inspect.signature(drawing.complete).parameters["rows"]
    assert command.parameters["rows"].default == rows.default
    for name in command.parameters.keys() - {*own, "caption"}:
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


# --- who chooses, and from how many codes ---


def test_one_likeliest_code_leaves_nothing_to_chance():
    """top-k 1 and temperature 0 are both greedy: all pictures are the same, whatever the seed."""
    greedy = t2ilearn.draw(CAPTION, system="vqvae-tiny", count=2, temperature=0.0).pictures
    for seed in (0, 1):
        drawn = t2ilearn.draw(CAPTION, system="vqvae-tiny", count=2, top_k=1, seed=seed).pictures
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn, greedy)
    few, all_of_them = (
        t2ilearn.draw(CAPTION, system="vqvae-tiny", count=2, top_k=k, top_p=None).pictures
        for k in (2, None)
    )
    assert not torch.equal(few, all_of_them) and not torch.equal(few[0], few[1])


def test_a_scorer_is_asked_by_name(monkeypatch):
    """Of shapes the reader chooses unless the likelihood is asked for."""
    asked = []

    def score(reader, pictures, captions):
        asked.append("reader")
        return torch.arange(6.0)

    def likelihood(prior, codes, caption):
        asked.append("likelihood")
        assert (caption == drawing.load_system("vqvae-tiny").tokenizer.encode([CAPTION])).all()
        return -torch.arange(6.0)

    everything = t2ilearn.draw(CAPTION, system="vqvae-tiny", count=6).pictures
    monkeypatch.setattr(drawing, "score", score)
    monkeypatch.setattr(drawing, "log_likelihood", likelihood)
    for scorer, kept in (("reader", [2, 5]), ("likelihood", [0, 3]), (None, [2, 5])):
        how = {"system": "vqvae-tiny", "count": 2, "best_of": 3, "scorer": scorer}
        assert torch.equal(t2ilearn.draw(CAPTION, **how).pictures, everything[kept]), scorer
    assert asked == ["reader", "likelihood", "reader"]


def test_the_reader_does_not_choose_among_what_it_cannot_read(tiny_picture):
    with pytest.raises(ValueError, match="reads captions of shapes; let likelihood choose"):
        t2ilearn.draw("a fox, flat", scorer="reader", count=1)
    with pytest.raises(ValueError, match="reads captions of shapes; let likelihood choose"):
        drawing.complete(tiny_picture, scorer="reader", system="vqvae-tiny")


def test_judges_never_choose():
    assert set(drawing.SCORERS) == {"reader", "likelihood"}


# --- finishing a picture ---


@pytest.fixture
def tiny_picture():
    """A picture at the size of the smallest system."""
    return t2ilearn.draw(CAPTION, system="vqvae-tiny", seed=3, count=1).pictures[0]


@pytest.fixture
def codes_drawn(monkeypatch):
    """The codes of everything that is drawn from now on."""
    seen, real = [], drawing.sample
    monkeypatch.setattr(
        drawing, "sample", lambda *args, **how: seen.append(real(*args, **how)) or seen[-1]
    )
    return seen


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_what_is_given_stays_and_the_rest_is_drawn(tiny_picture, codes_drawn, rows):
    how = {"system": "vqvae-tiny", "rows": rows, "count": 3, "seed": 1}
    done = drawing.complete(tiny_picture, "a large blue star", **how)
    kept = beginning(drawing.load_system("vqvae-tiny").vqvae, tiny_picture[None], rows)
    assert kept.shape == (1, 8 * rows) and (codes_drawn[0][:, : 8 * rows] == kept).all()
    assert done.request.start == tuple(kept[0].tolist()) and len(done.aligned) == 3
    assert done.pictures.shape == (3, 3, 32, 32) and done.request.caption == "a large blue star"
    # What is below is not looked at.
    other = tiny_picture.clone()
    other[:, 4 * rows :] = -other[:, 4 * rows :]
    same = drawing.complete(other, "a large blue star", **how)
    assert torch.equal(same.pictures, done.pictures)
    if rows == 1:
        assert not torch.equal(done.pictures[0], done.pictures[1])


def test_words_decide_how_a_picture_ends(tiny_picture, codes_drawn):
    how = {"system": "vqvae-tiny", "rows": 2, "count": 4, "temperature": 0.0}
    for caption in ("a large blue star", "a small green heart"):
        drawing.complete(tiny_picture, caption, **how)
    assert not torch.equal(*codes_drawn)


@pytest.mark.parametrize("best_of", [1, 3])
@pytest.mark.parametrize("caption", [None, ""])
def test_without_words_a_picture_ends_as_the_system_likes(
    monkeypatch, tiny_picture, caption, best_of
):
    """Also where the tokenizer itself knows no empty caption; then the likelihood chooses."""
    asked, real = [], drawing.log_likelihood

    def likelihood(prior, codes, ids):
        asked.append(ids)
        return real(prior, codes, ids)

    monkeypatch.setattr(drawing, "log_likelihood", likelihood)
    how = {"system": "vqvae-tiny", "count": 2, "best_of": best_of}
    done = drawing.complete(tiny_picture, caption, **how)
    assert done.aligned == [] and done.verdict() == "2 pictures" and len(done.pictures) == 2
    nothing = drawing.null_caption(2 * best_of, 24)
    assert [ids.tolist() for ids in asked] == [nothing.tolist()] * (best_of > 1)


def test_the_default_of_complete_is_dalle(monkeypatch):
    assert inspect.signature(drawing.complete).parameters["system"].default == "dalle"
    picture = torch.zeros(3, 64, 64)
    done = drawing.complete(picture, "a large blue star", count=1)
    assert done.request.system == "dalle" and done.pictures.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("caption", ["a large blue star", None])
def test_a_finished_picture_is_drawn_again_from_its_file(tiny_picture, tmp_path, caption):
    how = {"system": "vqvae-tiny", "count": 2, "best_of": 2, "top_k": 40, "scorer": "likelihood"}
    done = drawing.complete(tiny_picture, caption, rows=3, **how)
    path = done.save(tmp_path / "done.png")
    again = drawing.redraw(path)
    assert torch.equal(again.pictures, done.pictures) and again.request == done.request
    stored = json.loads(Image.open(path).info["t2ilearn"])
    assert stored["start"] == list(done.request.start) and len(stored["start"]) == 24
    assert stored["top_k"] == 40 and stored["scorer"] == "likelihood"


def store(path, facts):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("t2ilearn", json.dumps(facts))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_files_from_before_these_fields_are_still_drawn_again(drawn, tmp_path):
    facts = drawn.metadata()
    old = {k: v for k, v in facts.items() if k not in ("top_k", "scorer", "start")}
    assert len(old) == len(facts) - 3
    again = drawing.redraw(store(tmp_path / "old.png", old))
    assert torch.equal(again.pictures, drawn.pictures) and again.request == drawn.request


@pytest.mark.parametrize("change", [{"start": ["a"]}, {"top_k": "x"}, {"temperature": "hot"}])
def test_words_where_numbers_belong_are_damage(unchecked, drawn, tmp_path, change):
    """As readers meet it, without our own checks of types."""
    path = store(tmp_path / "wrong.png", {**drawn.metadata(), **change})
    with pytest.raises(ValueError, match="wrong.png are damaged"):
        drawing.redraw(path)


@pytest.mark.parametrize(
    "start, said", [([256] * 8, "from 0 to 255; these are 256"), ([0] * 64, "All 64 codes")]
)
def test_a_file_with_codes_that_are_none_says_so(drawn, tmp_path, start, said):
    path = store(tmp_path / "wrong.png", {**drawn.metadata(), "start": start})
    with pytest.raises(ValueError, match=said):
        drawing.redraw(path)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x[None], r"One picture is of shape \(3, H, W\), not \(1, 3, 32, 32\)"),
        (lambda x: x[:, :16, :16], "32"),
        (lambda x: x[:1], "32"),
        (lambda x: 127.5 * (x + 1), r"Pictures lie in \[−1, 1\]"),
        (lambda x: x * float("nan"), r"Pictures lie in \[−1, 1\]"),
    ],
)
def test_what_cannot_be_finished_is_refused(unchecked, tiny_picture, change, said):
    with pytest.raises(ValueError, match=said):
        drawing.complete(change(tiny_picture), CAPTION, system="vqvae-tiny")


@pytest.mark.parametrize("rows", [0, 8, -1])
def test_there_is_something_given_and_something_left(tiny_picture, rows):
    with pytest.raises(ValueError, match=f"Keep 1 … 7 rows of codes, not {rows}"):
        drawing.complete(tiny_picture, CAPTION, system="vqvae-tiny", rows=rows)


def test_a_caption_that_nobody_can_read_finishes_nothing(tiny_picture):
    with pytest.raises(CaptionError, match="Unknown word"):
        drawing.complete(tiny_picture, "a mauve star", system="vqvae-tiny")


def test_the_command_line_finishes_a_picture_of_any_size(tmp_path, tiny_picture):
    photo, out = tmp_path / "photo.png", tmp_path / "done.png"
    Image.effect_noise((90, 70), 60).convert("RGB").save(photo)
    how = ["--with", "vqvae-tiny", "--count", 2, "--top-k", 30, "--scorer", "likelihood"]
    result = run("draw", CAPTION, "--finish", photo, "--rows", 3, *how, "--out", out)
    assert result.exit_code == 0, result.output
    stored = json.loads(Image.open(out).info["t2ilearn"])
    picture = cli.picture_file(photo, 32)
    assert picture.shape == (3, 32, 32) and picture.abs().max() <= 1
    kept = beginning(drawing.load_system("vqvae-tiny").vqvae, picture[None], 3)[0].tolist()
    assert stored["start"] == kept and stored["top_k"] == 30 and stored["scorer"] == "likelihood"
    again = tmp_path / "again.png"
    assert run("redraw", out, "--out", again).exit_code == 0
    assert Image.open(out).tobytes() == Image.open(again).tobytes()


def test_without_words_the_command_line_finishes_too(tmp_path):
    photo, out = tmp_path / "photo.png", tmp_path / "done.png"
    Image.new("RGB", (64, 64), "navy").save(photo)
    result = run("draw", "", "--finish", photo, "--with", "vqvae-tiny", "--count", 2, "--out", out)
    assert result.exit_code == 0 and "2 pictures" in result.output, result.output


def test_what_the_command_line_cannot_finish_is_for_people(monkeypatch, capsys, tmp_path):
    text, tiny, photo = (tmp_path / name for name in ("text.png", "tiny.png", "photo.png"))
    text.write_text("hello", encoding="utf-8")
    Image.new("RGB", (4, 4)).save(tiny)
    Image.new("RGB", (64, 64)).save(photo)
    for options, said in (
        (["--finish", tmp_path / "missing.png"], "There is no picture"),
        (["--finish", tmp_path], "There is no picture"),
        (["--finish", text], "text.png"),
        (["--finish", tiny], "tiny.png"),
        (["--finish", photo, "--rows", 8], "Keep 1 … 7 rows"),
        (["--finish", photo, "--rows", 0], "Keep 1 … 7 rows"),
        (["--scorer", "judge"], "one of reader, likelihood"),
        (["--top-k", 0], "top-k must be 1 … 256"),
        (["--top-k", "many"], "top-k"),
    ):
        arguments = ["draw", CAPTION, "--with", "vqvae-tiny", *map(str, options)]
        monkeypatch.setattr("sys.argv", ["t2ilearn", *arguments])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        assert stop.value.code == 2, options
        assert said in output.err and "Traceback" not in output.err, output.err

"""From a caption to a file and back, through Python and the command line."""

import base64
import errno
import inspect
import io
import json
import os
import re
from dataclasses import fields, replace

import pytest
import torch
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

import t2ilearn
from t2ilearn import cli, drawing
from t2ilearn.data import CaptionError
from t2ilearn.data.pixels import bytes_from_pictures, pictures_from_bytes
from t2ilearn.judging import load_reader
from t2ilearn.models.dalle import encode_prefix
from t2ilearn.models.tokens import null_caption
from t2ilearn.systems import Request, registry, tokens
from t2ilearn.systems.tokens import TokenSystem
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
    assert stored["captions"] == [CAPTION, CAPTION] and stored["seed"] == 3
    assert stored["weights"] == drawn.weights_id and stored["system"] == "vqvae-tiny"


def test_best_of_keeps_what_the_training_reader_scores_highest(monkeypatch):
    """No judge takes part in the choice."""
    asked = []

    def score(reader, pictures, captions, world):
        asked.append(reader)
        values = torch.zeros(len(pictures))
        values[5] = 1.0
        return values

    everything = t2ilearn.draw(CAPTION, system="vqvae-tiny", count=8)
    monkeypatch.setattr(tokens, "score", score)
    kept = t2ilearn.draw(CAPTION, system="vqvae-tiny", count=2, best_of=4)
    assert torch.equal(kept.pictures[1], everything.pictures[5])
    assert asked == [load_reader("reader")]


def test_html_escapes_the_caption(drawn):
    text = '"><script>alert(1)</script>'
    evil = replace(drawn, request=replace(drawn.request, captions=(text, text)))
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
        ({"top_k": 0}, "top-k must be 1 or more, not 0"),
        ({"top_k": 257}, "top-k must be 1 … 256, not 257"),
        ({"scorer": "judge"}, "A scorer of vqvae-tiny is reader, likelihood, not 'judge'"),
        ({"count": 2.5}, "The count must be a whole number, not 2.5"),
        ({"seed": "1"}, "The seed must be a whole number, not '1'"),
        ({"seed": 2**63}, "seed"),
        ({"best_of": True}, "The best-of must be a whole number, not True"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"guidance_scale": None}, "The guidance scale must be a number, not None"),
        ({"top_k": 2.5}, "The top k must be a whole number, not 2.5"),
        ({"steps": 3}, "vqvae has no option 'steps'; its options are: guidance_scale, temperatur"),
        ({"caption": ""}, "empty|says nothing|word"),
    ],
)
def test_requests_out_of_range_are_refused(unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        t2ilearn.draw(**{"caption": CAPTION, "system": "vqvae-tiny", **arguments})


def store(path, facts):
    """A picture with these facts as its metadata; text is stored as it is."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("t2ilearn", facts if isinstance(facts, str) else json.dumps(facts))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_files_of_other_programs_are_refused(tmp_path):
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    with pytest.raises(ValueError, match="not drawn by t2ilearn"):
        drawing.redraw(plain)
    with pytest.raises(FileNotFoundError):
        drawing.redraw(tmp_path / "missing.png")
    text = tmp_path / "text.png"
    text.write_text("hello", encoding="utf-8")
    for path in (text, tmp_path):
        with pytest.raises(ValueError, match="not a readable picture"):
            drawing.redraw(path)


def png_text(width, height):
    """A start picture of this size, as metadata hold it."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


NAN, INFINITY = float("nan"), float("inf")
DAMAGED = [
    *({"captions": c} for c in (5, "a star", [], [5], [None], [[]], {"a": 1}, ["a star"] * 65)),
    *({"captions": [[p]]} for p in (5, ["a"], ["a", "b"], ["a", NAN], [1, 1], ["a", 1, 2])),
    *({"captions": [[["a", w]]]} for w in (INFINITY, 1e300, True, None)),
    *({"seed": v} for v in ("three", None, 1.5, NAN, -1, 2**63, 10**400, True, [1])),
    *({"best_of": v} for v in (0, -1, "2", 10**400, None, False, INFINITY)),
    *({"scorer": v} for v in ([1], 5, True)),
    *({"system": v} for v in (5, None, ["vqvae-tiny"])),
    *({"options": v} for v in (None, 5, [], "top_k", {"colour": 1}, {"cls": 1}, {"": 1})),
    *({"options": {"top_k": v}} for v in ("x", NAN, 0, [3], {})),
    *({"options": {"temperature": v}} for v in ("hot", NAN, INFINITY, -1, None, 10**400)),
    *({"options": {"guidance_scale": v}} for v in (True, NAN, 1e9, [])),
    *({"rows": v} for v in ("1", None, 1.5, NAN, [2])),
    *({"start": v} for v in (5, ["a"], "a", "AAAA", "é", {}, png_text(8, 12))),
    *({"weights": v} for v in (5, None, ["a"])),
    *({"schema": v} for v in ("2", 1, 0, True, None, 2.0)),
    {"colour": 1},
]


@pytest.mark.parametrize("change", DAMAGED, ids=lambda change: str(change)[:40])
def test_damaged_metadata_are_refused_with_a_sentence(unchecked, drawn, tmp_path, change):
    """As readers meet them, without our own checks of types."""
    path = store(tmp_path / "wrong.png", {**drawn.metadata(), **change})
    with pytest.raises(
        ValueError, match=r"The metadata of .*wrong\.png are damaged: .+\.$"
    ) as found:
        drawing.redraw(path)
    assert len(str(found.value)) < 700


@pytest.mark.parametrize("field", [f.name for f in fields(Request)] + ["weights", "schema"])
def test_metadata_without_a_field_are_damaged(unchecked, drawn, tmp_path, field):
    facts = drawn.metadata()
    del facts[field]
    with pytest.raises(ValueError, match=f"are damaged: .*{field}"):
        drawing.redraw(store(tmp_path / "wrong.png", facts))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "null", '"a star"', "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"]
)
def test_metadata_that_are_no_json_object_are_damaged(drawn, tmp_path, text):
    with pytest.raises(ValueError, match="are damaged: they are no JSON"):
        drawing.redraw(store(tmp_path / "wrong.png", text))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"captions": ["a mauve star"]}, "Unknown word 'mauve'"),
        ({"captions": [""]}, "empty"),
        ({"captions": [[["a star", 0.5]]]}, "takes one caption a picture, without a weight"),
        ({"system": "dalle9"}, "Unknown system 'dalle9'"),
        ({"system": "x" * 5000 + "/prior-tiny"}, "Unknown system"),
        ({"system": ""}, "Unknown system"),
        ({"scorer": "judge"}, "A scorer of"),
        ({"rows": 3}, "rows of 8 stay, and none without one, not 3"),
        ({"rows": -1, "start": png_text(32, 32)}, "rows of 8 stay"),
        ({"rows": 0, "start": png_text(32, 32)}, "Keep 1 … 7 rows"),
        ({"rows": 2, "start": png_text(64, 64)}, r"of shape \(3, 32, 32\)"),
        ({"rows": 2, "start": png_text(32, 96)}, "one picture, or from one for each of 2"),
        ({"schema": 3}, "drawn by a newer t2ilearn: update yours"),
    ],
)
def test_sound_metadata_that_cannot_be_drawn_here_say_why(
    unchecked, drawn, tmp_path, change, message
):
    with pytest.raises(ValueError, match=message) as found:
        drawing.redraw(store(tmp_path / "other.png", {**drawn.metadata(), **change}))
    assert "damaged" not in str(found.value) and len(str(found.value)) < 700


def test_pictures_of_other_weights_are_refused(drawn, tmp_path):
    path = store(tmp_path / "other.png", {**drawn.metadata(), "weights": "00000000"})
    with pytest.raises(WeightsError, match="drawn with weights 00000000, but .* are installed"):
        drawing.redraw(path)


def test_pictures_of_the_first_edition_are_named_as_such(tmp_path):
    """Its metadata had other fields, and the weights that drew them are gone."""
    old = {"caption": CAPTION, "system": "vqvae", "seed": 3, "count": 4, "guidance_scale": 2.0}
    old |= {"best_of": 1, "temperature": 1.0, "top_p": 0.9, "top_k": None, "scorer": None}
    old |= {"start": [], "weights": "0a1b2c3d-4e5f6a7b", "version": "0.1.0"}
    with pytest.raises(ValueError, match=f"first edition of t2ilearn.*anew: {CAPTION!r}"):
        drawing.redraw(store(tmp_path / "old.png", old))


def test_a_full_disk_keeps_the_old_file(drawn, tmp_path, monkeypatch):
    path = drawn.save(tmp_path / "star.png")
    before = path.read_bytes()

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
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


def test_errors_of_the_command_line_are_sentences(monkeypatch, capsys, tmp_path):
    for arguments in (
        ["draw", "a purpel star"],
        ["draw", CAPTION, "--with", "nothing"],
        ["draw", CAPTION, "--with", "vqvae-tiny", "--out", str(tmp_path / "no" / "where.png")],
        ["redraw", str(tmp_path / "missing.png")],
        ["train", "vqvae", "--preset", "huge"],
        ["train", "vqave"],
        ["train", "vqvae", "--stage", "priro", "--dry-run"],
        ["train", "vqvae", "--data", str(tmp_path), "--dry-run"],
        ["evaluate", "vqvae-tiny", "--n", "7"],
        ["evaluate", "nothing"],
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
    request = drawing.make_request("a star", None, 0, 4, 1, None, {})
    for name in python.parameters.keys() - {"caption", "options", "system"}:
        assert getattr(request, name) == python.parameters[name].default, name
    assert request.system == registry.best()
    completed = inspect.signature(drawing.complete).parameters
    for name in python.parameters.keys() - {"caption"}:
        assert completed[name].default == python.parameters[name].default, name


def test_a_systems_own_options_are_given_by_name(tmp_path):
    """Before the caption and after it, with a space or an equals sign."""
    out, how = tmp_path / "a.png", ["--with", "vqvae-tiny", "--count", 1]
    options = ["--guidance-scale", 3, "--top-k=9"]
    files = []
    for arguments in (
        [CAPTION, *options, *how],
        [*options, CAPTION, *how],
        [*how, *options, CAPTION],
    ):
        result = run("draw", *arguments, "--out", out)
        assert result.exit_code == 0, result.output
        files.append(Image.open(out).info["t2ilearn"])
    assert files[0] == files[1] == files[2]
    stored = json.loads(files[0])["options"]
    assert stored["guidance_scale"] == 3.0 and stored["top_k"] == 9 and stored["top_p"] == 0.9


@pytest.mark.parametrize("system", [name for name in registry.names() if name != "vqvae-tiny"])
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


def test_best_of_emoji_is_chosen_by_the_prior_and_no_judge(monkeypatch):
    """Of each three the likeliest for the caption is kept; the judge looks afterwards."""
    seen = {}

    def likelihood(prior, indices, caption):
        seen["tokens"] = indices
        return torch.tensor([0.0, 2.0, 1.0, 5.0, 3.0, 4.0])

    monkeypatch.setattr(tokens, "log_likelihood", likelihood)
    monkeypatch.setattr(tokens, "score", None)
    kept = t2ilearn.draw("a fox, flat", system="vqvae", count=2, best_of=3).pictures
    tokenizer = registry.load("vqvae").parts["tokenizer"]
    assert torch.equal(kept, tokenizer.decode_tokens(seen["tokens"]).clamp(-1, 1)[[1, 3]])


# --- what chooses, and from how many tokens ---


def test_sampling_the_likeliest_token_alone_is_deterministic():
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


def test_a_scorer_is_chosen_by_name(monkeypatch):
    """Of shapes the reader chooses unless the likelihood is asked for."""
    asked = []

    def score(reader, pictures, captions, world):
        asked.append("reader")
        return torch.arange(6.0)

    def likelihood(prior, indices, caption):
        asked.append("likelihood")
        assert (caption == registry.load("vqvae-tiny").text_tokenizer.encode([CAPTION])).all()
        return -torch.arange(6.0)

    everything = t2ilearn.draw(CAPTION, system="vqvae-tiny", count=6).pictures
    monkeypatch.setattr(tokens, "score", score)
    monkeypatch.setattr(tokens, "log_likelihood", likelihood)
    for scorer, kept in (("reader", [2, 5]), ("likelihood", [0, 3]), (None, [2, 5])):
        how = {"system": "vqvae-tiny", "count": 2, "best_of": 3, "scorer": scorer}
        assert torch.equal(t2ilearn.draw(CAPTION, **how).pictures, everything[kept]), scorer
    assert asked == ["reader", "likelihood", "reader"]


def test_the_reader_does_not_choose_among_what_it_cannot_read(tiny_picture):
    with pytest.raises(ValueError, match="reads captions of shapes; let likelihood choose"):
        t2ilearn.draw("a fox, flat", system="vqvae", scorer="reader", count=1)
    with pytest.raises(ValueError, match="reads captions of shapes; let likelihood choose"):
        drawing.complete(tiny_picture, scorer="reader", system="vqvae-tiny")


def test_judges_never_choose():
    for name in registry.names():
        assert set(registry.load(name).scorers()) == {"reader", "likelihood"}


# --- finishing a picture ---


@pytest.fixture
def tiny_picture():
    """A picture at the size of the smallest system."""
    return t2ilearn.draw(CAPTION, system="vqvae-tiny", seed=3, count=1).pictures[0]


@pytest.fixture
def tokens_drawn(monkeypatch):
    """The tokens of everything that is drawn from now on."""
    seen, real = [], TokenSystem.candidates

    def candidates(self, request, generator):
        found = real(self, request, generator)
        seen.append(found.tokens)
        return found

    monkeypatch.setattr(TokenSystem, "candidates", candidates)
    return seen


def prefix_of(picture, rows):
    """The tokens of the rows of a picture that stay; a request holds its pixels as bytes."""
    stored = pictures_from_bytes(bytes_from_pictures(picture[None]))
    return encode_prefix(registry.load("vqvae-tiny").parts["tokenizer"], stored, rows)


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_the_rows_that_are_given_stay_and_the_rest_is_drawn(tiny_picture, tokens_drawn, rows):
    how = {"system": "vqvae-tiny", "rows": rows, "count": 3, "seed": 1}
    done = drawing.complete(tiny_picture, "a large blue star", **how)
    kept = prefix_of(tiny_picture, rows)
    assert kept.shape == (1, 8 * rows) and (tokens_drawn[0][:, : 8 * rows] == kept).all()
    assert torch.equal(done.request.start, bytes_from_pictures(tiny_picture[None]))
    assert done.request.rows == rows and len(done.aligned) == 3
    assert done.pictures.shape == (3, 3, 32, 32) and done.request.caption == "a large blue star"
    # The pixels below have no influence.
    other = tiny_picture.clone()
    other[:, 4 * rows :] = -other[:, 4 * rows :]
    same = drawing.complete(other, "a large blue star", **how)
    assert torch.equal(same.pictures, done.pictures)
    if rows == 1:
        assert not torch.equal(done.pictures[0], done.pictures[1])


def test_the_caption_decides_the_part_that_is_drawn(tiny_picture, tokens_drawn):
    how = {"system": "vqvae-tiny", "rows": 2, "count": 4, "temperature": 0.0}
    for caption in ("a large blue star", "a small green heart"):
        drawing.complete(tiny_picture, caption, **how)
    assert not torch.equal(*tokens_drawn)


@pytest.mark.parametrize("best_of", [1, 3])
@pytest.mark.parametrize("caption", [None, ""])
def test_without_a_caption_a_picture_is_finished_unconditionally(
    monkeypatch, tiny_picture, caption, best_of
):
    """Also where the tokenizer itself knows no empty caption; then the likelihood chooses."""
    asked, real = [], tokens.log_likelihood

    def likelihood(prior, indices, ids):
        asked.append(ids)
        return real(prior, indices, ids)

    monkeypatch.setattr(tokens, "log_likelihood", likelihood)
    how = {"system": "vqvae-tiny", "count": 2, "best_of": best_of}
    done = drawing.complete(tiny_picture, caption, **how)
    assert done.aligned == [] and done.verdict() == "2 pictures" and len(done.pictures) == 2
    nothing = null_caption(2 * best_of, 24)
    assert [ids.tolist() for ids in asked] == [nothing.tolist()] * (best_of > 1)


def test_the_default_of_complete_is_the_best_system_that_ships():
    side = registry.load().resolution
    done = drawing.complete(torch.zeros(3, side, side), "a large blue star", count=1)
    assert done.request.system == registry.best() == "dalle"
    assert done.pictures.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("caption", ["a large blue star", None])
def test_a_finished_picture_is_drawn_again_from_its_file(tiny_picture, tmp_path, caption):
    how = {"system": "vqvae-tiny", "count": 2, "best_of": 2, "top_k": 40, "scorer": "likelihood"}
    done = drawing.complete(tiny_picture, caption, rows=3, **how)
    path = done.save(tmp_path / "done.png")
    again = drawing.redraw(path)
    assert torch.equal(again.pictures, done.pictures) and again.request == done.request
    stored = json.loads(Image.open(path).info["t2ilearn"])
    kept = Image.open(io.BytesIO(base64.b64decode(stored["start"])))
    assert kept.size == (32, 32) and stored["rows"] == 3
    assert stored["options"]["top_k"] == 40 and stored["scorer"] == "likelihood"


def test_options_that_a_file_does_not_have_take_their_defaults(drawn, tmp_path):
    """A later version may add some."""
    facts = drawn.metadata()
    for name in ("top_k", "top_p"):
        del facts["options"][name]
    again = drawing.redraw(store(tmp_path / "old.png", facts))
    assert torch.equal(again.pictures, drawn.pictures) and again.request == drawn.request


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
def test_pictures_of_another_size_or_range_are_not_finished(unchecked, tiny_picture, change, said):
    with pytest.raises(ValueError, match=said):
        drawing.complete(change(tiny_picture), CAPTION, system="vqvae-tiny")


@pytest.mark.parametrize("rows", [0, 8, -1])
def test_at_least_one_row_stays_and_one_is_drawn(tiny_picture, rows):
    with pytest.raises(ValueError, match=f"Keep 1 … 7 rows of 8, not {rows}"):
        drawing.complete(tiny_picture, CAPTION, system="vqvae-tiny", rows=rows)


def test_a_caption_that_cannot_be_read_finishes_nothing(tiny_picture):
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
    request = drawing.redraw(out).request
    assert torch.equal(request.start, bytes_from_pictures(picture[None])) and request.rows == 3
    assert stored["options"]["top_k"] == 30 and stored["scorer"] == "likelihood"
    again = tmp_path / "again.png"
    assert run("redraw", out, "--out", again).exit_code == 0
    assert Image.open(out).tobytes() == Image.open(again).tobytes()


def test_without_a_caption_the_command_line_finishes_too(tmp_path):
    photo, out = tmp_path / "photo.png", tmp_path / "done.png"
    Image.new("RGB", (64, 64), "navy").save(photo)
    result = run("draw", "", "--finish", photo, "--with", "vqvae-tiny", "--count", 2, "--out", out)
    assert result.exit_code == 0 and "2 pictures" in result.output, result.output


def test_the_command_line_says_in_a_sentence_what_it_cannot_finish(monkeypatch, capsys, tmp_path):
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
        (["--scorer", "judge"], "reader, likelihood, not 'judge'"),
        (["--top-k", 0], "top-k must be 1 or more"),
        (["--top-k", 257], "top-k must be 1 … 256"),
        (["--top-k", "many"], "The top k must be a whole number, not 'many'"),
        (["--top-k"], "The option --top-k needs a value"),
        (["--steps", 4], "has no option 'steps'; its options are: guidance_scale"),
        (["--cls", 4], "has no option 'cls'"),
        (["--picture", 4], "There is no option --picture here"),
        (["--caption", "a star"], "There is no option --caption here"),
        (["red", "ring"], "Unexpected argument 'red'"),
    ):
        arguments = ["draw", CAPTION, "--with", "vqvae-tiny", *map(str, options)]
        monkeypatch.setattr("sys.argv", ["t2ilearn", *arguments])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        assert stop.value.code == 2, options
        assert said in output.err and "Traceback" not in output.err, output.err

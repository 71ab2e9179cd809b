"""One class makes a system: everything that draws, measures, lists and stores can use it.

The toy below is registered here alone, and no other file knows it.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import t2ilearn
from t2ilearn import cli
from t2ilearn.data import Shapes, captions
from t2ilearn.data.grammar import read_caption
from t2ilearn.data.shapes import GROUNDS
from t2ilearn.drawing import complete, draw_request, draw_steps, redraw
from t2ilearn.systems import (
    PLANS,
    SYSTEMS,
    Options,
    Prompt,
    Request,
    System,
    evaluate_system,
    evaluation,
    registry,
)
from t2ilearn.systems.base import check_range


class Backgrounds(System):
    """Paints the background that a caption names, or white."""

    name, title, worlds = "backgrounds", "Backgrounds alone", ("shapes",)

    def steps(self, request, generator):
        grounds = [read_caption(text, self.worlds).stated.background for text in request.texts()]
        rows = [captions.BACKGROUNDS.index(ground or "white") for ground in grounds]
        colours = GROUNDS[rows].float()[:, :, None, None] / 127.5 - 1  # (B, 3, 1, 1)
        yield colours.expand(-1, -1, 64, 64)


@dataclass(frozen=True)
class Strokes(Options):
    strokes: int = 3
    width: float = 1.5
    soft: bool = False
    brush: str = "round"
    limit: float | None = None

    def __post_init__(self):
        check_range("strokes", self.strokes, 1, 9)


class Painter(System):
    """Takes prompts with weights and start pictures, and gets brighter with every stroke."""

    name, title = "painter", "Painter"
    Options, takes_start = Strokes, True

    def steps(self, request, generator):
        count = request.count * request.best_of
        start = torch.zeros(count, 3, 64, 64) if request.start is None else request.start / 255
        for stroke in range(request.options.strokes):
            shade = torch.rand(count, 1, 1, 1, generator=generator) / 9
            yield (0 * start + shade + stroke / 9).clamp(-1, 1).expand(count, 3, 64, 64)

    def scorers(self):
        return {"brightness": lambda system: lambda among: among.pictures.mean((1, 2, 3))}


CAPTION = "a small red star on a sky background"


@pytest.fixture(autouse=True)
def registered():
    """Both systems are known within each test, and unknown after it."""
    systems, plans = dict(SYSTEMS), dict(PLANS)
    for system in (Backgrounds, Painter):
        registry.register(system)
    yield
    for known, before in ((SYSTEMS, systems), (PLANS, plans)):
        known.clear()
        known.update(before)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


# --- a system of one class ---------------------------------------------------------------------


def test_it_draws_and_its_file_can_be_drawn_again(tmp_path):
    drawing = t2ilearn.draw(CAPTION, system="backgrounds", count=2)
    sky = GROUNDS[captions.BACKGROUNDS.index("sky")].float() / 127.5 - 1
    assert torch.equal(drawing.pictures, sky[None, :, None, None].expand(2, 3, 64, 64))
    assert drawing.aligned == [False, False]  # the judge looked, and there is no star
    again = redraw(drawing.save(tmp_path / "sky.png"))
    assert torch.equal(again.pictures, drawing.pictures) and again.request == drawing.request


def test_it_is_measured_in_the_worlds_that_it_learned():
    metrics = evaluate_system(registry.load("backgrounds"), n=16)
    assert metrics["test-full, as drawn"]["value"] < 0.2
    assert metrics["ceiling: real pictures"]["value"] > 0.8
    assert "ceiling: reconstructions" not in metrics  # nothing stands between it and pixels
    assert {"test-full, best of 8 by the reader", "seconds a picture in batches, as drawn"} <= set(
        metrics
    )


def test_the_studio_offers_it_and_draws_with_it():
    studio = t2ilearn.studio()
    assert studio.system.options[-2:] == ("backgrounds", "painter")
    studio.system.value, studio.caption.value, studio.count.value = "backgrounds", CAPTION, 2
    studio.draw_button.click()
    assert "0 of 2 pictures as stated" in studio.message.value
    studio.surprise_button.click()
    assert read_caption(studio.caption.value, ("shapes",))
    studio.system.value = "painter"  # which learned no world of ours
    studio.surprise_button.click()
    assert "type a caption" in studio.message.value


def test_the_command_line_lists_it_and_draws_with_it(tmp_path):
    listed = run("systems")
    assert listed.exit_code == 0, listed.output
    assert "backgrounds  Backgrounds alone\n    learned: shapes, 64×64 pixels" in listed.output
    assert "options: none\n    scorers: none" in listed.output
    assert "options: strokes=3, width=1.5, soft=False, brush=round" in listed.output
    out = tmp_path / "sky.png"
    drawn = run("draw", CAPTION, "--with", "backgrounds", "--count", 2, "--out", out)
    assert drawn.exit_code == 0 and Image.open(out).size == (128, 64), drawn.output
    measured = run("evaluate", "backgrounds", "--n", 8)
    assert measured.exit_code == 0 and "test-full, as drawn: " in measured.output


def test_it_is_not_taken_for_the_best_of_those_that_ship():
    assert registry.best() not in ("backgrounds", "painter")
    assert registry.card_of("backgrounds") is None
    assert registry.title("backgrounds") == "Backgrounds alone"


def test_its_steps_are_drawn_and_the_last_one_is_the_drawing():
    steps = list(draw_steps(CAPTION, system="painter", count=3, strokes=4))
    assert len(steps) == 4 and steps[0].mean() < steps[-1].mean()
    last = t2ilearn.draw(CAPTION, system="painter", count=3, strokes=4)
    assert torch.equal(steps[-1], last.pictures)
    steps = list(draw_steps("a star", system="vqvae-tiny", count=2, seed=4, top_k=5))
    drawn = t2ilearn.draw("a star", system="vqvae-tiny", count=2, seed=4, top_k=5)
    assert len(steps) == 8 and torch.equal(steps[-1], drawn.pictures)
    assert not any(step.requires_grad for step in steps)
    assert (steps[2][:, :, 12:] == 0).all()  # not yet drawn


@pytest.mark.parametrize(
    "wrong, message",
    [({"strokes": 0}, "strokes"), ({"count": 0}, "count"), ({"scorer": "x"}, "A scorer of")],
)
def test_steps_are_refused_when_they_are_asked_for_and_not_later(wrong, message):
    with pytest.raises(ValueError, match=message):
        draw_steps(CAPTION, **{"system": "painter", **wrong})


def test_without_a_scorer_there_is_no_best_of_many():
    with pytest.raises(ValueError, match="backgrounds has nothing that could choose the best"):
        t2ilearn.draw(CAPTION, system="backgrounds", count=1, best_of=2)
    everything = t2ilearn.draw(CAPTION, system="painter", count=4).pictures
    kept = t2ilearn.draw(CAPTION, system="painter", count=1, best_of=4).pictures
    assert torch.equal(kept[0], everything[everything.mean((1, 2, 3)).argmax()])


# --- options -----------------------------------------------------------------------------------


def test_unknown_options_are_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="backgrounds has no option 'top_p'; its options are: non"):
        t2ilearn.draw(CAPTION, system="backgrounds", top_p=0.9)
    message = "painter has no option 'top_p'; its options are: strokes, width, soft, brush, limit"
    with pytest.raises(ValueError, match=message):
        t2ilearn.draw(CAPTION, system="painter", top_p=0.9)
    with pytest.raises(ValueError, match="no option 'steps'; its options are: guidance_scale, te"):
        t2ilearn.draw(CAPTION, system="vqvae-tiny", steps=3)


@pytest.mark.parametrize("name", ["cls", "self", "given", "class", "strokes "])
def test_options_with_the_names_of_pythons_own_arguments_are_refused_too(name):
    with pytest.raises(ValueError, match="painter has no option"):
        Painter.make_options(**{name: 1})


@pytest.mark.parametrize(
    "given, made",
    [
        ({"strokes": "4", "width": "2"}, Strokes(strokes=4, width=2.0)),
        ({"strokes": torch.tensor(4), "width": 2}, Strokes(strokes=4, width=2.0)),
        ({"soft": "true", "brush": "flat"}, Strokes(soft=True, brush="flat")),
        ({"soft": False, "limit": None}, Strokes()),
        ({"limit": "0.5"}, Strokes(limit=0.5)),
    ],
)
def test_values_become_what_their_option_is(given, made):
    assert Painter.make_options(**given) == made


@pytest.mark.parametrize(
    "given, message",
    [
        ({"strokes": None}, "The strokes must be a whole number, not None"),
        ({"strokes": 2.5}, "The strokes must be a whole number, not 2.5"),
        ({"strokes": True}, "The strokes must be a whole number, not True"),
        ({"strokes": "many"}, "The strokes must be a whole number, not 'many'"),
        ({"strokes": 10**5000}, "The strokes must be 1 … 9, not a int of thousands of digits"),
        ({"width": 10**400}, "The width must be a number, not 1000"),
        ({"width": [1.0]}, r"The width must be a number, not \[1.0\]"),
        ({"width": {}}, "The width must be a number, not {}"),
        ({"limit": "none"}, "The limit must be a number, not 'none'"),
        ({"soft": "maybe"}, "The soft must be true or false, not 'maybe'"),
        ({"soft": 1}, "The soft must be true or false, not 1"),
        ({"brush": 5}, "The brush must be a word, not 5"),
        ({"strokes": 10}, "The strokes must be 1 … 9, not 10"),
    ],
)
def test_values_of_another_kind_or_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Painter.make_options(**given)


# --- requests ----------------------------------------------------------------------------------

PICTURES = torch.randint(256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"captions": ("a star", "a ring", "a star")},
        {"captions": ((Prompt("a fox"), Prompt("snow", -0.5)), "a fox", (Prompt("ink", 0.25),))},
        {"captions": ("Kätzchen 猫 🦤", "<b>", "a; b | c: 1")},
        {"start": PICTURES, "rows": 3},
        {"start": PICTURES[:1]},
        {"best_of": 4, "scorer": "brightness", "seed": 2**63 - 1},
        {"options": Strokes(strokes=2, width=0.5, soft=True, brush="flat", limit=1.0)},
    ],
)
def test_a_request_comes_back_from_its_file(tmp_path, changes):
    request = Request(("a star",) * 3, "painter", options=Strokes())
    request = replace(request, **changes)
    drawing = draw_request(request)
    again = redraw(drawing.save(tmp_path / "drawn.png"))
    assert torch.equal(again.pictures, drawing.pictures)
    assert again.request == request and again.request != replace(request, rows=request.rows + 1)
    if request.start is not None:
        assert again.request != replace(request, start=None)
        assert again.request != replace(request, start=255 - request.start)


def test_each_picture_of_a_request_is_judged_by_its_own_caption(monkeypatch):
    words = ("a red star", "a fox, flat", "a red star")
    request = Request(words, "vqgan", options=registry.find("vqgan").system.Options())
    drawing = draw_request(request)
    alone = t2ilearn.draw("a red star", system="vqgan", count=1)
    assert len(drawing.aligned) == 3 and drawing.aligned[0] == alone.aligned[0]
    assert drawing.request.caption == "a red star; a fox, flat"
    assert "drawn for: a red star; a fox, flat" in drawing._repr_html_()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"captions": ()}, "count × best-of must be 1 … 64, not 0 × 1"),
        ({"captions": ("a star",) * 65}, "count × best-of"),
        ({"captions": ((),)}, "without a prompt"),
        ({"captions": ("a star \ud800",)}, "not valid Unicode"),
        ({"captions": ((Prompt("a star", float("nan")),),)}, "weight of a prompt"),
        ({"seed": -1}, "seed"),
        ({"best_of": 0}, "best-of"),
        ({"rows": 2}, "rows of 8 stay, and none without one, not 2"),
        ({"start": PICTURES, "rows": 8}, "rows of 8 stay"),
        ({"start": PICTURES[:2]}, "from one picture, or from one for each of 3"),
        ({"start": PICTURES[:, :, :32]}, r"of shape \(3, 64, 64\)"),
    ],
)
def test_requests_that_cannot_be_drawn_are_refused(changes, message):
    request = replace(Request(("a star",) * 3, "painter", options=Strokes()), **changes)
    with pytest.raises(ValueError, match=message):
        draw_request(request)


def test_systems_that_take_one_caption_or_no_start_picture_say_so():
    prompts = (Prompt("a star"), Prompt("a ring", -1.0))
    with pytest.raises(ValueError, match="vqvae-tiny takes one caption a picture, without a w"):
        t2ilearn.draw(prompts, system="vqvae-tiny")
    assert len(t2ilearn.draw(prompts, system="painter", count=2).pictures) == 2
    assert len(t2ilearn.draw((Prompt("a star"),), system="vqvae-tiny", count=1).aligned) == 1
    with pytest.raises(ValueError, match="backgrounds cannot begin from a picture"):
        complete(torch.zeros(3, 64, 64), "a star", system="backgrounds")


# --- the best of many, as evaluation measures it -----------------------------------------------


def test_the_reader_chooses_and_the_judge_decides_what_is_right(monkeypatch):
    """Two captions, eight drawings each; the reader scores each drawing above the last."""
    right = torch.zeros(16, dtype=torch.bool)
    right[7] = right[8] = True  # the last of the first caption, the first of the second
    seen = {}

    def score(reader, pictures, asked, world):
        seen["reader"], seen["captions"] = reader, asked
        return torch.arange(16.0)

    def aligned(judge, pictures, asked, world):
        seen["judge"] = judge
        return right

    monkeypatch.setattr(evaluation, "score", score)
    monkeypatch.setattr(evaluation, "aligned", aligned)
    system, world = registry.load("backgrounds"), Shapes()
    drawn, real = [], system.generate
    monkeypatch.setattr(system, "generate", lambda r, g: drawn.append(r) or real(r, g))
    found = evaluation.best_of(system, world, n=16)
    values = [found[f"test-full, best of {n} by the reader"]["value"] for n in (1, 2, 4, 8)]
    assert values == [0.125, 0.125, 0.25, 0.5]
    # The interval is one of captions, not of drawings: two captions leave it wide.
    last = found["test-full, best of 8 by the reader"]
    assert last["low"] < 0.1 and last["high"] > 0.9
    asked = seen["captions"]
    assert asked[0] == asked[7] != asked[8] == asked[15] and len(asked) == 16
    assert [list(request.captions) for request in drawn] == [asked]
    assert seen["reader"] is evaluation.load_reader("reader")
    assert seen["judge"] is evaluation.load_reader("judge")


def test_the_best_of_many_is_drawn_as_draw_does_by_default():
    """The last of the manners that evaluation reports is the one with the default options."""
    for name in registry.names():
        system = registry.find(name).system
        assert list(system.manners().values())[-1] == system.Options()

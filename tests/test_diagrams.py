"""Diagrams: what they draw, what they refuse, and that they say everything in words as well."""

import re
import xml.etree.ElementTree as xml

import pytest

from t2ilearn.diagrams import HUES, SMALLEST, Arrow, Box, Diagram

ALT = "A picture goes through the encoder to a grid of vectors."
BOXES = [
    Box("x", "picture x", "B × 3 × 64 × 64", (0, 0), "data"),
    Box("encoder", "encoder", at=(0, 1)),
    Box("judge", "judge", at=(1, 1), kind="frozen"),
]


def texts(diagram: Diagram) -> list[str]:
    """Every piece of text in a drawing."""
    root = xml.fromstring(diagram.svg())
    return [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]


def test_every_box_note_and_label_is_drawn():
    drawn = texts(Diagram(BOXES, [Arrow("x", "encoder", "pixels")], ALT))
    assert {"picture x", "B × 3 × 64 × 64", "encoder", "pixels", "frozen"} <= set(drawn)


def test_the_svg_is_well_formed_and_says_what_it_shows():
    root = xml.fromstring(Diagram(BOXES, [Arrow("x", "encoder")], ALT + ' "<&>"').svg())
    assert root.get("role") == "img" and root.get("aria-label") == ALT + ' "<&>"'


def test_the_same_diagram_is_the_same_text_in_every_process():
    first, second = (Diagram(BOXES, [Arrow("x", "encoder")], ALT).svg() for _ in range(2))
    assert first == second and "url(#t2i" in first


def test_arrows_start_and_end_at_the_edges_of_their_boxes():
    diagram = Diagram(BOXES, [Arrow("x", "encoder"), Arrow("encoder", "judge")], ALT)
    root = xml.fromstring(diagram.svg())
    paths = [
        p.get("d") for p in root.iter("{http://www.w3.org/2000/svg}path") if p.get("fill") == "none"
    ]
    down, sideways = paths
    middle = diagram.middle(diagram.boxes["x"])
    assert down.startswith(f"M{middle[0]:g} {middle[1] + diagram.boxes['x'].height / 2:g}")
    assert sideways.startswith(f"M{diagram.middle(diagram.boxes['encoder'])[0] + 67:g} ")


@pytest.mark.parametrize(
    ("boxes", "arrows", "alt", "message"),
    [
        (BOXES, [Arrow("x", "nobody")], ALT, "not there: nobody"),
        ([*BOXES, Box("x", "again", at=(2, 2))], [], ALT, "a name and a place of its own"),
        ([*BOXES, Box("y", "same place", at=(0, 0))], [], ALT, "a name and a place of its own"),
        ([Box("far", "far", at=(4, 0))], [], ALT, "at most 4 columns"),
        (BOXES, [], "A model.", "whole sentences"),
    ],
)
def test_diagrams_that_make_no_sense_are_refused(boxes, arrows, alt, message):
    with pytest.raises(ValueError, match=message):
        Diagram(boxes, arrows, alt)


def test_an_unknown_kind_of_box_is_refused():
    with pytest.raises(ValueError, match="kind of a box"):
        Box("x", "x", kind="cloud")


def test_letters_stay_readable_on_a_narrow_page():
    narrow, wide = Diagram(BOXES, [], ALT), Diagram([*BOXES, Box("far", "far", at=(3, 0))], [], ALT)
    for diagram in (narrow, wide):
        (least,) = re.findall(r"min-width:(\d+)px", diagram.svg())
        assert int(least) / diagram.size[0] > 0.8
    assert SMALLEST * narrow.size[0] < 290, "two columns fit a phone of 320 pixels"
    assert "tabindex" not in narrow.html() and 'tabindex="0"' in wide.html()


def test_an_arrow_around_a_box_has_room_beside_it():
    boxes = [Box("a", "a", at=(0, 0)), Box("b", "b", at=(0, 1)), Box("c", "c", at=(0, 2))]
    plain = Diagram(boxes, [Arrow("a", "c")], ALT)
    for bend in (-30, 30):
        around = Diagram(boxes, [Arrow("a", "c", "kept", bend=bend)], ALT)
        assert around.size[0] > plain.size[0] + 30


def test_a_gradient_has_a_colour_of_its_own():
    drawn = Diagram(BOXES, [Arrow("encoder", "x", gradient=True)], ALT).svg()
    assert HUES["loss"] in drawn and "stroke-dasharray" in drawn

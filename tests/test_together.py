"""Worlds side by side: whose scene, whose picture, whose caption."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from t2ilearn import weights
from t2ilearn.data import (
    CaptionedPictures,
    CaptionError,
    CaptionTokenizer,
    Emoji,
    Shapes,
    TinyShapes,
    Together,
    captions,
)
from t2ilearn.data.bpe import SHARED, SHARED_LENGTH
from t2ilearn.data.captions import Stated
from t2ilearn.data.emoji_captions import TEMPLATES, StatedEmoji, describe_emoji
from t2ilearn.data.grammar import read_caption
from t2ilearn.data.together import worlds_in

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def emoji():
    """Made once, since it reads archives."""
    return Emoji()


@pytest.fixture(scope="module")
def both(emoji):
    return Together((Shapes(), emoji))


def test_it_is_a_world(both):
    assert isinstance(both, CaptionedPictures)
    assert both.name == "shapes + emoji" and worlds_in(both.name) == ("shapes", "emoji")
    assert worlds_in("folder") == ("folder",)


@pytest.mark.parametrize("turns, shares", [(None, (6, 6)), ((0, 1, 1), (4, 8)), ((1, 0), (6, 6))])
def test_the_worlds_take_turns(emoji, turns, shares):
    world = Together((Shapes(), emoji), turns)
    scenes = world.scenes(12, generator=seeded())
    cycle = list(turns or (0, 1))
    assert scenes[:, 0].tolist() == cycle * (12 // len(cycle))
    assert tuple((scenes[:, 0] == k).sum() for k in (0, 1)) == shares
    assert (scenes[scenes[:, 0] == 1][:, 4:] == -1).all()


def test_each_scene_goes_to_its_own_world(both):
    scenes = both.scenes(9, generator=seeded(1))
    shapes, emoji = both.worlds
    found, generator = both.pictures(scenes, seeded(2)), seeded(2)
    assert torch.equal(found[0::2], shapes.pictures(scenes[0::2, 1:], generator))
    assert torch.equal(found[1::2], emoji.pictures(scenes[1::2, 1:4], generator))
    said = both.mixed_captions(scenes, seeded(3))
    for row, caption in enumerate(said):
        assert read_caption(caption, [both.worlds[row % 2].name]).world is type(
            both.worlds[row % 2]
        )
    rest = both.pictures(scenes[1::2], seeded(2))  # of one world alone
    assert torch.equal(rest, emoji.pictures(scenes[1::2, 1:4], seeded(2)))


def test_samples_and_captions_belong_together(both):
    batch = both.sample(6, generator=seeded(4))
    assert batch.pictures.shape == (6, 3, 64, 64) and batch.pictures.abs().max() <= 1
    for world, kind, part in (
        ("shapes", Stated, slice(0, 6, 2)),
        ("emoji", StatedEmoji, slice(1, 6, 2)),
    ):
        stated = [read_caption(caption, [world]).stated for caption in batch.captions[part]]
        assert all(isinstance(each, kind) for each in stated)


def test_test_sets_are_the_worlds_own_and_one_mixed(both, emoji):
    assert both.test_sets[0] == "mixed"
    assert {"shapes: test-full", "shapes: composition", "emoji: held-out"} < set(both.test_sets)
    own = emoji.test_set("held-out", 3)
    there = both.test_set("emoji: held-out", 3)
    assert torch.equal(own.pictures, there.pictures) and own.captions == there.captions
    mixed = both.test_set("mixed", 5)
    assert torch.equal(mixed.pictures[0::2], Shapes().test_set("test-full", 3).pictures)
    assert mixed.captions[1::2] == emoji.test_set("seen", 2).captions
    with pytest.raises(ValueError, match="Unknown test set"):
        both.test_set("test-full")


def test_bad_worlds_and_scenes_are_refused(both, emoji):
    with pytest.raises(ValueError, match="none at all"):
        Together(())
    with pytest.raises(ValueError, match="one resolution"):
        Together((Shapes(), TinyShapes()))
    with pytest.raises(ValueError, match="a name each"):
        Together((Shapes(), Shapes()))
    with pytest.raises(ValueError, match="needs its turns"):
        Together((Shapes(), emoji), (0, 0))
    with pytest.raises(ValueError, match="number of a world"):
        both.pictures(torch.full((2, 12), 7), seeded())


# --- captions of either world -------------------------------------------------------------------


def test_a_caption_is_read_in_its_own_world():
    star = read_caption("a small red star")
    assert star.stated.objects[0].colour == "red" and star.text == "a small red star"
    dodo = read_caption("a dodo, outline, on a sky background")
    assert dodo.stated == StatedEmoji("dodo", "outline", "sky") and dodo.world is Emoji
    assert isinstance(read_caption("a star").stated, Stated)  # either world could read it
    assert read_caption("a star, glossy").stated == StatedEmoji("star", "glossy")
    assert isinstance(read_caption("a star", ["emoji"]).stated, StatedEmoji)


@pytest.mark.parametrize(
    "caption, message",
    [
        ("a dodp, outline", "Nearest known: dodo"),
        ("a gloomy fox", "fox"),
        ("a fox, cubist", "Unknown style 'cubist'"),
        ("a red small star", "size"),  # words of shapes alone: their grammar speaks
        ("", "empty"),
        ("a smal red star above a blue ring", "Unknown word 'smal'.*small"),  # a slip of the pen
        ("a mauve star", "Unknown word 'mauve'"),
        ("a glossy red star above a blue ring", "Nothing here is called"),  # a style was named
        ("a dodo on a red background", "Unknown background 'red'"),  # an emoji was named
        ("a small red dodo", "Nearest known: dodo"),
        ("🦤", "Nothing here is called '🦤'"),
        ("a dodo left of a red star", "Unknown word 'dodo'"),  # only shapes stand beside each other
    ],
)
def test_errors_come_from_the_world_whose_words_they_are(caption, message):
    with pytest.raises(CaptionError, match=message):
        read_caption(caption)


def test_a_world_that_was_not_learned_is_not_offered():
    with pytest.raises(CaptionError, match="Unknown word 'dodo'"):
        read_caption("a dodo", ["tiny-shapes"])
    with pytest.raises(ValueError, match="No grammar for photos"):
        read_caption("a dodo", ["photos"])
    with pytest.raises(ValueError, match="at least one world"):
        read_caption("a dodo", [])


# --- one tokenizer for both ---------------------------------------------------------------------


def test_the_shared_tokenizer_is_what_the_tool_learns():
    from build_tokenizer import learn

    shipped = json.loads(SHARED.read_text(encoding="utf-8"))["model"]
    learned = json.loads(learn()._bpe.to_str())["model"]
    assert shipped["merges"] == learned["merges"] and shipped["vocab"] == learned["vocab"]


def test_every_caption_of_both_grammars_fits(emoji):
    tokenizer = CaptionTokenizer.shared()
    assert tokenizer.vocabulary == 1024 and tokenizer.length == SHARED_LENGTH
    longest = [
        describe_emoji(phrase, "outline", "black", form)
        for phrases in emoji.phrases
        for phrase in phrases
        for form in range(TEMPLATES)
    ]
    longest += Shapes().test_scenes("test-full", 2000)[1]
    assert tokenizer.encode(longest).shape == (len(longest), SHARED_LENGTH)


def test_the_words_of_shapes_stay_whole():
    """Else an attribute would be spread over pieces that it shares with other words."""
    tokenizer = CaptionTokenizer.shared()
    assert [w for w in captions.VOCABULARY[3:] if len(tokenizer.pieces(w)) > 1] == []


# --- what the second world cost the first -------------------------------------------------------


def test_the_cards_hold_what_is_left_of_shapes_against_models_of_shapes_alone():
    """Reconstructions lost a few points with the second world, and drawings at most three."""
    measured = {"vqvae-book": "judge on reconstructions", "prior-book": "test-full, as drawn"}
    lost = {}
    for name, metric in measured.items():
        card = weights.load(name).card
        if "shapes alone" not in card.note:
            pytest.skip(f"{name} was trained on both worlds from the start")
        before = re.search(r"shapes alone.*?(\d+\.\d) ± \d\.\d %", card.note)
        lost[name] = float(before[1]) - 100 * card.metrics[metric]["value"]
    assert 0 < lost["vqvae-book"] < 10 and lost["prior-book"] <= 3

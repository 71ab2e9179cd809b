"""The shapes world: captions say what pictures show, and splits keep their promises."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2ilearn.data import CaptionError, Shapes, TinyShapes, encode, parse, shapes
from t2ilearn.data import captions as words
from t2ilearn.judging.alignment import matches
from t2ilearn.models import tokens

WORLDS = (Shapes(), TinyShapes())


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
@pytest.mark.parametrize("said", [1.0, 0.5])
def test_every_caption_parses_back_to_its_scene(world, said, generator):
    scenes = world.scenes(500, generator=generator)
    captions = world.captions(scenes, said=said, generator=generator)
    for scene, caption in zip(scenes.tolist(), captions, strict=True):
        stated = parse(caption)
        assert matches(scene, stated), caption
        if said == 1.0:
            everything = shapes.state(scene, False, [True] * 7)
            assert stated.canonical() == everything.canonical()


def test_a_caption_does_not_match_another_scene(generator):
    """Change any one attribute that a full caption states, and the match is gone."""
    scenes = Shapes().scenes(60, generator=generator)
    captions = Shapes().captions(scenes, said=1.0, generator=generator)
    for scene, caption in zip(scenes.tolist(), captions, strict=True):
        for column, value in enumerate(scene):
            if value >= 0:
                choices = shapes.CHOICES[shapes.FIELDS[column].rsplit("_", 1)[0]]
                changed = list(scene)
                changed[column] = (value + 1) % choices
                assert not matches(changed, parse(caption)), (caption, shapes.FIELDS[column])


def test_all_templates_and_orders_parse():
    thing = words.StatedObject("star", "small", "striped", "orange")
    other = words.StatedObject("ring")
    for template, relation, place in itertools.product(
        range(words.TEMPLATES), words.RELATIONS, (*words.BACKGROUNDS, None)
    ):
        stated = words.Stated((thing, other), relation, place)
        assert parse(words.describe(stated, template)) == stated
        single = words.Stated((thing,), None, place)
        assert parse(words.describe(single, template)) == single


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
def test_no_training_picture_or_caption_holds_a_held_out_pair(world, generator):
    scenes = world.scenes(20_000, generator=generator)
    assert not shapes.holds_held_out_pair(scenes).any()
    pairs = {(words.COLOURS[c], words.SHAPES[s]) for c, s in shapes.HELD_OUT}
    for caption in world.mixed_captions(scenes[:1500], generator):
        assert not {(thing.colour, thing.shape) for thing in parse(caption).objects} & pairs


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
def test_every_composition_caption_holds_one(world):
    pairs = {(words.COLOURS[c], words.SHAPES[s]) for c, s in shapes.HELD_OUT}
    for caption in world.test_set("composition", 200).captions:
        assert {(thing.colour, thing.shape) for thing in parse(caption).objects} & pairs


def test_held_out_pairs_use_each_colour_and_each_shape_once():
    colours, kinds = zip(*shapes.HELD_OUT, strict=True)
    assert sorted(colours) == sorted(kinds) == list(range(8))


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
def test_splits_are_disjoint(world, generator):
    def rows(split, n=4000):
        return {tuple(s) for s in world.scenes(n, split, generator=generator).tolist()}

    train, tested, composed = rows("train"), rows("test"), rows("composition", 1000)
    assert not train & composed and not tested & composed
    if world.test_share is None:  # too few scenes to keep any back, and the docstring says so
        assert train == tested and len(train) == 112
    else:
        assert not train & tested
    assert not shapes.holds_held_out_pair(torch.tensor(sorted(tested))).any()


def test_test_sets_repeat_and_have_the_stated_mix():
    scenes, captions = Shapes().test_scenes("test-full")
    again, captions_again = Shapes().test_scenes("test-full")
    assert torch.equal(scenes, again) and captions == captions_again and len(captions) == 2000
    two = scenes[:, 0].float().mean().item()
    assert abs(two - 0.7) < 4 * math.sqrt(0.21 / 2000)
    assert all(
        thing.size and thing.pattern and thing.colour
        for c in captions[:500]
        for thing in parse(c).objects
    )


@given(st.integers(0, 2**31), st.sampled_from([16, 32, 48, 64]))
@settings(max_examples=20, deadline=None)
def test_pictures_are_in_range_and_repeat(seed, resolution):
    world = Shapes(resolution)
    first = world.sample(8, generator=torch.Generator().manual_seed(seed))
    second = world.sample(8, generator=torch.Generator().manual_seed(seed))
    assert first.pictures.shape == (8, 3, resolution, resolution)
    assert first.pictures.abs().max() <= 1 and torch.isfinite(first.pictures).all()
    assert torch.equal(first.pictures, second.pictures) and first.captions == second.captions


def test_pictures_are_antialiased_alike_at_every_resolution(generator):
    """A picture drawn large and shrunk is the picture drawn small: within a grey level or three."""
    scenes = Shapes().scenes(32, generator=generator)
    large = shapes.render(scenes, 256, torch.Generator().manual_seed(1))
    small = shapes.render(scenes, 64, torch.Generator().manual_seed(1))
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    assert (shrunk - small).abs().mean() * 127.5 < 1.0


def test_objects_stay_inside_and_apart(generator):
    """Nothing touches the border, and the two halves of a pair do not overlap."""
    scenes = Shapes().scenes(400, generator=generator)
    scenes = scenes[scenes[:, 0] == 1]
    pictures = shapes.render(scenes, 64, generator)
    ground = shapes.GROUNDS[scenes[:, 2]].div(127.5).sub(1)[..., None, None]
    painted = (pictures - ground).abs().amax(1) > 0.02
    assert not painted[:, 0].any() and not painted[:, -1].any()
    assert not painted[:, :, 0].any() and not painted[:, :, -1].any()
    for axis in (0, 1):
        lines = painted[scenes[:, 1] == axis].any(2 - axis)  # (n, 64): is the line painted?
        middle = lines[:, 28:36]
        assert (~middle).any(1).all()


def _colour_blind(rgb, matrix):
    """Machado et al. 2009, severity 1, in linear light."""
    linear = (rgb / 255) ** 2.2
    return (linear @ torch.tensor(matrix).T).clamp(0, 1)


def _lab(linear):
    to_xyz = torch.tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / torch.tensor([0.9505, 1.0, 1.089])
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    lightness = 116 * f[:, 1] - 16
    return torch.stack([lightness, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize(
    "matrix",
    [
        [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]],
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
    ],
    ids=["typical", "protanopia", "deuteranopia"],
)
def test_colours_are_distinct_also_to_colour_blind_readers(matrix):
    lab = _lab(_colour_blind(shapes.PALETTE, matrix))
    apart = torch.cdist(lab, lab) + 1e3 * torch.eye(8)
    assert apart.min() > 15, apart.min()


def test_encode_pads_and_ends():
    ids = encode(["a star", "a small red star above a large ring"])
    assert ids.shape == (2, words.TEXT_LENGTH)
    assert ids[0, 2] == tokens.END and (ids[0, 3:] == tokens.PAD).all()
    assert words.decode(ids[1].tolist()) == "a small red star above a large ring"
    null = tokens.null_caption(3, words.TEXT_LENGTH)
    assert (null[:, 0] == tokens.NULL).all() and (null[:, 1] == tokens.END).all()
    longest = Shapes().captions(
        Shapes().scenes(2000, generator=torch.Generator().manual_seed(5)),
        said=1.0,
        generator=torch.Generator().manual_seed(5),
    )
    assert max(len(c.split()) for c in longest) < words.TEXT_LENGTH


# --- bad captions: every one a CaptionError, never another exception, never a silent pass ---

_TYPOS = [w[:-1] + "q" for w in words.VOCABULARY[3:] if len(w) > 3]


def _bad_captions():
    rng = random.Random(0)
    good = Shapes().captions(
        Shapes().scenes(260, generator=torch.Generator().manual_seed(3)),
        said=1.0,
        generator=torch.Generator().manual_seed(4),
    )
    for n, caption in enumerate(good):
        parts = caption.split()
        spot = rng.randrange(len(parts))
        kind = n % 5
        if kind == 0:  # a misspelt word
            parts[spot] = rng.choice(_TYPOS)
        elif kind == 1:  # cut before the shape
            last = max(i for i, w in enumerate(parts) if w in words.SHAPES)
            parts = parts[:last]
        elif kind == 2:  # something after the end
            parts = [*parts, "above"]
        elif kind == 3:  # adjectives in an impossible order
            first = min(i for i, w in enumerate(parts) if w in words.SHAPES)
            parts = [*parts[:first], parts[first], *parts[first - 1 : first], *parts[first + 1 :]]
        else:  # the caption twice, with no relation between
            parts = [*parts, *parts]
        yield " ".join(parts)


BAD = [
    *_bad_captions(),
    "",
    "   ",
    "...",
    "🦤",
    "<pad>",
    "<null>",
    "star",
    "a",
    "a red",
    "a red red star",
    "a red blue star",
    "a star is",
    "a star above",
    "above a star",
    "a star above a ring below a heart",
    "a star on a star",
    "a star on white background",
    "a star on a red background",
    "on a white background a star on a black background",
    "a star\x00",
    "<script>alert(1)</script>",
    "a " * 500 + "star",
    "x" * 10_000,
]


def test_bad_captions_raise_caption_errors():
    assert len(BAD) >= 200
    for caption in BAD:
        with pytest.raises(CaptionError) as caught:
            parse(caption)
        assert 10 < len(str(caught.value)) < 600, caption


def test_unknown_words_list_the_nearest():
    with pytest.raises(CaptionError, match="purple"):
        parse("a purpel star")
    with pytest.raises(CaptionError, match="triangle"):
        parse("a red traingle")


@given(st.lists(st.sampled_from(words.VOCABULARY[3:]), min_size=1, max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_words_parse_or_raise_a_caption_error(some):
    caption = " ".join(some)
    try:
        stated = parse(caption)
    except CaptionError:
        return
    assert parse(words.describe(stated)) == stated


def test_unknown_split_and_test_set(generator):
    with pytest.raises(ValueError, match="Unknown split"):
        Shapes().scenes(4, "trian", generator=generator)
    with pytest.raises(ValueError, match="test-full"):
        Shapes().test_set("full")
    with pytest.raises(ValueError, match="at least 16"):
        Shapes(8)


def test_training_captions_keep_to_reading_order_more_often_than_test_captions():
    """In training one pair of four is described from the lower or right object, in tests one of
    two: else nothing short of reading order and relation together tells who stands where."""
    world, generator = Shapes(), torch.Generator().manual_seed(0)
    scenes = world.scenes(4000, generator=generator)

    def swapped(captions):
        stated = [parse(caption).relation for caption in captions]
        pairs = [relation for relation in stated if relation]
        return sum(relation in ("below", "right of") for relation in pairs) / len(pairs)

    assert swapped(world.mixed_captions(scenes, generator)) == pytest.approx(0.25, abs=0.03)
    assert swapped(world.test_scenes("test-full")[1]) == pytest.approx(0.5, abs=0.04)

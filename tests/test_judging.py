"""The reader reads every attribute and recognises junk; alignment and binding count what was read;
and the report puts an interval around each count."""

import math

import pytest
import torch

from t2ilearn.data import Emoji, Shapes, TinyShapes
from t2ilearn.data import shapes as world
from t2ilearn.data.captions import CaptionError, parse
from t2ilearn.data.emoji_captions import concept_numbers
from t2ilearn.data.grammar import read_caption
from t2ilearn.judging import alignment, report
from t2ilearn.judging.alignment import aligned, binding, facts_of, matches, measured, score
from t2ilearn.judging.reader import (
    UNREADABLE,
    Reader,
    ReaderConfig,
    Reading,
    junk,
    load_reader,
    read,
    read_emoji,
    reader_loss,
)

SMALL = ReaderConfig(resolution=32, channels=(16, 32), features=64)


def test_the_shapes_of_trunk_features_and_answers(generator):
    reader = Reader(SMALL)
    pictures = Shapes(32).sample(3, generator=generator).pictures
    assert [m.shape[1:] for m in reader.trunk(pictures)] == [(16, 16, 16), (32, 8, 8)]
    assert reader.features(pictures).shape == (3, 64)
    assert [a.shape[1] for a in reader(pictures)] == [3, 2, 4, 2, 4, 8, 8, 2, 4, 8, 8]


def test_a_reader_overfits_eight_pictures(generator):
    torch.manual_seed(0)
    reader = Reader(SMALL)
    scenes = Shapes().scenes(8, generator=generator)
    pictures = world.render(scenes, 32, generator)
    optimiser = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    for _ in range(80):
        loss = reader_loss(reader(pictures), scenes).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.02
    reading = read(reader, pictures)
    assert torch.equal(reading.facts, scenes) and reading.readable.all()


def test_absent_attributes_carry_no_loss(generator):
    reader = Reader(SMALL)
    pictures = Shapes(32).sample(4, generator=generator).pictures
    facts = torch.full((4, 11), -1)
    facts[:, 0] = UNREADABLE
    logits = [a.detach().requires_grad_() for a in reader(pictures)]
    reader_loss(logits, facts).total.backward()
    assert logits[0].grad.abs().sum() > 0
    assert all(a.grad is None or not a.grad.any() for a in logits[1:])


def test_the_emoji_judge_lists_five_concepts_and_never_unreadable(generator):
    config = ReaderConfig(32, (16, 16), 32, answers=(9, 5, 4))
    judge, pictures = Reader(config).eval(), torch.rand(7, 3, 32, 32, generator=generator) * 2 - 1
    with torch.no_grad():
        concept, style, ground = judge(pictures)
    assert concept.shape == (7, 9) and style.shape == (7, 5) and ground.shape == (7, 4)
    reading = read_emoji(judge, pictures, chunk=3)
    order = concept[:, :8].argsort(dim=1, descending=True)
    assert torch.equal(reading.concepts, order[:, :5])
    assert torch.equal(reading.styles, style.argmax(1))
    assert torch.equal(reading.backgrounds, ground.argmax(1))
    assert torch.equal(reading.readable, concept.argmax(1) != 8)
    judge.heads.bias.data[8] = 100.0
    blind = read_emoji(judge, pictures)
    assert not blind.readable.any() and (blind.concepts < 8).all()


class EmojiAnswers(Reader):
    """A judge that always sees an ink dodo on white, with four other concepts behind the dodo."""

    blind = False

    def forward(self, pictures):
        numbers, n = concept_numbers(), len(pictures)
        dodo, fox, owl = (numbers[name] for name in ("dodo", "fox", "owl"))
        concept, style, ground = torch.zeros(n, 1325), torch.zeros(n, 5), torch.zeros(n, 4)
        concept[:, dodo], concept[:, fox] = 5.0, 4.0
        concept[:, [i for i in range(5) if i not in (dodo, fox, owl)][:3]] = 3.0
        concept[:, -1] = 9.0 if self.blind else 0.0
        style[:, 4], ground[:, 0] = 1.0, 1.0
        return [concept, style, ground]


def test_emoji_are_judged_by_what_their_captions_state():
    judge = EmojiAnswers(SMALL)
    rows = {
        "a dodo": True,
        "a fox, ink, on a white background": True,  # in the first five
        "an owl, ink, on a white background": False,
        "a dodo, flat": False,
        "a dodo, ink, on a black background": False,
    }
    pictures = torch.zeros(len(rows), 3, 32, 32)
    assert aligned(judge, pictures, list(rows), Emoji).tolist() == list(rows.values())
    read_before = [read_caption(caption, ("emoji",)) for caption in rows]
    assert aligned(judge, pictures, read_before, Emoji).tolist() == list(rows.values())
    judge.blind = True
    assert not aligned(judge, pictures, list(rows), Emoji).any()
    with pytest.raises(ValueError, match="5 pictures but 1"):
        aligned(judge, pictures, ["a dodo"], Emoji)


def test_what_a_world_reports_is_counted_by_measure():
    """The first concept, the first five and the style, each alone; what a caption does not state
    cannot be right."""
    judge, pictures = EmojiAnswers(SMALL), torch.zeros(4, 3, 32, 32)
    captions = ["a dodo, ink", "a fox, ink", "an owl, flat", "a dodo"]
    found = measured(judge, pictures, captions, Emoji)
    assert found["concept"].tolist() == [True, False, False, True]
    assert found["concept in the first five"].tolist() == [True, True, False, True]
    assert found["style"].tolist() == [True, True, False, False]
    judge.blind = True
    assert not any(right.any() for right in measured(judge, pictures, captions, Emoji).values())


def test_every_distinct_caption_is_parsed_once(monkeypatch):
    parsed = []

    class Counting(Shapes):
        @staticmethod
        def read(caption):
            parsed.append(caption)
            return parse(caption)

    captions = ["a star", "a red ring", "a star", "a star"]
    assert facts_of(captions, Counting) == facts_of(captions)
    assert parsed == ["a star", "a red ring"]
    with pytest.raises(CaptionError, match="Unknown word"):
        facts_of(["a mauve star"])


def test_unreadable_pictures_count_as_wrong(generator):
    """A reader that calls everything unreadable aligns nothing, whatever else it says."""
    scenes = Shapes().scenes(6, generator=generator)
    captions = Shapes().captions(scenes, said=1.0, generator=generator)

    class Blind(Reader):
        def forward(self, pictures):
            perfect = [
                torch.nn.functional.one_hot(scenes[:, c].clamp(min=0), n).float()
                for c, n in enumerate(self.config.answers)
            ]
            perfect[0][:, UNREADABLE] = 2.0 if self.blind else 0.0
            return perfect

    reader, pictures = Blind(SMALL), torch.zeros(6, 3, 32, 32)
    reader.blind = False
    assert aligned(reader, pictures, captions).all()
    reader.blind = True
    assert not aligned(reader, pictures, captions).any()


def test_facts_match_whatever_a_caption_does_not_state():
    scene = [1, 0, 0, 0, 1, 0, 3, 1, 0, 4, 5]  # small striped red star above large solid blue ring
    for caption, right in {
        "a star above a ring": True,
        "a ring below a star": True,
        "a ring above a star": False,
        "a small striped red star above a large solid blue ring on a white background": True,
        "a red star above a blue ring on a black background": False,
        "a blue star above a red ring": False,
        "a star": False,
        "a star left of a ring": False,
    }.items():
        assert matches(scene, parse(caption)) is right, caption


def test_pictures_of_another_shape_or_number_are_refused(unchecked):
    reader = Reader(SMALL)
    with pytest.raises(ValueError, match="shape"):
        reader(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match="2 pictures but 1"):
        aligned(reader, torch.zeros(2, 3, 32, 32), ["a star"])


# --- the readers that ship ---


@pytest.mark.parametrize("name, bar", [("judge", 0.995), ("reader", 0.98)])
def test_shipped_readers_read_real_pictures(name, bar):
    reader = load_reader(name)
    test = Shapes().test_set("test-full", 600)
    assert aligned(reader, test.pictures, test.captions).float().mean() >= bar
    shuffled = test.captions[1:] + test.captions[:1]
    assert aligned(reader, test.pictures, shuffled).float().mean() < 0.02


def test_judge_reads_the_tiny_world_and_held_out_pairs():
    judge = load_reader("judge")
    tiny = TinyShapes().test_set("test-full", 400)
    assert aligned(judge, tiny.pictures, tiny.captions).float().mean() >= 0.98
    composed = Shapes().test_set("composition", 400)
    assert aligned(judge, composed.pictures, composed.captions).float().mean() >= 0.99


def test_the_judge_calls_junk_unreadable(generator):
    pictures = Shapes().sample(200, generator=generator).pictures
    assert read(load_reader("judge"), junk(pictures, generator)).readable.float().mean() < 0.1


def test_score_prefers_the_caption_that_was_drawn(generator):
    reader = load_reader("reader")
    test = Shapes().test_set("test-full", 64)
    own = score(reader, test.pictures, test.captions)
    other = score(reader, test.pictures, test.captions[1:] + test.captions[:1])
    assert (own > other).float().mean() > 0.95


# --- binding -----------------------------------------------------------------------------------


def facts_in(caption):
    """The eleven facts of a caption that states everything but the background."""
    facts = [0] * 11
    for column, value in facts_of([caption])[0]:
        facts[column] = value
    return facts


def test_binding_counts_which_object_has_which_attribute(monkeypatch):
    """Pairs that are both there, once at their own object's place and once exchanged."""
    said = "a small solid red star above a large dotted blue star"  # one shape: nothing to exchange
    row = facts_in(said)
    exchanged = row.copy()
    exchanged[5], exchanged[9] = row[9], row[5]
    other = row.copy()
    other[5] = 6  # neither of the two colours
    facts = torch.tensor([row, exchanged, other, row])
    captions = [said, said, said, "a red star"]
    reading, reader = Reading(facts, torch.ones(4, dtype=torch.bool)), Reader()
    monkeypatch.setattr(alignment, "read", lambda reader, pictures: reading)
    found = binding(reader, torch.zeros(4, 3, 8, 8), captions)
    assert found.right.tolist() == [True, False] and found.rows.tolist() == [[0], [1]]
    both = "a small solid red star above a large dotted blue ring"
    reading = Reading(torch.tensor([facts_in(both)]), torch.ones(1, dtype=torch.bool))
    found = binding(reader, torch.zeros(1, 3, 8, 8), [both])
    assert found.right.tolist() == [True, True] and found.rows.tolist() == [[0], [0]]


# --- the report --------------------------------------------------------------------------------


@pytest.mark.parametrize("right, n", [(0, 50), (50, 50), (25, 50), (1990, 2000)])
def test_shares_have_wilsons_interval(right, n):
    value = report.share(torch.arange(n) < right)
    p, z = right / n, 1.96
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    high = centre + value["half_width"]
    # Wilson's bounds are where the null hypothesis is just rejected.
    assert abs(p - high) == pytest.approx(z * math.sqrt(max(0.0, high * (1 - high)) / n), abs=2e-3)
    assert value["value"] == pytest.approx(p, abs=1e-4) and value["half_width"] > 0


def test_pictures_that_belong_together_widen_the_interval(generator):
    """Thirty pictures of one drawing are no thirty drawings: ten groups, right or wrong as one."""
    groups = torch.arange(10).repeat_interleave(30)[:, None]
    right = (torch.arange(10) < 6).repeat_interleave(30)
    alone, together = report.share(right), report.share(right, groups)
    assert alone["value"] == together["value"] == 0.6
    # The normal interval of ten independent answers, by the sample's own deviation.
    expected = 1.96 * math.sqrt(0.6 * 0.4 / 9)
    assert together["half_width"] == pytest.approx(expected, abs=1e-4)
    assert together["half_width"] > 4 * alone["half_width"]
    own = report.share(right, torch.arange(300)[:, None])  # each picture a group of its own
    assert own["half_width"] == pytest.approx(alone["half_width"], abs=2e-3)


def test_damage_is_reported_and_the_floor_is_low():
    reader = Reader(ReaderConfig(64, (16, 16), 32))
    metrics = report.evaluate_reader(reader, Shapes(), n=20)
    assert metrics["floor (captions shuffled)"]["value"] < 0.3
    assert {"real", "blur 3x3", "noise 0.1", "jpeg 50", "at 32 px"} <= set(metrics)


def test_blur_and_jpeg_change_little_and_nothing_in_place(generator):
    pictures = Shapes().sample(4, generator=generator).pictures
    before = pictures.clone()
    for damaged in (report.blur(pictures), report.jpeg(pictures, 90)):
        assert damaged.shape == pictures.shape
        assert 0 < (damaged - pictures).abs().mean() < 0.1
    assert torch.equal(pictures, before)
    flat = torch.full((1, 3, 16, 16), 0.25)
    assert torch.allclose(report.blur(flat), flat)


def test_distances_are_measured_to_one_reference_set():
    """Its floor is the distance of real test pictures, which no drawing of noise reaches."""
    world, judge = TinyShapes(), load_reader("judge")
    real = world.test_set("test-full", 24).pictures
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = report.distances(judge, world, {"": noise, ", floor (real)": real}, n=24)
    name = "Fréchet distance in reader features"
    assert found[name]["value"] > 4 * found[f"{name}, floor (real)"]["value"] > 0
    assert found["precision"] < found["precision, floor (real)"]

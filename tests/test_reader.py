"""The reader reads every attribute, knows junk, and never moves under a judge's hands."""

import pytest
import torch

from t2ilearn.data import Shapes, TinyShapes
from t2ilearn.data import shapes as world
from t2ilearn.data.captions import parse
from t2ilearn.data.emoji_captions import StatedEmoji, concept_numbers
from t2ilearn.drawing import load_reader
from t2ilearn.reader import (
    UNREADABLE,
    Reader,
    ReaderConfig,
    aligned,
    aligned_emoji,
    junk,
    matches,
    read,
    read_emoji,
    reader_loss,
    score,
)

SMALL = ReaderConfig(resolution=32, channels=(16, 32), features=64)


def test_shapes_of_everything(generator):
    reader = Reader(SMALL)
    pictures = Shapes(32).sample(3, generator=generator).pictures
    assert [m.shape[1:] for m in reader.trunk(pictures)] == [(16, 16, 16), (32, 8, 8)]
    assert reader.features(pictures).shape == (3, 64)
    assert [a.shape[1] for a in reader(pictures)] == [3, 2, 4, 2, 4, 8, 8, 2, 4, 8, 8]


def test_overfits_eight_pictures(generator):
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
    judge, pictures = Reader(config).eval(), torch.randn(7, 3, 32, 32, generator=generator)
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


def test_emoji_are_judged_by_what_is_said():
    """A judge that always sees an ink dodo on white, with four other concepts behind the dodo."""
    numbers = concept_numbers()
    dodo, fox, owl = (numbers[name] for name in ("dodo", "fox", "owl"))

    class Sees(Reader):
        def forward(self, pictures):
            n = len(pictures)
            concept, style, ground = torch.zeros(n, 1325), torch.zeros(n, 5), torch.zeros(n, 4)
            concept[:, dodo], concept[:, fox] = 5.0, 4.0
            concept[:, [i for i in range(5) if i not in (dodo, fox, owl)][:3]] = 3.0
            concept[:, -1] = 9.0 if self.blind else 0.0
            style[:, 4], ground[:, 0] = 1.0, 1.0
            return [concept, style, ground]

    judge = Sees(SMALL)
    judge.blind = False
    rows = {
        StatedEmoji("dodo"): True,
        StatedEmoji("fox", "ink", "white"): True,  # in the first five
        StatedEmoji("owl", "ink", "white"): False,
        StatedEmoji("dodo", "flat"): False,
        StatedEmoji("dodo", "ink", "black"): False,
    }
    pictures = torch.zeros(len(rows), 3, 32, 32)
    assert aligned_emoji(judge, pictures, list(rows)).tolist() == list(rows.values())
    judge.blind = True
    assert not aligned_emoji(judge, pictures, list(rows)).any()
    with pytest.raises(ValueError, match="5 pictures but 1"):
        aligned_emoji(judge, pictures, [StatedEmoji("dodo")])


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


def test_matches_only_what_is_said():
    scene = world.Shapes().scenes(1, generator=torch.Generator().manual_seed(1))[0].tolist()
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


def test_bad_input(unchecked):
    reader = Reader(SMALL)
    with pytest.raises(ValueError, match="shape"):
        reader(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match="2 pictures but 1"):
        aligned(reader, torch.zeros(2, 3, 32, 32), ["a star"])


# --- the readers that ship ---


@pytest.mark.parametrize("name, bar", [("judge", 0.995), ("reader", 0.98)])
def test_shipped_readers_read_real_pictures(name, bar):
    reader = load_reader(name)
    test = Shapes().test_set("test-full", 1000)
    assert aligned(reader, test.pictures, test.captions).float().mean() >= bar
    shuffled = test.captions[1:] + test.captions[:1]
    assert aligned(reader, test.pictures, shuffled).float().mean() < 0.02


def test_judge_reads_the_tiny_world_and_held_out_pairs():
    judge = load_reader("judge")
    tiny = TinyShapes().test_set("test-full", 400)
    assert aligned(judge, tiny.pictures, tiny.captions).float().mean() >= 0.98
    composed = Shapes().test_set("composition", 400)
    assert aligned(judge, composed.pictures, composed.captions).float().mean() >= 0.99


def test_judge_knows_junk(generator):
    pictures = Shapes().sample(200, generator=generator).pictures
    assert read(load_reader("judge"), junk(pictures, generator)).readable.float().mean() < 0.1


def test_score_prefers_the_caption_that_was_drawn(generator):
    reader = load_reader("reader")
    test = Shapes().test_set("test-full", 64)
    own = score(reader, test.pictures, test.captions)
    other = score(reader, test.pictures, test.captions[1:] + test.captions[:1])
    assert (own > other).float().mean() > 0.95

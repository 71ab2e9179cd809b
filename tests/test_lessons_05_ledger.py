"""The ledgers of chapter 5: the two terms of a dVAE, and the text and the image term of DALL·E."""

import pytest
import torch

from t2ilearn.data import TinyShapes
from t2ilearn.lessons import ledger
from t2ilearn.models.dalle import DALLE, dalle_loss
from t2ilearn.models.dvae import DVAE, DVAEConfig, dvae_loss, gumbel_noise
from t2ilearn.models.tokens import END, NULL, PAD
from t2ilearn.models.transformer import PriorConfig

DVAE_TRUTH = {"reconstruction": "encoder codebook decoder", "kl": "encoder"}
DALLE_TRUTH = {
    "text": "text_embedding blocks",
    "image": "text_embedding padding image_embedding places blocks",
}
PARTS = ("text_embedding", "padding", "image_embedding", "places", "blocks")


@pytest.fixture(scope="module")
def dvae_book():
    torch.manual_seed(0)
    model = DVAE(
        DVAEConfig(resolution=32, channels=(16, 32), blocks=1, codebook_size=64, code_dim=8)
    )
    generator = torch.Generator().manual_seed(0)
    x = TinyShapes().sample(4, generator=generator).pictures
    return ledger(model, dvae_loss(x, model(x, 0.5, gumbel_noise((4, 64, 8, 8), generator))))


def dalle_books(caption):
    torch.manual_seed(0)
    model = DALLE(PriorConfig(16, 2, 8, 2, 2, vocabulary=12, text_length=5))
    indices = torch.randint(16, (len(caption), 4))
    parts = {
        "text_embedding": model.text_embedding,
        "padding": [model.padding],
        "image_embedding": model.image_embedding,
        "places": [model.row, model.column],
        "blocks": model.blocks,
    }
    loss = dalle_loss(model(indices, caption), caption, indices)
    return ledger(model, loss, parts), ledger(model, loss)


@pytest.fixture(scope="module")
def books():
    return dalle_books(torch.tensor([[5, 7, 9, END, PAD], [6, END, PAD, PAD, PAD]]))


def test_the_ledger_of_a_dvae(dvae_book):
    assert dvae_book.terms == ("reconstruction", "kl")
    assert dvae_book.parts == ("encoder", "codebook", "decoder")
    assert {t: dvae_book.moved(t) for t in DVAE_TRUTH} == {
        "reconstruction": {"encoder", "codebook", "decoder"},  # no straight-through here
        "kl": {"encoder"},
    }
    assert dvae_book.matches(DVAE_TRUTH).right


def test_the_ledger_of_dalle(books):
    book, whole = books
    assert book.terms == ("text", "image") and book.parts == PARTS
    assert book.matches(DALLE_TRUTH).right
    assert book["text", "padding"].norm == 0 != book["image", "padding"].norm
    assert whole.parts == ("text_embedding", "image_embedding", "blocks", "norm", "own")
    assert whole.moved("text") == {"text_embedding", "blocks", "norm", "own"}


def test_the_text_term_of_an_empty_caption_moves_nothing():
    book, _ = dalle_books(torch.tensor([[NULL, END, PAD, PAD, PAD]]))
    assert book.moved("text") == set()
    assert book.moved("image") == set(PARTS)


@pytest.mark.parametrize("term", DVAE_TRUTH)
@pytest.mark.parametrize("part", ["encoder", "codebook", "decoder"])
def test_every_wrong_cell_of_a_dvae_gets_a_reason(term, part, dvae_book):
    check(dvae_book, DVAE_TRUTH, term, part)


@pytest.mark.parametrize("term", DALLE_TRUTH)
@pytest.mark.parametrize("part", PARTS)
def test_every_wrong_cell_of_dalle_gets_a_reason(term, part, books):
    check(books[0], DALLE_TRUTH, term, part)


def check(book, truth, term, part):
    predicted = set(truth[term].split()) ^ {part}
    (sentence,) = book.matches(truth | {term: predicted}).wrong
    assert sentence.startswith(f"The {term} term ") and sentence.count(": ") == 1
    for plain in ("a gradient arrives", "no path", "its gradient is 0"):
        assert plain not in sentence

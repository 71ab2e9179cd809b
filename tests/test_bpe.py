"""Byte-pair encoding: nothing is unknown, nothing lost, and no text forges a special token."""

import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2ilearn.data import Shapes
from t2ilearn.data.bpe import LISTED, ROOM, SMALLEST, CaptionTokenizer
from t2ilearn.data.captions import CaptionError
from t2ilearn.models.tokens import END, NULL, PAD


def captions(n=600):
    world, generator = Shapes(), torch.Generator().manual_seed(0)
    return world.captions(world.scenes(n, generator=generator), said=1.0, generator=generator)


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer.train(captions(), vocabulary=400, length=32)


def folded(text):
    """A text without what the tokenizer may drop: case, width, white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def test_frequent_words_are_one_token_and_rare_ones_are_pieces(tokenizer):
    assert tokenizer.pieces("a small striped blue ring") == [
        " a", " small", " striped", " blue", " ring",
    ]  # fmt: skip
    pieces = tokenizer.pieces("a unicorn")
    assert len(pieces) > 2 and "".join(pieces) == " a unicorn"


def test_rows_are_text_end_padding(tokenizer):
    short, long = tokenizer.encode(["a ring", "a small striped blue ring"])
    assert short.shape == (32,) and short.dtype == torch.int64
    assert short[2] == END and (short[3:] == PAD).all()
    assert long[5] == END and (long[:5] > NULL).all()


def test_the_vocabulary_is_as_large_as_asked(tokenizer):
    assert tokenizer.vocabulary <= 400
    assert int(tokenizer.encode(captions(50)).max()) < tokenizer.vocabulary
    full = CaptionTokenizer.train(captions(), vocabulary=SMALLEST + 20)
    assert full.vocabulary == SMALLEST + 20


def test_training_is_repeatable(tokenizer):
    again = CaptionTokenizer.train(captions(), vocabulary=400, length=32)
    assert torch.equal(again.encode(captions(50)), tokenizer.encode(captions(50)))


@settings(max_examples=300, deadline=None)
@given(st.text(min_size=1, max_size=8).filter(folded))
def test_any_text_of_any_language_comes_back(tokenizer, text):
    try:
        ids = tokenizer.encode([text])[0].tolist()
    except CaptionError as error:  # eight characters can be more than 31 bytes
        assert "at most 31 fit" in str(error)
        return
    assert folded(tokenizer.decode(ids)) == folded(text)


@pytest.mark.parametrize("text", ["<pad>", "<end>", "a <null> ring", "<end><pad>"])
def test_no_text_forges_a_special_token(tokenizer, text):
    ids = tokenizer.encode([text])[0]
    before = ids[: int((ids == END).nonzero()[0])]
    assert (before > NULL).all() and tokenizer.decode(ids.tolist()) == text


def test_case_width_and_white_space_do_not_matter(tokenizer):
    rows = tokenizer.encode(["a blue ring", "  A\tBLUE \n ring ", "a ｂｌｕｅ ring"])
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_a_fitted_tokenizer_has_room_for_words_it_never_met():
    """Three words are few, in however many pieces they fall: they are not "too long"."""
    said = ["a happy yellow face", "a sad blue face with a hat and glasses"] * 10
    fitted = CaptionTokenizer.train(said).fitted(said)
    assert fitted.length == ROOM + 1 > 3 * len(fitted.pieces(said[1]))
    assert len(fitted.pieces("a purple cat")) > len(fitted.pieces(said[1]))
    for caption in (*said, "a purple cat", "a grumpy purple unicorn", "x" * (ROOM - 1)):
        assert fitted.decode(fitted.encode([caption])[0].tolist()) == caption
    with pytest.raises(CaptionError, match=f"at most {ROOM} fit"):
        fitted.encode(["x" * ROOM])  # and the blank that every word begins with


@pytest.mark.parametrize(
    ("longest", "length"), [(15, 32), (16, 33), (25, 51), (47, 95), (48, 96), (95, 96)]
)
def test_room_grows_with_the_longest_caption_up_to_the_limit(tokenizer, longest, length):
    caption = "ring " * longest
    assert len(tokenizer.pieces(caption)) == longest
    fitted = tokenizer.fitted(["a ring", caption])
    assert fitted.length == length and fitted.vocabulary == tokenizer.vocabulary
    assert (fitted.encode([caption])[0] != PAD).sum() == longest + 1


def test_captions_too_long_for_any_fit_are_listed_at_once(tokenizer):
    """Else training would stop over the first of them, an hour later."""
    with pytest.raises(
        CaptionError, match=r"At most 95 tokens .*\n  96 tokens: 'ring ring"
    ) as found:
        tokenizer.fitted(["a ring", "ring " * 96, "ring " * 95, "star " * 200])
    assert str(found.value).count("\n") == 2 and "200 tokens: 'star" in str(found.value)
    many = ["ring " * (96 + n) for n in range(LISTED + 5)]
    with pytest.raises(CaptionError, match="and 5 more"):
        tokenizer.fitted(many)


def test_it_comes_back_from_its_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    loaded = CaptionTokenizer.load(tmp_path / "t.json", 32)
    texts = ["a small red star", "<end> of it", "été 猫"]
    assert torch.equal(loaded.encode(texts), tokenizer.encode(texts))


def test_bad_captions_are_refused(tokenizer):
    with pytest.raises(CaptionError, match="empty"):
        tokenizer.encode(["a ring", "  \n"])
    with pytest.raises(CaptionError, match="empty"):
        tokenizer.encode([""])
    with pytest.raises(CaptionError, match="at most 31 fit"):
        tokenizer.encode(["ring " * 40])


def test_bad_files_and_sizes_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no tokenizer"):
        CaptionTokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not a tokenizer of ours"):
        CaptionTokenizer.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="smallest vocabulary"):
        CaptionTokenizer.train(captions(10), vocabulary=100)
    tokenizer.save(tmp_path / "t.json")
    with pytest.raises(ValueError, match="two ids"):
        CaptionTokenizer.load(tmp_path / "t.json", 1)

"""Lessons of chapter 5: answers of all kinds to its exercises.

What holds for the exercises of every chapter is in test_lessons.py.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from t2ilearn.lessons import exercise
from t2ilearn.lessons.exercises import judge
from t2ilearn.models.autoencoder import AutoencoderConfig, ImageTokenizer
from t2ilearn.models.dalle import DALLE, DALLEOutput, dalle_loss, encode_prefix
from t2ilearn.models.dvae import DVAEOutput, dvae_loss, gumbel_softmax
from t2ilearn.models.tokens import NULL, PAD, null_caption
from t2ilearn.models.transformer import PriorConfig
from t2ilearn.systems import Candidates, rerank


# Answers as readers write them: not the package's own, and found by what they do.
def softmax_by_division(logits, noise, temperature):
    weights = ((logits + noise) / temperature).exp()
    return weights / weights.sum(1, keepdim=True)


def kl_of_a_broadcast(logits, numbers):
    """As in a popular port: batchmean divides by the length of its first argument, 1."""
    log_uniform = torch.tensor([1 / logits.shape[1]]).log()
    log_q = logits.log_softmax(1)
    return F.kl_div(log_uniform, log_q, reduction="batchmean", log_target=True) / numbers


def kl_by_batchmean(logits, numbers):
    log_uniform = torch.full_like(logits, -math.log(logits.shape[1]))
    log_q = logits.log_softmax(1)
    return F.kl_div(log_uniform, log_q, reduction="batchmean", log_target=True) / numbers


def kl_exchanged(logits, numbers):
    log_uniform = torch.full_like(logits, -math.log(logits.shape[1]))
    log_q = logits.log_softmax(1)
    return F.kl_div(log_q, log_uniform, reduction="batchmean", log_target=True) / numbers


def embed_in_a_loop(caption, table, padding):
    rows = [
        [table[i] if i != PAD else padding[t] for t, i in enumerate(row)]
        for row in caption.tolist()
    ]
    return torch.stack([torch.stack(row) for row in rows])


def embed_masked(caption, table, padding):
    return table[caption].masked_fill((caption == PAD)[..., None], 0)


def terms_with_ignore_index(text_logits, image_logits, caption, indices):
    text = F.cross_entropy(text_logits.mT, caption, ignore_index=PAD)
    image = F.cross_entropy(image_logits.mT, indices)
    return text, image, text / 8 + image * 7 / 8


def terms_without_any_text(text_logits, image_logits, caption, indices):
    wanted = caption.clone()
    wanted[caption[:, 0] == NULL] = PAD
    text = F.cross_entropy(text_logits.mT, wanted, ignore_index=PAD)
    image = F.cross_entropy(image_logits.mT, indices)
    return text, image, text / 8 + image * 7 / 8


def guided_in_place(model, indices, caption, scale):
    c = model(indices, caption)
    caption[:] = null_caption(*caption.shape)
    u = model(indices, caption)
    return u + scale * (c - u)


def guided_like_min_dalle(model, indices, caption, scale):
    u, c = model(indices, null_caption(*caption.shape)), model(indices, caption)
    return u * (1 - scale) + c * scale


def best_in_a_loop(scores, best_of):
    starts = range(0, len(scores), best_of)
    return [max(range(i, i + best_of), key=lambda j: float(scores[j])) for i in starts]


def hide_in_place(picture, rows, side):
    last = rows * picture.shape[1] // side
    picture[:, last:] = picture[:, last - 1 : last]
    return picture


def hide_by_repeating(picture, rows, side):
    last = rows * picture.shape[1] // side
    rest = picture[:, last - 1 : last].expand(-1, picture.shape[1] - last, -1)
    return torch.cat([picture[:, :last], rest], dim=1)


@pytest.mark.parametrize(
    ("number", "answer", "message"),
    [
        ("5.1", lambda x, g, t: x + g, "Not yet"),
        ("5.1", lambda x, g, t: F.softmax((x + g) / t, -1), "over the places"),
        ("5.2", kl_of_a_broadcast, "twice as many pictures would cost twice"),
        ("5.2", kl_exchanged, "The other direction"),
        ("5.2", lambda x, n: x.softmax(1).square().sum() / n, "Not yet"),
        ("5.3", embed_masked, "as a mask would do"),
        ("5.4", terms_with_ignore_index, "learn to predict empty captions"),
        ("5.4", terms_without_any_text, "no caption at all, and its NaN"),
        ("5.5", guided_in_place, "changes its argument in place"),
        ("5.6", lambda s, n: s.view(-1, n).max(1).values, "Those are the scores"),
        ("5.7", hide_in_place, "changes its argument in place"),
        ("5.7", lambda p, rows, side: p[:, : p.shape[1] // 2], "full size|Not yet: its shape"),
    ],
)
def test_mistakes_are_recognised_by_what_they_compute(number, answer, message):
    verdict = judge(exercise(number), answer)
    assert not verdict.right and re.search(message, verdict.message), verdict.message


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("5.1", softmax_by_division),
        ("5.2", kl_by_batchmean),
        ("5.3", embed_in_a_loop),
        ("5.5", guided_like_min_dalle),
        ("5.6", best_in_a_loop),
        ("5.7", hide_by_repeating),
    ],
)
def test_right_answers_may_be_written_in_other_ways(number, answer):
    verdict = judge(exercise(number), answer)
    assert verdict.right, verdict.message


# ---------------------------------------------------------------- against the package


def test_the_packages_gumbel_softmax_is_a_right_answer():
    assert judge(exercise("5.1"), gumbel_softmax).right


def test_the_kl_term_is_that_of_the_loss():
    """The picture has as many values as in the exercise; its contents do not matter."""

    def answer(logits, values):
        side = math.isqrt(values // 3)
        x = torch.zeros(len(logits), 3, values // 3 // side, side)
        return dvae_loss(x, DVAEOutput(logits, x, x)).kl

    solution = exercise("5.2").code.solution
    logits = torch.randn(2, 6, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.isclose(answer(logits, 48), solution(logits, 48))


def test_the_terms_are_those_of_the_loss():
    def answer(text_logits, image_logits, caption, indices):
        return tuple(dalle_loss(DALLEOutput(text_logits, image_logits), caption, indices))

    assert judge(exercise("5.4"), answer).right


def test_padding_is_embedded_as_in_the_model():
    torch.manual_seed(0)
    model = DALLE(PriorConfig(8, 2, 6, 1, 2, vocabulary=9, text_length=4))
    caption = torch.tensor([[5, 3, 1, PAD], [4, 1, PAD, PAD]])
    text = model._embed(torch.zeros(2, 0, dtype=torch.int64), caption)[:, 1:5]
    ours = exercise("5.3").code.solution(caption, model.text_embedding.weight, model.padding)
    assert torch.allclose(text, ours + model.word_position)


def test_the_best_samples_are_those_that_the_package_keeps():
    def answer(scores, best_of):
        m = len(scores)
        tokens = torch.zeros(m, 4, dtype=torch.int64)
        among = Candidates(torch.zeros(m, 3, 4, 4), [""] * m, tokens)
        return rerank(among, best_of, lambda _: scores)[1]

    assert judge(exercise("5.6"), answer).right


def test_encode_prefix_hides_the_same_part_as_the_exercise():
    seen = []

    class Recorder(ImageTokenizer):
        config = AutoencoderConfig(
            resolution=32, channels=(8, 8), blocks=1, codebook_size=4, code_dim=2
        )

        def tokens(self, x):
            seen.append(x)
            return torch.zeros(len(x), 64, dtype=torch.int64)

    picture = 2 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    for rows in (1, 4, 7):
        encode_prefix(Recorder(), picture[None], rows)
        assert torch.equal(seen[-1][0], exercise("5.7").code.solution(picture, rows, 8))

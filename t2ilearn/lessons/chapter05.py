"""Exercises of chapter 5 as code; their words are in `chapter05.toml`."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from t2ilearn.lessons.exercises import Answer, Code
from t2ilearn.models.tokens import NULL, PAD, null_caption

Model = Callable[[Tensor, Tensor], Tensor]


def _points(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def soft_sample(
    logits: Float[Tensor, "b k n"], noise: Float[Tensor, "b k n"], temperature: float
) -> Float[Tensor, "b k n"]:
    """softmax((l + g) / τ), over the K tokens."""
    return ((logits + noise) / temperature).softmax(1)


def _see_draw(answer: Answer) -> list:
    seen: list[Tensor] = []
    for temperature in (0.25, 2.0):
        logits, noise = _points(1, 2, 5, 3).requires_grad_(), _points(2, 2, 5, 3)
        y = answer(logits, noise, temperature)
        slope = torch.zeros_like(logits)
        if y.requires_grad:
            (slope,) = torch.autograd.grad((y * _points(3, 2, 5, 3)).sum(), logits)
        seen += [y, slope]
    return seen


def _one_hot(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    best = F.one_hot((logits + noise).argmax(1), logits.shape[1])
    return best.movedim(-1, 1).float()


def _straight(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    y = soft_sample(logits, noise, temperature)
    return _one_hot(logits, noise, temperature) + y - y.detach()


_DRAW = {
    "no_noise": lambda x, g, t: (x / t).softmax(1),
    "noise_whole": lambda x, g, t: (x / t + g).softmax(1),
    "logits_whole": lambda x, g, t: (x + g / t).softmax(1),
    "multiplied": lambda x, g, t: ((x + g) * t).softmax(1),
    "no_temperature": lambda x, g, t: (x + g).softmax(1),
    "noise_late": lambda x, g, t: (x / t).softmax(1) + g,
    "shares": lambda x, g, t: ((x.softmax(1) + g) / t).softmax(1),
    "places": lambda x, g, t: ((x + g) / t).softmax(2),
    "no_softmax": lambda x, g, t: (x + g) / t,
    "one_hot": _one_hot,
    "straight": _straight,
    "detached": lambda x, g, t: soft_sample(x.detach(), g, t),
}


def kl_to_uniform(logits: Float[Tensor, "b k h w"], values: int) -> Float[Tensor, ""]:
    """D_KL(q ‖ uniform), summed over a picture's tokens, a mean over pictures, per pixel value."""
    log_q = logits.log_softmax(1)
    nats = (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum((1, 2, 3))
    return nats.mean() / values


def _see_uniform(answer: Answer) -> list:
    sure = 40 * F.one_hot(torch.tensor([[0, 1], [2, 3]]), 6).permute(2, 0, 1)[None].float()
    return [answer(2 * _points(4, 3, 7, 2, 4), 96), answer(sure, 48), answer(0 * sure, 48)]


def _spread(q: Tensor, log_q: Tensor) -> Tensor:
    return (q * log_q).sum(1)


def _uniform_but(each: Any = None, total: Any = None, dim: int = 1) -> Answer:
    """The KL term with another summand, another mean, or a softmax over something else."""

    def answer(logits: Tensor, values: int) -> Tensor:
        q, log_q, k = logits.softmax(dim), logits.log_softmax(dim), math.log(logits.shape[1])
        nats = _spread(q, log_q) + k if each is None else each(q, log_q, k)  # (B, h, w)
        return nats.sum((1, 2)).mean() / values if total is None else total(nats, values)

    return answer


_UNIFORM = {
    "per_token": _uniform_but(total=lambda nats, n: nats.mean()),
    "per_picture": _uniform_but(total=lambda nats, n: nats.sum((1, 2)).mean()),
    "token_and_value": _uniform_but(total=lambda nats, n: nats.mean() / n),
    "whole_batch": _uniform_but(total=lambda nats, n: nats.sum() / n),
    "mean": lambda x, n: (x.softmax(1) * (x.log_softmax(1) + math.log(x.shape[1]))).mean(),
    "turned": _uniform_but(lambda q, log_q, k: -log_q.mean(1) - k),
    "entropy": _uniform_but(lambda q, log_q, k: -_spread(q, log_q)),
    "no_uniform": _uniform_but(lambda q, log_q, k: _spread(q, log_q)),
    "sign": _uniform_but(lambda q, log_q, k: -_spread(q, log_q) - k),
    "bits": _uniform_but(lambda q, log_q, k: (_spread(q, log_q) + k) / math.log(2)),
    "no_weight": _uniform_but(lambda q, log_q, k: (log_q + k).sum(1)),
    "dimension": _uniform_but(dim=2),
}


def embed(
    caption: Int[Tensor, "b t"], text_embedding: Float[Tensor, "v d"], padding: Float[Tensor, "t d"]
) -> Float[Tensor, "b t d"]:
    """A vector for each place: the text token's, or where there is padding the place's own."""
    return torch.where((caption != PAD)[..., None], text_embedding[caption], padding)


def _see_embed(answer: Answer) -> Any:
    caption = torch.tensor([[5, 3, 1, 0, 0, 0], [4, 4, 2, 3, 1, 0], [2, 1, 0, 0, 0, 0]])
    return answer(caption, _points(5, 7, 3), _points(6, 6, 3))


def _count_from_the_first(caption: Tensor, words: Tensor, padding: Tensor) -> Tensor:
    gap = caption == PAD
    return torch.where(gap[..., None], padding[(gap.cumsum(1) - 1).clamp(min=0)], words[caption])


_EMBED = {
    "id_zero": lambda q, words, padding: words[q],
    "zeros": lambda q, words, padding: words[q] * (q != PAD)[..., None],
    "added": lambda q, words, padding: words[q] + padding * (q == PAD)[..., None],
    "everywhere": lambda q, words, padding: words[q] + padding,
    "turned": lambda q, words, padding: torch.where((q == PAD)[..., None], words[q], padding),
    "one_for_all": lambda q, words, padding: torch.where(
        (q != PAD)[..., None], words[q], padding[0]
    ),
    "from_the_first": _count_from_the_first,
}


def two_terms(
    text_logits: Float[Tensor, "b t v"],
    image_logits: Float[Tensor, "b n k"],
    caption: Int[Tensor, "b t"],
    indices: Int[Tensor, "b n"],
) -> tuple[Tensor, Tensor, Tensor]:
    """(nats per text token, nats per image token, 1/8 of the first + 7/8 of the second)."""
    counts = (caption != PAD) & (caption[:, :1] != NULL)
    nats = F.cross_entropy(text_logits.mT, caption, reduction="none") * counts
    text = nats.sum() / counts.sum().clamp(min=1)
    image = F.cross_entropy(image_logits.mT, indices)
    return text, image, text / 8 + 7 * image / 8


def _see_terms(answer: Answer) -> list:
    caption = torch.tensor([[5, 3, 1, 0, 0], [4, 4, 6, 3, 1], [NULL, 1, 0, 0, 0]])
    indices = torch.tensor([[0, 1], [2, 3], [3, 0]])
    text, image = 2 * _points(7, 3, 5, 7), 2 * _points(8, 3, 2, 4)
    empty = caption[[2, 2, 2]]
    return [*answer(text, image, caption, indices), *answer(text, image, empty, indices)]


def _terms_but(text: Any = None, share: float = 1 / 8, total: Any = None) -> Answer:
    """Both terms with one thing wrong. `text` gets the nats, what is no padding, what is not ∅."""

    def answer(
        text_logits: Tensor, image_logits: Tensor, caption: Tensor, indices: Tensor
    ) -> tuple:
        nats = F.cross_entropy(text_logits.mT, caption, reduction="none")
        real, asked = caption != PAD, (caption[:, :1] != NULL).expand_as(caption)
        counts = (real & asked).float()
        right = (nats * counts).sum() / counts.sum().clamp(min=1)
        w = right if text is None else text(nats, real.float(), asked.float())
        p = F.cross_entropy(image_logits.mT, indices, reduction="none")
        mixed = share * w + (1 - share) * p.mean()
        return w, p.mean(), mixed if total is None else total(w, p, (nats * counts).sum(), counts)

    return answer


def _mean(nats: Tensor, counts: Tensor) -> Tensor:
    return (nats * counts).sum() / counts.sum().clamp(min=1)


_TERMS = {
    "padding_too": _terms_but(lambda nats, real, asked: _mean(nats, asked)),
    "empty_too": _terms_but(lambda nats, real, asked: _mean(nats, real)),
    "all_too": _terms_but(lambda nats, real, asked: nats.mean()),
    "all_places": _terms_but(lambda nats, real, asked: (nats * real * asked).mean()),
    "captions": _terms_but(
        lambda nats, real, asked: (
            (nats * real * asked).sum(1) / (real * asked).sum(1).clamp(min=1)
        ).mean()
    ),
    "nan": _terms_but(lambda nats, real, asked: (nats * real * asked).sum() / (real * asked).sum()),
    "sums": _terms_but(lambda nats, real, asked: (nats * real * asked).sum()),
    "swapped": _terms_but(share=7 / 8),
    "halves": _terms_but(share=1 / 2),
    "added": _terms_but(total=lambda w, p, nats, counts: w + p.mean()),
    "one_pot": _terms_but(
        total=lambda w, p, nats, counts: (nats + p.sum()) / (counts.sum() + p.numel())
    ),
    "exchanged": lambda text, image, caption, indices: tuple(
        two_terms(text, image, caption, indices)[i] for i in (1, 0, 2)
    ),
}


def guided(
    model: Model, indices: Int[Tensor, "b n"], caption: Int[Tensor, "b t"], scale: float
) -> Float[Tensor, "b k"]:
    """u + s (c − u), where u are the logits without a caption; the caption stays as it is."""
    c, u = model(indices, caption), model(indices, null_caption(*caption.shape))
    return u + scale * (c - u)


def _toy_model(indices: Tensor, caption: Tensor) -> Tensor:
    """Logits (B, 5) that depend on all tokens of image and text, and on the text's order."""
    text = _points(9, caption.shape[1], 8, 5)[torch.arange(caption.shape[1]), caption].sum(1)
    return text + _points(10, 4, 5)[indices].sum(1)


def _see_guided(answer: Answer) -> list:
    indices, caption = torch.tensor([[0, 3], [2, 1]]), torch.tensor([[5, 3, 1, 0], [4, 6, 3, 1]])
    return [answer(_toy_model, indices, caption, scale) for scale in (3.0, 0.0)]


def _guided_but(mix: Any = None, nothing: Callable[[Tensor], Tensor] | None = None) -> Answer:
    def answer(model: Model, indices: Tensor, caption: Tensor, scale: float) -> Tensor:
        empty = null_caption(*caption.shape) if nothing is None else nothing(caption)
        c, u = model(indices, caption), model(indices, empty)
        return u + scale * (c - u) if mix is None else mix(c, u, scale)

    return answer


def _first_word(caption: Tensor) -> Tensor:
    return torch.cat([torch.full_like(caption[:, :1], NULL), caption[:, 1:]], dim=1)


_GUIDED = {
    "swapped": _guided_but(lambda c, u, s: c + s * (u - c)),
    "from_c": _guided_but(lambda c, u, s: c + s * (c - u)),
    "on_top": _guided_but(lambda c, u, s: u + s * c),
    "unguided": _guided_but(lambda c, u, s: c),
    "probabilities": _guided_but(lambda c, u, s: u.softmax(1) + s * (c.softmax(1) - u.softmax(1))),
    "padding": _guided_but(nothing=torch.zeros_like),
    "all_null": _guided_but(nothing=lambda caption: torch.full_like(caption, NULL)),
    "first_word": _guided_but(nothing=_first_word),
}


def best_of_each(scores: Float[Tensor, " m"], best_of: int) -> Int[Tensor, " n"]:
    """The numbers, among all m, of the best of each `best_of` in a row."""
    rows = scores.view(-1, best_of)
    return best_of * torch.arange(len(rows)) + rows.argmax(1)


def _see_best(answer: Answer) -> list:
    scores = torch.tensor([0.1, 0.9, 0.4, -3.0, -1.0, -2.0, 0.8, 0.7, 0.2, 5.0, 4.0, 6.0])
    return [answer(scores, 3), answer(scores, 2), answer(scores, 1)]


_BEST = {
    "in_the_row": lambda s, n: s.view(-1, n).argmax(1),
    "columns": lambda s, n: s.view(n, -1).argmax(0) * (len(s) // n) + torch.arange(len(s) // n),
    "worst": lambda s, n: n * torch.arange(len(s) // n) + s.view(-1, n).argmin(1),
    "of_all": lambda s, n: s.topk(len(s) // n).indices,
    "of_all_in_order": lambda s, n: s.topk(len(s) // n).indices.sort().values,
    "scores": lambda s, n: s.view(-1, n).amax(1),
    "one": lambda s, n: s.argmax(),
    "rows_counted": lambda s, n: torch.arange(len(s) // n) + s.view(-1, n).argmax(1),
}


def hide_below(picture: Float[Tensor, "3 h w"], rows: int, side: int) -> Float[Tensor, "3 h w"]:
    """Below the first `rows` of `side` rows of tokens, the last row of pixels that is kept."""
    last = rows * picture.shape[1] // side
    seen = picture.clone()
    seen[:, last:] = picture[:, last - 1 : last]
    return seen


def _see_hidden(answer: Answer) -> list:
    return [answer(_points(11, 3, 12, 4), rows, 4) for rows in (1, 3)]


def _hidden_but(
    cut: Callable[[int, int, int], int] = lambda rows, h, side: rows * h // side,
    fill: Callable[[Tensor, int], Any] = lambda picture, last: picture[:, last - 1 : last],
) -> Answer:
    def answer(picture: Tensor, rows: int, side: int) -> Tensor:
        last, seen = cut(rows, picture.shape[1], side), picture.clone()
        seen[:, last:] = fill(picture, last)
        return seen

    return answer


_HIDDEN = {
    "visible": lambda picture, rows, side: picture.clone(),
    "grey": _hidden_but(fill=lambda picture, last: 0.0),
    "black": _hidden_but(fill=lambda picture, last: -1.0),
    "pixels": _hidden_but(lambda rows, h, side: rows),
    "first_hidden": _hidden_but(fill=lambda picture, last: picture[:, last : last + 1]),
    "bottom": _hidden_but(fill=lambda picture, last: picture[:, -1:]),
    "one_more": _hidden_but(lambda rows, h, side: (rows + 1) * h // side),
    "mean_of_all": _hidden_but(fill=lambda picture, last: picture.mean((1, 2), keepdim=True)),
    "cut_off": lambda picture, rows, side: picture[:, : rows * picture.shape[1] // side].clone(),
}

EXERCISES = {
    "5.1": Code(soft_sample, _see_draw, _DRAW),
    "5.2": Code(kl_to_uniform, _see_uniform, _UNIFORM),
    "5.3": Code(embed, _see_embed, _EMBED),
    "5.4": Code(two_terms, _see_terms, _TERMS),
    "5.5": Code(guided, _see_guided, _GUIDED),
    "5.6": Code(best_of_each, _see_best, _BEST),
    "5.7": Code(hide_below, _see_hidden, _HIDDEN),
}

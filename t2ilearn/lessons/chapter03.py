"""Exercises of chapter 3 as code; their words are in `chapter03.toml`."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from t2ilearn.lessons.exercises import Answer, Code


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def my_perplexity(logits: Float[Tensor, "n k"], indices: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """exp of the mean −ln p of the true tokens, 1 … K and beyond."""
    log_p = logits.log_softmax(1)[torch.arange(len(indices)), indices]
    return (-log_p.mean()).exp()


def _see_perplexity(answer: Answer) -> Any:
    return answer(3 * _random(0, 6, 5), torch.tensor([0, 1, 2, 3, 4, 0]))


def _at(values: Tensor, indices: Tensor) -> Tensor:
    return values[range(len(indices)), indices]


_PERPLEXITY = {
    "nats": F.cross_entropy,
    "base": lambda x, q: 2 ** F.cross_entropy(x, q),
    "sum": lambda x, q: F.cross_entropy(x, q, reduction="sum").exp(),
    "arithmetic": lambda x, q: 1 / _at(x.softmax(1), q).mean(),
    "sign": lambda x, q: (-F.cross_entropy(x, q)).exp(),
    "logits": lambda x, q: (-_at(x, q).mean()).exp(),
    "dimension": lambda x, q: (-_at(x.log_softmax(0), q).mean()).exp(),
    "entropy": lambda x, q: torch.special.entr(x.softmax(1)).sum(1).mean().exp(),
}


def my_attention(
    q: Float[Tensor, "t d"], k: Float[Tensor, "t d"], v: Float[Tensor, "t d"]
) -> Float[Tensor, "t d"]:
    """Causal attention of one head (Vaswani 2017, Eq. 1)."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    allowed = torch.ones_like(scores, dtype=torch.bool).tril()
    return scores.masked_fill(~allowed, -math.inf).softmax(1) @ v


def _see_attention(answer: Answer) -> Any:
    return answer(*_random(0, 3, 5, 4))


def _attention_but(scale: float = 1.0, mask: str = "past", dim: int = 1) -> Answer:
    """Attention with one thing wrong; `scale` is on top of the root."""

    def answer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores, past = scale * q @ k.T / math.sqrt(q.shape[1]), torch.ones(len(q), len(q)).tril()
        if mask == "after":
            return scores.softmax(dim) * past @ v
        if mask == "zero":
            return (scores * past).softmax(dim) @ v
        seen = {"past": past, "open": past + 1, "future": past.T, "before": past.tril(-1)}[mask]
        return scores.masked_fill(seen == 0, -math.inf).softmax(dim) @ v

    return answer


_ATTENTION = {
    "open": _attention_but(mask="open"),
    "no_root": _attention_but(2.0),
    "d": _attention_but(0.5),
    "future": _attention_but(mask="future"),
    "before": _attention_but(mask="before"),
    "after": _attention_but(mask="after"),
    "zero": _attention_but(mask="zero"),
    "dimension": _attention_but(dim=0),
    "plain_mean": _attention_but(0.0),
}


def attention_mask(text: int, image: int) -> Bool[Tensor, "total total"]:
    """True where a row may attend to a column: text to all text, image tokens backwards."""
    mask = torch.ones(text + image, text + image, dtype=torch.bool).tril()
    mask[:text, :text] = True
    return mask


def _see_mask(answer: Answer) -> list:
    return [answer(3, 4), answer(2, 5)]


def _ahead(text: int, image: int) -> Tensor:
    n = text + image
    return attention_mask(text, image) | torch.ones(n, n, dtype=torch.bool).tril(1)


def _no_text(text: int, image: int) -> Tensor:
    mask = attention_mask(text, image)
    mask[text:, :text] = False
    return mask


def _leak(text: int, image: int) -> Tensor:
    mask = attention_mask(text, image)
    mask[:text] = True
    return mask


_MASK = {
    "triangle": lambda text, image: attention_mask(text, image).tril(),
    "flipped": lambda text, image: attention_mask(text, image).T,
    "open": lambda text, image: torch.ones(text + image, text + image),
    "ahead": _ahead,
    "behind": lambda text, image: attention_mask(text, image).clone().fill_diagonal_(False),
    "leak": _leak,
    "no_text": _no_text,
}


def my_top_p(p: Float[Tensor, " k"], top_p: float) -> Float[Tensor, " k"]:
    """The likeliest that together reach top_p, their sum 1 again."""
    ranked, order = p.sort(descending=True)
    before = ranked.cumsum(0) - ranked
    kept = torch.zeros_like(p)
    kept[order] = torch.where(before < top_p, ranked, 0)
    return kept / kept.sum()


def _see_top_p(answer: Answer) -> list:
    p = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    return [answer(p.clone(), 0.7), answer(p.clone(), 0.2)]


def _top_p_but(more: int = 0, norm: bool = True, order: str = "back", least: int = 1) -> Answer:
    """Top-p with one thing wrong; `more` tokens are kept than should be, at least `least`."""

    def answer(p: Tensor, top_p: float) -> Tensor:
        ranked, places = (p, torch.arange(len(p))) if order == "none" else p.sort(descending=True)
        count = max(least, int((ranked.cumsum(0) - ranked < top_p).sum()) + more)
        cut = torch.where(torch.arange(len(p)) < count, ranked, 0)
        kept = cut if order == "sorted" else torch.zeros_like(p).scatter(0, places, cut)
        return kept / kept.sum() if norm else kept

    return answer


_TOP_P = {
    "sum": _top_p_but(norm=False),
    "crossing": _top_p_but(-1),
    "crossing_small": _top_p_but(-1, least=0),
    "more": _top_p_but(1),
    "sorted": _top_p_but(order="sorted"),
    "unsorted": _top_p_but(order="none"),
    "each": lambda p, top_p: torch.where(p >= top_p, p, 0) / torch.where(p >= top_p, p, 0).sum(),
}


def my_guidance(
    c: Float[Tensor, " k"], u: Float[Tensor, " k"], scale: float
) -> Float[Tensor, " k"]:
    """Probabilities of guided logits (Ho & Salimans 2022, Eq. 6, with s = w + 1)."""
    return (u + scale * (c - u)).softmax(-1)


def _see_guidance(answer: Answer) -> Any:
    return answer(*_random(0, 2, 5), 3.0)


_GUIDANCE = {
    "logits": lambda c, u, s: u + s * (c - u),
    "swapped": lambda c, u, s: (c + s * (u - c)).softmax(0),
    "from_c": lambda c, u, s: (c + s * (c - u)).softmax(0),
    "temperature": lambda c, u, s: (s * c).softmax(0),
    "probabilities": lambda c, u, s: u.softmax(0) + s * (c.softmax(0) - u.softmax(0)),
    "on_top": lambda c, u, s: (u + s * c).softmax(0),
}


def bits_left(nats_per_token: float, places: int) -> float:
    """Bits per picture, from the nats per token and the number of tokens."""
    return places * nats_per_token / math.log(2)


def _see_bits(answer: Answer) -> list:
    return [answer(2.5, 64), answer(0.7, 16)]


_BITS = {
    "one_token": lambda nats, places: nats / math.log(2),
    "nats": lambda nats, places: nats * places,
    "multiplied": lambda nats, places: nats * places * math.log(2),
    "twice": lambda nats, places: places * math.log2(nats),
    "exponential": lambda nats, places: places * math.exp(nats),
    "ten": lambda nats, places: places * nats * math.log2(10),
}


def place_in_the_stream(text: int, drawn: int) -> int:
    """The position, from 0, of the token that is fed after `drawn` image tokens are drawn."""
    return text + drawn


def _see_place(answer: Answer) -> list:
    return [answer(24, 1), answer(24, 10), answer(0, 3)]


_PLACE = {
    "zero": lambda text, drawn: 0,
    "no_start": lambda text, drawn: text + drawn - 1,
    "too_far": lambda text, drawn: text + drawn + 1,
    "no_caption": lambda text, drawn: drawn,
    "among_image": lambda text, drawn: drawn - 1,
    "start": lambda text, drawn: text,
}

EXERCISES = {
    "3.1": Code(my_perplexity, _see_perplexity, _PERPLEXITY),
    "3.2": Code(my_attention, _see_attention, _ATTENTION),
    "3.3": Code(attention_mask, _see_mask, _MASK),
    "3.4": Code(my_top_p, _see_top_p, _TOP_P),
    "3.5": Code(my_guidance, _see_guidance, _GUIDANCE),
    "3.6": Code(bits_left, _see_bits, _BITS),
    "3.7": Code(place_in_the_stream, _see_place, _PLACE),
}

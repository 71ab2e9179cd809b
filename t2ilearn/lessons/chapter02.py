"""Exercises of chapter 2 as code; their words are in `chapter02.toml`."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from t2ilearn.lessons.exercises import Answer, Code
from t2ilearn.models.quantizers import EMAQuantizer


def _points(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits_of_a_picture(side: int, codebook_size: int) -> float:
    """Bits in side × side tokens, each one of `codebook_size`."""
    return side**2 * math.log2(codebook_size)


def _see_bits(answer: Answer) -> list:
    return [answer(8, 1024), answer(4, 512)]


_BITS = {
    "one_token": lambda side, K: math.log2(K),
    "one_row": lambda side, K: side * math.log2(K),
    "nats": lambda side, K: side**2 * math.log(K),
    "not_log": lambda side, K: side**2 * K,
    "product": lambda side, K: math.log2(side**2 * K),
}


def nearest(z: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"]) -> Int[Tensor, " n"]:
    """Index of the nearest code vector for each encoding (van den Oord 2017, Eq. 1)."""
    distances = (codebook**2).sum(1) - 2 * z @ codebook.T  # (n, K)
    return distances.argmin(1)


def _see_nearest(answer: Answer) -> Any:
    return answer(1.3 * _points(5, 60, 2), 1.5 * _points(6, 7, 2))


_NEAREST = {
    "farthest": lambda z, e: torch.cdist(z, e).argmax(1),
    "product": lambda z, e: (z @ e.T).argmax(1),
    "plus": lambda z, e: ((e**2).sum(1) + 2 * z @ e.T).argmin(1),
    "no_two": lambda z, e: ((e**2).sum(1) - z @ e.T).argmin(1),
    "unsquared": lambda z, e: (e.norm(dim=1) - 2 * z @ e.T).argmin(1),
    "cosine": lambda z, e: (F.normalize(z) @ F.normalize(e).T).argmax(1),
    "squares": lambda z, e: torch.cdist(z, e).square().amin(1),
    "distances": lambda z, e: torch.cdist(z, e).amin(1),
    "other_way": lambda z, e: torch.cdist(z, e).argmin(0),
    "vectors": lambda z, e: e[torch.cdist(z, e).argmin(1)],
}


def straight_through(z: Float[Tensor, "n d"], e: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The value of e, with the gradient for z (van den Oord 2017, section 3.2)."""
    return z + (e - z).detach()


def _pulled(value: Any, *leaves: Tensor, by: Tensor | None = None) -> list[Tensor]:
    """A value and the gradients that reach the leaves; zeros where none does."""
    grads: list[Tensor | None] = [None] * len(leaves)
    if value.requires_grad:
        grads = list(torch.autograd.grad(value, leaves, by, allow_unused=True))
    pairs = zip(grads, leaves, strict=True)
    return [value, *(torch.zeros_like(leaf) if g is None else g for g, leaf in pairs)]


def _see_straight(answer: Answer) -> list:
    z, e = _points(1, 5, 2).requires_grad_(), _points(2, 5, 2).requires_grad_()
    return _pulled(answer(z, e), z, e, by=_points(3, 5, 2))


_STRAIGHT = {
    "z_alone": lambda z, e: z,
    "bracket": lambda z, e: z + (z - e).detach(),
    "detached": lambda z, e: e.detach(),
    "all_to_e": lambda z, e: z.detach() + (e - z.detach()),
    "e_too": lambda z, e: z + e - z.detach(),
    "halves": lambda z, e: (z + e) / 2 + (e - z).detach() / 2,
}


def quantizer_loss(
    z: Float[Tensor, "n d"], e: Float[Tensor, "n d"], beta: float
) -> Float[Tensor, ""]:
    """Second and third term of van den Oord 2017, Eq. 3, as means."""
    codebook_loss = F.mse_loss(e, z.detach())
    commitment_loss = F.mse_loss(z, e.detach())
    return codebook_loss + beta * commitment_loss


def _see_loss(answer: Answer) -> list:
    z, e = _points(1, 5, 2).requires_grad_(), _points(2, 5, 2).requires_grad_()
    return _pulled(answer(z, e, 0.25), z, e)


def _weighed(first: Any, second: Any, sums: bool = False) -> Answer:
    """The two terms with other weights, of which each may be a function of β."""

    def answer(z: Tensor, e: Tensor, beta: float) -> Tensor:
        a, b = (w(beta) if callable(w) else w for w in (first, second))
        loss = a * F.mse_loss(e, z.detach()) + b * F.mse_loss(z, e.detach())
        return loss * z.numel() if sums else loss

    return answer


def _same(beta: float) -> float:
    return beta


_LOSS = {
    "beta_swapped": _weighed(_same, 1),
    "sums": _weighed(1, _same, sums=True),
    "beta_both": _weighed(_same, _same),
    "no_beta": _weighed(1, 1),
    "no_commitment": _weighed(1, 0),
    "no_codebook": _weighed(0, _same),
    "no_detach": lambda z, e, beta: (1 + beta) * F.mse_loss(z, e),
    "both_encoder": lambda z, e, beta: (1 + beta) * F.mse_loss(z, e.detach()),
    "both_codes": lambda z, e, beta: (1 + beta) * F.mse_loss(e, z.detach()),
    "nothing": lambda z, e, beta: (1 + beta) * F.mse_loss(e, z).detach(),
    "late": lambda z, e, beta: (
        F.mse_loss(z + (e - z).detach(), z.detach()) + beta * F.mse_loss(z, e.detach())
    ),
}


def my_perplexity(counts: Int[Tensor, " k"]) -> float:
    """exp of the entropy of the indices, from how often each was used: 1 … K."""
    p = counts[counts > 0] / counts.sum()
    return float((-(p * p.log()).sum()).exp())


def _see_perplexity(answer: Answer) -> list:
    return [answer(torch.tensor(n)) for n in ([5, 3, 0, 2], [4, 4, 4, 4], [9, 0, 0, 0])]


def _entropy(counts: Tensor) -> Tensor:
    return torch.special.entr(counts / counts.sum()).sum()


_PERPLEXITY = {
    "nan": lambda n: (-(n / n.sum() * (n / n.sum()).log()).sum()).exp(),
    "entropy": _entropy,
    "base": lambda n: 2 ** _entropy(n),
    "count": lambda n: (n > 0).sum(),
    "usage": lambda n: (n > 0).double().mean(),
    "sign": lambda n: (-_entropy(n)).exp(),
    "counts": lambda n: torch.special.entr(n.double()).sum().exp(),
}


def ema_step(
    count: Float[Tensor, ""],
    total: Float[Tensor, " d"],
    chosen: Float[Tensor, "n d"],
    decay: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, " d"], Float[Tensor, " d"]]:
    """One code vector's averages after a step, and the vector (van den Oord 2017, appendix A.1)."""
    new_count = decay * count + (1 - decay) * len(chosen)
    new_total = decay * total + (1 - decay) * chosen.sum(0)
    return new_count, new_total, new_total / new_count


def _see_ema(answer: Answer) -> list:
    count, total = torch.tensor(2.0), torch.tensor([1.0, -3.0])
    crowds = (_points(4, 6, 2), _points(4, 0, 2))
    return [list(answer(count, total, chosen, 0.9)) for chosen in crowds]


def _ema_but(keep: float = 0.9, take: float = 0.1, mean: bool = False, code: str = "") -> Answer:
    """An EMA step with one thing wrong."""

    def answer(count: Tensor, total: Tensor, chosen: Tensor, decay: float) -> tuple:
        added = chosen.mean(0) if mean else chosen.sum(0)
        n, m = keep * count + take * len(chosen), keep * total + take * added
        return n, m, {"": m / n, "m": m, "mean": chosen.mean(0), "old": m / count}[code]

    return answer


_EMA = {
    "swapped": _ema_but(0.1, 0.9),
    "mean": _ema_but(mean=True),
    "full": _ema_but(take=1.0),
    "sum_alone": _ema_but(code="m"),
    "batch_mean": _ema_but(code="mean"),
    "old_count": _ema_but(code="old"),
}


@torch.no_grad()
def restart_code(quantizer: EMAQuantizer, k: int, place: Float[Tensor, " d"]) -> None:
    """Move code vector k, and its averages with it, in place."""
    quantizer.codebook[k] = place
    quantizer.counts[k] = 1.0
    quantizer.sums[k] = place  # m = N · e, with N = 1


def _see_restart(answer: Answer) -> list:
    code_vectors = torch.tensor([[-0.7, 0.1], [0.5, 0.6], [9.0, 9.0]])
    crowd = (code_vectors[torch.arange(30) % 2] + 0.1 * _points(2, 30, 2)).T[None, :, None]
    quantizer, place = EMAQuantizer(3, 2, decay=0.9), torch.tensor([-2.0, -2.0])
    quantizer.replace_codes(torch.arange(3), code_vectors)
    for _ in range(60):
        quantizer(crowd)  # no encoding chooses the third code, and its averages decay
    answer(quantizer, 2, place)
    at_once = quantizer.codebook.clone()
    quantizer(crowd)
    stays = (quantizer.codebook - at_once).norm(dim=1) < 0.05
    runs_away = quantizer.codebook[2].norm() > 20
    return [at_once, stays, runs_away, quantizer.counts[2] > 0.5]


def _set(*names: str, count: float | None = 1.0) -> Answer:
    """Change these tensors alone; with no count, m = N · e keeps the decayed N."""

    def answer(quantizer: EMAQuantizer, k: int, place: Tensor) -> None:
        for name in names:
            value = {"counts": count, "sums": place if count else place * quantizer.counts[k]}
            getattr(quantizer, name)[k] = value.get(name, place)

    return answer


_RESTART = {
    "nothing": _set(),
    "code_only": _set("codebook"),
    "sums_only": _set("codebook", "sums"),
    "counts_only": _set("codebook", "counts"),
    "dead_again": _set("codebook", "sums", count=None),
    "averages_only": _set("counts", "sums"),
}

EXERCISES = {
    "2.1": Code(bits_of_a_picture, _see_bits, _BITS),
    "2.2": Code(nearest, _see_nearest, _NEAREST),
    "2.3": Code(straight_through, _see_straight, _STRAIGHT),
    "2.4": Code(quantizer_loss, _see_loss, _LOSS),
    "2.5": Code(my_perplexity, _see_perplexity, _PERPLEXITY),
    "2.6": Code(ema_step, _see_ema, _EMA),
    "2.7": Code(restart_code, _see_restart, _RESTART, in_place=True),
}

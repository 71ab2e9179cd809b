"""Exercises of chapter 2 as code; their words are in `chapter02.toml`, the build's code in
`chapter02_build.py`."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from t2ilearn.lessons.chapter02_build import BUILD
from t2ilearn.lessons.exercises import Answer, Code
from t2ilearn.lessons.experiments import recorded
from t2ilearn.models.quantizers import EMAQuantizer


def _points(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- 2.1 ----------------------------------------------------------------------------------------


def largest_codebook(side: int, budget: int) -> int:
    """The largest power of two K for which side × side tokens need at most `budget` bits."""
    bits_per_token = budget // side**2
    return 2**bits_per_token


def _see_codebook(answer: Answer) -> list:
    return [float(answer(*sizes)) for sizes in ((8, 640), (8, 700), (4, 100))]


_CODEBOOK = {
    "one_row": lambda side, budget: 2 ** (budget // side),
    "bits": lambda side, budget: budget // side**2,
    "no_power": lambda side, budget: int(2 ** (budget / side**2)),
    "too_large": lambda side, budget: 2 ** math.ceil(budget / side**2 + 1e-9),
    "nats": lambda side, budget: int(math.exp(budget // side**2)),
    "bytes": lambda side, budget: 2 ** (8 * budget // side**2),
}


# --- 2.2 ----------------------------------------------------------------------------------------


def unused_bits(counts: Int[Tensor, " k"]) -> float:
    """log₂ K minus the entropy of the indices in bits: what a token could carry and does not."""
    p = counts[counts > 0] / counts.sum()
    entropy = -(p * p.log2()).sum()
    return math.log2(len(counts)) - float(entropy)


def _see_unused(answer: Answer) -> list:
    return [answer(torch.tensor(n)) for n in ([5, 3, 0, 2], [9, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8])]


def _nats(counts: Tensor) -> Tensor:
    return torch.special.entr(counts / counts.sum()).sum()


_UNUSED = {
    "nan": lambda n: math.log2(len(n)) + (n / n.sum() * (n / n.sum()).log2()).sum(),
    "nats": lambda n: math.log(len(n)) - _nats(n),
    "mixed": lambda n: math.log2(len(n)) - _nats(n),
    "carried": lambda n: _nats(n) / math.log(2),
    "used_only": lambda n: torch.log2((n > 0).sum()) - _nats(n) / math.log(2),
    "codes": lambda n: len(n) - _nats(n).exp(),
    "usage": lambda n: math.log2(len(n)) * (1 - (n > 0).double().mean()),
}


# --- 2.3 ----------------------------------------------------------------------------------------


def steps_until_dead(count: float | int, decay: float | int, threshold: float | int) -> int:
    """The first step without a use after which n̄ = γ^steps · count is below the threshold."""
    return math.floor(math.log(threshold / count) / math.log(decay)) + 1


def _see_dead(answer: Answer) -> list:
    return [answer(1.0, 0.99, 0.03), answer(20.0, 0.9, 0.03), answer(4.0, 0.5, 0.03)]


_DEAD = {
    "one_less": lambda n, decay, least: math.floor(math.log(least / n) / math.log(decay)),
    "no_start": lambda n, decay, least: math.floor(math.log(least) / math.log(decay)) + 1,
    "linear": lambda n, decay, least: math.floor((n - least) / (1 - decay)) + 1,
    "other_memory": lambda n, decay, least: (
        math.floor(math.log(least / n) / math.log(1 - decay)) + 1
    ),
    "fraction": lambda n, decay, least: math.log(least / n) / math.log(decay),
}


# --- 2.4 ----------------------------------------------------------------------------------------


@torch.no_grad()
def restart_code(quantizer: EMAQuantizer, k: int, place: Float[Tensor, " d"]) -> None:
    """Move code vector k, and its averages with it, in place."""
    quantizer.codebook[k] = place
    quantizer.counts[k] = 1.0
    quantizer.sums[k] = place  # m̄ = n̄ · e, with n̄ = 1


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
    """Change these tensors alone; with no count, m̄ = n̄ · e keeps the decayed n̄."""

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


# --- 2.6: the derivation ------------------------------------------------------------------------


def copied_gradient(
    x: Float[Tensor, " m"],
    A: Float[Tensor, "m d"],
    z: Float[Tensor, " d"],
    e: Float[Tensor, " d"],
    beta: float | int,
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """The gradient that z receives from all three terms, and how far its reconstruction part is
    from the gradient at z itself."""
    M, D = A.shape
    reconstruction = -2 / M * A.T @ (x - A @ e)
    commitment = 2 * beta / D * (z - e)
    error = 2 / M * A.T @ A @ (e - z)
    return reconstruction + commitment, error


def _see_copied(answer: Answer) -> list:
    inputs = (_points(1, 3), _points(2, 3, 2), _points(3, 2), _points(4, 2), 0.5)
    return [*answer(*inputs)]


def _copied_but(
    at: str = "e",
    factor: float = 1.0,
    commitment: float = 1.0,
    extra: float = 0.0,
    sums: bool = False,
    error: float = 1.0,
) -> Answer:
    """The two results with one thing wrong."""

    def answer(x: Tensor, A: Tensor, z: Tensor, e: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        M, D = (1, 1) if sums else A.shape
        place = e if at == "e" else z
        pulled = -2 * factor / M * A.T @ (x - A @ place)
        held = 2 * (commitment * beta + extra) / D * (z - e)
        return pulled + held, error * 2 / M * A.T @ A @ (e - z)

    return answer


_COPIED = {
    "at_z": _copied_but(at="z"),
    "true": _copied_but(factor=0.0),
    "sums": _copied_but(sums=True),
    "no_beta": _copied_but(commitment=0.0, extra=1.0),
    "no_commitment": _copied_but(commitment=0.0),
    "codebook_too": _copied_but(extra=1.0),
    "uphill": _copied_but(factor=-1.0),
    "error_sign": _copied_but(error=-1.0),
    "no_error": _copied_but(error=0.0),
}


# --- 2.7: the experiment ------------------------------------------------------------------------


def effects(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Paired differences in usage: by initialisation, their mean and smallest; by learning rate."""
    usage = {(r["learning_rate"], r["initialisation"], r["seed"]): r["usage"] for r in rows}
    rates, seeds = ({key[i] for key in usage} for i in (0, 2))
    by_start = [usage[r, "k-means", s] - usage[r, "random", s] for r in rates for s in seeds]
    by_rate = [usage[max(rates), "random", s] - usage[min(rates), "random", s] for s in seeds]
    return sum(by_start) / len(by_start), min(by_start), sum(by_rate) / len(by_rate)


def _see_effects(answer: Answer) -> list:
    return [*answer(recorded("2.7").rows)]


def _effects_but(
    of: str = "usage", seeds: int = 3, sign: int = 1, kept: Any = min, start: str = "random"
) -> Answer:
    """The three numbers with one thing wrong."""

    def answer(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
        changed = [{**row, "usage": row[of]} for row in rows if row["seed"] < seeds]
        swap = {"random": "k-means", "k-means": "random"}
        mean, least, _ = effects(changed)
        others = [{**row, "initialisation": swap[row["initialisation"]]} for row in changed]
        by_rate = effects(changed if start == "random" else others)[2]
        if kept is max:
            least = -effects(others)[1]
        return sign * mean, sign * least, sign * by_rate

    return answer


def _best_seed(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    best: dict[tuple[float, str], float] = {}
    for row in rows:
        key = (row["learning_rate"], row["initialisation"])
        best[key] = max(row["usage"], best.get(key, 0.0))
    chosen = [
        {"learning_rate": rate, "initialisation": start, "seed": 0, "usage": usage}
        for (rate, start), usage in best.items()
    ]
    return effects(chosen)


_EFFECTS = {
    "perplexity": _effects_but(of="perplexity"),
    "psnr": _effects_but(of="psnr"),
    "one_seed": _effects_but(seeds=1),
    "best_seed": _best_seed,
    "sign": _effects_but(sign=-1),
    "largest": _effects_but(kept=max),
    "other_start": _effects_but(start="k-means"),
}

EXERCISES = {
    "2.1": Code(largest_codebook, _see_codebook, _CODEBOOK),
    "2.2": Code(unused_bits, _see_unused, _UNUSED),
    "2.3": Code(steps_until_dead, _see_dead, _DEAD),
    "2.4": Code(restart_code, _see_restart, _RESTART, in_place=True),
    "2.5": BUILD,
    "2.6": Code(copied_gradient, _see_copied, _COPIED),
    "2.7": Code(effects, _see_effects, _EFFECTS),
}

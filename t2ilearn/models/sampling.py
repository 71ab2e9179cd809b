"""Sampling tokens from a prior, one by one: temperature, truncation and guidance.

Papers: top-k sampling (Fan et al. 2018), top-p or nucleus sampling (Holtzman et al. 2020),
classifier-free guidance (Ho & Salimans 2022).

| symbol | name |
|---|---|
| τ | `temperature`: logits are divided by it |
| k, p | `top_k`, `top_p` |
| c, u | logits with the caption, and with ∅ (`tokens.null_caption`) |
| s | `guidance_scale`: logits = u + s (c − u) (Ho & Salimans 2022, Eq. 6, with s = w + 1) |

Differs from the papers in: guidance acts on the logits of the next token, where the paper's acts on
the score of a diffusion model.

Letters: B batch, T tokens of a caption, N tokens of a picture, K code vectors in the codebook.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .layers import LEAST_TEMPERATURE
from .tokens import null_caption
from .transformer import Prior, PriorConfig


def sample_from_logits(
    logits: Float[Tensor, "b k"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " b"]:
    """Sample one token a row.

    Args:
        temperature: τ ≥ 0; 0 takes the likeliest token (greedy).
        top_k: only the k likeliest tokens may be sampled.
        top_p: only the smallest set of likeliest tokens whose probabilities reach p together may be
            sampled (nucleus sampling); at least one.

    Raises:
        ValueError: for an argument outside its range, or logits that hold NaN.
    """
    check_options(logits.shape[1], temperature, top_k, top_p)
    if logits.isnan().any():
        raise ValueError("The logits hold NaN: the model, or what it was given, is damaged.")
    if temperature == 0:
        return logits.argmax(1)
    logits = (logits - logits.amax(1, keepdim=True)).float() / temperature  # ≤ 0: no overflow
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None:
        p, order = logits.softmax(1).sort(descending=True)
        before = p.cumsum(1) - p  # the probability of all likelier tokens
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(cut, -math.inf)
    p = logits.softmax(1).to("cpu" if generator is None else generator.device)
    return torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)


@torch.no_grad()
def sample_steps(
    model: Prior,
    caption: Int[Tensor, "b t"] | None = None,
    *,
    count: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float = 1.0,
    start: Int[Tensor, "b n"] | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Int[Tensor, "b n"]]:
    """Sample tokens one by one; yields all there are after each.

    Args:
        caption: one a picture, or None for a prior without captions.
        count: how many pictures, where neither `caption` nor `start` determines it.
        temperature, top_k, top_p: see `sample_from_logits`.
        guidance_scale: s ≥ 0; 0 ignores the caption, 1 is the model as learned.
        start: tokens to continue from, for example those of the upper half of a picture.
        use_cache: False computes everything anew for each token, and gives the same.

    Raises:
        ValueError: for an argument outside its range, or inputs that this prior does not take.
    """
    check_sampling(model.config, temperature, top_k, top_p, guidance_scale)
    given = caption if start is None else start
    batch = (1 if count is None else count) if given is None else len(given)
    if batch < 1:
        raise ValueError(f"The number of pictures must be at least 1, not {batch}.")
    device = next(model.parameters()).device
    indices = torch.zeros(batch, 0, dtype=torch.int64, device=device) if start is None else start
    model.check(indices, caption)
    if indices.shape[1] == model.config.num_image_tokens:
        raise ValueError(f"All {indices.shape[1]} tokens are given: nothing is left to sample.")
    guided = caption is not None and guidance_scale != 1
    if guided and caption is not None:
        caption = torch.cat([caption, null_caption(*caption.shape).to(caption.device)])
    caches = model.new_caches(2 * batch if guided else batch) if use_cache else None
    while indices.shape[1] < model.config.num_image_tokens:
        logits = model.next_logits(indices.repeat(2, 1) if guided else indices, caption, caches)
        if guided:
            c, u = logits.chunk(2)
            logits = u + guidance_scale * (c - u)
        new = sample_from_logits(logits, temperature, top_k, top_p, generator)
        indices = torch.cat([indices, new[:, None]], dim=1)
        yield indices


def check_sampling(
    config: PriorConfig,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    guidance_scale: float,
) -> None:
    """Raise ValueError if tokens cannot be sampled with these options."""
    check_options(config.codebook_size, temperature, top_k, top_p)
    if not 0 <= guidance_scale < math.inf:
        raise ValueError(f"The guidance scale must be 0 or more, not {guidance_scale}.")


def check_options(
    codebook_size: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Raise ValueError for an option of `sample_from_logits` that is out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"The temperature must be 0 (greedy) or more, not {temperature}.")
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"The temperature {temperature:g} is so small that logits overflow: take 0 (greedy) or "
            f"at least {LEAST_TEMPERATURE:f}."
        )
    if top_k is not None and not 1 <= top_k <= codebook_size:
        raise ValueError(f"top-k must be 1 … {codebook_size}, not {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top-p must be in (0, 1], not {top_p}.")


def sample(
    model: Prior,
    caption: Int[Tensor, "b t"] | None = None,
    *,
    generator: torch.Generator,
    **how: object,
) -> Int[Tensor, "b n"]:
    """The finished tokens of `sample_steps`; `how` are its other arguments."""
    *_, indices = sample_steps(model, caption, generator=generator, **how)  # type: ignore[arg-type]
    return indices

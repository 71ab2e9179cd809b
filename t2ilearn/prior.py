"""Priors over codes: one distribution over the next code at a time.

    p(codes | caption) = Π_i p(code_i | code_1 … code_{i−1}, caption)

`TransformerPrior` (Vaswani 2017; Radford 2019; Esser 2021) reads the caption as a prefix, in both
directions, and the codes causally. `prior_loss` is the cross-entropy of the product above.

| symbol | name |
|---|---|
| code_i | `codes[:, i]` |
| s | `guidance_scale` (Ho & Salimans 2022): logits = u + s (c − u) |

Differs from the papers in: words attend to each other in both directions; word, code and position
embeddings start at one scale, for a bag of words cannot bind attributes to objects.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from t2ilearn.layers import KVCache, TransformerBlock

PAD, END, NULL = 0, 1, 2


@dataclass(frozen=True)
class PriorConfig:
    """Sizes of a prior; `vocabulary` 0 means that there are no captions."""

    codes: int = 1024
    length: int = 64
    width: int = 192
    depth: int = 6
    heads: int = 6
    vocabulary: int = 0
    text_length: int = 24


class PriorLoss(NamedTuple):
    """Mean cross-entropy in nats a code."""

    cross_entropy: Tensor
    total: Tensor


class TransformerPrior(nn.Module):
    """Next-code logits by a Transformer; see the module's docstring."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.words = config.text_length if config.vocabulary else 0
        self.start = nn.Parameter(torch.empty(1, 1, config.width))
        self.code_embedding = nn.Embedding(config.codes, config.width)
        self.position = nn.Parameter(torch.empty(self.words + config.length, config.width))
        if config.vocabulary:
            self.word_embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.codes, bias=False)
        self.apply(self._start_values)
        nn.init.normal_(self.start, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    @staticmethod
    def _start_values(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _mask(self, caption: Tensor | None, total: int) -> Tensor:
        """(B or 1, 1, T, T), True where attention is allowed."""
        allowed = torch.ones(total, total, dtype=torch.bool, device=self.position.device).tril()
        if caption is None:
            return allowed[None, None]
        allowed[: self.words, : self.words] = True
        real = F.pad(caption != PAD, (0, total - self.words), value=True)
        return allowed[None, None] & real[:, None, None]

    def _prefix(self, caption: Tensor | None, batch: int) -> Tensor:
        """Words (if any) and the start token, with their positions: (B, words + 1, D)."""
        start = self.start.expand(batch, -1, -1)
        x = start if caption is None else torch.cat([self.word_embedding(caption), start], 1)
        return x + self.position[: x.shape[1]]

    def _check(self, caption: Tensor | None) -> None:
        if (caption is None) != (self.words == 0):
            raise ValueError("A conditional prior needs captions, an unconditional one takes none.")
        if caption is not None and caption.shape[1] != self.words:
            raise ValueError(f"Captions have {self.words} ids, not {caption.shape[1]}.")

    def forward(
        self, codes: Int[Tensor, "b n"], caption: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b n k"]:
        """Logits; position i sees the caption and the codes before i."""
        self._check(caption)
        batch, n = codes.shape
        if n > self.config.length:
            raise ValueError(f"At most {self.config.length} codes, not {n}.")
        x = self._prefix(caption, batch)
        body = self.code_embedding(codes[:, :-1]) + self.position[x.shape[1] : self.words + n]
        x = torch.cat([x, body], 1)
        mask = self._mask(caption, x.shape[1])
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x[:, self.words :]))


def prior_loss(logits: Float[Tensor, "b n k"], codes: Int[Tensor, "b n"]) -> PriorLoss:
    """−log p(codes) / N, in nats."""
    cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
    return PriorLoss(cross_entropy, cross_entropy)


def drop_captions(
    caption: Int[Tensor, "b t"], rate: float, generator: torch.Generator
) -> Int[Tensor, "b t"]:
    """Replace captions by the null caption at a rate, so that guidance has something to leave."""
    dropped = torch.rand(len(caption), generator=generator) < rate
    out = caption.clone()
    out[dropped] = _null_like(caption)[dropped]
    return out


def _null_like(caption: Tensor) -> Tensor:
    null = torch.full_like(caption, PAD)
    null[:, 0], null[:, 1] = NULL, END
    return null


def choose(
    logits: Float[Tensor, "b k"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Int[Tensor, " b"]:
    """Draw one code a row. Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(1)
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    return torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


@torch.no_grad()
def sample_steps(
    model: TransformerPrior,
    caption: Int[Tensor, "b t"] | None = None,
    *,
    count: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float = 1.0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Int[Tensor, "b n"]]:
    """Draw codes one by one; yields what there is after each.

    Raises:
        ValueError: for a negative temperature, top-k outside 1 … K or top-p outside (0, 1].
    """
    config = model.config
    if temperature < 0:
        raise ValueError(f"The temperature must be 0 (greedy) or more, not {temperature}.")
    if top_k is not None and not 1 <= top_k <= config.codes:
        raise ValueError(f"top-k must be 1 … {config.codes}, not {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top-p must be in (0, 1], not {top_p}.")
    model._check(caption)
    batch = count or 1 if caption is None else len(caption)
    guided = caption is not None and guidance_scale != 1
    if guided and caption is not None:
        caption = torch.cat([caption, _null_like(caption)])
    rows = 2 * batch if guided else batch
    total = model.words + config.length
    x = model._prefix(caption, rows)
    mask = model._mask(caption, total)
    caches = [
        KVCache(rows, config.heads, total, config.width // config.heads, x) for _ in model.blocks
    ]
    codes = torch.zeros(batch, 0, dtype=torch.int64, device=x.device)
    for i in range(config.length):
        seen = model.words + 1 + i
        if use_cache:
            window = mask[:, :, seen - x.shape[1] : seen, :seen]
            y = x
            for block, cache in zip(model.blocks, caches, strict=True):
                y = block(y, window, cache)
            logits = model.head(model.norm(y[:, -1]))
        else:
            both = codes.repeat(2, 1) if guided else codes
            logits = model(F.pad(both, (0, 1)), caption)[:, -1]
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance_scale * (conditional - unconditional)
        new = choose(logits, temperature, top_k, top_p, generator)
        codes = torch.cat([codes, new[:, None]], 1)
        yield codes
        if i + 1 < config.length:
            x = model.code_embedding(new.repeat(2) if guided else new)[:, None]
            x = x + model.position[seen]


def sample(
    model: TransformerPrior, caption: Int[Tensor, "b t"] | None = None, **how: object
) -> Int[Tensor, "b n"]:
    """The finished codes of `sample_steps`; takes the same arguments."""
    *_, codes = sample_steps(model, caption, **how)  # type: ignore[arg-type]
    return codes

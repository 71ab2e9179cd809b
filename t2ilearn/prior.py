"""Priors over codes: what makes a VQ-VAE draw. One distribution over the next code at a time,

    p(q | c)  =  Π_i  p(q_i | q_1 … q_{i−1}, c)

so that drawing codes one by one is drawing from the whole. Two models of the factors:

    PixelCNN    masked convolutions, the prior of the VQ-VAE paper (van den Oord et al. 2016a,
                2016b: gated, two stacks without a blind spot, conditioned by Eq. 4)
    Transformer the caption as a prefix that reads itself in both directions, then the codes,
                each seeing what came before (Vaswani et al. 2017; Radford et al. 2019;
                second stage of Esser et al. 2021)

`prior_loss` is the cross-entropy of the product above; `sample_steps` draws from it.

| symbol | name |
|---|---|
| q_i | `codes[:, i]`, the grid row by row |
| c, ∅ | `caption`, `tokens.null_caption` |
| τ | `temperature`: logits are divided by it |
| s | `guidance_scale`: logits = u + s (c − u), on logits (Ho & Salimans 2022, Eq. 6, s = w + 1) |

Differs from the papers in: the Transformer's input and output embeddings are one matrix, as in
GPT-2; words, codes and positions start at one scale, for where positions whisper, a caption is a
bag of words, and a bag cannot say which colour belongs to which shape; the PixelCNN gets its
caption from a small Transformer over the words instead of a class number.

Letters: B batch, T words of a caption, N = h · w codes, K codes in the codebook, D width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from t2ilearn.layers import KVCache, TransformerBlock
from t2ilearn.tokens import PAD, null_caption

INIT = 0.02  # standard deviation of all weights at the start (GPT-2)


@dataclass(frozen=True)
class PriorConfig:
    """Sizes of a prior.

    Args:
        codes: K, the size of the codebook.
        side: h = w, the side of the grid of codes.
        width: D.
        depth: blocks of a Transformer, layers of a PixelCNN.
        heads: of attention; D must be a multiple.
        vocabulary: words that captions are made of; 0 for a prior without captions.
        text_length: T, the ids of a caption with its padding.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    codes: int = 1024
    side: int = 8
    width: int = 192
    depth: int = 5
    heads: int = 6
    vocabulary: int = 0
    text_length: int = 24

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}.")
        if self.codes < 2 or self.side < 1 or self.depth < 1 or self.vocabulary < 0:
            raise ValueError("Two codes, a side of one and one block are the least, please.")
        if self.vocabulary and self.text_length < 2:
            raise ValueError(f"A caption needs two ids at least, not {self.text_length}.")

    @property
    def length(self) -> int:
        """N, the number of codes in a picture."""
        return self.side**2

    @property
    def words(self) -> int:
        """T, or 0 for a prior without captions."""
        return self.text_length if self.vocabulary else 0


class PriorLoss(NamedTuple):
    """−log p(q | c) / N: nats a code."""

    cross_entropy: Float[Tensor, ""]
    total: Float[Tensor, ""]


def prior_loss(logits: Float[Tensor, "b n k"], codes: Int[Tensor, "b n"]) -> PriorLoss:
    """Mean cross-entropy of each code given those before it, in float32."""
    cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
    return PriorLoss(cross_entropy, total=cross_entropy)


def drop_captions(
    caption: Int[Tensor, "b t"], rate: float, generator: torch.Generator
) -> Int[Tensor, "b t"]:
    """Captions with some replaced by ∅, so that one model learns p(q | c) and p(q).

    Args:
        rate: the share that is replaced, in [0, 1]; Ho & Salimans (2022) use 0.1 to 0.2.
    """
    dropped = torch.rand(len(caption), generator=generator) < rate
    null = null_caption(*caption.shape).to(caption.device)
    return torch.where(dropped.to(caption.device)[:, None], null, caption)


def slip(
    codes: Int[Tensor, "b n"], size: int, most: float, generator: torch.Generator
) -> Int[Tensor, "b n"]:
    """Codes with some exchanged by lot, for a model to hear while it learns to say the right ones.

    Who hears only right codes in training finishes any drawing that it knows by heart, whatever
    the caption; and goes astray after its own first slip (exposure bias, Ranzato et al. 2016).

    Args:
        size: K.
        most: each picture's own share of slips is drawn from [0, most].
    """
    share = most * torch.rand(len(codes), 1, generator=generator)
    slips = torch.rand(codes.shape, generator=generator) < share
    anything = torch.randint(size, codes.shape, generator=generator)
    return torch.where(slips.to(codes.device), anything.to(codes.device), codes)


class Prior(nn.Module):
    """What both priors share: their sizes, and the checks of what they are given."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config

    def check(self, codes: Tensor, caption: Tensor | None) -> None:
        """Raise ValueError if these are not inputs for this prior."""
        words, length, last = self.config.words, self.config.length, self.config.codes - 1
        if (caption is None) != (words == 0):
            kind = "with captions: give one" if words else "without captions: give none"
            raise ValueError(f"This is a prior {kind}.")
        if caption is not None and (caption.ndim != 2 or caption.shape[1] != words):
            raise ValueError(f"Captions have shape (B, {words}), not {tuple(caption.shape)}.")
        if caption is not None and caption.numel():
            top = self.config.vocabulary - 1
            if not 0 <= caption.min() <= caption.max() <= top:
                worst = caption.max().item() if caption.max() > top else caption.min().item()
                raise ValueError(f"Word ids go up to {top}, not {worst}.")
            if (caption == PAD).all(1).any():
                raise ValueError("A caption is all padding; null_caption() is none at all.")
        if caption is not None and codes.ndim == 2 and len(caption) != len(codes):
            raise ValueError(f"{len(codes)} pictures but {len(caption)} captions.")
        if codes.ndim != 2 or codes.shape[1] > length:
            raise ValueError(
                f"At most {length} codes: (B, N ≤ {length}), not {tuple(codes.shape)}."
            )
        if codes.numel() and not 0 <= codes.min() <= codes.max() <= last:
            wrong = f"{codes.min().item()} … {codes.max().item()}"
            raise ValueError(f"Codes are numbers from 0 to {last}; these are {wrong}.")

    def code_logits(
        self, codes: Int[Tensor, "b n"], caption: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b n k"]:
        """Logits of every code, from the caption and the codes before it."""
        return self(codes, caption)

    def next_logits(
        self,
        codes: Int[Tensor, "b n"],
        caption: Int[Tensor, "b t"] | None = None,
        caches: list[KVCache] | None = None,
    ) -> Float[Tensor, "b k"]:
        """Logits of the code that comes after these. Without caches: everything anew."""
        return self.code_logits(F.pad(codes, (0, 1)), caption)[:, -1]

    def new_caches(self, batch: int) -> list[KVCache] | None:
        """Empty caches for `next_logits`, if this prior has a use for them."""
        return None


@torch.no_grad()
def log_likelihood(
    model: Prior, codes: Int[Tensor, "b n"], caption: Int[Tensor, "b t"] | None = None
) -> Float[Tensor, " b"]:
    """log p(q | c) of whole pictures, in nats: which of several is the likeliest for a caption."""
    logits = model.code_logits(codes, caption).float()
    return -F.cross_entropy(logits.mT, codes, reduction="none").sum(1)


def empty_caches(config: PriorConfig, batch: int, length: int, like: Tensor) -> list[KVCache]:
    """A cache for each block, with room for `length` tokens; like a tensor of the model."""
    sizes = (batch, config.heads, length, config.width // config.heads)
    return [KVCache(*sizes, like.detach()) for _ in range(config.depth)]


# --- the Transformer ---------------------------------------------------------------------------


class TransformerPrior(Prior):
    """c_1 … c_T, start, q_1 … q_{N−1}  →  logits of q_1 … q_N."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        if config.vocabulary:
            self.word_embedding = nn.Embedding(config.vocabulary, config.width)
        self.start = nn.Parameter(INIT * torch.randn(1, 1, config.width))
        self.code_embedding = nn.Embedding(config.codes, config.width)
        self.position = nn.Parameter(INIT * torch.randn(config.words + config.length, config.width))
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.apply(gpt2_init)

    def forward(
        self, codes: Int[Tensor, "b n"], caption: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b n k"]:
        """Logits of every code; those of number i look at the caption and the codes before i.

        Raises:
            ValueError: for codes or words out of range, too many of them, or a caption where none
                belongs.
        """
        self.check(codes, caption)
        x = self._embed(codes[:, :-1], caption)  # (B, T + N, D): words, start, codes
        x = self._through_blocks(x, self._mask(caption, x.shape[1]))
        return self._logits(x[:, self.config.words :])

    def next_logits(
        self,
        codes: Int[Tensor, "b n"],
        caption: Int[Tensor, "b t"] | None = None,
        caches: list[KVCache] | None = None,
    ) -> Float[Tensor, "b k"]:
        """Logits of the code that comes after these; what the caches know is not done again."""
        if caches is None:
            return super().next_logits(codes, caption)
        seen, total = caches[0].length, self.config.words + 1 + codes.shape[1]
        if seen == 0:
            x = self._embed(codes, caption)
        else:  # one new code a call
            x = self.code_embedding(codes[:, seen - total :]) + self.position[seen:total]
        x = self._through_blocks(x, self._mask(caption, total)[:, :, seen:], caches)
        return self._logits(x[:, -1])

    def new_caches(self, batch: int) -> list[KVCache]:
        """One empty cache a block."""
        return empty_caches(self.config, batch, len(self.position), self.position)

    def _embed(self, codes: Tensor, caption: Tensor | None) -> Float[Tensor, "b total d"]:
        """Words (if any), start and codes, each with its position added."""
        parts = [self.start.expand(len(codes), -1, -1), self.code_embedding(codes)]
        if caption is not None:
            parts.insert(0, self.word_embedding(caption))
        x = torch.cat(parts, dim=1)
        return x + self.position[: x.shape[1]]

    def _through_blocks(
        self, x: Tensor, mask: Tensor, caches: list[KVCache] | None = None
    ) -> Float[Tensor, "b _ d"]:
        for number, block in enumerate(self.blocks):
            x = block(x, mask, None if caches is None else caches[number])
        return self.norm(x)

    def _logits(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        return x @ self.code_embedding.weight.T

    def _mask(self, caption: Tensor | None, total: int) -> Bool[Tensor, "_ 1 total total"]:
        """True where attention is allowed: backwards, among all words, and never to padding."""
        allowed = torch.ones(total, total, dtype=torch.bool, device=self.position.device).tril()
        if caption is None:
            return allowed[None, None]
        words = self.config.words
        allowed[:words, :words] = True
        real = F.pad(caption != PAD, (0, total - words), value=True)  # (B, T + codes)
        return (allowed & real[:, None])[:, None]


def gpt2_init(module: nn.Module) -> None:
    """Radford et al. 2019: all matrices alike, no bias."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# --- the PixelCNN ------------------------------------------------------------------------------


class GatedLayer(nn.Module):
    """One layer of the two stacks (van den Oord et al. 2016b, Fig. 2).

    The vertical stack sees all rows up to its own, the horizontal one its own row up to its own
    place, and gets the vertical stack's row above. Together: everything before, no blind spot.

    Args:
        first: mask A. The horizontal stack must not see its own place, which holds the answer;
            in later layers that place holds a summary of what came before (mask B).
    """

    def __init__(self, width: int, first: bool, kernel: int = 5) -> None:
        super().__init__()
        self.first, self.reach = first, kernel // 2
        self.vertical = nn.Conv2d(width, 2 * width, (self.reach + 1, kernel))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, self.reach + (not first)))
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(
        self,
        v: Float[Tensor, "b d h w"],
        h: Float[Tensor, "b d h w"],
        condition: Float[Tensor, "#b #d2 1 1"],
    ) -> tuple[Float[Tensor, "b d h w"], Float[Tensor, "b d h w"]]:
        """Both stacks, one layer on; the condition is added before the gates (Eq. 4)."""
        r = self.reach
        up = self.vertical(F.pad(v, (r, r, r, 0)))  # rows i − r … i
        above = F.pad(up, (0, 0, 1, 0))[:, :, :-1]  # so that row i hears of rows before i only
        left = self.horizontal(F.pad(h, (r, 0, 0, 0))[..., : h.shape[3] + r - self.first])
        new = self.out(_gate(left + self.link(above) + condition))
        return _gate(up + condition), new if self.first else h + new


def _gate(x: Float[Tensor, "b d2 h w"]) -> Float[Tensor, "b d h w"]:
    """tanh(a) · σ(b), the halves of x (van den Oord et al. 2016b, Eq. 2)."""
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


class PixelCNN(Prior):
    """Codes as a picture of numbers; each place predicted from the rows above and its left."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        width = config.width
        self.code_embedding = nn.Embedding(config.codes, width)
        self.layers = nn.ModuleList(GatedLayer(width, first=i == 0) for i in range(config.depth))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, config.codes, 1))
        if config.vocabulary:
            self.word_embedding = nn.Embedding(config.vocabulary, width)
            self.position = nn.Parameter(torch.randn(config.words, width))
            self.reader = TransformerBlock(width, config.heads)
            self.conditions = nn.Linear(width, 2 * width * config.depth)

    def forward(
        self, codes: Int[Tensor, "b n"], caption: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b n k"]:
        """Logits of every code, from the caption and the codes before it.

        Raises:
            ValueError: as for the Transformer.
        """
        self.check(codes, caption)
        n, side = codes.shape[1], self.config.side
        grid = F.pad(codes, (0, self.config.length - n)).unflatten(1, (side, side))
        v = h = self.code_embedding(grid).movedim(-1, 1)  # (B, D, h, w)
        for layer, condition in zip(self.layers, self._conditions(caption), strict=True):
            v, h = layer(v, h, condition)
        return self.head(h).flatten(2).mT[:, :n]

    def _conditions(self, caption: Tensor | None) -> list[Tensor]:
        """What each layer hears of the caption, the same at all places: (B or 1, 2 D, 1, 1)."""
        width, depth = self.config.width, self.config.depth
        if caption is None:
            return [self.code_embedding.weight.new_zeros(1, 1, 1, 1)] * depth
        real = caption != PAD  # (B, T)
        x = self.reader(self.word_embedding(caption) + self.position, real[:, None, None])
        mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)  # (B, D)
        return list(self.conditions(mean)[..., None, None].split(2 * width, dim=1))


# --- drawing from a prior ----------------------------------------------------------------------


def choose(
    logits: Float[Tensor, "b k"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " b"]:
    """Draw one code a row.

    Args:
        temperature: τ ≥ 0; 0 takes the likeliest.
        top_k: only the k likeliest may be drawn.
        top_p: only the likeliest that together reach this probability may be drawn (Holtzman et
            al. 2020); at least one.
    """
    if temperature == 0:
        return logits.argmax(1)
    logits = (logits - logits.amax(1, keepdim=True)).float() / temperature  # ≤ 0: no overflow
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None:
        p, order = logits.softmax(1).sort(descending=True)
        before = p.cumsum(1) - p  # the probability of all that is likelier
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
    """Draw codes one by one; yields all there are after each.

    Args:
        caption: one a picture, or None for a prior without captions.
        count: how many pictures, where there is no caption that tells.
        temperature, top_k, top_p: see `choose`.
        guidance_scale: s ≥ 0; 0 ignores the caption, 1 is the model as learned.
        start: codes to go on from, for example the upper half of a picture.
        use_cache: False computes everything anew for each code, and gives the same.

    Raises:
        ValueError: for an argument outside its range, or inputs that this prior does not take.
    """
    check_sampling(model.config, temperature, top_k, top_p, guidance_scale)
    given = caption if start is None else start
    batch = (1 if count is None else count) if given is None else len(given)
    if batch < 1:
        raise ValueError(f"At least one picture, please, not {batch}.")
    device = next(model.parameters()).device
    codes = torch.zeros(batch, 0, dtype=torch.int64, device=device) if start is None else start
    model.check(codes, caption)
    if codes.shape[1] == model.config.length:
        raise ValueError(f"All {codes.shape[1]} codes are given: nothing is left to draw.")
    guided = caption is not None and guidance_scale != 1
    if guided and caption is not None:
        caption = torch.cat([caption, null_caption(*caption.shape).to(caption.device)])
    caches = model.new_caches(2 * batch if guided else batch) if use_cache else None
    while codes.shape[1] < model.config.length:
        logits = model.next_logits(codes.repeat(2, 1) if guided else codes, caption, caches)
        if guided:
            c, u = logits.chunk(2)
            logits = u + guidance_scale * (c - u)
        new = choose(logits, temperature, top_k, top_p, generator)
        codes = torch.cat([codes, new[:, None]], dim=1)
        yield codes


def check_sampling(
    config: PriorConfig,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    guidance_scale: float,
) -> None:
    """Raise ValueError if these cannot be sampled with."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"The temperature must be 0 (greedy) or more, not {temperature}.")
    if top_k is not None and not 1 <= top_k <= config.codes:
        raise ValueError(f"top-k must be 1 … {config.codes}, not {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top-p must be in (0, 1], not {top_p}.")
    if not 0 <= guidance_scale < math.inf:
        raise ValueError(f"The guidance scale must be 0 or more, not {guidance_scale}.")


def sample(
    model: Prior,
    caption: Int[Tensor, "b t"] | None = None,
    *,
    generator: torch.Generator,
    **how: object,
) -> Int[Tensor, "b n"]:
    """The finished codes of `sample_steps`, which says what `how` may be."""
    *_, codes = sample_steps(model, caption, generator=generator, **how)  # type: ignore[arg-type]
    return codes

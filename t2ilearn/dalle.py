"""DALL·E: a picture as the end of a sentence (Ramesh et al. 2021).

Stage one, the *discrete VAE*: an encoder that says how likely each of K codes is at each place, a
draw that gradients can pass, and a decoder. Its loss is the evidence bound of section 2.1,

    L_dVAE  =  −ln p(x | y)  +  β · D_KL(q(k | x) ‖ uniform),     y = softmax((l + g) / τ)

Stage two: one Transformer reads words and codes as one stream and predicts what comes next,

    w_1 … w_T  q_1 … q_N,        L  =  1/8 · L_words  +  7/8 · L_picture

so that a caption and the codes of its upper half are both just a beginning, to be gone on from.

| symbol | name |
|---|---|
| l, q(k given x) | `logits`, one for each code and place; their softmax |
| g | `noise`, Gumbel(0, 1) |
| τ | `temperature`, by `temperature_at`: 1 → 1/16 |
| β | `kl_weight`, by `kl_weight_at`: 0 → 6.6 |
| φ, ε | `squeeze`, `EPSILON`: [0, 1] → [ε, 1 − ε], Eq. 2 of the appendix |
| μ, ln b | `mean`, `log_scale` of the logit-Laplace distribution, Eq. 1 of the appendix |
| w, q | `caption`, `codes` |

Differs from the paper in: encoder and decoder are chapter 2's (strided convolutions, SiLU), the
codes' vectors D numbers long; b is at least 1/4, for plain grounds would drive it to 0, and a
pixel counts by 1/b (a small dVAE's copies: 19.8 dB with 1/64, 22.5 dB); all attention is dense;
words and codes are predicted through their own embeddings (weights tied); words that were padding,
or a caption left out for guidance, are not counted in L_words; some of the codes heard in training
are wrong on purpose (`prior.slip`); a dVAE begins as an autoencoder (`DVAE._score_by_likeness`);
8 × 8 codes instead of 32 × 32. The class draws from any `PictureCodes`, a VQGAN's as well.

Letters: B batch, T words, N = h · w codes, K codes in the codebook, V vocabulary, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from t2ilearn.layers import KVCache, TransformerBlock
from t2ilearn.prior import INIT, Prior, PriorConfig, empty_caches, gpt2_init
from t2ilearn.tokens import NULL, PAD
from t2ilearn.vqvae import (
    CodesConfig,
    Decoder,
    Encoder,
    PictureCodes,
    check_pictures,
    precise,
    ranks,
    summed_over_ranks,
)

EPSILON = 0.1  # ε: keeps the logit of a black or white pixel finite
NARROWEST = math.log(1 / 4)  # of ln b: some 20 of 255 grey levels
WARMEST, COLDEST = 1.0, 1 / 16  # τ at the start and at the end (section 2.1)
KL_WEIGHT = 6.6  # β at the end (appendix A.2)
WORDS_SHARE = 1 / 8  # of the loss; the rest is the picture's (appendix B.2)


# --- stage one: a draw that gradients can pass -------------------------------------------------


@dataclass(frozen=True)
class DVAEConfig(CodesConfig):
    """Sizes of a discrete VAE; see `CodesConfig`."""


class DVAEOutput(NamedTuple):
    """What the encoder says of the codes, and what the decoder of the picture."""

    logits: Float[Tensor, "b k h w"]
    mean: Float[Tensor, "b 3 H W"]
    log_scale: Float[Tensor, "b 3 H W"]


class DVAELoss(NamedTuple):
    """The two terms of the bound, each in nats a number of x, and their weighted sum."""

    reconstruction: Float[Tensor, ""]
    divergence: Float[Tensor, ""]
    total: Float[Tensor, ""]


def gumbel_noise(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "..."]:
    """g = −ln(−ln u) with u uniform in (0, 1); argmax(l + g) is a draw from softmax(l)."""
    u = torch.rand(shape, generator=generator, dtype=dtype)
    tiny = torch.finfo(dtype).tiny
    return -(-u.clamp(min=tiny).log()).clamp(min=tiny).log()  # rand can say 0, never 1


def relaxed_draw(
    logits: Float[Tensor, "b k *places"], noise: Float[Tensor, "b k *places"], temperature: float
) -> Float[Tensor, "b k *places"]:
    """y = softmax((l + g) / τ) over the codes (Jang et al. 2017, Eq. 2).

    Args:
        noise: from `gumbel_noise`.
        temperature: τ > 0. Towards 0 a draw becomes one code, and its gradient wild; towards ∞ it
            becomes the same mixture of all codes.

    Raises:
        ValueError: if τ is not above 0.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"The temperature of a relaxed draw must be above 0, not {temperature}.")
    return ((precise(logits) + noise) / temperature).softmax(1)


class DVAE(PictureCodes):
    """Encoder, a draw of codes, decoder (section 2.1). In use the likeliest codes are taken."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config: DVAEConfig = config
        self.encoder = Encoder(config, outputs=config.codes)
        self.codebook = nn.Parameter(torch.randn(config.codes, config.code_dim))
        self.decoder = Decoder(config, outputs=6)  # μ and ln b for red, green and blue
        self._score_by_likeness()

    @torch.no_grad()
    def _score_by_likeness(self) -> None:
        """At first, a code's logit is its vector's product with a projection of the features.

        So a soft draw at τ = 1 hands that projection on, roughly, and the whole begins as an
        autoencoder. From logits that have nothing to do with the vectors, a few codes win it all.
        """
        last = self.encoder[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        projection = nn.Conv2d(last.in_channels, self.config.code_dim, 1).weight[:, :, 0, 0]
        last.weight.copy_((self.codebook @ projection)[:, :, None, None])  # (K, C, 1, 1)
        nn.init.zeros_(last.bias)

    def forward(
        self,
        x: Float[Tensor, "b 3 H W"],
        temperature: float,
        noise: Float[Tensor, "b k h w"],
    ) -> DVAEOutput:
        """Draw codes softly and say what picture they make.

        Raises:
            ValueError: for pictures of another resolution, or τ ≤ 0.
        """
        logits = self.logits(x)  # (B, K, h, w)
        y = relaxed_draw(logits, noise, temperature)
        mixture = torch.einsum("bkhw,kd->bdhw", y, self.codebook)
        return DVAEOutput(logits, *self.picture(mixture))

    def logits(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """l: how likely each code is at each place, before the softmax.

        Raises:
            ValueError: for pictures of another resolution.
        """
        check_pictures(x, self.config)
        return precise(self.encoder(x))

    def picture(
        self, mixture: Float[Tensor, "b d h w"]
    ) -> tuple[Float[Tensor, "b 3 H W"], Float[Tensor, "b 3 H W"]]:
        """μ and ln b of each number of the picture, in the space of logits."""
        mean, log_scale = precise(self.decoder(mixture)).chunk(2, dim=1)
        return mean, log_scale.clamp(min=NARROWEST)

    def tokens(self, x: Float[Tensor, "b 3 H W"]) -> Int[Tensor, "b n"]:
        """The likeliest codes, row by row.

        Raises:
            ValueError: for pictures of another resolution.
        """
        return self.logits(x).argmax(1).flatten(1)

    def decode_grid(self, codes: Int[Tensor, "b h w"]) -> Float[Tensor, "b 3 H W"]:
        """A grid of valid codes → pictures, not clamped: φ⁻¹(sigmoid(μ))."""
        mean, _ = self.picture(F.embedding(codes, self.codebook).movedim(-1, 1))
        return 2 * (mean.sigmoid() - EPSILON) / (1 - 2 * EPSILON) - 1


def squeeze(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """φ: [−1, 1] → [ε, 1 − ε] (appendix A.3, Eq. 2), where logits are finite."""
    return (1 - 2 * EPSILON) * (precise(x) + 1) / 2 + EPSILON


def logit_laplace(
    x: Float[Tensor, "*shape"], mean: Float[Tensor, "*shape"], log_scale: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """−ln p(x): the logit of x is Laplace-distributed about μ (appendix A.3, Eq. 1).

    Args:
        x: in (0, 1), for example from `squeeze`.
        mean, log_scale: μ and ln b.

    Returns:
        Nats for each number. It is a density: it can be below 0.
    """
    distance = (x.logit() - mean).abs() / log_scale.exp()
    return math.log(2) + log_scale + (x * (1 - x)).log() + distance


def dvae_loss(
    x: Float[Tensor, "b 3 H W"], output: DVAEOutput, kl_weight: float = KL_WEIGHT
) -> DVAELoss:
    """The negative evidence bound, over the numbers in x as in the paper (appendix A.2).

    Args:
        x: the pictures that `output` is about.
        kl_weight: β. A KL of one nat a code counts β · N / (3HW): the paper's β / 192, and ours.
    """
    reconstruction = logit_laplace(squeeze(x), output.mean, output.log_scale).mean()
    log_q = output.logits.log_softmax(1)  # (B, K, h, w)
    surprise = (log_q.exp() * (log_q + math.log(log_q.shape[1]))).sum(1)  # nats a code: ln K − H
    divergence = surprise.flatten(1).sum(1).mean() / x[0].numel()
    total = reconstruction + kl_weight * divergence
    return DVAELoss(reconstruction, divergence, total)


def temperature_at(share: float, until: float = 0.5) -> float:
    """τ after a share of the training: half a cosine from 1 to 1/16 (appendix A.2).

    A function of the share alone. Who multiplies the last τ instead, lets the decay compound.

    Args:
        share: of the steps behind us, in [0, 1].
        until: where 1/16 is reached; the paper's is 1/20 of its three million steps.
    """
    return WARMEST + (COLDEST - WARMEST) * _half_cosine(share / until)


def kl_weight_at(share: float, top: float = KL_WEIGHT, until: float = 0.1) -> float:
    """β after a share of the training: half a cosine from 0 to `top` (appendix A.2)."""
    return top * _half_cosine(share / until)


def _half_cosine(share: float) -> float:
    """From 0 to 1, gently at both ends."""
    return 0.5 - 0.5 * math.cos(math.pi * min(1.0, max(0.0, share)))


# --- stage two: words and codes in one stream --------------------------------------------------


class Stream(NamedTuple):
    """Logits of what comes next: of the words w_1 … w_T, and of the codes q_1 … q_N."""

    words: Float[Tensor, "b t v"]
    picture: Float[Tensor, "b n k"]


class DALLELoss(NamedTuple):
    """Nats a word and nats a code, and their weighted sum."""

    words: Float[Tensor, ""]
    picture: Float[Tensor, ""]
    total: Float[Tensor, ""]


class DALLE(Prior):
    """start, w_1 … w_T, start of the picture, q_1 … q_{N−1}  →  logits of each word and code.

    Nobody looks ahead, words included. Where a caption has no word, a vector of that place stands
    in (section 2.2): nothing is masked, and every place always holds something learned.

    Raises:
        ValueError: if the config has no vocabulary.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        if not config.vocabulary:
            raise ValueError("DALL·E reads words: its vocabulary cannot be 0.")
        width, side = config.width, config.side
        self.word_embedding = nn.Embedding(config.vocabulary, width)
        self.code_embedding = nn.Embedding(config.codes, width)
        self.padding = nn.Parameter(INIT * torch.randn(config.words, width))  # instead of a word
        self.starts = nn.Parameter(INIT * torch.randn(2, 1, 1, width))  # of words, of the picture
        self.word_position = nn.Parameter(INIT * torch.randn(config.words, width))
        self.row = nn.Parameter(INIT * torch.randn(side, 1, width))
        self.column = nn.Parameter(INIT * torch.randn(side, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.apply(gpt2_init)

    def forward(
        self, codes: Int[Tensor, "b n"], caption: Int[Tensor, "b t"] | None = None
    ) -> Stream:
        """Logits of every word, from those before it, and of every code, from all words too.

        Raises:
            ValueError: for codes or words out of range, too many of them, or no caption.
        """
        self.check(codes, caption)
        assert caption is not None
        x = self._embed(codes[:, :-1], caption)  # (B, 1 + T + N, D)
        for block in self.blocks:
            x = block(x, is_causal=True)
        x, words = self.norm(x), self.config.words
        return Stream(
            words=x[:, :words] @ self.word_embedding.weight.T,
            picture=x[:, words + 1 :] @ self.code_embedding.weight.T,
        )

    def code_logits(
        self, codes: Int[Tensor, "b n"], caption: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b n k"]:
        """Of the stream only the picture."""
        return self(codes, caption).picture

    def next_logits(
        self,
        codes: Int[Tensor, "b n"],
        caption: Int[Tensor, "b t"] | None = None,
        caches: list[KVCache] | None = None,
    ) -> Float[Tensor, "b k"]:
        """Logits of the code that comes after these; what the caches know is not done again."""
        if caches is None:
            return super().next_logits(codes, caption)
        assert caption is not None
        if caches[0].length == 0:
            x = self._embed(codes, caption)
        else:  # one new code a call
            x = self._embed_codes(codes)[:, -1:]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache=cache, is_causal=True)
        return self.norm(x[:, -1]) @ self.code_embedding.weight.T

    def new_caches(self, batch: int) -> list[KVCache]:
        """One empty cache a block."""
        length = 1 + self.config.words + self.config.length
        return empty_caches(self.config, batch, length, self.row)

    def _embed(self, codes: Tensor, caption: Tensor) -> Float[Tensor, "b total d"]:
        """start, words or what stands in for them, start of the picture, codes."""
        first, second = self.starts.expand(-1, len(codes), -1, -1)  # (B, 1, D) each
        real = (caption != PAD)[..., None]
        words = torch.where(real, self.word_embedding(caption), self.padding) + self.word_position
        return torch.cat([first, words, second, self._embed_codes(codes)], dim=1)

    def _embed_codes(self, codes: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Codes, each with its row and its column added."""
        places = (self.row + self.column).flatten(0, 1)  # (N, D)
        return self.code_embedding(codes) + places[: codes.shape[1]]


def dalle_loss(
    stream: Stream,
    caption: Int[Tensor, "b t"],
    codes: Int[Tensor, "b n"],
    words_share: float = WORDS_SHARE,
) -> DALLELoss:
    """Both cross-entropies, each a mean over its own kind, in float32 or better (appendix B.2).

    In data-parallel training all processes call this together: captions differ in length, and a
    word counts the same whichever process has it.

    Args:
        caption: the words that the stream should have said. Padding is not counted, and a caption
            that says nothing is nothing to learn: without any word `words` is 0.
        words_share: 1/8 in the paper, for it is the picture that we want.

    Raises:
        ValueError: if the share is not in [0, 1].
    """
    if not 0 <= words_share <= 1:
        raise ValueError(f"The words' share of the loss must be in [0, 1], not {words_share}.")
    wanted = caption.masked_fill(caption[:, :1] == NULL, PAD).flatten()
    nats = F.cross_entropy(
        precise(stream.words).flatten(0, 1), wanted, ignore_index=PAD, reduction="sum"
    )
    words = ranks() * nats / summed_over_ranks((wanted != PAD).sum()).clamp(min=1)
    picture = F.cross_entropy(precise(stream.picture).flatten(0, 1), codes.flatten())
    total = words_share * words + (1 - words_share) * picture
    return DALLELoss(words, picture, total)


# --- going on from half a picture, and keeping the best of many --------------------------------


@torch.no_grad()
def beginning(
    model: PictureCodes, pictures: Float[Tensor, "b 3 H W"], rows: int
) -> Int[Tensor, "b n"]:
    """The codes of the upper rows, to go on from: `sample_steps(…, start=beginning(…))`.

    What is below is painted over first, each column by its last pixel that stays: an encoder sees
    beyond its own square, and would else whisper what the picture really shows.

    Args:
        rows: how many of the h rows of codes to keep, 1 … h − 1.

    Raises:
        ValueError: for pictures of another size or range, or another number of rows.
    """
    check_pictures(pictures, model.config)
    if not (pictures.abs() <= 1).all():  # NaN neither
        raise ValueError(
            f"Pictures lie in [−1, 1]; these go from {pictures.min():.3g} to {pictures.max():.3g}."
        )
    side = model.config.side
    if not 1 <= rows < side:
        raise ValueError(f"Keep 1 … {side - 1} rows of codes, not {rows}.")
    last = rows * pictures.shape[2] // side
    seen = pictures.clone()
    seen[:, :, last:] = pictures[:, :, last - 1 : last]
    return model.tokens(seen)[:, : rows * side]


class Candidates(NamedTuple):
    """What there is to choose from: pictures, the codes they were made of, and their captions."""

    pictures: Float[Tensor, "m 3 H W"]
    codes: Int[Tensor, "m n"]
    captions: list[str]


# A number for each candidate; the higher, the better the picture fits its caption.
Scorer = Callable[[Candidates], Float[Tensor, " m"]]


def keep_best(
    candidates: Candidates, best_of: int, scorer: Scorer
) -> tuple[Float[Tensor, "n 3 H W"], Int[Tensor, " n"]]:
    """Of each `best_of` candidates in a row the one that the scorer likes best (section 2.5).

    Returns:
        The pictures kept, and their numbers among the candidates.

    Raises:
        ValueError: if the candidates are not a whole number of such rows, or are of unequal number,
            or the scorer has not one number for each.
    """
    m = len(candidates.pictures)
    if best_of < 1 or m % best_of or {len(part) for part in candidates} != {m}:
        counts = ", ".join(str(len(part)) for part in candidates)
        raise ValueError(f"{counts} pictures, codes and captions make no rows of {best_of}.")
    scores = scorer(candidates)
    if scores.shape != (m,) or scores.isnan().any():
        raise ValueError(f"A scorer says a number of each of {m} candidates, none of them NaN.")
    best = scores.view(-1, best_of).argmax(1).cpu()
    kept = best_of * torch.arange(m // best_of) + best
    return candidates.pictures[kept], kept

"""DALL·E: text and image tokens in one stream (Ramesh et al. 2021).

The second stage: one Transformer reads the tokens of a caption, then those of a picture, and
predicts at every place the token that follows,

    w_1 … w_T  q_1 … q_N,        L  =  1/8 · L_text  +  7/8 · L_image

A caption and the tokens of a picture's upper half are both a prefix, from which it can continue.
The first stage, which makes the image tokens, is in `dvae`.

| symbol | name |
|---|---|
| w, q | `caption`, `indices` |
| L_text, L_image | `DALLELoss.text`, `DALLELoss.image` |
| 1/8 | `TEXT_WEIGHT` |

Differs from the paper in: all attention is dense; text and image tokens are predicted through their
own embeddings (tied weights); padding, and a caption that was dropped for guidance, are not counted
in L_text; some of the image tokens that are the input in training are wrong on purpose
(`transformer.corrupt_tokens`). The class draws from any `ImageTokenizer`, a VQGAN as well.

Letters: B batch, T text tokens, N = h · w image tokens, K code vectors in the codebook,
V vocabulary, D dimension of a token's vector.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .autoencoder import ImageTokenizer
from .distributed import num_ranks, sum_over_ranks
from .layers import KVCache, TransformerBlock, at_least_float32, check_pictures
from .tokens import NULL, PAD
from .transformer import INIT_STD, Prior, PriorConfig, empty_caches, gpt2_init

TEXT_WEIGHT = 1 / 8  # of the text's loss; the image's has the rest (appendix B.2)


class DALLEOutput(NamedTuple):
    """Logits of the text tokens w_1 … w_T, and of the image tokens q_1 … q_N."""

    text: Float[Tensor, "b t v"]
    image: Float[Tensor, "b n k"]


class DALLE(Prior):
    """start, w_1 … w_T, start of the image, q_1 … q_{N−1}  →  logits of each w and q.

    All attention is causal, in the text as well. Where a caption has no token, a learned vector of
    that place replaces it (section 2.2), so that nothing has to be masked.

    Raises:
        ValueError: if the config has no vocabulary.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        if not config.vocabulary:
            raise ValueError("DALL·E needs captions: its vocabulary cannot be 0.")
        dim, side, length = config.dim, config.side, config.num_text_tokens
        self.text_embedding = nn.Embedding(config.vocabulary, dim)
        self.image_embedding = nn.Embedding(config.codebook_size, dim)
        self.padding = nn.Parameter(INIT_STD * torch.randn(length, dim))  # replaces PAD
        self.starts = nn.Parameter(INIT_STD * torch.randn(2, 1, 1, dim))  # of text, of image
        self.word_position = nn.Parameter(INIT_STD * torch.randn(length, dim))
        self.row = nn.Parameter(INIT_STD * torch.randn(side, 1, dim))
        self.column = nn.Parameter(INIT_STD * torch.randn(side, dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, config.num_heads) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.apply(gpt2_init)

    def forward(
        self, indices: Int[Tensor, "b n"], caption: Int[Tensor, "b t"] | None = None
    ) -> DALLEOutput:
        """Logits of every text token, given those before it, and of every image token, given all
        text tokens and the image tokens before it.

        Raises:
            ValueError: for tokens out of range, too many of them, or no caption.
        """
        self.check(indices, caption)
        x = self._embed(indices[:, :-1], caption)  # (B, 1 + T + N, D)
        for block in self.blocks:
            x = block(x, is_causal=True)
        x, length = self.norm(x), self.config.num_text_tokens
        return DALLEOutput(
            text=x[:, :length] @ self.text_embedding.weight.T,
            image=x[:, length + 1 :] @ self.image_embedding.weight.T,
        )

    def code_logits(
        self, indices: Int[Tensor, "b n"], caption: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b n k"]:
        """Logits of the image tokens only."""
        return self(indices, caption).image

    def next_logits(
        self,
        indices: Int[Tensor, "b n"],
        caption: Int[Tensor, "b t"] | None = None,
        caches: list[KVCache] | None = None,
    ) -> Float[Tensor, "b k"]:
        """Logits of the token that follows these; what the caches hold is not computed again."""
        if caches is None:
            return super().next_logits(indices, caption)
        if caches[0].length == 0:
            x = self._embed(indices, caption)
        else:  # one new token a call
            x = self._embed_image(indices)[:, -1:]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache=cache, is_causal=True)
        return self.norm(x[:, -1]) @ self.image_embedding.weight.T

    def new_caches(self, batch: int) -> list[KVCache]:
        """One empty cache a block."""
        length = 1 + self.config.num_text_tokens + self.config.num_image_tokens
        return empty_caches(self.config, batch, length, self.row)

    def _embed(self, indices: Tensor, caption: Tensor | None) -> Float[Tensor, "b total d"]:
        """start, text or what replaces it, start of the image, image."""
        if caption is None:
            raise ValueError("DALL·E needs captions: give one, or null_caption() for none.")
        first, second = self.starts.expand(-1, len(indices), -1, -1)  # (B, 1, D) each
        real = (caption != PAD)[..., None]
        text = torch.where(real, self.text_embedding(caption), self.padding) + self.word_position
        return torch.cat([first, text, second, self._embed_image(indices)], dim=1)

    def _embed_image(self, indices: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Image tokens, each with its row and its column added."""
        places = (self.row + self.column).flatten(0, 1)  # (N, D)
        return self.image_embedding(indices) + places[: indices.shape[1]]


class DALLELoss(NamedTuple):
    """Nats per text token and nats per image token, and their weighted sum."""

    text: Float[Tensor, ""]
    image: Float[Tensor, ""]
    total: Float[Tensor, ""]


def dalle_loss(
    output: DALLEOutput,
    caption: Int[Tensor, "b t"],
    indices: Int[Tensor, "b n"],
    text_weight: float = TEXT_WEIGHT,
) -> DALLELoss:
    """Both cross-entropies, each a mean over its own tokens, in float32 or better (appendix B.2).

    In data-parallel training all processes call this together: captions differ in length, and a
    text token counts the same in every process.

    Args:
        output: what the model returned.
        caption: the text tokens that it should predict. Padding and empty captions (∅) are not
            counted; if no text token is left, `text` is 0.
        indices: the image tokens that it should predict.
        text_weight: 1/8 in the paper, because the picture is what matters.

    Raises:
        ValueError: if the weight is not in [0, 1].
    """
    if not 0 <= text_weight <= 1:
        raise ValueError(f"text_weight must be in [0, 1], not {text_weight}.")
    targets = caption.masked_fill(caption[:, :1] == NULL, PAD).flatten()
    nats = F.cross_entropy(
        at_least_float32(output.text).flatten(0, 1), targets, ignore_index=PAD, reduction="sum"
    )
    text = num_ranks() * nats / sum_over_ranks((targets != PAD).sum()).clamp(min=1)
    image = F.cross_entropy(at_least_float32(output.image).flatten(0, 1), indices.flatten())
    total = text_weight * text + (1 - text_weight) * image
    return DALLELoss(text, image, total)


@torch.no_grad()
def encode_prefix(
    model: ImageTokenizer, pictures: Float[Tensor, "b 3 H W"], rows: int
) -> Int[Tensor, "b n"]:
    """The tokens of the upper rows, to continue from: `sample_steps(…, start=encode_prefix(…))`.

    The pixels below are overwritten first, each column by its last pixel that is kept: the
    receptive field of an encoder is wider than one place, and tokens near the border would
    otherwise depend on the part that is to be drawn.

    Args:
        rows: how many of the h rows of tokens to keep, 1 … h − 1.

    Raises:
        ValueError: for pictures of another size or range, or another number of rows.
    """
    check_pictures(pictures, model.config.resolution)
    side = model.config.side
    if not 1 <= rows < side:
        raise ValueError(f"Keep 1 … {side - 1} rows of tokens, not {rows}.")
    last = rows * pictures.shape[2] // side
    kept = pictures.clone()
    kept[:, :, last:] = pictures[:, :, last - 1 : last]
    return model.tokens(kept)[:, : rows * side]

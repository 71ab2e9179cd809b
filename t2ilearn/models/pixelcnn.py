"""The PixelCNN: the grid of tokens as a picture, each predicted from the rows above and its left.

Papers: PixelCNN and gated PixelCNN (van den Oord et al. 2016a, 2016b); it is the prior of the
VQ-VAE paper. Two stacks of masked convolutions have no blind spot; the caption enters by Eq. 4.

    vertical stack    rows 1 … i                       ─┐ row above
    horizontal stack  row i, places up to its own  ←────┘  →  logits of the token

| symbol | name |
|---|---|
| q_i | `indices[:, i]`, the grid row by row |
| c | `caption` |
| tanh(a) · σ(b) | the gate (2016b, Eq. 2) |
| V h | `condition`, one vector for all places (2016b, Eq. 4) |

Differs from the papers in: the condition is computed from the caption by a small Transformer block
instead of a class number; masks are paddings and crops.

Letters: B batch, T tokens of a caption, N = h · w tokens of a picture, K code vectors, D channels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .layers import TransformerBlock
from .tokens import PAD
from .transformer import Prior, PriorConfig


class GatedLayer(nn.Module):
    """One layer of the two stacks (van den Oord et al. 2016b, Fig. 2).

    The vertical stack sees all rows up to its own. The horizontal stack sees its own row up to its
    own place, and receives the vertical stack's row above. Together they see all previous tokens.

    Args:
        first: mask A. The horizontal stack must not see its own place, which holds the answer; in
            later layers that place holds features of the previous tokens (mask B).
    """

    def __init__(self, channels: int, first: bool, kernel: int = 5) -> None:
        super().__init__()
        self.first, self.reach = first, kernel // 2
        self.vertical = nn.Conv2d(channels, 2 * channels, (self.reach + 1, kernel))
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, self.reach + (not first)))
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(
        self,
        v: Float[Tensor, "b d h w"],
        h: Float[Tensor, "b d h w"],
        condition: Float[Tensor, "#b #d2 1 1"],
    ) -> tuple[Float[Tensor, "b d h w"], Float[Tensor, "b d h w"]]:
        """Both stacks after this layer; the condition is added before the gates (Eq. 4)."""
        r = self.reach
        up = self.vertical(F.pad(v, (r, r, r, 0)))  # rows i − r … i
        above = F.pad(up, (0, 0, 1, 0))[:, :, :-1]  # so that row i depends on rows before i only
        left = self.horizontal(F.pad(h, (r, 0, 0, 0))[..., : h.shape[3] + r - self.first])
        new = self.out(_gate(left + self.link(above) + condition))
        return _gate(up + condition), new if self.first else h + new


def _gate(x: Float[Tensor, "b d2 h w"]) -> Float[Tensor, "b d h w"]:
    """tanh(a) · σ(b), the halves of x (van den Oord et al. 2016b, Eq. 2)."""
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


class PixelCNN(Prior):
    """A prior of gated masked convolutions over the grid of tokens."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        dim, num_layers = config.dim, config.num_layers
        self.image_embedding = nn.Embedding(config.codebook_size, dim)
        self.layers = nn.ModuleList(GatedLayer(dim, first=i == 0) for i in range(num_layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(dim, config.codebook_size, 1))
        if config.vocabulary:
            self.text_embedding = nn.Embedding(config.vocabulary, dim)
            self.position = nn.Parameter(torch.randn(config.num_text_tokens, dim))
            self.reader = TransformerBlock(dim, config.num_heads)
            self.conditions = nn.Linear(dim, 2 * dim * num_layers)

    def forward(
        self, indices: Int[Tensor, "b n"], caption: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b n k"]:
        """Logits of every token, given the caption and the tokens before it.

        Raises:
            ValueError: as for the Transformer.
        """
        self.check(indices, caption)
        n, side = indices.shape[1], self.config.side
        grid = F.pad(indices, (0, self.config.num_image_tokens - n)).unflatten(1, (side, side))
        v = h = self.image_embedding(grid).movedim(-1, 1)  # (B, D, h, w)
        for layer, condition in zip(self.layers, self._conditions(caption), strict=True):
            v, h = layer(v, h, condition)
        return self.head(h).flatten(2).mT[:, :n]

    def _conditions(self, caption: Tensor | None) -> list[Tensor]:
        """Each layer's vector of the caption, the same at all places: (B or 1, 2 D, 1, 1)."""
        dim, num_layers = self.config.dim, self.config.num_layers
        if caption is None:
            return [self.image_embedding.weight.new_zeros(1, 1, 1, 1)] * num_layers
        real = caption != PAD  # (B, T)
        x = self.reader(self.text_embedding(caption) + self.position, real[:, None, None])
        mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)  # (B, D)
        return list(self.conditions(mean)[..., None, None].split(2 * dim, dim=1))

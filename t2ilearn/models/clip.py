"""CLIP: pictures and captions as points of one space (Radford et al. 2021).

    picture → image tower → u,    caption → text tower → v,    both of length 1
    s_ij  =  exp(t) u_i · v_j                                   for every pair of a batch
    L     =  ½ ( CE(rows of s)  +  CE(columns of s) )           the right answer is i = j

| symbol | name |
|---|---|
| u, v | `CLIPOutput.image`, `CLIPOutput.text` |
| t = ln(1/τ), exp(t) | `CLIP.logit_scale`, `CLIPOutput.scale`; τ is the temperature |
| CE of the rows, of the columns | `CLIPLoss.image_to_text`, `CLIPLoss.text_to_image` |

Differs from the paper in: nothing that the released weights show: the towers have the layout of
ViT-B/32. At the start the blocks of both towers have the scales that the paper gives the text's.

Letters: B batch of one process, H = W side of a picture, N patches of it, T tokens of a caption,
D dimension of a token's vector, E dimension of the shared space.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .distributed import gather_with_gradient, own_rank
from .layers import (
    QuickGELU,
    TransformerBlock,
    at_least_float32,
    check_dtype,
    check_ids,
    check_pictures,
)
from .tokens import END

START_SCALE = math.log(1 / 0.07)  # of t: "initialized to the equivalent of 0.07" (section 2.5)
MAX_SCALE = math.log(100)  # of t: "clipped to prevent scaling the logits by more than 100"


def _check_sizes(dim: int, num_layers: int, num_heads: int, embed_dim: int) -> None:
    if min(dim, num_layers, num_heads, embed_dim) < 1 or dim % num_heads:
        raise ValueError(
            f"dim {dim} must be a multiple of num_heads {num_heads}, and they, num_layers "
            f"{num_layers} and embed_dim {embed_dim} at least 1."
        )


@dataclass(frozen=True)
class ImageTowerConfig:
    """Sizes of an image tower.

    Args:
        resolution: H = W.
        patch: side of a patch in pixels; it divides H.
        dim: D.
        num_layers, num_heads: of the Transformer; D is a multiple of num_heads.
        embed_dim: E.
        mean, std: of red, green and blue in [0, 1]; pictures are normalised with them. One half
            leaves pictures in [−1, 1] as they are.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    resolution: int = 64
    patch: int = 8
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    embed_dim: int = 128
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        _check_sizes(self.dim, self.num_layers, self.num_heads, self.embed_dim)
        if self.patch < 1 or self.resolution < self.patch or self.resolution % self.patch:
            raise ValueError(
                f"The patch ({self.patch}) must divide the resolution ({self.resolution})."
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, not {self.std}.")

    @property
    def num_patches(self) -> int:
        """N."""
        return (self.resolution // self.patch) ** 2


@dataclass(frozen=True)
class TextTowerConfig:
    """Sizes of a text tower.

    Args:
        vocabulary: the number of text tokens there are.
        text_length: T at most, the context length.
        dim: D.
        num_layers, num_heads: of the Transformer; D is a multiple of num_heads.
        embed_dim: E.
        end_token: the token at the end of a text, where the tower reads its output.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    vocabulary: int = 1024
    text_length: int = 28
    dim: int = 128
    num_layers: int = 3
    num_heads: int = 4
    embed_dim: int = 128
    end_token: int = END

    def __post_init__(self) -> None:
        _check_sizes(self.dim, self.num_layers, self.num_heads, self.embed_dim)
        if self.vocabulary < 2 or self.text_length < 1:
            raise ValueError(
                "vocabulary must be at least 2 and text_length at least 1; they are "
                f"{self.vocabulary} and {self.text_length}."
            )
        if not 0 <= self.end_token < self.vocabulary:
            raise ValueError(
                f"end_token must be a token, 0 … {self.vocabulary - 1}, not {self.end_token}."
            )


# --- two towers --------------------------------------------------------------------------------


def _blocks(dim: int, num_layers: int, num_heads: int) -> nn.ModuleList:
    """Pre-norm blocks with quick-GELU, initialised as in the paper's code."""
    into_residual = dim**-0.5 * (2 * num_layers) ** -0.5  # a sum of 2 L terms keeps its scale
    scales = {
        "attention.qkv": dim**-0.5,
        "attention.out": into_residual,
        "mlp.0": (2 * dim) ** -0.5,
        "mlp.2": into_residual,
    }
    blocks = [TransformerBlock(dim, num_heads, QuickGELU()) for _ in range(num_layers)]
    for block in blocks:
        for layer, scale in scales.items():
            nn.init.normal_(block.get_parameter(f"{layer}.weight"), std=scale)
            nn.init.zeros_(block.get_parameter(f"{layer}.bias"))
    return nn.ModuleList(blocks)


class ImageTower(nn.Module):
    """A Vision Transformer (Dosovitskiy et al. 2021): (B, 3, H, W) → (B, E)."""

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.patches = nn.Conv2d(3, dim, config.patch, stride=config.patch, bias=False)
        self.class_token = nn.Parameter(dim**-0.5 * torch.randn(dim))
        self.position = nn.Parameter(dim**-0.5 * torch.randn(1 + config.num_patches, dim))
        self.norm_pre = nn.LayerNorm(dim)
        self.blocks = _blocks(dim, config.num_layers, config.num_heads)
        self.norm_post = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, config.embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=dim**-0.5)

    def forward(self, pictures: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b e"]:
        """Embeddings, not yet of length 1, of pictures in [−1, 1].

        Noisy cutouts may leave this range (chapter 7), so it is checked in `CLIP.encode_image`.

        Raises:
            ValueError: for pictures of another size.
        """
        side = self.config.resolution
        if pictures.shape[1:] != (3, side, side):
            raise ValueError(
                f"This tower takes pictures of shape (B, 3, {side}, {side}), not "
                f"{tuple(pictures.shape)}. Resize them."
            )
        x = self.patches(self._normalise(pictures)).flatten(2).mT  # (B, N, D)
        first = self.class_token.expand(len(x), 1, -1)
        x = torch.cat([first.to(x), x], dim=1) + self.position  # (B, 1 + N, D)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm_post(x[:, 0]))

    def _normalise(self, pictures: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
        """((x + 1) / 2 − mean) / std, in one step less."""
        mean = pictures.new_tensor(self.config.mean).view(3, 1, 1)
        std = pictures.new_tensor(self.config.std).view(3, 1, 1)
        return (pictures - (2 * mean - 1)) / (2 * std)


class TextTower(nn.Module):
    """A causal Transformer (Radford et al. 2019) that is read at the end of the text."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.embedding = nn.Embedding(config.vocabulary, dim)
        self.position = nn.Parameter(0.01 * torch.randn(config.text_length, dim))
        self.blocks = _blocks(dim, config.num_layers, config.num_heads)
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, config.embed_dim, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.projection.weight, std=dim**-0.5)

    def forward(self, captions: Int[Tensor, "b t"]) -> Float[Tensor, "b e"]:
        """Embeddings, not yet of length 1.

        A token attends to itself and those before it, so that nothing after the end of a text,
        such as padding, has an influence: a batch may be cut to its longest caption.

        Args:
            captions: token ids, at most `text_length` of them; each row holds an end token, and
                the first one counts.

        Raises:
            ValueError: if a caption is too long or has no end, or a token is out of range.
        """
        self._check(captions)
        x = self.embedding(captions) + self.position[: captions.shape[1]]  # (B, T, D)
        for block in self.blocks:
            x = block(x, is_causal=True)
        end = (captions == self.config.end_token).int().argmax(1)
        x = x[torch.arange(len(x), device=x.device), end]  # (B, D)
        return self.projection(self.norm(x))

    def _check(self, captions: Tensor) -> None:
        length, last = self.config.text_length, self.config.vocabulary - 1
        if captions.ndim != 2 or not 1 <= captions.shape[1] <= length:
            raise ValueError(
                f"Captions have 1 … {length} tokens: (B, T ≤ {length}), not "
                f"{tuple(captions.shape)}."
            )
        check_ids("Text tokens", captions)
        if captions.numel() and not 0 <= captions.min() <= captions.max() <= last:
            wrong = f"{captions.min().item()} … {captions.max().item()}"
            raise ValueError(f"Text tokens are numbers from 0 to {last}; these are {wrong}.")
        without = (captions != self.config.end_token).all(1)
        if without.any():
            raise ValueError(
                f"Caption {int(without.int().argmax())} has no end token "
                f"({self.config.end_token}): its tokenizer belongs to another model."
            )


# --- the model ---------------------------------------------------------------------------------


class CLIPOutput(NamedTuple):
    """Embeddings of length 1, and the factor exp(t) of their products."""

    image: Float[Tensor, "b e"]
    text: Float[Tensor, "b2 e"]
    scale: Float[Tensor, ""]


class CLIPLoss(NamedTuple):
    """Cross-entropy of the caption given the picture, of the picture given the caption, and half
    of their sum; in nats."""

    image_to_text: Float[Tensor, ""]
    text_to_image: Float[Tensor, ""]
    total: Float[Tensor, ""]


class CLIP(nn.Module):
    """Two towers and a learned temperature.

    Raises:
        ValueError: if `embed_dim` differs between the towers.
    """

    def __init__(self, image_config: ImageTowerConfig, text_config: TextTowerConfig) -> None:
        super().__init__()
        if image_config.embed_dim != text_config.embed_dim:
            raise ValueError(
                "Both towers must have one embed_dim, not "
                f"{image_config.embed_dim} and {text_config.embed_dim}."
            )
        self.image_tower = ImageTower(image_config)
        self.text_tower = TextTower(text_config)
        self.logit_scale = nn.Parameter(torch.tensor(START_SCALE))

    def forward(
        self, pictures: Float[Tensor, "b 3 H W"], captions: Int[Tensor, "b2 t"]
    ) -> CLIPOutput:
        """Embeddings of pictures and of captions; `clip_loss` compares them.

        Raises:
            ValueError: as `encode_image` and `encode_text`.
        """
        scale = at_least_float32(self.logit_scale).exp()
        return CLIPOutput(self.encode_image(pictures), self.encode_text(captions), scale)

    def encode_image(self, pictures: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b e"]:
        """u, embeddings of length 1.

        Raises:
            ValueError: for pictures of another size, or with values outside [−1, 1].
        """
        check_pictures(pictures, self.image_tower.config.resolution)
        check_dtype(pictures, self.image_tower.patches.weight)
        return unit_length(self.image_tower(pictures))

    def encode_text(self, captions: Int[Tensor, "b t"]) -> Float[Tensor, "b e"]:
        """v, embeddings of length 1. Raises ValueError as `TextTower.forward`."""
        return unit_length(self.text_tower(captions))

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """t ← min(t, ln 100). Training calls this after every step of the optimiser: without it
        the logits may grow until they overflow."""
        self.logit_scale.clamp_(max=MAX_SCALE)


def unit_length(x: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
    """x / ‖x‖, in float32 or better."""
    return F.normalize(at_least_float32(x), dim=1)


def logits(
    image: Float[Tensor, "b e"], text: Float[Tensor, "b2 e"], scale: Float[Tensor, ""]
) -> Float[Tensor, "b b2"]:
    """s = exp(t) u vᵀ, in float32: one row a picture and one column a caption."""
    with torch.autocast(image.device.type, enabled=False):
        return scale * image @ text.T


def clip_loss(output: CLIPOutput) -> CLIPLoss:
    """The symmetric loss of Figure 3: each picture has to find its caption, and each caption its
    picture.

    Processes that train together gather their embeddings, and each takes the rows and columns that
    are its own. The mean of their losses, and of their gradients, is that of the joint batch.

    Raises:
        ValueError: if there are not as many pictures as captions.
    """
    image, text, scale = output
    if len(image) != len(text):
        raise ValueError(f"{len(image)} pictures but {len(text)} captions: they are pairs.")
    all_image, all_text = gather_with_gradient(image), gather_with_gradient(text)  # (ranks · B, E)
    right = own_rank() * len(image) + torch.arange(len(image), device=image.device)

    image_to_text = F.cross_entropy(logits(image, all_text, scale), right)
    text_to_image = F.cross_entropy(logits(all_image, text, scale).T, right)
    total = (image_to_text + text_to_image) / 2
    return CLIPLoss(image_to_text, text_to_image, total)

"""DALL·E 2 (unCLIP): from an image embedding to a picture, and arithmetic of embeddings.

    caption y → prior (`diffusion_prior`) → ẑ_I        P(z_I given y)
    ẑ_I and y → decoder → picture                      P(x given z_I and y)

The decoder is chapter 9's network with two more paths for the image embedding: it is added to the
time's vector, and it becomes a few more tokens beside those of the caption. Only these two paths
are trained; without an embedding the decoder is chapter 9's model, number for number.

Papers: unCLIP (Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP
Latents", sections 2.1 and 3), spherical interpolation (Shoemake 1985).

| symbol | name |
|---|---|
| z_I, z_T (z_i, z_t in the paper) | `image_embedding`, `text_embedding`, both of length 1 |
| y | `caption` |
| slerp(a, b, θ) | `slerp`; θ is `weight` |
| z_d | the difference of two texts in `text_difference` |

Differs from the paper in: the decoder's network is frozen, where the paper's is trained whole;
there is no upsampler (`unet.UNet` with `low_resolution` is one).

Letters: B batch, E dimension of CLIP's space, D dimension of a token's vector, K tokens that an
image embedding becomes.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .clip import unit_length
from .diffusion_prior import check_embeddings
from .dit import DiT, ImageContext
from .layers import at_least_float32

# --- the decoder -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageConditioningConfig:
    """Sizes of the two paths of an image embedding.

    Args:
        embed_dim: E.
        dim: D of the network.
        num_tokens: K; 4 in the paper.

    Raises:
        ValueError: for a size below 1.
    """

    embed_dim: int = 128
    dim: int = 192
    num_tokens: int = 4

    def __post_init__(self) -> None:
        if min(self.embed_dim, self.dim, self.num_tokens) < 1:
            raise ValueError(
                f"embed_dim {self.embed_dim}, dim {self.dim} and num_tokens {self.num_tokens} must "
                "be at least 1."
            )


class ImageConditioning(nn.Module):
    """z_I → what is added to the time's vector, and K tokens (Ramesh et al. 2022, section 2.1)."""

    def __init__(self, config: ImageConditioningConfig) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.to_time = nn.Linear(config.embed_dim, dim, bias=False)
        self.to_tokens = nn.Sequential(
            nn.Linear(config.embed_dim, 2 * dim),
            nn.GELU(),
            nn.Linear(2 * dim, config.num_tokens * dim),
        )
        self.scale = math.sqrt(config.embed_dim)  # a coordinate of length-1 embeddings is small
        nn.init.zeros_(self.to_time.weight)

    def forward(self, image_embedding: Float[Tensor, "b e"]) -> ImageContext:
        """Both paths; where there is no embedding (`no_embedding`), nothing is added, and no token
        is attended to.

        Raises:
            ValueError: for embeddings of another size, or NaN.
        """
        check_embeddings(image_embedding, self.config.embed_dim, "Image embeddings")
        x = at_least_float32(image_embedding).to(self.to_time.weight) * self.scale
        tokens = self.to_tokens(x).unflatten(1, (self.config.num_tokens, -1))  # (B, K, D)
        return ImageContext(self.to_time(x), tokens, given=image_embedding.any(1))


class Decoder(nn.Module):
    """(z, t, image embedding, caption) → x̂.

    Args:
        network: of chapter 9; its weights stay as they are.
        conditioning: the paths of the image embedding, which are trained.

    Raises:
        ValueError: if the two have vectors of different sizes.
    """

    def __init__(self, network: DiT, conditioning: ImageConditioning) -> None:
        super().__init__()
        if network.config.dim != conditioning.config.dim:
            raise ValueError(
                f"The network has vectors of {network.config.dim} numbers, and the image tokens "
                f"have {conditioning.config.dim}."
            )
        self.network, self.conditioning = network.requires_grad_(False), conditioning

    def forward(
        self,
        z: Float[Tensor, "b 3 h w"],
        t: Float[Tensor, " b"],
        image_embedding: Float[Tensor, "b e"],
        caption: Int[Tensor, "b l"],
    ) -> Float[Tensor, "b 3 h w"]:
        """x̂ of each mixture; see `DiT`."""
        return self.network(z, t, caption, self.conditioning(image_embedding))


def drop_embeddings(
    x: Float[Tensor, "b e"], rate: float, generator: torch.Generator
) -> Float[Tensor, "b e"]:
    """Embeddings with a share of them replaced by ∅, so that guidance has something to leave.

    Args:
        rate: the share, in [0, 1].
    """
    kept = torch.rand(len(x), generator=generator) >= rate
    return x * kept.to(x)[:, None]


# --- arithmetic of embeddings ------------------------------------------------------------------


def slerp(a: Float[Tensor, "b e"], b: Float[Tensor, "b e"], weight: float) -> Float[Tensor, "b e"]:
    """The point between two directions at a share of their angle (Shoemake 1985), of length 1.

    Args:
        weight: θ in [0, 1]; 0 is a, 1 is b.

    Raises:
        ValueError: for a weight outside [0, 1], or two opposite directions, between which there is
            no shortest way.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"The weight must be in [0, 1], not {weight}.")
    a, b = unit_length(a), unit_length(b)
    cosine = (a * b).sum(1, keepdim=True).clamp(-1, 1)
    if (cosine < -1 + 1e-6).any():
        raise ValueError("Two embeddings are opposite: there is no shortest way between them.")
    angle = cosine.acos()
    sine = angle.sin()
    near = sine < 1e-4  # then the straight way is the same
    safe = torch.where(near, torch.ones_like(sine), sine)
    from_a = torch.where(near, 1 - weight + 0 * angle, ((1 - weight) * angle).sin() / safe)
    from_b = torch.where(near, weight + 0 * angle, (weight * angle).sin() / safe)
    return unit_length(from_a * a + from_b * b)


def text_difference(
    image_embedding: Float[Tensor, "b e"],
    old: Float[Tensor, "b e"],
    new: Float[Tensor, "b e"],
    weight: float,
) -> Float[Tensor, "b e"]:
    """An image embedding turned towards the difference of two text embeddings (section 3.3).

    z_d = (new − old) / ‖new − old‖, and the result is slerp(z_I, z_d, θ).

    Args:
        old, new: text embeddings of what the picture shows, and of what it shall show.
        weight: θ; 0.25 to 0.5 in the paper.

    Raises:
        ValueError: if both texts are the same; else as `slerp`.
    """
    difference = new - old
    if not (difference.norm(dim=1) > 1e-6).all():
        raise ValueError("Both texts have the same embedding: they name no difference.")
    return slerp(image_embedding, unit_length(difference), weight)

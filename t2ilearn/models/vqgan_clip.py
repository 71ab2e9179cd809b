"""VQGAN-CLIP: a picture optimised until CLIP finds it similar to a prompt (Crowson et al. 2022).

    z  →  nearest code vectors  →  decoder  →  picture  →  cutouts  →  CLIP  →  u_1 … u_C
    L  =  Σ_p w_p · mean_c d(u_c, v_p),       d(u, v)  =  2 asin(‖u − v‖ / 2)²
    z  ←  Adam(z, ∇L),  then clamped to the range of the code vectors

No network learns anything: the gradient of CLIP's loss goes through the decoder to z. `optimise` is
a generator that yields the picture of every step. It takes callables, so that the small models of
this book and the released ones run through the same lines.

| symbol | name |
|---|---|
| z | `Latents.z`; in the second form `TokenLogits.logits`, a distribution over tokens a place |
| v_p, w_p | `Prompts.embeddings`, `Prompts.weights`: of texts or of pictures, also negative |
| u_c | the embedding of a cutout (`cutouts.make_cutouts`); C is `CutoutConfig.number` |
| d | `spherical_distance`, half the squared angle between two directions |

Differs from the paper in: a batch of pictures is optimised at once, each towards its own prompts;
the angle of d is computed by atan2, whose gradient is finite everywhere. See also `cutouts`.

Letters: B pictures, P prompts of each, C cutouts of each, E dimension of CLIP's space, D × h × w
latents, K code vectors, s side of CLIP's pictures.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .cutouts import CutoutConfig, make_cutouts
from .layers import at_least_float32, check_pictures
from .vqvae import VQVAE

# --- gradients that differ from the function's own ---------------------------------------------


class _ClampWithGradient(torch.autograd.Function):
    """Forward: clamp. Backward: the gradient passes where x is in range, and also where a step
    against the gradient would bring x back towards the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        clamped = torch.minimum(torch.maximum(x, low), high)
        ctx.save_for_backward(x - clamped)
        return clamped

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (beyond,) = ctx.saved_tensors  # above 0 where x is too high, below 0 where too low
        return gradient * (gradient * beyond >= 0), None, None


def clamp_with_gradient(
    x: Float[Tensor, "*shape"], low: float | Tensor, high: float | Tensor
) -> Float[Tensor, "*shape"]:
    """x clamped to [low, high], with a gradient that still leads back from outside.

    The gradient of an ordinary clamp is 0 outside, so that a pixel that left the range would stay
    there for ever.
    """
    return _ClampWithGradient.apply(x, torch.as_tensor(low).to(x), torch.as_tensor(high).to(x))


def straight_through(value: Float[Tensor, "*s"], x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """`value` forward, the gradient of x backward."""
    return x + (value - x).detach()


def spherical_distance(
    u: Float[Tensor, "*batch e"], v: Float[Tensor, "*batch2 e"]
) -> Float[Tensor, "*batch3"]:
    """2 asin(‖u − v‖ / 2)² of two directions of length 1: half the square of their angle."""
    difference = torch.linalg.vector_norm(u - v, dim=-1)
    angle = 2 * torch.atan2(difference, torch.linalg.vector_norm(u + v, dim=-1))
    return angle**2 / 2


# --- what is optimised -------------------------------------------------------------------------


class Codec(NamedTuple):
    """A model of pictures as grids of code vectors, as functions.

    Args:
        encode: (B, 3, H, W) → z, (B, D, h, w).
        quantize: z → the nearest code vectors, (B, D, h, w).
        decode: code vectors → pictures, (B, 3, H, W), which may leave [−1, 1] a little.
        codebook: the K code vectors, (K, D).
        grid: h and w.
    """

    encode: Callable[[Tensor], Tensor]
    quantize: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    codebook: Float[Tensor, "k d"]
    grid: tuple[int, int]


def codec_of(model: VQVAE) -> Codec:
    """The functions of a VQ-VAE or VQGAN, ours or a released one, in evaluation mode."""
    model.eval()
    quantizer, side = model.quantizer, model.config.side

    def quantize(z: Tensor) -> Tensor:
        return quantizer.lookup(quantizer.nearest(quantizer.project(z)))

    codebook = quantizer.embeddings().detach()
    return Codec(model.encode, quantize, model.decoder, codebook, (side, side))


class Latents(nn.Module):
    """z, one vector a place: the first form.

    Args:
        z: where to start; see `random_latents`, `Codec.encode`.
    """

    def __init__(self, z: Float[Tensor, "b d h w"], codec: Codec) -> None:
        super().__init__()
        self.z = nn.Parameter(z.detach().clone())
        self._codec = codec
        self.low = codec.codebook.amin(0).view(-1, 1, 1)  # (D, 1, 1)
        self.high = codec.codebook.amax(0).view(-1, 1, 1)

    def forward(self) -> Float[Tensor, "b d h w"]:
        """The nearest code vectors, with the gradient of z."""
        with torch.no_grad():
            nearest = self._codec.quantize(self.z)
        return straight_through(nearest, self.z)

    @torch.no_grad()
    def clamp(self) -> None:
        """Put z back into the range of the code vectors, after every step."""
        self.z.copy_(torch.minimum(torch.maximum(self.z, self.low), self.high))


class TokenLogits(nn.Module):
    """Logits of the token of every place: the second form.

    Forward takes the likeliest token; backward is the gradient of the mean code vector under
    softmax(logits).

    Args:
        tokens: where to start, (B, h · w).
        strength: how much likelier these tokens are at first, in nats.
    """

    def __init__(self, tokens: Int[Tensor, "b n"], codec: Codec, strength: float = 1.0) -> None:
        super().__init__()
        self._codec = codec
        start = strength * F.one_hot(tokens, len(codec.codebook)).to(codec.codebook)
        self.logits = nn.Parameter(start)  # (B, N, K)

    def forward(self) -> Float[Tensor, "b d h w"]:
        """The code vectors of the likeliest tokens."""
        soft = self.logits.softmax(-1)
        hard = F.one_hot(self.logits.argmax(-1), soft.shape[-1]).to(soft)
        e = straight_through(hard, soft) @ self._codec.codebook  # (B, N, D)
        return e.mT.unflatten(2, self._codec.grid)

    def clamp(self) -> None:
        """Nothing: logits may be any numbers."""


def random_tokens(n: int, codec: Codec, generator: torch.Generator) -> Int[Tensor, "n hw"]:
    """A token drawn uniformly for every place."""
    height, width = codec.grid
    return torch.randint(len(codec.codebook), (n, height * width), generator=generator)


def random_latents(n: int, codec: Codec, generator: torch.Generator) -> Float[Tensor, "n d h w"]:
    """The code vectors of random tokens."""
    tokens = random_tokens(n, codec, generator).to(codec.codebook.device)
    return F.embedding(tokens, codec.codebook).mT.unflatten(2, codec.grid)


# --- prompts -----------------------------------------------------------------------------------


class Prompts(NamedTuple):
    """What each picture shall resemble: directions in CLIP's space and their weights, where 0
    fills up."""

    embeddings: Float[Tensor, "b p e"]
    weights: Float[Tensor, "b p"]


def make_prompts(each: Sequence[Sequence[tuple[Float[Tensor, " e"], float]]]) -> Prompts:
    """Prompts of a batch of pictures.

    Args:
        each: for every picture its pairs of embedding, of a text or of a picture, and weight; a
            negative weight steers away.

    Raises:
        ValueError: if a picture has no prompt, an embedding is NaN or 0, or a weight is 0 or not
            finite.
    """
    if not each or not all(each):
        raise ValueError("Every picture needs a prompt at least.")
    for embedding, weight in (pair for pairs in each for pair in pairs):
        if not embedding.isfinite().all() or not embedding.any():
            raise ValueError("An embedding must be finite and have a direction.")
        if weight == 0 or not abs(weight) < float("inf"):
            raise ValueError(f"A weight must be a number other than 0, not {weight}.")
    most, first = max(map(len, each)), each[0][0][0]
    embeddings = at_least_float32(first).new_zeros(len(each), most, len(first))
    weights = embeddings.new_zeros(len(each), most)
    for row, pairs in enumerate(each):
        for column, (embedding, weight) in enumerate(pairs):
            embeddings[row, column] = F.normalize(embedding.detach().to(embeddings), dim=0)
            weights[row, column] = weight
    return Prompts(embeddings, weights)


def prompt_loss(cutouts: Float[Tensor, "c b e"], prompts: Prompts) -> Float[Tensor, " b"]:
    """Σ_p w_p · mean_c d(u_c, v_p), one number a picture.

    Args:
        cutouts: embeddings of length 1.
    """
    distances = spherical_distance(cutouts[:, :, None], prompts.embeddings)  # (C, B, P)
    return (prompts.weights * distances.mean(0)).sum(1)


# --- the optimisation --------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimisationConfig:
    """How long and how fast.

    Args:
        steps: of Adam.
        learning_rate: of Adam.
        patience: stop early after so many steps in which no picture's loss fell; None never does.

    Raises:
        ValueError: for a value out of range.
    """

    steps: int = 300
    learning_rate: float = 0.1
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 0 or (self.patience is not None and self.patience < 1):
            raise ValueError(
                f"steps must be 0 or more and patience at least 1; they are {self.steps} and "
                f"{self.patience}."
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"The learning rate must be above 0, not {self.learning_rate}.")


class VQGANCLIPStep(NamedTuple):
    """What there is after a step.

    Steps count from 0, the start. The pictures are in [−1, 1]; if the optimisation ended early they
    are the best ones so far, and `stopped` says why: "NaN" or "no progress". The loss is that of
    each picture; its cutouts are random, so it varies from step to step.
    """

    step: int
    pictures: Float[Tensor, "b 3 h w"]
    loss: Float[Tensor, " b"]
    stopped: str = ""


def optimise(
    start: Latents | TokenLogits,
    codec: Codec,
    encode_image: Callable[[Tensor], Tensor],
    prompts: Prompts,
    side: int,
    generator: torch.Generator,
    cutouts: CutoutConfig,
    config: OptimisationConfig,
) -> Iterator[VQGANCLIPStep]:
    """Optimise pictures towards their prompts; yields before every step and after the last.

    The last `pictures` are the result. The networks behind the callables are not changed, and
    receive no gradient. It works where gradients are switched off around it.

    Args:
        start: what is optimised, in place.
        encode_image: CLIP's image tower, (n, 3, s, s) → (n, E); a float outside [−1, 1] must not
            be an error there.
        side: s.
        generator: decides all cutouts.
    """
    optimiser = torch.optim.Adam(start.parameters(), lr=config.learning_rate)
    best: VQGANCLIPStep | None = None
    waited = 0
    for step in range(config.steps + 1):
        pictures, loss, gradients = _forward_and_backward(
            start, codec, encode_image, prompts, side, cutouts, generator
        )
        if not _all_finite(pictures, loss, *gradients):
            kept = pictures.nan_to_num().clamp(-1, 1) if best is None else best.pictures
            yield VQGANCLIPStep(step, kept, loss if best is None else best.loss, "NaN")
            return
        now = VQGANCLIPStep(step, pictures, loss)
        better = loss < (float("inf") if best is None else best.loss)
        best = now if best is None else _better_of(now, best, better)
        waited = 0 if better.any() else waited + 1
        if config.patience is not None and waited >= config.patience:
            yield best._replace(step=step, stopped="no progress")
            return
        yield now
        if step < config.steps:
            for parameter, gradient in zip(start.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
            start.clamp()


def _forward_and_backward(
    start: Latents | TokenLogits,
    codec: Codec,
    encode_image: Callable[[Tensor], Tensor],
    prompts: Prompts,
    side: int,
    cutouts: CutoutConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Pictures, the loss of each, and the gradient of what is optimised."""
    with torch.enable_grad():
        pictures = clamp_with_gradient(codec.decode(start()), -1.0, 1.0)  # (B, 3, H, W)
        seen = make_cutouts(pictures, side, cutouts, generator)  # (C · B, 3, s, s)
        u = F.normalize(at_least_float32(encode_image(seen)), dim=1)
        loss = prompt_loss(u.unflatten(0, (cutouts.number, -1)), prompts)  # (B,)
        gradients = torch.autograd.grad(loss.sum(), list(start.parameters()))
    return pictures.detach(), loss.detach(), gradients


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


def _better_of(now: VQGANCLIPStep, best: VQGANCLIPStep, better: Tensor) -> VQGANCLIPStep:
    """Of each picture the version with the lower loss."""
    pictures = torch.where(better[:, None, None, None], now.pictures, best.pictures)
    return VQGANCLIPStep(now.step, pictures, torch.where(better, now.loss, best.loss))


def start_from_pictures(
    pictures: Float[Tensor, "b 3 h w"], codec: Codec, form: str = "latents"
) -> Latents | TokenLogits:
    """What is optimised, such that it begins at given pictures.

    Args:
        pictures: of the codec's size, in [−1, 1].
        form: "latents" or "logits".

    Raises:
        ValueError: for pictures of another range, or another form.
    """
    check_pictures(pictures)
    _check_form(form)
    with torch.no_grad():
        z = codec.encode(pictures)
        if form == "latents":
            return Latents(z, codec)
        nearest = codec.quantize(z).flatten(2).mT  # (B, N, D)
        exact = "donot_use_mm_for_euclid_dist"
        tokens = torch.cdist(nearest, codec.codebook[None].to(nearest), compute_mode=exact).argmin(
            -1
        )
    return TokenLogits(tokens, codec)


def start_from_noise(
    n: int, codec: Codec, generator: torch.Generator, form: str = "latents"
) -> Latents | TokenLogits:
    """What is optimised, such that it begins at random tokens.

    Raises:
        ValueError: for a form other than "latents" and "logits".
    """
    _check_form(form)
    if form == "latents":
        return Latents(random_latents(n, codec, generator), codec)
    return TokenLogits(random_tokens(n, codec, generator).to(codec.codebook.device), codec)


def _check_form(form: str) -> None:
    if form not in ("latents", "logits"):
        raise ValueError(f"The form is 'latents' or 'logits', not {form!r}.")

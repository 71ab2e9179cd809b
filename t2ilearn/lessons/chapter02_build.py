"""Exercise 2.5: a VQ-VAE from an empty class, in six steps; the words are in `chapter02.toml`.

`MyVQVAE` is the reference solution. It is the model of chapter 2 with the fewest parts that work:
`t2ilearn.models.vqvae` has residual blocks, other quantizers and checks of its input besides.

Letters: B batch, h and w grid of tokens, K code vectors, D numbers in each.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2ilearn.lessons.answers import NotYet
from t2ilearn.lessons.builds import Step, build


class MyVQVAE(nn.Module):
    """Encoder, codebook, decoder, and the loss with its three terms, for 32 × 32 pictures."""

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1),  # (B, 32, 16, 16)
            nn.SiLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),  # (B, 64, 8, 8)
            nn.SiLU(),
            nn.Conv2d(64, code_dim, 1),  # (B, D, 8, 8)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, 64, 3, padding=1),  # (B, 64, 8, 8)
            nn.SiLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),  # (B, 32, 16, 16)
            nn.SiLU(),
            nn.ConvTranspose2d(32, 3, 4, stride=2, padding=1),  # (B, 3, 32, 32)
        )
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim) / code_dim**0.5)

    def nearest(self, z: Tensor) -> Tensor:
        z = z.movedim(1, -1)  # (B, h, w, D)
        distances = (self.codebook**2).sum(1) - 2 * z @ self.codebook.T  # (B, h, w, K)
        return distances.argmin(-1)  # (B, h, w)

    def lookup(self, tokens: Tensor) -> Tensor:
        return self.codebook[tokens].movedim(-1, 1)  # (B, D, h, w)

    def straight_through(self, z: Tensor, e: Tensor) -> Tensor:
        return z + (e - z).detach()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder(x)
        e = self.lookup(self.nearest(z))
        x_hat = self.decoder(self.straight_through(z, e))
        return x_hat, z, e

    def loss(self, x: Tensor, beta: float | int = 0.25) -> Tensor:
        x_hat, z, e = self(x)
        reconstruction = F.mse_loss(x_hat, x)
        codebook = F.mse_loss(e, z.detach())
        commitment = F.mse_loss(z, e.detach())
        return reconstruction + codebook + beta * commitment


# --- what each step is measured by --------------------------------------------------------------


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _model(kind: type, size: int = 7, dim: int = 3) -> Any:
    """A small model with fixed weights, whose graded method is not `__init__`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(size, dim)
    return model


def _shape(model: Any, name: str, x: Tensor | None = None) -> Tensor:
    """The shape of a part's output, or of a table; six numbers, with −1 for those it lacks."""
    part = getattr(model, name, None)
    if part is None:
        raise NotYet(f"It waits: there is no self.{name} yet.")
    sizes = list((part if x is None else part(x)).shape)
    return torch.tensor((sizes + [-1] * 6)[:6])


def _see_parts(kind: type) -> list:
    model = _model(kind, 12, 5)
    shapes = [
        _shape(model, "encoder", _random(1, 2, 3, 32, 32)),
        _shape(model, "decoder", _random(2, 2, 5, 8, 8)),
        _shape(model, "codebook"),
    ]
    learned = isinstance(model.codebook, nn.Parameter)
    return [*shapes, learned, len(torch.unique(model.codebook.detach(), dim=0)) > 1]


def _see_nearest(kind: type) -> Any:
    return _model(kind).nearest(0.6 * _random(3, 2, 3, 4, 5))


def _see_lookup(kind: type) -> list:
    model, tokens = _model(kind), torch.arange(24).view(2, 3, 4) % 7
    e = model.lookup(tokens)
    return [e, *_gradients((e * _random(4, *e.shape)).sum(), [model.codebook])]


def _see_straight(kind: type) -> list:
    z, e = _random(1, 2, 3, 2, 2).requires_grad_(), _random(2, 2, 3, 2, 2).requires_grad_()
    z_q = _model(kind).straight_through(z, e)
    return [z_q, *_gradients((z_q * _random(3, *z_q.shape)).sum(), [z, e])]


def _see_forward(kind: type) -> list:
    model, x = _model(kind), _random(5, 2, 3, 32, 32).clamp(-1, 1)
    x_hat, z, e = model(x)
    parts = [next(model.encoder.parameters()), model.codebook]
    of_pictures = _gradients(x_hat.square().sum(), parts)
    return [x_hat, z, e, *of_pictures, *_gradients(e.square().sum(), [model.codebook])]


def _see_loss(kind: type) -> list:
    model, x = _model(kind), _random(6, 2, 3, 32, 32).clamp(-1, 1)
    loss = model.loss(x, 0.25)
    parts = [next(model.encoder.parameters()), model.codebook, next(model.decoder.parameters())]
    return [loss, *_gradients(100 * loss, parts)]


def _gradients(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a value; zeros where none arrives."""
    found: list[Tensor | None] = [None] * len(leaves)
    if value.requires_grad:
        found = list(torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True))
    return [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)
    ]


# --- wrong answers, by name ---------------------------------------------------------------------


def _parts(
    halvings: int = 2, doublings: int = 2, codebook: Any = None, outputs: str = "code_dim"
) -> Any:
    """An `__init__` with one thing wrong."""

    def answer(self: Any, codebook_size: int, code_dim: int) -> None:
        nn.Module.__init__(self)
        last = code_dim if outputs == "code_dim" else codebook_size
        down = [nn.Conv2d(3, 3, 4, stride=2, padding=1) for _ in range(halvings)]
        up = [nn.ConvTranspose2d(3, 3, 4, stride=2, padding=1) for _ in range(doublings)]
        self.encoder = nn.Sequential(*down, nn.Conv2d(3, last, 1))
        self.decoder = nn.Sequential(nn.Conv2d(code_dim, 3, 1), *up)
        start = torch.randn(codebook_size, code_dim)
        self.codebook = nn.Parameter(start) if codebook is None else codebook(start)

    return answer


_PARTS = {
    "one_halving": _parts(halvings=1),
    "one_doubling": _parts(doublings=1),
    "outputs_k": _parts(outputs="codebook_size"),
    "plain_tensor": _parts(codebook=lambda start: start),
    "transposed": _parts(codebook=lambda start: nn.Parameter(start.T.clone())),
    "all_equal": _parts(codebook=lambda start: nn.Parameter(torch.zeros_like(start))),
}


def _reshaped(self: Any, z: Tensor) -> Tensor:
    flat = z.reshape(-1, z.shape[1])  # numbers of neighbouring places, mixed
    return torch.cdist(flat, self.codebook).argmin(1).view(len(z), *z.shape[2:])


_NEAREST = {
    "reshaped": _reshaped,
    "product": lambda self, z: (z.movedim(1, -1) @ self.codebook.T).argmax(-1),
    "farthest": lambda self, z: torch.cdist(z.movedim(1, -1), self.codebook[None]).argmax(-1),
    "flat": lambda self, z: MyVQVAE.nearest(self, z).flatten(1),
    "vectors": lambda self, z: self.codebook[MyVQVAE.nearest(self, z)].movedim(-1, 1),
}
_LOOKUP = {
    "channels_last": lambda self, tokens: self.codebook[tokens],
    "reshaped": lambda self, tokens: self.codebook[tokens].reshape(
        len(tokens), -1, *tokens.shape[1:]
    ),
    "detached": lambda self, tokens: MyVQVAE.lookup(self, tokens).detach(),
}
_STRAIGHT = {
    "z_alone": lambda self, z, e: z + 0 * e,
    "no_gradient": lambda self, z, e: e.detach(),
    "to_e": lambda self, z, e: e + 0 * z,
    "bracket": lambda self, z, e: z + (z - e).detach(),
    "both": lambda self, z, e: z + e - z.detach(),
}


def _forward(input_of_decoder: Any, first: Any = None) -> Any:
    """A `forward` that gives the decoder something else, or returns something else."""

    def answer(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder(x)
        e = self.lookup(self.nearest(z))
        x_hat = self.decoder(input_of_decoder(self, z, e))
        return x_hat, *(first(z, e) if first else (z, e))

    return answer


_FORWARD = {
    "e_itself": _forward(lambda self, z, e: e),
    "not_quantised": _forward(lambda self, z, e: z),
    "z_detached": _forward(lambda self, z, e: self.straight_through(z.detach(), e)),
    "returns_z_q": _forward(
        lambda self, z, e: self.straight_through(z, e), lambda z, e: (z, z + (e - z).detach())
    ),
}


def _loss(codebook: Any = 1.0, commitment: Any = None, late: bool = False) -> Any:
    """A `loss` with other weights, or computed after the straight-through line."""

    def answer(self: Any, x: Tensor, beta: float = 0.25) -> Tensor:
        x_hat, z, e = self(x)
        weight = beta if commitment is None else commitment(beta)
        first = self.straight_through(z, e) if late else e
        pull = codebook(beta) if callable(codebook) else codebook
        return (
            F.mse_loss(x_hat, x)
            + pull * F.mse_loss(first, z.detach())
            + weight * F.mse_loss(z, e.detach())
        )

    return answer


def _nothing_detached(self: Any, x: Tensor, beta: float = 0.25) -> Tensor:
    x_hat, z, e = self(x)
    return F.mse_loss(x_hat, x) + (1 + beta) * F.mse_loss(z, e)


def _no_reconstruction(self: Any, x: Tensor, beta: float = 0.25) -> Tensor:
    _, z, e = self(x)
    return F.mse_loss(e, z.detach()) + beta * F.mse_loss(z, e.detach())


_LOSS = {
    "beta_on_codebook": _loss(codebook=lambda beta: beta, commitment=lambda beta: 1),
    "no_beta": _loss(commitment=lambda beta: 1),
    "no_commitment": _loss(commitment=lambda beta: 0),
    "no_codebook": _loss(codebook=0),
    "late": _loss(late=True),
    "nothing_detached": _nothing_detached,
    "no_reconstruction": _no_reconstruction,
}

BUILD = build(
    MyVQVAE,
    Step("__init__", _see_parts, _PARTS),
    Step("nearest", _see_nearest, _NEAREST),
    Step("lookup", _see_lookup, _LOOKUP),
    Step("straight_through", _see_straight, _STRAIGHT),
    Step("forward", _see_forward, _FORWARD),
    Step("loss", _see_loss, _LOSS),
)

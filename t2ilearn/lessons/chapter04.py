"""Exercises of chapter 4 as code; their words are in `chapter04.toml`."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from t2ilearn.lessons.exercises import Answer, Code
from t2ilearn.models.lpips import Trunk
from t2ilearn.models.vqgan import DELTA, MAX_ADAPTIVE_WEIGHT, Discriminator, DiscriminatorConfig


def _points(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _gradients(value: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The gradients that reach the leaves; zeros where none does."""
    found: Any = [None] * len(leaves)
    if value.requires_grad:
        found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]


def discriminator_loss(real: Float[Tensor, " n"], fake: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """½ max(0, 1 − D(x)) + ½ max(0, 1 + D(x̂)), each a mean over patches."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def _see_discriminator(answer: Answer) -> list:
    real, fake = torch.tensor([4.0, 0.3, -0.4]), torch.tensor([-3.0, -0.4, 0.9, 0.1, 2.0])
    real.requires_grad_(), fake.requires_grad_()
    value = answer(real, fake)
    return [value, *_gradients(value, real, fake)]


def _hinge(on_real: int = -1, on_fake: int = 1, how: Any = F.relu, half: float = 0.5) -> Answer:
    """The discriminator's loss with other signs, another bend or another factor."""
    return lambda real, fake: (
        half * (how(1 + on_real * real).mean() + how(1 + on_fake * fake).mean())
    )


_DISCRIMINATOR = {
    "no_half": _hinge(half=1.0),
    "both_signs": _hinge(1, -1),
    "fake_sign": _hinge(-1, -1),
    "real_sign": _hinge(1, 1),
    "no_bend": _hinge(how=lambda x: x),
    "bend_last": lambda real, fake: (F.relu(1 - real.mean()) + F.relu(1 + fake.mean())) / 2,
    "no_margin": lambda real, fake: (F.relu(-real).mean() + F.relu(fake).mean()) / 2,
    "sums": lambda real, fake: (F.relu(1 - real).sum() + F.relu(1 + fake).sum()) / 2,
    "one_pot": lambda real, fake: torch.cat((F.relu(1 - real), F.relu(1 + fake))).mean(),
    "other_loss": lambda real, fake: (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2,
    "real_alone": lambda real, fake: F.relu(1 - real).mean() / 2,
    "fake_alone": lambda real, fake: F.relu(1 + fake).mean() / 2,
}


def generator_term(fake: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """−D(x̂), a mean over patches: no bend, so that the gradient never ends."""
    return -fake.mean()


def _see_generator(answer: Answer) -> list:
    fake = torch.tensor([-3.0, -0.4, 0.9, 0.1, 2.0]).requires_grad_()
    value = answer(fake)
    return [value, *_gradients(value, fake)]


_GENERATOR = {
    "sign": lambda fake: fake.mean(),
    "hinge": lambda fake: F.relu(1 - fake).mean(),
    "half_hinge": lambda fake: F.relu(1 - fake).mean() / 2,
    "discriminators_loss": lambda fake: F.relu(1 + fake).mean() / 2,
    "discriminators_loss_turned": lambda fake: -F.relu(1 + fake).mean() / 2,
    "half": lambda fake: -fake.mean() / 2,
    "sum": lambda fake: -fake.sum(),
    "other_loss": lambda fake: F.softplus(-fake).mean(),
    "saturating": lambda fake: -F.softplus(fake).mean(),
    "detached": lambda fake: -fake.detach().mean(),
}


def my_lambda(
    picture_loss: Float[Tensor, ""], generator_loss: Float[Tensor, ""], decoder: nn.Sequential
) -> Float[Tensor, ""]:
    """Esser et al. (2021), Eq. 7, at the decoder's last weight; at most 10⁴."""
    last: Any = decoder[-1].weight
    a, b = (
        torch.autograd.grad(term, last, retain_graph=True)[0].norm()
        for term in (picture_loss, generator_loss)
    )
    return (a / (b + DELTA)).clamp(max=MAX_ADAPTIVE_WEIGHT).detach()


def _see_lambda(answer: Answer) -> list:
    seen: list[Any] = []
    # The generator loss has a large gradient, one as small as δ, or none.
    for bright, strength in ((20.0, 3.0), (0.2, 1e-4), (20.0, 0.0)):
        decoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        for i, p in enumerate(decoder.parameters()):
            p.data = _points(i, *p.shape)
        drawn = decoder(_points(7, 5, 3))
        value = answer(bright * drawn.square().mean(), strength * drawn.mean(), decoder)
        left_behind = any(p.grad is not None for p in decoder.parameters())
        seen += [value, getattr(value, "requires_grad", False), left_behind]
    return seen


def _norm(term: Tensor, leaves: list[Tensor], power: int = 1, graph: bool = False) -> Tensor:
    found = torch.autograd.grad(term, leaves, retain_graph=True, create_graph=graph)
    return torch.cat([g.flatten() for g in found]).norm() ** power


def _weight(i: int) -> Callable[[Any], list[Tensor]]:
    return lambda decoder: [decoder[i].weight]


_last = _weight(-1)


def _lambda_but(
    ratio: Callable[[Tensor, Tensor], Tensor] = lambda a, b: a / (b + DELTA),
    at: Callable[[Any], list[Tensor]] = _last,
    most: float = MAX_ADAPTIVE_WEIGHT,
    **how: Any,
) -> Answer:
    """λ with one thing wrong."""
    return lambda picture_loss, generator_loss, decoder: ratio(
        _norm(picture_loss, at(decoder), **how), _norm(generator_loss, at(decoder), **how)
    ).clamp(max=most)


def _by_backward(picture_loss: Tensor, generator_loss: Tensor, decoder: Any) -> Tensor:
    norms = []
    for term in (picture_loss, generator_loss):
        decoder.zero_grad()
        term.backward(retain_graph=True)
        norms.append(decoder[-1].weight.grad.norm())
    return (norms[0] / (norms[1] + DELTA)).clamp(max=MAX_ADAPTIVE_WEIGHT)


_LAMBDA = {
    "inverse": _lambda_but(lambda a, b: b / (a + DELTA)),
    "no_delta": _lambda_but(lambda a, b: a / b),
    "no_delta_no_limit": _lambda_but(lambda a, b: a / b, most=math.inf),
    "no_limit": _lambda_but(most=math.inf),
    "attached": _lambda_but(graph=True),
    "all_layers": _lambda_but(at=lambda decoder: [*decoder.parameters()]),
    "first_layer": _lambda_but(at=_weight(0)),
    "bias_too": _lambda_but(at=lambda decoder: [*decoder[-1].parameters()]),
    "squares": _lambda_but(power=2),
    "values": lambda a, b, decoder: (a / (b.abs() + DELTA)).clamp(max=MAX_ADAPTIVE_WEIGHT).detach(),
    "backward": _by_backward,
}


def my_distance(
    trunk: Trunk, x: Float[Tensor, "b 3 h w"], y: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, " b"]:
    """Zhang et al. (2018), Eq. 1, with all channels' weights 1 / L."""
    levels = []
    for a, b in zip(trunk(x), trunk(y), strict=True):
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        levels.append((a - b).square().sum(1).mean((1, 2)))
    return torch.stack(levels).mean(0)


def _two_levels(x: Tensor) -> list[Tensor]:
    """A trunk: 4 channels at full size, 6 at half."""
    first = F.conv2d(x, _points(11, 4, 3, 3, 3), padding=1).tanh()
    return [first, F.conv2d(first, _points(12, 6, 4, 2, 2), stride=2).tanh()]


def _see_distance(answer: Answer) -> list:
    x, y = _points(1, 2, 3, 6, 6).tanh(), _points(2, 2, 3, 6, 6).tanh().requires_grad_()
    value = answer(_two_levels, x, y)
    return [value, *_gradients(value.sum(), y)]


def _distance_but(
    unit: Any = 1, channels: str = "sum", places: str = "mean", levels: str = "mean", power: int = 2
) -> Answer:
    """The distance with one thing wrong: `unit` is what is made one long."""

    def answer(trunk: Trunk, x: Tensor, y: Tensor) -> Tensor:
        found = []
        for a, b in zip(trunk(x), trunk(y), strict=True):
            if unit is not None:
                a, b = F.normalize(a, dim=unit), F.normalize(b, dim=unit)
            apart = (a - b).abs() ** power
            found.append(getattr(getattr(apart, channels)(1), places)((1, 2)))
        return getattr(torch.stack(found), levels)(0)

    return answer


_whole = _distance_but()
_DISTANCE = {
    "no_unit": _distance_but(unit=None),
    "whole_map": _distance_but(unit=(1, 2, 3)),
    "places_unit": _distance_but(unit=(2, 3)),
    "sum_places": _distance_but(places="sum"),
    "mean_channels": _distance_but(channels="mean"),
    "sum_levels": _distance_but(levels="sum"),
    "absolute": _distance_but(power=1),
    "pixels": lambda trunk, x, y: (x - y).square().mean((1, 2, 3)),
    "one_number": lambda trunk, x, y: _whole(trunk, x, y).mean(),
    "detached": lambda trunk, x, y: _whole(trunk, x, y.detach()),
    "first_alone": lambda trunk, x, y: _whole(lambda z: trunk(z)[:1], x, y),
}


def disc_factor(progress: float, start: float, warmup: float) -> float:
    """The generator loss's factor, 0 … 1: 0 until start + warmup, then rising over `warmup`."""
    return min(1.0, max(0.0, (progress - start - warmup) / warmup))


def _see_factor(answer: Answer) -> list:
    return [answer(i / 20, s, w) for s, w in ((0.4, 0.1), (0.0, 0.25)) for i in range(21)]


_FACTOR = {
    "no_warmup": lambda p, start, warmup: min(1.0, max(0.0, (p - start) / warmup)),
    "jump": lambda p, start, warmup: float(p >= start + warmup),
    "jump_at_start": lambda p, start, warmup: float(p >= start),
    "endless": lambda p, start, warmup: max(0.0, (p - start - warmup) / warmup),
    "negative": lambda p, start, warmup: min(1.0, (p - start - warmup) / warmup),
    "until_the_end": lambda p, start, warmup: max(0.0, (p - start - warmup) / (1 - start - warmup)),
    "from_zero": lambda p, start, warmup: min(1.0, p / (start + warmup)),
    "falling": lambda p, start, warmup: 1 - disc_factor(p, start, warmup),
}


def patch_side(num_levels: int) -> int:
    """The side of the receptive field of one logit of the discriminator, in pixels."""
    side = 1 + 3 + 3  # backwards: the last two layers have stride 1
    for _ in range(num_levels):
        side = 2 * side + 2  # a kernel of 4 with stride 2: (side − 1) · 2 + 4
    return side


def _see_patch(answer: Answer) -> list:
    return [answer(levels) for levels in (1, 2, 3)]


def _patch_but(seen: int = 7, grow: Callable[[int], int] = lambda n: 2 * n + 2) -> Answer:
    def answer(levels: int) -> int:
        side = seen
        for _ in range(levels):
            side = grow(side)
        return side

    return answer


_PATCH = {
    "no_stride_one": _patch_but(1),
    "one_stride_one": _patch_but(4),
    "forwards": lambda levels: _patch_but(1)(levels) + 6,
    "no_stride": _patch_but(7, lambda n: n + 3),
    "kernel_alone": lambda levels: 4 * 2**levels,
    "spacing": lambda levels: 2**levels,
    "doubled": _patch_but(7, lambda n: 2 * n),
    "touching": _patch_but(7, lambda n: 2 * n + 4),
}


def two_losses(
    discriminator: Discriminator, x: Float[Tensor, "b 3 h w"], drawn: Float[Tensor, "b 3 h w"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(generator loss, discriminator loss), each with a gradient for its own network alone."""
    ours = -discriminator.with_frozen_weights(drawn).mean()
    real, fake = discriminator(x), discriminator(drawn.detach())
    return ours, (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def _see_two(answer: Answer) -> list:
    discriminator = Discriminator(DiscriminatorConfig(4, 1)).eval()
    for i, p in enumerate(discriminator.parameters()):
        p.data = 0.3 * _points(i, *p.shape)
    decoder, z = _points(21, 3, 3).requires_grad_(), _points(22, 2, 3, 12, 12)
    drawn = torch.einsum("ij,bjhw->bihw", decoder, z)
    ours, theirs = answer(discriminator, _points(23, 2, 3, 12, 12), drawn)
    leaves = (decoder, *discriminator.parameters())
    return [ours, theirs, *_gradients(ours, *leaves), *_gradients(theirs, *leaves)]


def _two_but(
    ours: Callable[[Discriminator, Tensor], Tensor] = lambda D, drawn: D.with_frozen_weights(drawn),
    real: Callable[[Discriminator, Tensor], Tensor] = lambda D, x: D(x),
    fake: Callable[[Discriminator, Tensor], Tensor] = lambda D, drawn: D(drawn.detach()),
) -> Answer:
    """Both losses, with logits computed in other ways."""
    return lambda D, x, drawn: (
        -ours(D, drawn).mean(),
        discriminator_loss(real(D, x).flatten(), fake(D, drawn).flatten()),
    )


def _attached(discriminator: Discriminator, drawn: Tensor) -> Tensor:
    return discriminator(drawn)


def _cut(discriminator: Discriminator, drawn: Tensor) -> Tensor:
    return discriminator(drawn).detach()


_TWO = {
    "attached": _two_but(fake=_attached),
    "not_frozen": _two_but(ours=_attached),
    "both_attached": _two_but(_attached, fake=_attached),
    "detached_in_the_other": _two_but(ours=lambda D, drawn: D(drawn.detach())),
    "constant": _two_but(ours=_cut),
    "swapped": _two_but(
        ours=lambda D, drawn: D(drawn.detach()),
        fake=lambda D, drawn: D.with_frozen_weights(drawn),
    ),
    "real_only": _two_but(fake=_cut),
    "nothing_learned": _two_but(real=_cut, fake=_cut),
    "exchanged": lambda D, x, drawn: two_losses(D, x, drawn)[::-1],
}

EXERCISES = {
    "4.1": Code(discriminator_loss, _see_discriminator, _DISCRIMINATOR),
    "4.2": Code(generator_term, _see_generator, _GENERATOR),
    "4.3": Code(patch_side, _see_patch, _PATCH),
    "4.4": Code(disc_factor, _see_factor, _FACTOR),
    "4.5": Code(my_distance, _see_distance, _DISTANCE),
    "4.6": Code(my_lambda, _see_lambda, _LAMBDA),
    "4.7": Code(two_losses, _see_two, _TWO),
}

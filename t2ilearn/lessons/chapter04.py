"""Exercises of chapter 4 as code; their words are in `chapter04.toml`."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from t2ilearn.lessons.exercises import Answer, Code
from t2ilearn.vqgan import DELTA, LARGEST_WEIGHT, Critic, CriticConfig, Trunk


def _points(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _gradients(value: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The gradients that reach the leaves; zeros where none does."""
    found: Any = [None] * len(leaves)
    if value.requires_grad:
        found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]


def critic_loss(real: Float[Tensor, " n"], fake: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """½ max(0, 1 − D(x)) + ½ max(0, 1 + D(x̂)), each a mean over patches."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def _see_critic(answer: Answer) -> list:
    real, fake = torch.tensor([4.0, 0.3, -0.4]), torch.tensor([-3.0, -0.4, 0.9, 0.1, 2.0])
    real.requires_grad_(), fake.requires_grad_()
    value = answer(real, fake)
    return [value, *_gradients(value, real, fake)]


def _hinge(on_real: int = -1, on_fake: int = 1, how: Any = F.relu, half: float = 0.5) -> Answer:
    """The critic's loss with other signs, another bend or another factor."""
    return lambda real, fake: (
        half * (how(1 + on_real * real).mean() + how(1 + on_fake * fake).mean())
    )


_CRITIC = {
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
    """−D(x̂), a mean over patches: no bend, so that the push never ends."""
    return -fake.mean()


def _see_generator(answer: Answer) -> list:
    fake = torch.tensor([-3.0, -0.4, 0.9, 0.1, 2.0]).requires_grad_()
    value = answer(fake)
    return [value, *_gradients(value, fake)]


_GENERATOR = {
    "sign": lambda fake: fake.mean(),
    "hinge": lambda fake: F.relu(1 - fake).mean(),
    "half_hinge": lambda fake: F.relu(1 - fake).mean() / 2,
    "critics": lambda fake: F.relu(1 + fake).mean() / 2,
    "critics_turned": lambda fake: -F.relu(1 + fake).mean() / 2,
    "half": lambda fake: -fake.mean() / 2,
    "sum": lambda fake: -fake.sum(),
    "other_loss": lambda fake: F.softplus(-fake).mean(),
    "saturating": lambda fake: -F.softplus(fake).mean(),
    "detached": lambda fake: -fake.detach().mean(),
}


def my_lambda(
    pictures: Float[Tensor, ""], adversarial: Float[Tensor, ""], decoder: nn.Sequential
) -> Float[Tensor, ""]:
    """Esser et al. (2021), Eq. 7, at the decoder's last weight; at most 10⁴."""
    last: Any = decoder[-1].weight
    a, b = (
        torch.autograd.grad(term, last, retain_graph=True)[0].norm()
        for term in (pictures, adversarial)
    )
    return (a / (b + DELTA)).clamp(max=LARGEST_WEIGHT).detach()


def _see_lambda(answer: Answer) -> list:
    seen: list[Any] = []
    # The critic's gradient: strong, as weak as δ, none.
    for bright, loud in ((20.0, 3.0), (0.2, 1e-4), (20.0, 0.0)):
        decoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        for i, p in enumerate(decoder.parameters()):
            p.data = _points(i, *p.shape)
        drawn = decoder(_points(7, 5, 3))
        value = answer(bright * drawn.square().mean(), loud * drawn.mean(), decoder)
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
    most: float = LARGEST_WEIGHT,
    **how: Any,
) -> Answer:
    """λ with one thing wrong."""
    return lambda pictures, adversarial, decoder: ratio(
        _norm(pictures, at(decoder), **how), _norm(adversarial, at(decoder), **how)
    ).clamp(max=most)


def _by_backward(pictures: Tensor, adversarial: Tensor, decoder: Any) -> Tensor:
    norms = []
    for term in (pictures, adversarial):
        decoder.zero_grad()
        term.backward(retain_graph=True)
        norms.append(decoder[-1].weight.grad.norm())
    return (norms[0] / (norms[1] + DELTA)).clamp(max=LARGEST_WEIGHT)


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
    "values": lambda a, b, decoder: (a / (b.abs() + DELTA)).clamp(max=LARGEST_WEIGHT).detach(),
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
    x, y = _points(1, 2, 3, 6, 6), _points(2, 2, 3, 6, 6).requires_grad_()
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


def say(progress: float, start: float, warm: float) -> float:
    """How loud the critic is, 0 … 1: silent, then rising over `warm`, then in full."""
    return min(1.0, max(0.0, (progress - start - warm) / warm))


def _see_say(answer: Answer) -> list:
    return [answer(i / 20, s, w) for s, w in ((0.4, 0.1), (0.0, 0.25)) for i in range(21)]


_SAY = {
    "no_warm": lambda p, start, warm: min(1.0, max(0.0, (p - start) / warm)),
    "jump": lambda p, start, warm: float(p >= start + warm),
    "jump_at_start": lambda p, start, warm: float(p >= start),
    "endless": lambda p, start, warm: max(0.0, (p - start - warm) / warm),
    "negative": lambda p, start, warm: min(1.0, (p - start - warm) / warm),
    "until_the_end": lambda p, start, warm: max(0.0, (p - start - warm) / (1 - start - warm)),
    "from_zero": lambda p, start, warm: min(1.0, p / (start + warm)),
    "faded_out": lambda p, start, warm: 1 - say(p, start, warm),
}


def patch_side(levels: int) -> int:
    """How many pixels, each way, one logit of the critic sees."""
    seen = 1 + 3 + 3  # backwards: the last two layers have stride 1
    for _ in range(levels):
        seen = 2 * seen + 2  # a kernel of 4 with stride 2: (seen − 1) · 2 + 4
    return seen


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
    critic: Critic, x: Float[Tensor, "b 3 h w"], drawn: Float[Tensor, "b 3 h w"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(the generator's term, the critic's loss), each with a gradient for its own player alone."""
    ours = -critic.frozen(drawn).mean()
    real, fake = critic(x), critic(drawn.detach())
    return ours, (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def _see_two(answer: Answer) -> list:
    critic = Critic(CriticConfig(4, 1)).eval()
    for i, p in enumerate(critic.parameters()):
        p.data = 0.3 * _points(i, *p.shape)
    decoder, z = _points(21, 3, 3).requires_grad_(), _points(22, 2, 3, 12, 12)
    drawn = torch.einsum("ij,bjhw->bihw", decoder, z)
    ours, theirs = answer(critic, _points(23, 2, 3, 12, 12), drawn)
    leaves = (decoder, *critic.parameters())
    return [ours, theirs, *_gradients(ours, *leaves), *_gradients(theirs, *leaves)]


def _two_but(
    ours: Callable[[Critic, Tensor], Tensor] = lambda critic, drawn: critic.frozen(drawn),
    real: Callable[[Critic, Tensor], Tensor] = lambda critic, x: critic(x),
    fake: Callable[[Critic, Tensor], Tensor] = lambda critic, drawn: critic(drawn.detach()),
) -> Answer:
    """Both losses, with logits computed in other ways."""
    return lambda critic, x, drawn: (
        -ours(critic, drawn).mean(),
        critic_loss(real(critic, x).flatten(), fake(critic, drawn).flatten()),
    )


def _attached(critic: Critic, drawn: Tensor) -> Tensor:
    return critic(drawn)


def _cut(critic: Critic, drawn: Tensor) -> Tensor:
    return critic(drawn).detach()


_TWO = {
    "attached": _two_but(fake=_attached),
    "thawed": _two_but(ours=_attached),
    "both_attached": _two_but(_attached, fake=_attached),
    "deaf": _two_but(ours=lambda critic, drawn: critic(drawn.detach())),
    "deaf_and_frozen": _two_but(ours=_cut),
    "swapped": _two_but(
        ours=lambda critic, drawn: critic(drawn.detach()),
        fake=lambda critic, drawn: critic.frozen(drawn),
    ),
    "critic_half": _two_but(fake=_cut),
    "critic_asleep": _two_but(real=_cut, fake=_cut),
    "exchanged": lambda critic, x, drawn: two_losses(critic, x, drawn)[::-1],
}

EXERCISES = {
    "4.1": Code(critic_loss, _see_critic, _CRITIC),
    "4.2": Code(generator_term, _see_generator, _GENERATOR),
    "4.3": Code(patch_side, _see_patch, _PATCH),
    "4.4": Code(say, _see_say, _SAY),
    "4.5": Code(my_distance, _see_distance, _DISTANCE),
    "4.6": Code(my_lambda, _see_lambda, _LAMBDA),
    "4.7": Code(two_losses, _see_two, _TWO),
}

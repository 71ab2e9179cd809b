"""The discriminator: both losses of its logits, the adaptive weight λ, maps of its logits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import traitlets
from jaxtyping import Float, Int
from torch import Tensor

from t2ilearn.models.vqgan import LOSSES, Discriminator
from t2ilearn.models.vqvae import VQVAE
from t2ilearn.training.flight import Record, read_record
from t2ilearn.weights import ASSETS
from t2ilearn.widgets.base import Widget, joined, listed, numbers
from t2ilearn.widgets.pictures import Frames, blur, noise

EDGE = 3.0  # what the hinge lab shows: logits from −3 to 3
CURVES = (
    *("step", "adaptive_weight", "discriminator_loss", "logits_real", "logits_fake"),
    *("pixels", "perceptual"),
)
MAX_POINTS = 200


class HingeLab(Widget):
    """Logits of real and generated patches on a line: both networks' losses and their gradients.

    Args:
        real, fake: one to six logits each, in −3 … 3.
        loss: the loss whose gradients are drawn first, "hinge" or "non-saturating".

    Raises:
        ValueError: for more or fewer logits, one outside, or another loss.
    """

    _esm = joined("shared", "plane", "hinge")
    real = listed()
    fake = listed()
    loss = traitlets.Unicode().tag(sync=True)

    def __init__(
        self,
        real: Any = (1.6, 0.7, -0.4),
        fake: Any = (-1.5, -0.8, 0.5),
        loss: str = "hinge",
    ) -> None:
        fallback = (
            "Hinge lab: a discriminator's logits, the losses of discriminator and generator, and "
            "the gradient at each logit."
        )
        super().__init__(real=list(real), fake=list(fake), loss=loss, fallback=fallback)

    @traitlets.validate("real", "fake")
    def _check_logits(self, proposal: Any) -> list[float]:
        name = proposal["trait"].name
        logits = numbers(proposal["value"], name, -EDGE, EDGE)
        if len(logits) > 6:
            raise ValueError(f"{name} are {len(logits)} logits; there is room for six.")
        return logits

    @traitlets.validate("loss")
    def _check_loss(self, proposal: Any) -> str:
        if proposal["value"] not in LOSSES:
            raise ValueError(f"loss is one of {', '.join(LOSSES)}, not {proposal['value']!r}.")
        return proposal["value"]


class AdaptiveWeight(Widget):
    """λ over a recorded run, to scrub through, and its arithmetic with two gradients to set.

    Args:
        record: of a VQGAN's training, from `flight.read_record`, or its curves alone; by default
            that of `vqgan-tiny`.
        picture_loss, generator_loss: lengths of both gradients at the start, in 0 … 10.
        share: the generator loss's weight `disc_weight` times `disc_factor`, in 0 … 1.

    Raises:
        ValueError: if a curve is missing or shorter than others, or a number is out of its range.
    """

    _esm = joined("shared", "plane", "adaptive")
    curves = traitlets.Dict().tag(sync=True)
    start = traitlets.Int().tag(sync=True)
    picture_loss = traitlets.Float().tag(sync=True)
    generator_loss = traitlets.Float().tag(sync=True)
    share = traitlets.Float().tag(sync=True)

    def __init__(
        self,
        record: Record | Mapping[str, Sequence[Any]] | None = None,
        picture_loss: float = 0.1,
        generator_loss: float = 0.01,
        share: float = 0.4,
    ) -> None:
        record = read_record(ASSETS / "flights" / "vqgan-tiny") if record is None else record
        given = record.facts["curves"] if isinstance(record, Record) else record
        curves = _chosen(given)
        super().__init__(
            curves=curves,
            start=max(range(len(curves["step"])), key=curves["adaptive_weight"].__getitem__),
            picture_loss=picture_loss,
            generator_loss=generator_loss,
            share=share,
            fallback="The adaptive weight λ: over a recorded run, and computed from two gradients.",
        )

    @traitlets.validate("curves")
    def _check_curves(self, proposal: Any) -> dict[str, list[float]]:
        return _chosen(proposal["value"])

    @traitlets.validate("picture_loss", "generator_loss", "share")
    def _check_number(self, proposal: Any) -> float:
        name = proposal["trait"].name
        low = 1e-6 if name == "picture_loss" else 0.0
        high = 1.0 if name == "share" else 10.0
        return numbers([proposal["value"]], name, low, high)[0]


def _chosen(curves: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
    """The curves that the widget shows, at most `MAX_POINTS` of each, evenly chosen."""
    missing = [name for name in CURVES if name not in curves]
    if missing:
        raise ValueError(f"This is no record of a VQGAN: it lacks {', '.join(missing)}.")
    count = len(curves["step"])
    if count < 2 or any(len(curves[name]) != count for name in CURVES):
        sizes = ", ".join(f"{name} {len(curves[name])}" for name in CURVES)
        raise ValueError(f"Curves must have two or more points, all as many; there are: {sizes}.")
    kept = min(count, MAX_POINTS)
    places = [round(i * (count - 1) / (kept - 1)) for i in range(kept)]
    return {name: numbers([curves[name][i] for i in places], name) for name in CURVES}


# --- the discriminator's logits, patch by patch ---------------------------------------------------


def patch_starts(discriminator: Discriminator, side: int) -> Int[Tensor, " n"]:
    """Where each logit's patch begins, in pixels along one side; outside the picture it is padded.

    The patches are `discriminator.config.patch` pixels wide and overlap.
    """
    spacing = 2**discriminator.config.num_levels
    count = side // spacing - 2  # the two layers of stride 1 lose one each
    first = -(spacing - 1) - 2 * spacing  # all layers pad by one place of their own size
    return first + spacing * torch.arange(count)


def spoiled(
    picture: Float[Tensor, "3 h w"], models: Mapping[str, VQVAE] | None = None, seed: int = 0
) -> dict[str, Float[Tensor, "3 h w"]]:
    """A square picture and damaged versions of it: of its square with the strongest edges, of half
    its side, or of all of it.

    Args:
        models: whose reconstructions are added, by name.
        seed: of the noise.
    """
    x, half = picture[None], picture.shape[-1] // 2
    edges = (x[..., 1:, 1:] - x[..., :-1, :-1]).abs().sum(1)  # (1, h − 1, w − 1)
    hop = max(1, half // 4)
    lively = F.avg_pool2d(edges, half - 1, stride=hop)[0]
    top, left = (hop * i for i in divmod(int(lively.argmax()), lively.shape[1]))
    inside, block = torch.zeros(2, *x.shape, dtype=torch.bool)
    inside[..., top : top + half, left : left + half] = True
    block[..., top + half // 2 : top + half, left + half // 2 : left + half] = True
    grey = x[inside].view(3, -1).mean(1)[:, None, None]

    def within(y: Tensor) -> Tensor:
        return torch.where(inside, y, x)[0]

    changed = {
        "none": picture,
        "blurred": within(blur(x, half / 16)),
        "noisy": within(noise(x, 0.2, seed)),
        "a block painted over": torch.where(block, grey, x)[0],
        "other colours": within(x.roll(1, dims=1)),
        "quarters moved": x.roll((half, half), dims=(2, 3))[0],
    }
    with torch.no_grad():
        for name, model in (models or {}).items():
            changed[f"through {name}"] = model(x).reconstruction.clamp(-1, 1)[0]
    return changed


@torch.no_grad()
def patch_maps(
    discriminator: Discriminator,
    picture: Float[Tensor, "3 h w"],
    damages: Mapping[str, Float[Tensor, "3 h w"]] | None = None,
    title: str = "The discriminator's logits, patch by patch",
) -> Frames:
    """A damaged picture and the discriminator's logits, patch by patch: blue for real, red for
    generated, in full colour from ±1 on, where the hinge loss is 0.

    Args:
        discriminator: in evaluation mode.
        picture: square, in [−1, 1].
        damages: damaged versions of it, by name; by default `spoiled(picture)`.

    Raises:
        ValueError: if the discriminator is in training mode, or a picture has another shape.
    """
    if discriminator.training:
        raise ValueError(
            "The discriminator is in training mode, where batch norm mixes pictures: call "
            "discriminator.eval() first."
        )
    damages = spoiled(picture) if damages is None else damages
    side = picture.shape[-1]
    for name, damaged in damages.items():
        if damaged.shape != (3, side, side):
            raise ValueError(f"{name!r} is {tuple(damaged.shape)}, not (3, {side}, {side}).")
    starts, seen = patch_starts(discriminator, side), discriminator.config.patch
    zoom = max(1, 256 // side)
    before = discriminator(picture[None])[0, 0]  # (n, n)
    pictures, captions, marks = [], [], []
    for damaged in damages.values():
        logits = discriminator(damaged[None])[0, 0]  # (n, n)
        views = _views(damaged, logits, starts, seen, zoom)
        hurt = (damaged - picture).abs().amax(0) > 0.02  # (side, side)
        pictures += views
        captions += [_describe(logits, before, hurt, starts, seen)] * len(views)
        marks += [_frame_of(hurt)] * len(views)
    axes: dict[str, Sequence[Any]] = {
        "damage": [*damages],
        "view": ["picture", "logits", "overlay"],
    }
    first = [*damages][min(1, len(damages) - 1)]
    return Frames(torch.stack(pictures), axes, captions, marks, title, start=(first, "overlay"))


def _views(
    damaged: Tensor, logits: Tensor, starts: Tensor, seen: int, zoom: int
) -> list[Float[Tensor, "3 H W"]]:
    """The picture, the logits as cells about the middles of their patches, and both in one."""
    large = damaged.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    sure = logits.clamp(-1, 1)
    blue, red = (torch.tensor(c)[:, None, None] for c in ((-0.9, -0.1, 0.6), (0.7, -0.5, -0.8)))
    cells = 1 - sure.abs() + sure.clamp(min=0) * blue + (-sure).clamp(min=0) * red  # white at 0
    spacing = int(starts[1] - starts[0])
    cells = cells.repeat_interleave(spacing * zoom, 1).repeat_interleave(spacing * zoom, 2)
    cells[:, :: spacing * zoom] = cells[:, :, :: spacing * zoom] = 0.6  # the grid
    middle = (int(starts[0]) + (seen - spacing) // 2) * zoom
    inside = slice(middle, middle + cells.shape[1])
    alone, both = torch.full_like(large, 0.4), large.clone()
    alone[:, inside, inside] = cells
    both[:, inside, inside] = 0.35 * large.mean(0)[inside, inside] + 0.65 * cells
    return [large, alone, both]


def _describe(logits: Tensor, before: Tensor, hurt: Tensor, starts: Tensor, seen: int) -> str:
    """Mean logits: of all, and of the patches that see the damage, now and before it."""
    side, text = len(hurt), f"mean logit {logits.mean():.2f}"
    spans = [slice(max(0, int(s)), min(side, int(s) + seen)) for s in starts]
    sees = torch.tensor([[bool(hurt[rows, columns].any()) for columns in spans] for rows in spans])
    if sees.any():
        text += (
            f"; {logits[sees].mean():.2f} where {int(sees.sum())} of {sees.numel()} patches see "
        )
        text += f"the damage, before it {before[sees].mean():.2f}"
    return text.replace("-", "−")


def _frame_of(hurt: Tensor) -> tuple[float, ...]:
    """The frame about the damage, in parts of 1; none where there is nothing to frame."""
    rows, columns = (hurt.any(axis).nonzero().flatten() for axis in (1, 0))
    if not len(rows) or len(rows) == len(columns) == len(hurt):
        return ()
    ends = [int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
    sizes = (ends[0], ends[1], ends[2] - ends[0], ends[3] - ends[1])
    return tuple(round(v / len(hurt), 4) for v in sizes)

"""Widgets that show pictures made beforehand: frames with sliders, and rankings by distance."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import traitlets
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from t2ilearn.data import Shapes
from t2ilearn.judging import load_reader
from t2ilearn.judging.reader import Reader
from t2ilearn.models.lpips import perceptual_distance
from t2ilearn.models.vqvae import VQVAE
from t2ilearn.training.flight import Record, contact_sheet
from t2ilearn.widgets.base import Widget, joined, listed


def data_uri(picture: Image.Image, quality: int = 80) -> str:
    """A picture as WebP inside an address, so that no file need be fetched.

    Args:
        quality: 1 … 99, or 100 for one without any loss.
    """
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=quality, lossless=quality == 100)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


class Frames(Widget):
    """Pictures made beforehand: one or two sliders choose which of them is shown.

    Args:
        pictures: a tensor (N, 3, H, W) in [−1, 1], or N PIL pictures; the last axis runs fastest.
        axes: each slider's name and its values, one or two; N is the product of their numbers.
        captions: one a picture.
        marks: one a picture: a frame to draw on it, (left, top, width, height) in parts of 1,
            or () for none.
        title: what stands above.
        width: of the shown picture, in CSS pixels, at most; it shrinks on a small screen.
        quality: of WebP, 1 … 99, or 100 for no loss.
        start: for each axis the value at which it opens, and to which *Reset* returns; by default
            the first.

    Raises:
        ValueError: if the numbers do not fit together, an axis lacks the value at which it should
            start, or all is too large for a page.
    """

    _esm = joined("shared", "frames")
    title = traitlets.Unicode().tag(sync=True)
    axes = listed()
    frames = traitlets.List(traitlets.Unicode()).tag(sync=True)
    captions = traitlets.List(traitlets.Unicode()).tag(sync=True)
    marks = listed()
    width = traitlets.Int().tag(sync=True)
    start = listed()

    def __init__(
        self,
        pictures: Tensor | Sequence[Image.Image],
        axes: Mapping[str, Sequence[str | int | float]],
        captions: Sequence[str] = (),
        marks: Sequence[Sequence[float]] = (),
        title: str = "Frames",
        width: int = 320,
        quality: int = 80,
        start: Sequence[str | int | float] = (),
    ) -> None:
        if isinstance(pictures, Tensor):
            pictures = [contact_sheet(picture[None]) for picture in pictures]
        super().__init__(
            frames=[data_uri(picture, quality) for picture in pictures],
            axes=[{"name": name, "values": list(values)} for name, values in axes.items()],
            captions=list(captions),
            marks=[list(mark) for mark in marks],
            title=title,
            width=width,
            start=list(start) or [next(iter(values), None) for values in axes.values()],
            fallback=f"{title}: {len(pictures)} pictures by {' and '.join(axes)}.",
        )

    @traitlets.validate("frames", "axes", "captions", "marks")
    def _check_numbers(self, proposal: Any) -> list:
        lengths = [len(axis["values"]) for axis in self.axes]
        wanted, name, value = math.prod(lengths), proposal["trait"].name, proposal["value"]
        if len(lengths) not in (1, 2) or wanted == 0:
            raise ValueError("axes must be one or two sliders, with at least one value each.")
        if name == "frames" and len(value) != wanted:
            sizes = " × ".join(map(str, lengths))
            raise ValueError(f"{len(value)} pictures, but the axes have {sizes} places.")
        if name in ("captions", "marks") and value and len(value) != wanted:
            raise ValueError(f"{len(value)} {name} for {wanted} pictures.")
        return value

    @traitlets.validate("start")
    def _check_start(self, proposal: Any) -> list:
        start = proposal["value"]
        if len(start) != len(self.axes):
            raise ValueError(f"start has {len(start)} values for {len(self.axes)} axes.")
        for value, axis in zip(start, self.axes, strict=True):
            if value not in axis["values"]:
                raise ValueError(f"start is {value!r}, which {axis['name']!r} never takes.")
        return start

    @classmethod
    def of_record(
        cls, record: Record, title: str = "A recorded training run", count: int = 24
    ) -> "Frames":
        """A training run to scrub through, from `flight.read_record`.

        It opens at the last frame, what became of the run; *Play* begins at the first.

        Args:
            count: at most so many frames, evenly chosen; the first and the last are among them.

        Raises:
            ValueError: if the run recorded no frames.
        """
        if not record.frames:
            raise ValueError("This run recorded curves alone, and no frames.")
        last, count = len(record.frames) - 1, min(count, len(record.frames))
        chosen = [record.frames[round(i * last / max(1, count - 1))] for i in range(count)]
        curves = record.facts["curves"]
        captions = []
        for step, _ in chosen:
            nearest = min(range(len(curves["step"])), key=lambda i: abs(curves["step"][i] - step))
            captions.append(f"loss {curves['total'][nearest]:.3g}")
        steps = [step for step, _ in chosen]
        pictures = [picture for _, picture in chosen]
        return cls(pictures, {"step": steps}, captions, title=title, start=steps[-1:])

    @classmethod
    @torch.no_grad()
    def of_tokens(
        cls,
        vqvae: VQVAE,
        tokens: Int[Tensor, " n"],
        places: Sequence[int],
        replacements: Sequence[int],
        title: str = "Token painter",
    ) -> "Frames":
        """A picture in which one token is replaced: which place, and by which other token?

        Args:
            tokens: the picture, as `vqvae.tokens` gives it.
            places: which tokens may be replaced, row by row from 0.
            replacements: by which tokens.
        """
        side = vqvae.config.side
        painted = tokens.repeat(len(places) * len(replacements), 1)
        pairs = [(place, token) for place in places for token in replacements]
        for row, (place, token) in zip(painted, pairs, strict=True):
            row[place] = token
        spots = {place: divmod(place, side) for place in places}
        captions = [f"token {token} instead of {int(tokens[place])}" for place, token in pairs]
        marks = [(spots[p][1] / side, spots[p][0] / side, 1 / side, 1 / side) for p, _ in pairs]
        names = [f"{row + 1}, {column + 1}" for row, column in spots.values()]
        axes: dict[str, Sequence[Any]] = {"row, column": names, "token": replacements}
        return cls(vqvae.decode_tokens(painted), axes, captions, marks, title, 256)


# --- distances ---------------------------------------------------------------------------------


def shift(pictures: Float[Tensor, "b 3 h w"], pixels: int) -> Float[Tensor, "b 3 h w"]:
    """To the right; the left edge is repeated."""
    return F.pad(pictures, (pixels, 0, 0, 0), mode="replicate")[..., : pictures.shape[-1]]


def blur(pictures: Float[Tensor, "b 3 h w"], sigma: float) -> Float[Tensor, "b 3 h w"]:
    """By a Gaussian with a standard deviation of so many pixels."""
    radius = math.ceil(3 * sigma)
    bell = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
    bell = (bell / bell.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pictures, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, bell, groups=3), bell.mT, groups=3)


def noise(pictures: Float[Tensor, "b 3 h w"], sigma: float, seed: int) -> Float[Tensor, "b 3 h w"]:
    """Gaussian, of a standard deviation as a part of the way from black to mid-grey."""
    grains = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
    return (pictures + sigma * grains).clamp(-1, 1)


class DistanceRanking(Widget):
    """One picture shifted, blurred and noisy: three distances rank the copies differently.

    Args:
        picture: (3, H, W) in [−1, 1]; by default one of `test-full`.
        reader: whose levels the perceptual distance compares; by default the training reader.
            Never a judge, which no loss may see.
        seed: of the noise.

    Raises:
        ValueError: if the picture has another shape.
    """

    _esm = joined("shared", "distance_ranking")
    original = traitlets.Unicode().tag(sync=True)
    damages = listed()
    measures = traitlets.List(traitlets.Unicode()).tag(sync=True)
    start = traitlets.List(traitlets.Int()).tag(sync=True)

    def __init__(
        self, picture: Tensor | None = None, reader: Reader | None = None, seed: int = 0
    ) -> None:
        if picture is None:
            picture = Shapes().test_set("test-full", 1).pictures[0]
        if picture.ndim != 3 or picture.shape[0] != 3:
            raise ValueError(f"The picture must be (3, H, W), not {tuple(picture.shape)}.")
        reader, x = reader or load_reader("reader"), picture[None]
        spoiled: dict[str, tuple[str, dict[float, Tensor]]] = {
            "shift": (" px", {s: shift(x, s) for s in (1, 2, 3, 4, 6)}),
            "blur": (" px", {s: blur(x, s) for s in (0.5, 1.0, 1.5, 2.0, 3.0)}),
            "noise": ("", {s: noise(x, s, seed) for s in (0.05, 0.1, 0.15, 0.2, 0.3)}),
        }
        damages: list[dict[str, Any]] = []
        for name, (unit, copies) in spoiled.items():
            y = torch.cat(list(copies.values()))
            far = (y - x).abs().mean((1, 2, 3)), (y - x).square().mean((1, 2, 3)).sqrt()
            with torch.no_grad():
                seen = perceptual_distance(reader.trunk, x.expand_as(y), y)
            distances = torch.stack([*far, seen], dim=1)  # (strengths, measures)
            damages.append(
                {
                    "name": name,
                    "unit": unit,
                    "strengths": list(copies),
                    "pictures": [data_uri(contact_sheet(c), 90) for c in copies.values()],
                    "distances": [[round(v, 5) for v in row] for row in distances.tolist()],
                }
            )
        super().__init__(
            original=data_uri(contact_sheet(x), 90),
            damages=damages,
            measures=["L1", "L2", "perceptual"],
            start=[0, 2, 3],  # shift 1, blur 1.5, noise 0.2: three distances, three orders
            fallback="Distance ranking: of three spoiled copies, which is the nearest?",
        )

"""Exercises of chapter 1 as code; their words are in `chapter01.toml`."""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from t2ilearn.data.captions import COLOURS, SHAPES, StatedObject, parse
from t2ilearn.data.shapes import TinyShapes
from t2ilearn.judging.alignment import matches
from t2ilearn.lessons.exercises import Answer, Code


def my_psnr(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """PSNR in decibels of pictures in [−1, 1]: the peak is 2."""
    return 10 * torch.log10(4 / (a - b).square().mean())


def _see_psnr(answer: Answer) -> list:
    black = torch.zeros(1, 3, 4, 4)
    return [answer(black, black + shift) for shift in (0.2, 0.5)]


def _mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


_PSNR = {
    "peak_one": lambda a, b: 10 * torch.log10(1 / _mse(a, b)),
    "bytes": lambda a, b: 10 * torch.log10(255**2 / _mse(a, b)),
    "natural": lambda a, b: 10 * torch.log(4 / _mse(a, b)),
    "sign": lambda a, b: 10 * torch.log10(_mse(a, b) / 4),
    "half": lambda a, b: 10 * torch.log10(2 / _mse(a, b).sqrt()),
    "peak_unsquared": lambda a, b: 10 * torch.log10(2 / _mse(a, b)),
    "sum": lambda a, b: 10 * torch.log10(4 / (a - b).square().sum()),
}


def fulfils(seen: StatedObject, stated: StatedObject) -> bool:
    """Whether a picture's object has every attribute that a caption states."""
    names = ("shape", "size", "pattern", "colour")
    return all(getattr(stated, name) in (None, getattr(seen, name)) for name in names)


def _see_fulfils(answer: Answer) -> list:
    seen = parse("a small striped red star").objects[0]
    true = ["small striped red star", "star", "red star", "small star"]
    false = ["blue star", "red ring", "small blue star", "large star", "dotted star", "blue ring"]
    return [bool(answer(seen, parse(f"a {text}").objects[0])) for text in true + false]


_FULFILS = {
    "equal": lambda seen, stated: seen == stated,
    "any": lambda seen, stated: any(v == getattr(seen, k) for k, v in vars(stated).items()),
    "shape_only": lambda seen, stated: seen.shape == stated.shape,
    "no_size": lambda seen, stated: (
        seen.shape == stated.shape and stated.colour in (None, seen.colour)
    ),
    "always": lambda seen, stated: True,
    "never": lambda seen, stated: False,
}


def pictures_needed(p: float, h: float) -> int:
    """How many test pictures a share p within ± h (95 %) takes."""
    return math.ceil(1.96**2 * p * (1 - p) / h**2)


def _see_needed(answer: Answer) -> list:
    return [answer(0.9, 0.01), answer(0.5, 0.03)]


_NEEDED = {
    "floor": lambda p, h: math.floor(1.96**2 * p * (1 - p) / h**2),
    "fraction": lambda p, h: 1.96**2 * p * (1 - p) / h**2,
    "unsquared": lambda p, h: math.ceil(1.96 * p * (1 - p) / h),
    "z_unsquared": lambda p, h: math.ceil(1.96 * p * (1 - p) / h**2),
    "no_z": lambda p, h: math.ceil(p * (1 - p) / h**2),
    "no_share": lambda p, h: math.ceil(1.96**2 / h**2),
    "root": lambda p, h: math.ceil(1.96**2 * math.sqrt(p * (1 - p)) / h**2),
    "whole_width": lambda p, h: math.ceil(4 * 1.96**2 * p * (1 - p) / h**2),
}


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's interval (1927) for `right` of n, 95 %: its lower and upper end."""
    p, z = right / n, 1.96
    below = 1 + z**2 / n
    m = (p + z**2 / (2 * n)) / below
    h = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / below
    return m - h, m + h


def _see_wilson(answer: Answer) -> list:
    return [float(end) for pair in ((20, 20), (3, 10), (0, 50)) for end in answer(*pair)]


def _wilson_but(z: float = 1.96, below: bool = True, at_p: bool = False, n4: int = 0) -> Answer:
    """Wilson's interval with one thing wrong; `n4` is the power of n in z² / 4n², if not −2."""

    def answer(right: int, n: int) -> tuple[float, float]:
        p, base = right / n, 1 + z**2 / n if below else 1.0
        h = z * math.sqrt(p * (1 - p) / n + z**2 / 4 * float(n) ** (n4 or -2)) / base
        m = p if at_p else (p + z**2 / (2 * n)) / base
        return m - h, m + h

    return answer


def _wald(right: int, n: int) -> tuple[float, float]:
    p = right / n
    h = 1.96 * math.sqrt(p * (1 - p) / n)
    return p - h, p + h


_WILSON = {
    "wald": _wald,
    "middle": _wilson_but(at_p=True),
    "denominator": _wilson_but(below=False),
    "z_one": _wilson_but(1.0),
    "brackets": _wilson_but(n4=2),
}


def my_floor(facts: Sequence[Sequence[int]], captions: Sequence[str]) -> float:
    """The share of readings that match the next picture's caption, in [0, 1]."""
    others = [*captions[1:], captions[0]]
    return sum(matches(f, parse(c)) for f, c in zip(facts, others, strict=True)) / len(facts)


def _see_floor(answer: Answer) -> list:
    world, generator = TinyShapes(), torch.Generator().manual_seed(4)
    scenes = world.scenes(50, generator=generator)
    captions = world.mixed_captions(scenes, generator)
    return [answer(scenes.tolist()[:n], captions[:n]) for n in (50, 35)]


def _fits(
    facts: Sequence, captions: Sequence[str], shifts: Iterable[int], wrap: bool = True
) -> int:
    """How many pictures fit the captions so many places on."""
    n, stated = len(facts), [parse(caption) for caption in captions]
    pairs = ((i, i + k) for k in shifts for i in range(n) if wrap or i + k < n)
    return sum(matches(facts[i], stated[j % n]) for i, j in pairs)


_FLOOR = {
    "ceiling": lambda f, c: _fits(f, c, [0]) / len(f),
    "count": lambda f, c: _fits(f, c, [1]),
    "own_too": lambda f, c: _fits(f, c, range(len(f))) / len(f) ** 2,
    "all_others": lambda f, c: _fits(f, c, range(1, len(f))) / len(f) / (len(f) - 1),
    "equal_captions": lambda f, c: sum(map(str.__eq__, c, [*c[1:], c[0]])) / len(c),
    "last": lambda f, c: _fits(f, c, [1], wrap=False) / (len(f) - 1),
}


def held_out_pairs(colours: Sequence[str], shapes: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs in which each colour and each shape occurs once."""
    return list(zip(colours, shapes, strict=True))


def _see_pairs(answer: Answer) -> list:
    pairs = [tuple(pair) for pair in answer(COLOURS, SHAPES)]
    columns = [[pair[i] for pair in pairs] for i in (0, 1)]
    known = sum(c in COLOURS and s in SHAPES for c, s in pairs)
    most = [max(map(column.count, column), default=0) for column in columns]
    return [len(pairs), known, *(len(set(column)) for column in columns), *most]


_PAIRS = {
    "one_colour": lambda colours, shapes: [(colours[0], shape) for shape in shapes],
    "one_shape": lambda colours, shapes: [(colour, shapes[0]) for colour in colours],
    "everything": lambda colours, shapes: [(c, s) for c in colours for s in shapes],
    "one_pair": lambda colours, shapes: [(colours[0], shapes[2])],
    "nothing": lambda colours, shapes: [],
}

EXERCISES = {
    "1.1": Code(my_psnr, _see_psnr, _PSNR),
    "1.2": Code(fulfils, _see_fulfils, _FULFILS),
    "1.3": Code(pictures_needed, _see_needed, _NEEDED),
    "1.4": Code(wilson, _see_wilson, _WILSON),
    "1.5": Code(my_floor, _see_floor, _FLOOR),
    "1.6": Code(held_out_pairs, _see_pairs, _PAIRS),
}

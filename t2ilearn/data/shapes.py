"""Captioned shapes: pictures rendered from facts, so that every caption is exactly checkable.

A scene holds one or two objects. Each has a size, a pattern, a colour and a shape; two objects
stand one above the other or side by side; the background has one of four colours. Scenes are rows
of integers (`FIELDS`), pictures are drawn from them by signed distance functions: d(p) is the
distance from point p to the outline, negative inside, and a pixel's coverage is
clamp(1/2 − d, 0, 1) with d in pixels, which is antialiasing for free (Quilez, "2D distance
functions").

Splits. A hash of the facts sends one scene in 32 to the tests. Eight of the 64 colour × shape
pairs (`HELD_OUT`) never occur in training, in pictures or in words: a model that draws one
has composed it.
"""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from t2ilearn.data import captions as words
from t2ilearn.data.captions import Stated, StatedObject, parse
from t2ilearn.data.interface import PictureBatch
from t2ilearn.data.pixels import pictures_from_bytes

# axis 0: object 1 above object 2; axis 1: object 1 left of object 2. −1 where nothing is there.
FIELDS = ("count", "axis", "background") + tuple(
    f"{name}_{slot}" for slot in (1, 2) for name in ("size", "pattern", "colour", "shape")
)
CHOICES = {"count": 2, "axis": 2, "background": 4, "size": 2, "pattern": 4, "colour": 8, "shape": 8}
OBJECT_1, OBJECT_2 = slice(3, 7), slice(7, 11)

# Each colour and each shape once: red triangle, orange star, yellow heart, green ring, ...
HELD_OUT = tuple((c, (c + 2) % 8) for c in range(8))
SPLITS = ("train", "all", "test")
TEST_SETS = ("test-full", "test-partial", "composition")

# sRGB; lightness differs wherever hue alone would fail a colour-blind reader.
PALETTE = torch.tensor(
    [
        (205, 22, 30),  # red
        (240, 130, 10),  # orange
        (252, 236, 40),  # yellow
        (18, 140, 80),  # green
        (40, 72, 228),  # blue
        (140, 40, 165),  # purple
        (255, 155, 208),  # pink
        (88, 54, 40),  # brown
    ]
).float()
GROUNDS = torch.tensor([(250, 250, 250), (16, 16, 18), (138, 138, 142), (160, 214, 246)]).float()


def _ink(colours: Float[Tensor, "8 3"]) -> Float[Tensor, "8 3"]:
    """The second colour of a pattern: pale on dark colours, dark on light ones."""
    luminance = colours @ torch.tensor([0.2126, 0.7152, 0.0722])
    pale, dark = 0.3 * colours + 0.7 * 255, 0.3 * colours
    return torch.where((luminance < 125)[:, None], pale, dark)


INKS = _ink(PALETTE)


# --- signed distances in the object's own coordinates: it fills about [-1, 1]², y points down ---


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.86


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.76


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y - 0.2
    return torch.maximum(y, x.abs() * 0.866 - y * 0.5) - 0.56


def _star(x: Tensor, y: Tensor) -> Tensor:
    sector = math.pi / 5
    angle = torch.atan2(x, -y).abs()  # 0 points up
    angle = (angle - 2 * sector * torch.round(angle / (2 * sector))).abs()
    radius = torch.hypot(x, y)
    tip, notch = 1.0, 0.45
    edge_x, edge_y = notch * math.cos(sector) - tip, notch * math.sin(sector)
    length = math.hypot(edge_x, edge_y)
    across = edge_x * (radius * torch.sin(angle)) - edge_y * (radius * torch.cos(angle) - tip)
    return -across / length


def _heart(x: Tensor, y: Tensor) -> Tensor:
    side = 0.5
    u, v = (x.abs() - y - 0.05) * 0.7071, (x.abs() + y + 0.05) * 0.7071
    square = torch.maximum(u.abs(), v.abs()) - side
    lobe = torch.hypot(u - side, v) - side
    return torch.minimum(square, lobe)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.64).abs() - 0.27


def _cross(x: Tensor, y: Tensor) -> Tensor:
    ax, ay = x.abs(), y.abs()
    bar, post = torch.maximum(ax - 0.9, ay - 0.34), torch.maximum(ax - 0.34, ay - 0.9)
    return torch.minimum(bar, post)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() / 0.68 + y.abs() - 1) * 0.57


_DISTANCE: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _circle,
    _square,
    _triangle,
    _star,
    _heart,
    _ring,
    _cross,
    _diamond,
)  # in the order of captions.SHAPES


# --- patterns: a signed field, positive where the ink goes, in object units ---


def _stripes(x: Tensor, y: Tensor) -> Tensor:
    period = 0.7
    t = (x + y) * 0.7071 / period
    return ((t - torch.floor(t) - 0.5).abs() - 0.25) * period


def _dots(x: Tensor, y: Tensor) -> Tensor:
    period = 0.74
    u, v = x / period + 0.5, y / period + 0.5
    return 0.24 - torch.hypot(u - torch.floor(u) - 0.5, v - torch.floor(v) - 0.5) * period


def _checkers(x: Tensor, y: Tensor) -> Tensor:
    cell = 0.5
    u, v = x / (2 * cell) + 0.25, y / (2 * cell) + 0.25
    tri_x = (u - torch.floor(u) - 0.5).abs() - 0.25
    tri_y = (v - torch.floor(v) - 0.5).abs() - 0.25
    return torch.sign(tri_x * tri_y) * torch.minimum(tri_x.abs(), tri_y.abs()) * 2 * cell


_PATTERN: tuple[Callable[[Tensor, Tensor], Tensor] | None, ...] = (None, _stripes, _dots, _checkers)


def _paint(
    canvas: Float[Tensor, "n 3 h w"],
    things: Int[Tensor, "n 4"],
    centre: Float[Tensor, "n 2"],
    radius: Float[Tensor, " n"],
    angle: Float[Tensor, " n"],
) -> None:
    """Draw object i on canvas i, in place (the canvas is the caller's own)."""
    n, _, size, _ = canvas.shape
    grid = (torch.arange(size) + 0.5) * (2 / size) - 1
    dx, dy = grid[None, None] - centre[:, :1, None], grid[None, :, None] - centre[:, 1:, None]
    cos, sin = (
        (torch.cos(angle) / radius)[:, None, None],
        (torch.sin(angle) / radius)[:, None, None],
    )
    x, y = cos * dx + sin * dy, cos * dy - sin * dx  # (n, h, w), object units
    pixels = (radius * size / 2)[:, None, None]  # pixels in one object unit
    inside = torch.empty(n, size, size)
    for number, distance in enumerate(_DISTANCE):
        rows = (things[:, 3] == number).nonzero()[:, 0]
        if len(rows):
            inside[rows] = (0.5 - distance(x[rows], y[rows]) * pixels[rows]).clamp_(0, 1)
    inked = torch.zeros(n, size, size)
    for number, pattern in enumerate(_PATTERN):
        rows = (things[:, 1] == number).nonzero()[:, 0]
        if pattern is not None and len(rows):
            inked[rows] = (0.5 + pattern(x[rows], y[rows]) * pixels[rows]).clamp_(0, 1)
    colour, ink = PALETTE[things[:, 2]][..., None, None], INKS[things[:, 2]][..., None, None]
    canvas.lerp_(torch.lerp(colour, ink, inked[:, None]), inside[:, None])


def render(
    scenes: Int[Tensor, "n 11"], resolution: int, generator: torch.Generator
) -> Float[Tensor, "n 3 {resolution} {resolution}"]:
    """Draw scenes as pictures in [−1, 1]. Place, size and angle vary a little by `generator`."""
    chunks = [_render(chunk, resolution, generator) for chunk in scenes.split(64)]  # fits a cache
    return torch.cat(chunks) if chunks else torch.zeros(0, 3, resolution, resolution)


def _render(scenes: Tensor, resolution: int, generator: torch.Generator) -> Tensor:
    n = len(scenes)
    canvas = GROUNDS[scenes[:, 2]][..., None, None].expand(n, 3, resolution, resolution).clone()
    jitter = torch.rand(n, 2, 4, generator=generator) * 2 - 1  # along, across, radius, angle
    pair = (scenes[:, 0] == 1).float()
    for slot, columns in enumerate((OBJECT_1, OBJECT_2)):
        rows = (scenes[:, 0] >= slot).nonzero()[:, 0]
        if not len(rows):
            continue
        things, shake, two = scenes[rows, columns], jitter[rows, slot], pair[rows]
        radius = torch.where(things[:, 0] == 0, 0.27, 0.44) * (1 + 0.04 * shake[:, 2])
        room = torch.where(things[:, 0] == 0, 0.12, 0.01)
        along = two * (slot - 0.5) * 0.98 + (two * room + (1 - two) * 0.2) * shake[:, 0]
        across = 0.2 * shake[:, 1]
        axis = scenes[rows, 1]
        centre = torch.where(
            (axis == 0)[:, None], torch.stack([across, along], 1), torch.stack([along, across], 1)
        )
        part = canvas[rows]
        _paint(part, things, centre, radius, 0.12 * shake[:, 3])
        canvas[rows] = part
    return pictures_from_bytes(canvas)


# --- scenes ---


def _hash(scenes: Int[Tensor, "n 11"]) -> Int[Tensor, " n"]:
    """A fixed pseudo-random number in 0 … 31 for the facts of each scene."""
    key = torch.zeros(len(scenes), dtype=torch.int64)
    for column in range(scenes.shape[1]):
        key = (key * 31 + scenes[:, column] + 2) % 2_147_483_647
        key = (key * 48_271 + 11) % 2_147_483_647
    return (key >> 7) % 32


def holds_held_out_pair(scenes: Int[Tensor, "n 11"]) -> Bool[Tensor, " n"]:
    """True where either object is one of the eight colour × shape pairs kept from training."""
    shape_of = torch.tensor([shape for _, shape in HELD_OUT])
    found = torch.zeros(len(scenes), dtype=torch.bool)
    for columns in (OBJECT_1, OBJECT_2):
        thing = scenes[:, columns]
        found |= (thing[:, 2] >= 0) & (shape_of[thing[:, 2].clamp(min=0)] == thing[:, 3])
    return found


def in_split(scenes: Int[Tensor, "n 11"], split: str, share: int | None = 32) -> Bool[Tensor, " n"]:
    """Which scenes belong to a split.

    "train": what generative models see. "all": the same and held-out pairs, for the judge alone.
    "test": scenes of neither, without held-out pairs. "composition": test scenes with such a pair.
    One scene in `share` (a divisor of 32) is kept for the tests; with None scenes are not kept
    apart, only pictures of them are, and held-out pairs.
    """
    pair = holds_held_out_pair(scenes)
    tested = torch.ones_like(pair) if share is None else _hash(scenes) % share == 0
    trained = tested if share is None else ~tested
    if split == "all":
        return trained
    rules = {"train": trained & ~pair, "test": tested & ~pair, "composition": tested & pair}
    if split not in rules:
        raise ValueError(f"Unknown split {split!r}; one of {', '.join([*rules, 'all'])}.")
    return rules[split]


_VALUES = {
    "size": words.SIZES,
    "pattern": words.PATTERNS,
    "colour": words.COLOURS,
    "shape": words.SHAPES,
}


def facts_of(stated: Stated) -> list[tuple[int, int]]:
    """What a caption states, as pairs (column of `FIELDS`, value)."""
    stated = stated.canonical()
    facts = [(0, len(stated.objects) - 1)]
    if stated.relation is not None:
        facts.append((1, ("above", "left of").index(stated.relation)))
    if stated.background is not None:
        facts.append((2, words.BACKGROUNDS.index(stated.background)))
    for slot, thing in enumerate(stated.objects):
        for offset, name in enumerate(("size", "pattern", "colour", "shape")):
            value = getattr(thing, name)
            if value is not None:
                facts.append((3 + 4 * slot + offset, _VALUES[name].index(value)))
    return facts


def state(scene: list[int], swap: bool, keep: list[bool]) -> Stated:
    """The facts of a scene as a caption could state them.

    Args:
        scene: one row of integers, in the order of `FIELDS`.
        swap: name the second object first, with the inverse relation.
        keep: whether to say background, then size, pattern and colour of objects 1 and 2.
    """

    def thing(columns: slice, said: list[bool]) -> StatedObject:
        size, pattern, colour, shape = scene[columns]
        return StatedObject(
            words.SHAPES[shape],
            words.SIZES[size] if said[0] else None,
            words.PATTERNS[pattern] if said[1] else None,
            words.COLOURS[colour] if said[2] else None,
        )

    background = words.BACKGROUNDS[scene[2]] if keep[0] else None
    first = thing(OBJECT_1, keep[1:4])
    if scene[0] == 0:
        return Stated((first,), None, background)
    stated = Stated((first, thing(OBJECT_2, keep[4:7])), ("above", "left of")[scene[1]], background)
    if swap:
        relation = words.INVERSE[("above", "left of")[scene[1]]]
        return Stated(stated.objects[::-1], relation, background)
    return stated


class Shapes:
    """The shapes world. Implements `CaptionedPictures`.

    Args:
        resolution: height and width in pixels, at least 16.
    """

    name = "shapes"
    label = ""
    judge: str | None = "judge"
    reader: str | None = "reader"
    first_answers: Mapping[int, int] = {}
    measures: Mapping[str, tuple[int, int] | None] = {"judge": None}
    test_sets: tuple[str, ...] = TEST_SETS
    reconstruction_sets: tuple[str, ...] = ("test-full",)
    test_share: int | None = 32  # one scene in so many is kept for the tests

    def __init__(self, resolution: int = 64) -> None:
        if resolution < 16:
            raise ValueError(f"Shapes need at least 16 pixels a side, not {resolution}.")
        self.resolution = resolution

    @property
    def worlds(self) -> "tuple[Shapes, ...]":
        """This world alone."""
        return (self,)

    @staticmethod
    def read(caption: str) -> Stated:
        """What a caption states; see `captions.parse`."""
        return parse(caption)

    @staticmethod
    def facts(stated: Stated) -> list[tuple[int, int]]:
        """What was stated, as pairs (column, value)."""
        return facts_of(stated)

    def covers(self, stated: Stated) -> bool:
        """Every caption that the grammar reads can be drawn here."""
        return True

    def unseen(self, stated: Stated) -> bool:
        """Whether a caption states a colour and a shape that never met in training."""
        pairs = [(t.colour, t.shape) for t in stated.objects if t.colour is not None]
        numbers = [(words.COLOURS.index(c), words.SHAPES.index(s)) for c, s in pairs]
        return any(pair in HELD_OUT for pair in numbers)

    def _draw_scenes(self, n: int, split: str, generator: torch.Generator) -> Tensor:
        def roll(high: int) -> Tensor:
            return torch.randint(high, (n,), generator=generator)

        columns = [(torch.rand(n, generator=generator) < 0.7).long(), roll(2), roll(4)]
        columns += [roll(CHOICES[name.rsplit("_", 1)[0]]) for name in FIELDS[3:]]
        scenes = torch.stack(columns, 1)
        if split == "composition":  # plant a held-out pair in one of the two places
            pair = torch.tensor(HELD_OUT)[roll(8)]
            second = (scenes[:, 0] == 1) & (roll(2) == 1)
            scenes[~second, 5:7], scenes[second, 9:11] = pair[~second], pair[second]
        scenes[scenes[:, 0] == 0, 7:] = -1
        scenes[scenes[:, 0] == 0, 1] = -1
        return scenes

    def scenes(
        self, n: int, split: str = "train", *, generator: torch.Generator
    ) -> Int[Tensor, "{n} 11"]:
        """n random scenes of a split, as integers in the order of `FIELDS`."""
        kept: list[Tensor] = []
        while sum(map(len, kept)) < n:
            rarity = 1 if split in ("train", "all") else self.test_share or 1
            scenes = self._draw_scenes(max(64, 2 * n * rarity), split, generator)
            kept.append(scenes[in_split(scenes, split, self.test_share)])
        return torch.cat(kept)[:n]

    def captions(
        self,
        scenes: Int[Tensor, "n 11"],
        *,
        said: float,
        generator: torch.Generator,
        reading_order: bool = False,
    ) -> list[str]:
        """A caption for each scene.

        Args:
            said: probability of saying each attribute that may be left unsaid (all but shape
                and relation); 1 says everything.
            reading_order: describe three of four pairs from the upper or left object, as people
                do, instead of one of two.
        """
        n = len(scenes)
        keep = (torch.rand(n, 7, generator=generator) < said).tolist()
        roll = torch.randint(4, (n,), generator=generator)
        swap = (roll == 1 if reading_order else roll % 2 == 1).tolist()
        template = torch.randint(words.TEMPLATES, (n,), generator=generator).tolist()
        rows = zip(scenes.tolist(), swap, keep, template, strict=True)
        return [words.describe(state(scene, s, k), t) for scene, s, k, t in rows]

    def sample(self, n: int, split: str = "train", *, generator: torch.Generator) -> PictureBatch:
        """n pictures and captions; half of the captions say everything, half leave things out."""
        scenes = self.scenes(n, split, generator=generator)
        return PictureBatch(
            self.pictures(scenes, generator), self.mixed_captions(scenes, generator)
        )

    def pictures(
        self, scenes: Int[Tensor, "n 11"], generator: torch.Generator
    ) -> Float[Tensor, "n 3 h w"]:
        """`render` at this world's resolution."""
        return render(scenes, self.resolution, generator)

    def mixed_captions(self, scenes: Int[Tensor, "n 11"], generator: torch.Generator) -> list[str]:
        """Captions as in training: every second one says everything, and three of four describe a
        pair in reading order.

        With one of two, which object is named first would say nothing of where it stands, and
        neither would the relation alone: only the two together do. No small step towards learning
        both at once pays, so a prior keeps assigning the attributes to the objects at random.
        """
        full, partial = (
            self.captions(part, said=said, generator=generator, reading_order=True)
            for part, said in ((scenes[0::2], 1.0), (scenes[1::2], 0.5))
        )
        mixed = [""] * len(scenes)
        mixed[0::2], mixed[1::2] = full, partial
        return mixed

    def test_scenes(self, name: str, n: int = 2000) -> tuple[Int[Tensor, "{n} 11"], list[str]]:
        """Scenes and captions of a test set, the same at every call."""
        if name not in TEST_SETS:
            raise ValueError(f"Unknown test set {name!r}; one of {', '.join(TEST_SETS)}.")
        generator = torch.Generator().manual_seed(1000 + TEST_SETS.index(name))
        split = "composition" if name == "composition" else "test"
        scenes = self.scenes(n, split, generator=generator)
        said = 0.5 if name == "test-partial" else 1.0
        return scenes, self.captions(scenes, said=said, generator=generator)

    def test_set(self, name: str, n: int = 2000) -> PictureBatch:
        """Pictures and captions of a test set, the same at every call.

        Args:
            name: "test-full" (every attribute said), "test-partial" (each with probability ½) or
                "composition" (every caption holds a colour × shape pair unseen in training).
        """
        scenes, captions = self.test_scenes(name, n)
        generator = torch.Generator().manual_seed(2000)
        return PictureBatch(self.pictures(scenes, generator), captions)

    def reader_test(self, n: int = 2000) -> PictureBatch:
        """What a reader is tested with: pictures whose captions say everything."""
        return self.test_set("test-full", n)

    def groups(self, name: str, n: int = 2000) -> None:
        """No two pictures of a test set belong together."""

    def reference_set(self, n: int = 2000) -> Float[Tensor, "{n} 3 h w"]:
        """Pictures of other test scenes, the same at every call: distances are measured to them."""
        generator = torch.Generator().manual_seed(2500)
        return self.pictures(self.scenes(n, "test", generator=generator), generator)


class TinyShapes(Shapes):
    """A corner of the world that a laptop learns in minutes: 32×32, one solid object, 4 colours,
    4 shapes, 2 sizes, 4 backgrounds.

    Without the held-out pairs that makes 112 scenes, too few to keep any back: `test` holds new
    pictures of scenes known from training, and only `composition` has new scenes.
    """

    name = "tiny-shapes"
    test_share = None
    COLOURS = (0, 2, 3, 4)  # red, yellow, green, blue
    SHAPES = (0, 2, 3, 4)  # circle, triangle, star, heart

    def __init__(self, resolution: int = 32) -> None:
        super().__init__(resolution)

    def covers(self, stated: Stated) -> bool:
        """Whether a caption states one solid object in this world's colours and shapes."""
        thing = stated.objects[0]
        colours = [None, *(words.COLOURS[number] for number in self.COLOURS)]
        known = thing.colour in colours and words.SHAPES.index(thing.shape) in self.SHAPES
        return len(stated.objects) == 1 and thing.pattern in (None, "solid") and known

    def _draw_scenes(self, n: int, split: str, generator: torch.Generator) -> Tensor:
        scenes = super()._draw_scenes(n, split, generator)
        scenes[:, 0], scenes[:, 1], scenes[:, 4], scenes[:, 7:] = 0, -1, 0, -1
        pick = torch.randint(4, (n, 2), generator=generator)
        if split == "composition":  # the only held-out pairs with a colour and a shape from here
            pairs = torch.tensor(
                [p for p in HELD_OUT if p[0] in self.COLOURS and p[1] in self.SHAPES]
            )
            scenes[:, 5:7] = pairs[pick[:, 0] % len(pairs)]
        else:
            scenes[:, 5] = torch.tensor(self.COLOURS)[pick[:, 0]]
            scenes[:, 6] = torch.tensor(self.SHAPES)[pick[:, 1]]
        return scenes

"""Emoji in styles: real drawings of some 1,300 concepts by five studios, with captions.

    a dodo, glossy, on a sky background

A scene is three integers (`FIELDS`): the concept, the style (which studio drew it) and the
background. Drawings ship as one archive a style (`emoji_files`), each under its own licence.
They are decoded once into memory and then moved, scaled and laid over a background, a batch at a
time. Captions have a grammar of their own (`emoji_captions`).

Splits. Five in a hundred concept × style pairs are held out by a fixed hash: a model that draws
"a dodo, glossy" without having seen that pair has composed it from dodos in other styles and
other glossy things. Held-out pairs have no near twin among the other drawings of any style, so
the share of smiling faces among them is small (the build tool says how twins are measured).

Two honest exceptions. The *ink* style is black lines: on the black background it is drawn in
white. And a drawing that would vanish (a white cloud on white) never meets that background.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from t2ilearn.data.captions import BACKGROUNDS
from t2ilearn.data.emoji_captions import (
    TEMPLATES,
    StatedEmoji,
    concept_numbers,
    describe_emoji,
    parse_emoji,
)
from t2ilearn.data.emoji_files import (
    AGAIN,
    ASSETS,
    DRAWN,
    STYLES,
    EmojiError,
    read_index,
    read_shard,
)
from t2ilearn.data.interface import PictureBatch
from t2ilearn.data.pixels import pictures_from_bytes
from t2ilearn.data.shapes import GROUNDS

FIELDS = ("concept", "style", "background")
SPLITS = ("train", "all", "held-out")
TEST_SETS = ("seen", "held-out")

SMALLEST = 0.84  # scale of the smallest augmented picture; none is cut at the border
INK, BLACK = STYLES.index("ink"), BACKGROUNDS.index("black")
# A pixel shows if some channel differs from the ground by this many of 255 levels; a drawing is
# visible if this share of the pixels it covers shows.
CONTRAST, SHOWN = 40, 0.33


def _premultiplied(drawings: UInt8[np.ndarray, "p 64 64 4"]) -> UInt8[Tensor, "p 4 64 64"]:
    """RGBA with alpha multiplied in, channels first: what may be averaged without dark fringes."""
    pictures = torch.from_numpy(drawings).permute(0, 3, 1, 2).contiguous()
    alpha = pictures[:, 3:].int()
    for channel in range(3):  # a channel at a time: the whole in wider integers is large
        colour = pictures[:, channel : channel + 1]
        colour.copy_((colour * alpha + 127) // 255)
    return pictures


def _shows(drawings: UInt8[Tensor, "p 4 64 64"], style: Int[Tensor, " p"]) -> Bool[Tensor, "p 4"]:
    """Whether each drawing can be seen on each background."""
    shown = []
    for part, kind in zip(drawings.split(512), style.split(512), strict=True):
        small = part[:, :, ::2, ::2].float()  # every fourth pixel is enough to count by
        covered = (small[:, 3] > 127).sum((1, 2))
        for ground, colour in enumerate(GROUNDS):
            laid = _inked(small, kind, torch.full_like(kind, ground))
            # over the ground: rgb + (1 − alpha) · ground, less the ground
            change = (laid[:, :3] - laid[:, 3:] / 255 * colour[:, None, None]).abs().amax(1)
            shown.append((change >= CONTRAST).sum((1, 2)) >= SHOWN * covered)
    return torch.cat([torch.stack(shown[i : i + 4], 1) for i in range(0, len(shown), 4)])


def _inked(
    drawings: Float[Tensor, "n 4 h w"], style: Int[Tensor, " n"], background: Int[Tensor, " n"]
) -> Float[Tensor, "n 4 h w"]:
    """The same drawings, with ink on black turned to white (premultiplied: colour = alpha)."""
    white = ((style == INK) & (background == BLACK))[:, None, None, None]
    return torch.where(white, drawings[:, 3:], drawings)


def emoji_facts(stated: StatedEmoji) -> list[tuple[int, int]]:
    """What a caption states, as pairs (column of `FIELDS`, value)."""
    facts = [(0, concept_numbers()[stated.concept])]
    if stated.style is not None:
        facts.append((1, STYLES.index(stated.style)))
    if stated.background is not None:
        facts.append((2, BACKGROUNDS.index(stated.background)))
    return facts


class Emoji:
    """The emoji world. Implements `CaptionedPictures`.

    Args:
        resolution: height and width in pixels, 16 … 128; the drawings themselves have 64.
        directory: where the index and the archives are; by default those that ship.
        smallest: scale of the smallest picture, in (0, 1]; 1 leaves every drawing where it is.

    Attributes:
        concepts: names, by concept number.
        phrases: for each concept, its name and then its synonyms, with their articles.
        pairs: concept and style of each drawing, as numbers.
        held_out: which drawings no generative model may see.

    Raises:
        EmojiError: if the index or an archive is missing or damaged.
        ValueError: for another resolution or scale.
    """

    name = "emoji"
    label = "emoji, "
    judge: str | None = "emoji-judge"
    reader: str | None = None
    first_answers: Mapping[int, int] = {0: 5}  # many concepts look alike
    measures: Mapping[str, tuple[int, int] | None] = {
        "concept": (0, 1),
        "concept in the first five": (0, 5),
        "style": (1, 1),
    }
    test_sets: tuple[str, ...] = TEST_SETS
    reconstruction_sets: tuple[str, ...] = TEST_SETS

    def __init__(
        self, resolution: int = 64, directory: Path | None = None, smallest: float = SMALLEST
    ) -> None:
        if not 16 <= resolution <= 128:
            raise ValueError(f"Emoji are drawn at 16 to 128 pixels a side, not {resolution}.")
        if not 0 < smallest <= 1:
            raise ValueError(f"The smallest scale must be above 0 and at most 1, not {smallest}.")
        self.resolution, self.smallest = resolution, smallest
        directory = directory or ASSETS
        index = read_index(directory)
        self.concepts: tuple[str, ...] = tuple(index["concepts"])
        self.phrases: tuple[tuple[str, ...], ...] = tuple(map(tuple, index["concepts"].values()))
        number = {name: i for i, name in enumerate(self.concepts)}
        pairs: list[tuple[int, int]] = []
        held: list[bool] = []
        drawings: list[np.ndarray] = []
        for shard in index["shards"]:
            before = len(pairs)
            for facts, drawing in read_shard(directory / shard["file"], shard):
                if facts["concept"] not in number:
                    raise EmojiError(
                        f"{shard['file']} draws {facts['concept']!r}, which the index does not "
                        f"list. {AGAIN}"
                    )
                pairs.append((number[facts["concept"]], STYLES.index(shard["style"])))
                held.append(facts["split"] == "held-out")
                drawings.append(drawing)
            if len(pairs) - before != shard["count"]:
                raise EmojiError(
                    f"{shard['file']} holds {len(pairs) - before} drawings, not {shard['count']}. "
                    f"{AGAIN}"
                )
        self.pairs: Int[Tensor, "p 2"] = torch.tensor(pairs)
        self.held_out: Bool[Tensor, " p"] = torch.tensor(held)
        bank = _premultiplied(np.stack(drawings))
        self._prepare(bank)

    @property
    def worlds(self) -> "tuple[Emoji, ...]":
        """This world alone."""
        return (self,)

    @staticmethod
    def read(caption: str) -> StatedEmoji:
        """What a caption states; see `emoji_captions.parse_emoji`."""
        return parse_emoji(caption)

    @staticmethod
    def facts(stated: StatedEmoji) -> list[tuple[int, int]]:
        """What was stated, as pairs (column, value)."""
        return emoji_facts(stated)

    def covers(self, stated: StatedEmoji) -> bool:
        """Whether there is a drawing of what a caption states."""
        styles = self._number[concept_numbers()[stated.concept]] >= 0
        return bool(styles.any() if stated.style is None else styles[STYLES.index(stated.style)])

    def unseen(self, stated: StatedEmoji) -> bool:
        """Whether a caption states a concept in a style that training never showed."""
        if stated.style is None:
            return False
        row = self._number[concept_numbers()[stated.concept], STYLES.index(stated.style)]
        return bool(row < 0 or self.held_out[row])

    def _prepare(self, bank: UInt8[Tensor, "p 4 64 64"]) -> None:
        """Keep the drawings at this resolution, and list every scene that can be seen."""
        self._number = torch.full((len(self.concepts), len(STYLES)), -1)
        self._number[self.pairs[:, 0], self.pairs[:, 1]] = torch.arange(len(bank))
        self.visible: Bool[Tensor, "p 4"] = _shows(bank, self.pairs[:, 1])
        self._drawings = bank
        if self.resolution != DRAWN:
            side = (self.resolution, self.resolution)
            parts = [
                functional.interpolate(part.float(), side, mode="bilinear", antialias=True)
                for part in bank.split(256)
            ]
            self._drawings = torch.cat([p.round().clamp(0, 255).byte() for p in parts])
        row, ground = self.visible.nonzero(as_tuple=True)
        scenes = torch.cat([self.pairs[row], ground[:, None]], 1)
        held = self.held_out[row]
        self._scenes = {"train": scenes[~held], "all": scenes, "held-out": scenes[held]}

    def _rows(self, scenes: Int[Tensor, "n 3"]) -> Int[Tensor, " n"]:
        """The drawing of each scene; `ValueError` if there is none."""
        rows = self._number[scenes[:, 0], scenes[:, 1]]
        if (missing := (rows < 0).nonzero()[:, 0]).numel():
            concept, style, _ = scenes[missing[0]].tolist()
            raise ValueError(f"There is no {STYLES[style]} drawing of {self.concepts[concept]!r}.")
        return rows

    def in_split(self, scenes: Int[Tensor, "n 3"], split: str) -> Bool[Tensor, " n"]:
        """Which scenes belong to a split.

        "train": what generative models see. "held-out": pairs kept from them. "all": both, for
        the judge alone.
        """
        held = self.held_out[self._rows(scenes)]
        rules = {"train": ~held, "all": torch.ones_like(held), "held-out": held}
        if split not in rules:
            raise ValueError(f"Unknown split {split!r}; one of {', '.join(SPLITS)}.")
        return rules[split]

    def scenes(
        self, n: int, split: str = "train", *, generator: torch.Generator
    ) -> Int[Tensor, "{n} 3"]:
        """n random scenes of a split, as integers in the order of `FIELDS`."""
        if split not in self._scenes:
            raise ValueError(f"Unknown split {split!r}; one of {', '.join(SPLITS)}.")
        choices = self._scenes[split]
        return choices[torch.randint(len(choices), (n,), generator=generator)]

    def each_once(self, generator: torch.Generator) -> Int[Tensor, "p 3"]:
        """A scene of every drawing, each on one of the backgrounds where it can be seen."""
        ground = torch.multinomial(self.visible.float(), 1, generator=generator)
        return torch.cat([self.pairs, ground], 1)

    def pictures(
        self, scenes: Int[Tensor, "n 3"], generator: torch.Generator
    ) -> Float[Tensor, "n 3 {self.resolution} {self.resolution}"]:
        """Draw scenes as pictures in [−1, 1]. Place and size vary a little by `generator`.

        Raises:
            ValueError: if a style has no drawing of a concept.
        """
        rows = self._rows(scenes)
        shake = torch.rand(len(scenes), 3, generator=generator)
        if not len(rows):
            return torch.zeros(0, 3, self.resolution, self.resolution)
        parts = zip(scenes.split(64), rows.split(64), shake.split(64), strict=True)
        return torch.cat([self._lay(*part) for part in parts])  # 64 pictures fit a cache

    def _lay(self, scenes: Tensor, rows: Tensor, shake: Tensor) -> Tensor:
        """Move and scale drawings, and lay them over their backgrounds."""
        drawings = _inked(self._drawings[rows].float(), scenes[:, 1], scenes[:, 2])
        scale = self.smallest + (1 - self.smallest) * shake[:, 0]
        shift = (2 * shake[:, 1:] - 1) * (1 - scale)[:, None]  # as far as the border allows
        # From output to input, in units of half the picture: x ↦ (x − shift) / scale.
        theta = torch.zeros(len(rows), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
        theta[:, :, 2] = -shift / scale[:, None]
        grid = functional.affine_grid(theta, list(drawings.shape), align_corners=False)
        moved = functional.grid_sample(drawings, grid, align_corners=False)
        ground = GROUNDS[scenes[:, 2]][..., None, None]
        laid = moved[:, :3] + ground * (1 - moved[:, 3:] / 255)
        return pictures_from_bytes(laid).clamp_(-1, 1)

    def state(self, scene: list[int]) -> StatedEmoji:
        """The facts of a scene as a caption that says everything would state them."""
        concept, style, background = scene
        return StatedEmoji(self.concepts[concept], STYLES[style], BACKGROUNDS[background])

    def captions(
        self, scenes: Int[Tensor, "n 3"], *, said: float, generator: torch.Generator
    ) -> list[str]:
        """A caption for each scene. Half of the concepts that have synonyms go by one of them.

        Args:
            said: probability of saying the style, and of saying the background; 1 says both.
        """
        n = len(scenes)
        keep = (torch.rand(n, 2, generator=generator) < said).tolist()
        template = torch.randint(TEMPLATES, (n,), generator=generator).tolist()
        pick = torch.rand(n, generator=generator).tolist()
        captions = []
        for scene, (style, place), form, u in zip(
            scenes.tolist(), keep, template, pick, strict=True
        ):
            name, *others = self.phrases[scene[0]]
            phrase = others[int((2 * u - 1) * len(others))] if others and u >= 0.5 else name
            stated = self.state(scene)
            captions.append(
                describe_emoji(
                    phrase,
                    stated.style if style else None,
                    stated.background if place else None,
                    form,
                )
            )
        return captions

    def mixed_captions(self, scenes: Int[Tensor, "n 3"], generator: torch.Generator) -> list[str]:
        """Captions as in training: every second one says everything."""
        mixed = [""] * len(scenes)
        mixed[0::2] = self.captions(scenes[0::2], said=1.0, generator=generator)
        mixed[1::2] = self.captions(scenes[1::2], said=0.5, generator=generator)
        return mixed

    def sample(self, n: int, split: str = "train", *, generator: torch.Generator) -> PictureBatch:
        """n pictures and captions; half of the captions say everything, half leave things out."""
        scenes = self.scenes(n, split, generator=generator)
        return PictureBatch(
            self.pictures(scenes, generator), self.mixed_captions(scenes, generator)
        )

    def test_scenes(self, name: str, n: int = 2000) -> tuple[Int[Tensor, "{n} 3"], list[str]]:
        """Scenes of a test set and captions that say everything, the same at every call.

        Args:
            name: "seen" (pairs known from training, in new places and sizes) or "held-out".
        """
        if name not in TEST_SETS:
            raise ValueError(f"Unknown test set {name!r}; one of {', '.join(TEST_SETS)}.")
        generator = torch.Generator().manual_seed(3000 + TEST_SETS.index(name))
        split = "train" if name == "seen" else name
        scenes = self.scenes(n, split, generator=generator)
        return scenes, self.captions(scenes, said=1.0, generator=generator)

    def test_set(self, name: str, n: int = 2000) -> PictureBatch:
        """Pictures and captions of a test set, the same at every call; see `test_scenes`."""
        scenes, captions = self.test_scenes(name, n)
        generator = torch.Generator().manual_seed(4000)
        return PictureBatch(self.pictures(scenes, generator), captions)

    def reader_test(self, n: int = 2000) -> PictureBatch:
        """What a reader is tested with: every drawing once, moved and scaled anew on some
        background, however many n asks for. It knows the drawings; their places are new."""
        generator = torch.Generator().manual_seed(5000)
        scenes = self.each_once(generator)
        pictures = self.pictures(scenes, generator)
        return PictureBatch(pictures, self.captions(scenes, said=1.0, generator=generator))

    def groups(self, name: str, n: int = 2000) -> Int[Tensor, "{n} 2"]:
        """Concept and style of each picture of a test set: pictures of one drawing are no
        independent answers."""
        return self.test_scenes(name, n)[0][:, :2]

    def reference_set(self, n: int = 2000) -> Float[Tensor, "{n} 3 h w"]:
        """Pictures of training scenes in places and sizes of their own, the same at every call."""
        generator = torch.Generator().manual_seed(4500)
        return self.pictures(self.scenes(n, "train", generator=generator), generator)

"""Several worlds as one, so that a single model learns them all.

A scene has a column more than in its own world: first the number of the world, then that world's
facts, filled up with −1 where another world's are longer. Pictures and captions are left to the
worlds themselves; so are test sets, which are told apart by a name ("shapes: test-full"), but for
one, in which the worlds take turns.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from t2ilearn.data.interface import CaptionedPictures, PictureBatch

AND = " + "  # between the worlds' names
BETWEEN = ": "  # of a world's name and its test set's
MIXED = "mixed"


def worlds_in(name: str) -> tuple[str, ...]:
    """The names of the worlds in the name of some that are together, as a card has it."""
    return tuple(name.split(AND))


class Together:
    """Worlds side by side. Implements `CaptionedPictures`.

    Args:
        worlds: at least one; all at one resolution, under different names.
        turns: numbers of worlds, in the order in which they take turns, over and over; by default
            each once. In (0, 1, 1) the second has twice the share of the first.

    Attributes:
        worlds: these, in the order of the first column of a scene.

    Raises:
        ValueError: if there is no world, they differ in resolution or share a name, or one of them
            has no turn.
    """

    def __init__(
        self, worlds: Sequence[CaptionedPictures], turns: Sequence[int] | None = None
    ) -> None:
        sides, names = {world.resolution for world in worlds}, [world.name for world in worlds]
        if len(sides) != 1 or len(set(names)) != len(names):
            raise ValueError(
                "Worlds that are learned together have one resolution and a name each, not "
                f"{', '.join(f'{w.name} at {w.resolution}' for w in worlds) or 'none at all'}."
            )
        self.turns = tuple(range(len(worlds)) if turns is None else turns)
        if set(self.turns) != set(range(len(worlds))):
            raise ValueError(f"Each of {len(worlds)} worlds needs its turns, not {self.turns}.")
        self.worlds = tuple(worlds)
        self.name, self.resolution = AND.join(names), sides.pop()
        any_seed = torch.Generator().manual_seed(0)
        self._widths = [world.scenes(1, generator=any_seed).shape[1] for world in worlds]
        self.test_sets: tuple[str, ...] = (
            MIXED,
            *(world.name + BETWEEN + name for world in worlds for name in world.test_sets),
        )

    label = ""
    judge: str | None = None  # captions, judges and measures are those of the worlds
    reader: str | None = None
    first_answers: Mapping[int, int] = {}
    measures: Mapping[str, tuple[int, int] | None] = {}
    reconstruction_sets: tuple[str, ...] = ()

    @staticmethod
    def read(caption: str) -> Any:
        """Captions of several worlds are read by `grammar.read_caption`."""
        raise ValueError("Name the worlds: read_caption(caption, worlds).")

    @staticmethod
    def facts(stated: Any) -> list[tuple[int, int]]:
        """As for `read`."""
        raise ValueError("What was stated belongs to one of the worlds.")

    def covers(self, stated: Any) -> bool:
        """As for `read`."""
        raise ValueError("What was stated belongs to one of the worlds.")

    unseen = covers

    def scenes(
        self, n: int, split: str = "train", *, generator: torch.Generator
    ) -> Int[Tensor, "{n} facts"]:
        """n random scenes of a split that every world has; the worlds take turns."""
        scenes = torch.full((n, 1 + max(self._widths)), -1)
        scenes[:, 0] = torch.tensor(self.turns).repeat(-(-n // len(self.turns)))[:n]
        for number, world in enumerate(self.worlds):
            rows = (scenes[:, 0] == number).nonzero()[:, 0]
            own = world.scenes(len(rows), split, generator=generator)
            scenes[rows, 1 : 1 + self._widths[number]] = own
        return scenes

    def _each_world(
        self, scenes: Int[Tensor, "n facts"]
    ) -> list[tuple[CaptionedPictures, Int[Tensor, " _"], Int[Tensor, "_ _"]]]:
        """Each world with the rows that are its own and their facts; an empty one is left out."""
        found = []
        for number, world in enumerate(self.worlds):
            rows = (scenes[:, 0] == number).nonzero()[:, 0]
            if len(rows):
                found.append((world, rows, scenes[rows, 1 : 1 + self._widths[number]]))
        if sum(len(rows) for _, rows, _ in found) != len(scenes):
            raise ValueError(f"Scenes begin with the number of a world, below {len(self.worlds)}.")
        return found

    def pictures(
        self, scenes: Int[Tensor, "n facts"], generator: torch.Generator
    ) -> Float[Tensor, "n 3 h w"]:
        """A picture of each scene, as in training.

        Raises:
            ValueError: if a scene is of no world.
        """
        out = torch.zeros(len(scenes), 3, self.resolution, self.resolution)
        for world, rows, facts in self._each_world(scenes):
            out[rows] = world.pictures(facts, generator)
        return out

    def mixed_captions(
        self, scenes: Int[Tensor, "n facts"], generator: torch.Generator
    ) -> list[str]:
        """A caption of each scene, as in training."""
        out = [""] * len(scenes)
        for world, rows, facts in self._each_world(scenes):
            said = world.mixed_captions(facts, generator)
            for row, caption in zip(rows.tolist(), said, strict=True):
                out[row] = caption
        return out

    def sample(self, n: int, split: str = "train", *, generator: torch.Generator) -> PictureBatch:
        """n random pictures of a split with their captions; the worlds take turns."""
        scenes = self.scenes(n, split, generator=generator)
        return PictureBatch(
            self.pictures(scenes, generator), self.mixed_captions(scenes, generator)
        )

    def test_set(self, name: str, n: int = 2000) -> PictureBatch:
        """A test set of one of the worlds ("shapes: test-full"), or each world's first, mixed.

        Raises:
            ValueError: if there is no such test set.
        """
        if name not in self.test_sets:
            raise ValueError(f"Unknown test set {name!r}; one of {', '.join(self.test_sets)}.")
        if name == MIXED:
            return self._mixed(n)
        owner, _, own_name = name.partition(BETWEEN)
        world = next(world for world in self.worlds if world.name == owner)
        return world.test_set(own_name, n)

    def _mixed(self, n: int) -> PictureBatch:
        k = len(self.worlds)
        pictures = torch.zeros(n, 3, self.resolution, self.resolution)
        captions = [""] * n
        for number, world in enumerate(self.worlds):
            part = world.test_set(world.test_sets[0], len(range(number, n, k)))
            pictures[number::k], captions[number::k] = part
        return PictureBatch(pictures, captions)

    def test_scenes(self, name: str, n: int = 2000) -> tuple[Int[Tensor, "n facts"], list[str]]:
        """Scenes and captions of a test set of one of the worlds.

        Raises:
            ValueError: if there is no such test set.
        """
        owner, _, own_name = name.partition(BETWEEN)
        for world in self.worlds:
            if world.name == owner:
                return world.test_scenes(own_name, n)
        raise ValueError(f"Unknown test set {name!r}; one of {', '.join(self.test_sets[1:])}.")

    def reader_test(self, n: int = 2000) -> PictureBatch:
        """The first world's."""
        return self.worlds[0].reader_test(n)

    def groups(self, name: str, n: int = 2000) -> Int[Tensor, "n columns"] | None:
        """Those of the world whose test set it is."""
        owner, _, own_name = name.partition(BETWEEN)
        found = [world.groups(own_name, n) for world in self.worlds if world.name == owner]
        return found[0] if found else None

    def reference_set(self, n: int = 2000) -> Float[Tensor, "n 3 h w"]:
        """The reference sets of the worlds, one after the other."""
        return torch.cat([world.reference_set(n) for world in self.worlds])

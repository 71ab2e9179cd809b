"""Your own pictures: a folder with a table of captions as a world of captioned pictures.

    my-pictures/captions.csv        file,caption
                                    rex.jpg,a brown dog on a lawn
                                    rex.jpg,"a dog, tongue out"
                                    more/tom.png,a black cat left of a window

`data.caption_tables` reads the table, which may also be the `metadata.csv` or `metadata.jsonl` of
Hugging Face Datasets. `data.picture_files` reads the pictures: each is turned upright by its EXIF
tag, put on white where it is transparent, cropped to its central square and resampled to the
resolution. From then on it stays in memory. Nothing is left out silently: a folder with bad rows
is refused, and the error lists them.

Picture files that decode to the same pixels are one picture, whatever their names are, and it has
the captions of all of them. The SHA-256 of the pixels, read as a number in [0, 1), puts a picture
into the test split where it is below 0.1. So a picture keeps its split when others join the folder,
and at every resolution. The smallest number is always in the test split and the largest always in
the training split. Near twins, such as a picture and its copy saved as JPEG (`near_twins`), are on
one side: that of the twin whose SHA-256 ends in the smallest number.

Colour profiles are not applied: every picture is read as sRGB.

Shapes: n pictures of a batch, m of the folder or of a test set, h = w = resolution.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from t2ilearn.data.caption_tables import Fault, Row, read_table, refuse_faults, shorten
from t2ilearn.data.captions import CaptionError
from t2ilearn.data.interface import PictureBatch
from t2ilearn.data.near_twins import thumbnail, twin_groups
from t2ilearn.data.picture_files import FolderError, find_picture, read_picture, shrink
from t2ilearn.data.pixels import pictures_from_bytes

SPLITS = ("train", "test")
TEST_SETS = ("test",)
TEST_SHARE = 0.1
MEMORY_LIMIT = 4 * 2**30  # bytes of all pictures at the resolution


class Folder:
    """A folder of pictures with captions. Implements `CaptionedPictures`.

    Args:
        path: the folder; it holds one table of captions, see `data.caption_tables`.
        resolution: height and width in pixels, at least 16.
        shift: data augmentation by random translation. Each training picture is moved by up to
            this many pixels along each axis; from 0 to resolution / 8. Pictures are stored wider by
            as much on each side, so that no border appears, and test pictures are the middle.
            Mirroring, the other usual augmentation, is not offered: it would make captions with
            "left of" wrong.

    Attributes:
        captions, test_captions: the captions of each split, in the table's order. A tokenizer is
            trained on the former.

    Raises:
        FolderError: if the folder or its table is missing or unreadable; if rows are bad, all of
            them by line number; or if the pictures would take more than `MEMORY_LIMIT`.
        ValueError: if the resolution or the shift is no whole number, or out of range.
    """

    name = "folder"
    label = ""
    judge: str | None = None  # no network here knows what such pictures show
    reader: str | None = None
    first_answers: Mapping[int, int] = {}
    measures: Mapping[str, tuple[int, int] | None] = {}
    test_sets: tuple[str, ...] = TEST_SETS
    reconstruction_sets: tuple[str, ...] = TEST_SETS

    def __init__(self, path: str | Path, resolution: int = 64, shift: int = 0) -> None:
        for name, value in {"resolution": resolution, "shift": shift}.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"The {name} must be a whole number, not {value!r}.")
        if resolution < 16:
            raise ValueError(f"The resolution must be at least 16 pixels, not {resolution}.")
        if not 0 <= shift <= resolution // 8:
            most = resolution // 8
            raise ValueError(f"The shift must be 0 … {most} pixels at {resolution}, not {shift}.")
        self.path, self.resolution, self.shift = Path(path), resolution, shift
        self.table, rows, faults = read_table(self.path)
        files: dict[Path, list[Row]] = {}
        for row in rows:
            try:
                files.setdefault(find_picture(self.path, row.file), []).append(row)
            except FolderError as error:
                faults.append(Fault(row.line, f"{shorten(row.file)} {error}"))
        _check_memory(len(files), resolution, shift)
        self._load(files, faults)

    def _load(self, files: dict[Path, list[Row]], faults: list[Fault]) -> None:
        """Fill the store, or raise `FolderError` if any row is bad or its picture unreadable."""
        side = self.resolution + 2 * self.shift
        store = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
        seen: dict[bytes, list[Row]] = {}
        thumbnails = []
        for path, rows in tqdm(files.items(), desc="pictures", unit="picture", delay=2):
            try:
                picture = read_picture(path)
            except FolderError as error:
                faults += [Fault(row.line, f"{shorten(row.file)} {error}") for row in rows]
                continue
            digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()
            if digest not in seen:
                store[len(seen)] = shrink(picture, side)
                thumbnails.append(thumbnail(picture))
            seen.setdefault(digest, []).extend(rows)
        refuse_faults(self.table, faults)
        # A view with every window that a shift can choose: (m, 3, shifts, shifts, h, w).
        windows = store[: len(seen)].unfold(2, self.resolution, 1)
        self._windows = windows.unfold(3, self.resolution, 1)
        rows_of = [sorted(rows) for rows in seen.values()]
        self._captions = [[row.caption for row in rows] for rows in rows_of]
        splits = split_by_content(list(seen), twin_groups(thumbnails))
        self._splits = dict(zip(SPLITS, splits, strict=True))
        self.captions, self.test_captions = (
            [row.caption for row in sorted(row for m in self._splits[split] for row in rows_of[m])]
            for split in SPLITS
        )
        self._files = len(files)
        self._digests = list(seen)

    def fingerprint(self) -> str:
        """A SHA-256 that changes with any picture or caption, and with nothing else."""
        pairs = sorted(zip((d.hex() for d in self._digests), self._captions, strict=True))
        return hashlib.sha256(json.dumps(pairs).encode("utf-8")).hexdigest()

    def __repr__(self) -> str:
        train, test = (len(self._splits[split]) for split in SPLITS)
        return (
            f"<Folder {self.path}: {self._files:,} files, {train + test:,} distinct pictures "
            f"({train:,} train, {test:,} test), {sum(map(len, self._captions)):,} captions; "
            f"{self.resolution}×{self.resolution} px, "
            f"{self._windows.untyped_storage().nbytes() / 2**20:.1f} MiB>"
        )

    @property
    def worlds(self) -> "tuple[Folder, ...]":
        """This world alone."""
        return (self,)

    @staticmethod
    def read(caption: str) -> Any:
        """Raises CaptionError: captions of own pictures are free text without a grammar."""
        raise CaptionError(f"No grammar reads captions of own pictures, such as {caption!r}.")

    @staticmethod
    def facts(stated: Any) -> list[tuple[int, int]]:
        """Raises ValueError, as `covers` and `unseen` do: `read` returns nothing to be compared."""
        raise ValueError("Captions of own pictures state no facts that could be compared.")

    def covers(self, stated: Any) -> bool:
        """Raises ValueError."""
        return bool(self.facts(stated))

    def unseen(self, stated: Any) -> bool:
        """Raises ValueError."""
        return bool(self.facts(stated))

    def _members(self, split: str) -> list[int]:
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; one of {', '.join(SPLITS)}.")
        if not self._splits[split]:
            raise FolderError(
                f"{self.path} holds one distinct picture (or near twins of one), which is in the "
                "training split: add a second one to have a test split."
            )
        return self._splits[split]

    def _windowed(
        self, members: Int[Tensor, " n"], down: Int[Tensor, " n"], right: Int[Tensor, " n"]
    ) -> Float[Tensor, "n 3 h w"]:
        """Pictures in [−1, 1], each cropped to the window that begins at (down, right)."""
        return pictures_from_bytes(self._windows[members, :, down, right])  # (n, 3, h, w)

    def scenes(
        self, n: int, split: str = "train", *, generator: torch.Generator
    ) -> Int[Tensor, "{n} 1"]:
        """Numbers of n pictures of a split, drawn uniformly with replacement.

        Raises:
            ValueError: for an unknown split.
            FolderError: for the test split of a folder with one distinct picture.
        """
        members = torch.tensor(self._members(split))
        return members[torch.randint(len(members), (n,), generator=generator)][:, None]

    def pictures(
        self, scenes: Int[Tensor, "n 1"], generator: torch.Generator
    ) -> Float[Tensor, "n 3 h w"]:
        """The pictures with these numbers; training pictures are shifted, test pictures are not."""
        members = scenes[:, 0]
        spots = torch.randint(2 * self.shift + 1, (2, len(members)), generator=generator)
        trained = torch.isin(members, torch.tensor(self._splits["train"]))
        down, right = torch.where(trained, spots, self.shift)
        return self._windowed(members, down, right)

    def mixed_captions(self, scenes: Int[Tensor, "n 1"], generator: torch.Generator) -> list[str]:
        """One of the captions of each picture, drawn at random."""
        rolls = torch.randint(2**31, (len(scenes),), generator=generator).tolist()
        choices = [self._captions[member] for member in scenes[:, 0].tolist()]
        return [some[roll % len(some)] for some, roll in zip(choices, rolls, strict=True)]

    def sample(self, n: int, split: str = "train", *, generator: torch.Generator) -> PictureBatch:
        """n random pictures of a split, each with one of its captions. Raises as `scenes` does."""
        scenes = self.scenes(n, split, generator=generator)
        return PictureBatch(
            self.pictures(scenes, generator), self.mixed_captions(scenes, generator)
        )

    def test_scenes(self, name: str, n: int = 2000) -> tuple[Int[Tensor, "m 1"], list[str]]:
        """Numbers and captions of the first n pairs of the test split, or all if there are fewer.

        Every picture comes once with its first caption before any comes again with its second.

        Raises:
            ValueError: for an unknown name ("test" is the only one) or a negative n.
            FolderError: if the folder holds one distinct picture.
        """
        if name not in TEST_SETS:
            raise ValueError(f"Unknown test set {name!r}; one of {', '.join(TEST_SETS)}.")
        if n < 0:
            raise ValueError(f"A test set must have 0 pictures or more, not {n}.")
        pairs = [
            (turn, place, member)
            for place, member in enumerate(self._members("test"))
            for turn in range(len(self._captions[member]))
        ]
        chosen = sorted(pairs)[:n]
        members = torch.tensor([member for _, _, member in chosen], dtype=torch.int64)
        return members[:, None], [self._captions[member][turn] for turn, _, member in chosen]

    def test_set(self, name: str, n: int = 2000) -> PictureBatch:
        """The pictures, not shifted, and the captions of `test_scenes`, which raises the same."""
        scenes, captions = self.test_scenes(name, n)
        middle = torch.full_like(scenes[:, 0], self.shift)
        return PictureBatch(self._windowed(scenes[:, 0], middle, middle), captions)

    def reader_test(self, n: int = 2000) -> PictureBatch:
        """Raises ValueError: a reader learns attributes, and own pictures have none."""
        raise ValueError("Readers cannot be tested on own pictures: these state no attributes.")

    def groups(self, name: str, n: int = 2000) -> Int[Tensor, "m 1"]:
        """The number of each test picture: several captions of one picture belong together."""
        return self.test_scenes(name, n)[0]

    def reference_set(self, n: int = 2000) -> Float[Tensor, "{n} 3 h w"]:
        """n training pictures, drawn with replacement, the same at every call."""
        return self.sample(n, "train", generator=torch.Generator().manual_seed(4500)).pictures


def split_by_content(
    digests: Sequence[bytes], groups: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Places of the training pictures and of the test pictures, both in the digests' order.

    Args:
        digests: the SHA-256 of each picture; all different.
        groups: the number of each picture's group, whose members stay together; by default each
            picture is alone.
    """
    order = sorted(range(len(digests)), key=digests.__getitem__)
    groups = range(len(digests)) if groups is None else groups
    speaker: dict[int, bytes] = {}  # of each group: the digest that ends in the smallest number
    for digest, group in zip(digests, groups, strict=True):
        speaker[group] = min(speaker.get(group, digest), digest, key=lambda d: d[::-1])
    ranked = sorted(speaker, key=speaker.__getitem__)
    below = sum(int.from_bytes(d[:8], "big") < TEST_SHARE * 2**64 for d in speaker.values())
    tested = set(ranked[: min(max(below, 1), len(ranked) - 1)])
    train, test = ([i for i in order if (groups[i] in tested) == side] for side in (False, True))
    return train, test


def _check_memory(files: int, resolution: int, shift: int) -> None:
    """Raise `FolderError` if so many pictures do not fit in memory, before any is decoded."""
    needed = 3 * files * (resolution + 2 * shift) ** 2
    if needed > MEMORY_LIMIT:
        fits = int((MEMORY_LIMIT / 3 / files) ** 0.5) - 2 * shift
        instead = f"take a resolution of {fits} or less, or" if fits >= 16 else "take"
        raise FolderError(
            f"{files:,} pictures of {resolution}×{resolution} need {needed / 2**30:,.1f} GiB, and "
            f"at most {MEMORY_LIMIT / 2**30:,.1f} are kept in memory: {instead} fewer pictures."
        )

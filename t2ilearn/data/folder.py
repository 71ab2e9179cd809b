"""Your own pictures: a folder with a `captions.csv` as a world of captioned pictures.

    file,caption
    rex.jpg,a brown dog on a lawn
    rex.jpg,"a dog, tongue out"
    more/tom.png,a black cat left of a window

Every picture is turned upright by its EXIF tag, laid on white where it is transparent, cropped to
its central square and shrunk to the resolution; from then on it lives in memory. Nothing is left
out in silence: a folder with bad rows is refused, and the error lists them.

Pictures that decode to the same pixels are one picture, whatever their files are called, and have
the captions of all of them. The pixels' SHA-256, read as a number in [0, 1), sends a picture to
the tests where it is below 0.1, so that a picture keeps its split when others join the folder,
and at every resolution. The smallest number is always tested and the largest always trained on.

Colour profiles are not applied: every picture is taken for sRGB.
"""

import csv
import hashlib
import io
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from t2ilearn.data.interface import PictureBatch
from t2ilearn.data.picture_files import FolderError, read_picture, shrink

CAPTIONS = "captions.csv"
SPLITS = ("train", "test")
TEST_SETS = ("test",)
TEST_SHARE = 0.1
MEMORY_LIMIT = 4 * 2**30  # bytes of all pictures at the resolution
LISTED = 20  # bad rows that an error spells out


class Row(NamedTuple):
    """A row of `captions.csv` and the line it begins in, counted from 1."""

    line: int
    file: str
    caption: str


class Folder:
    """A folder of pictures with captions. Implements `CaptionedPictures`.

    Args:
        path: the folder; it holds `captions.csv`, in UTF-8, with the columns `file` (relative to
            the folder) and `caption`. Other columns and empty lines are ignored, and
            further rows for a file are further captions of it.
        resolution: height and width in pixels, at least 16.
        shift: training pictures are moved by up to so many pixels at random, along each axis; 0 …
            resolution / 8. Pictures are stored wider by as much on each side, so that a move shows
            what is there and not a border, and tests see the middle. Mirroring, the other usual
            augmentation, is not offered: it would make "left of" a lie.

    Attributes:
        captions, test_captions: those of each split, in the file's order. A tokenizer learns from
            the former.

    Raises:
        FolderError: if the folder or its `captions.csv` is missing or unreadable; for bad rows,
            all of them by line number; or if the pictures would take more than `MEMORY_LIMIT`.
        ValueError: for a resolution or a shift out of range.
    """

    name = "folder"
    test_sets: tuple[str, ...] = TEST_SETS

    def __init__(self, path: str | Path, resolution: int = 64, shift: int = 0) -> None:
        if resolution < 16:
            raise ValueError(f"Pictures need at least 16 pixels a side, not {resolution}.")
        if not 0 <= shift <= resolution // 8:
            raise ValueError(f"The shift is 0 … {resolution // 8} pixels here, not {shift}.")
        self.path, self.resolution, self.shift = Path(path), resolution, shift
        rows, faults = read_rows(self.path)
        files: dict[Path, list[Row]] = {}
        for row in rows:
            try:
                files.setdefault(find_picture(self.path, row.file), []).append(row)
            except FolderError as error:
                faults.append((row.line, f"{_short(row.file)} {error}"))
        _check_memory(len(files), resolution, shift)
        self._load(files, faults)

    def _load(self, files: dict[Path, list[Row]], faults: list[tuple[int, str]]) -> None:
        """Fill the store, unless rows are at fault, those whose picture cannot be read included."""
        side = self.resolution + 2 * self.shift
        store = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
        seen: dict[bytes, list[Row]] = {}
        for path, rows in tqdm(files.items(), desc="pictures", unit="picture", delay=2):
            try:
                picture = read_picture(path)
            except FolderError as error:
                faults += [(row.line, f"{_short(row.file)} {error}") for row in rows]
                continue
            digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()
            if digest not in seen:
                store[len(seen)] = shrink(picture, side)
            seen.setdefault(digest, []).extend(rows)
        _refuse(self.path, faults)
        # A view of the store with every window a shift can choose: (m, 3, shifts, shifts, h, w).
        self._windows = (
            store[: len(seen)].unfold(2, self.resolution, 1).unfold(3, self.resolution, 1)
        )
        rows_of = [sorted(rows) for rows in seen.values()]
        self._captions = [[row.caption for row in rows] for rows in rows_of]
        self._splits = dict(zip(SPLITS, split_by_content(list(seen)), strict=True))
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

    def _members(self, split: str) -> list[int]:
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; one of {', '.join(SPLITS)}.")
        if not self._splits[split]:
            raise FolderError(
                f"{self.path} holds one distinct picture, and it is trained on: add a second one "
                "to have something to test with."
            )
        return self._splits[split]

    def _windowed(
        self, members: Int[Tensor, " n"], down: Int[Tensor, " n"], right: Int[Tensor, " n"]
    ) -> Float[Tensor, "n 3 h w"]:
        """Pictures in [−1, 1], each seen through the window that begins at (down, right)."""
        return self._windows[members, :, down, right].float().div_(127.5).sub_(1)

    def scenes(
        self, n: int, split: str = "train", *, generator: torch.Generator
    ) -> Int[Tensor, "{n} 1"]:
        """Numbers of n random pictures of a split, any as likely as another.

        Raises:
            ValueError: for an unknown split.
            FolderError: for the test split of a folder with one distinct picture.
        """
        members = torch.tensor(self._members(split))
        return members[torch.randint(len(members), (n,), generator=generator)][:, None]

    def pictures(
        self, scenes: Int[Tensor, "n 1"], generator: torch.Generator
    ) -> Float[Tensor, "n 3 h w"]:
        """The pictures of these numbers: training pictures shifted, those of the tests not."""
        members = scenes[:, 0]
        spots = torch.randint(2 * self.shift + 1, (2, len(members)), generator=generator)
        trained = torch.isin(members, torch.tensor(self._splits["train"]))
        down, right = torch.where(trained, spots, self.shift)
        return self._windowed(members, down, right)

    def mixed_captions(self, scenes: Int[Tensor, "n 1"], generator: torch.Generator) -> list[str]:
        """One of the captions of each picture."""
        rolls = torch.randint(2**31, (len(scenes),), generator=generator).tolist()
        choices = [self._captions[member] for member in scenes[:, 0].tolist()]
        return [some[roll % len(some)] for some, roll in zip(choices, rolls, strict=True)]

    def sample(self, n: int, split: str = "train", *, generator: torch.Generator) -> PictureBatch:
        """n random pictures of a split, each with one of its captions; raises as `scenes` does."""
        scenes = self.scenes(n, split, generator=generator)
        return PictureBatch(
            self.pictures(scenes, generator), self.mixed_captions(scenes, generator)
        )

    def test_set(self, name: str, n: int = 2000) -> PictureBatch:
        """The first n of the test split's pictures with captions, or all if there are fewer.

        Every picture comes once, with its first caption, before any comes again with its second.

        Raises:
            ValueError: for an unknown name ("test" is the only one) or a negative n.
            FolderError: if the folder holds one distinct picture.
        """
        if name not in TEST_SETS:
            raise ValueError(f"Unknown test set {name!r}; one of {', '.join(TEST_SETS)}.")
        if n < 0:
            raise ValueError(f"A test set has 0 pictures or more, not {n}.")
        pairs = [
            (turn, place, member)
            for place, member in enumerate(self._members("test"))
            for turn in range(len(self._captions[member]))
        ]
        chosen = sorted(pairs)[:n]
        members = torch.tensor([member for _, _, member in chosen], dtype=torch.int64)
        middle = torch.full_like(members, self.shift)
        captions = [self._captions[member][turn] for turn, _, member in chosen]
        return PictureBatch(self._windowed(members, middle, middle), captions)


def split_by_content(digests: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """Places of the pictures to train on and of those to test with, each in the digests' order.

    Args:
        digests: the SHA-256 of each picture, all different.
    """
    order = sorted(range(len(digests)), key=digests.__getitem__)
    below = sum(int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64 for digest in digests)
    cut = min(max(below, 1), len(digests) - 1)
    return order[cut:], order[:cut]


# --- captions.csv ---


def read_rows(folder: Path) -> tuple[list[Row], list[tuple[int, str]]]:
    """The rows of a folder's `captions.csv` and the faults of the others, as (line, reason)s.

    White space around a file's name is dropped; in a caption, any run of it becomes one space.

    Raises:
        FolderError: if there is no such folder or file, or it cannot be read as a table.
    """
    text = _read_text(folder)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    table: list[tuple[int, list[str]]] = []
    while True:
        line = reader.line_num + 1  # a row may run over several lines, inside quotes
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise FolderError(
                f"{folder / CAPTIONS} has broken quoting in the row that begins in line {line} "
                f'({error}). Close every quote, and write "" for a quote inside quotes.'
            ) from None
        if cells:
            table.append((line, cells))
    if not table:
        raise FolderError(f"{folder / CAPTIONS} is empty. Begin it with the line file,caption.")
    header = [cell.strip() for cell in table[0][1]]
    _check_header(folder, header)
    if len(table) == 1:
        raise FolderError(f"{folder / CAPTIONS} has a header and no rows: add one per picture.")
    rows, faults = [], []
    for line, cells in table[1:]:
        if len(cells) != len(header):
            hint = "; a caption with commas goes in quotes" if len(cells) > len(header) else ""
            faults.append((line, f"columns: {len(cells)} here, {len(header)} in the header{hint}"))
            continue
        caption = " ".join(cells[header.index("caption")].split())
        row = Row(line, cells[header.index("file")].strip(), caption)
        if not caption:
            faults.append((line, f"the caption of {_short(row.file)} is empty"))
        rows.append(row)
    return rows, faults


def _read_text(folder: Path) -> str:
    """The text of a folder's `captions.csv`, with or without a byte order mark."""
    if not folder.exists():
        raise FolderError(f"There is no folder {folder}.")
    if not folder.is_dir():
        raise FolderError(f"{folder} is a file; name the folder that holds pictures and captions.")
    path = folder / CAPTIONS
    if not path.is_file():
        raise FolderError(
            f"{folder} holds no {CAPTIONS}. Write one: the line file,caption and then, for each "
            "picture, a line like rex.jpg,a brown dog."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FolderError(f"{path} cannot be opened: {error.strerror}.") from None
    remedy = 'Save it again as UTF-8 (in Excel: "CSV UTF-8"; in an editor: encoding UTF-8).'
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FolderError(f"{path} is in UTF-16, not UTF-8. {remedy}")
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise FolderError(f"{path} holds a NUL byte in line {line}; it may be UTF-16. {remedy}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise FolderError(
            f"{path} is not in UTF-8 from line {line} on (is it Latin-1 or Windows-1252?). {remedy}"
        ) from None


def _check_header(folder: Path, header: list[str]) -> None:
    """Raise `FolderError` unless the columns `file` and `caption` are there, once each."""
    if header.count("file") == header.count("caption") == 1:
        return
    mark = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    hint = f" The mark between columns is {mark!r}: save it with commas instead." if mark else ""
    raise FolderError(
        f"{folder / CAPTIONS} must begin with the columns file and caption, once each; found: "
        f"{', '.join(map(_short, header[:LISTED]))}.{hint}"
    )


def find_picture(folder: Path, file: str) -> Path:
    """The path of a file that a row names, "/" or "\\" between folders.

    A link inside the folder is followed: whoever made the folder put it there.

    Raises:
        FolderError: if the name is empty, leads out of the folder or to no file. The message goes
            on from the file's name.
    """
    if not file:
        raise FolderError("is no file's name: the cell is empty")
    # Windows' rules know more ways out (C:\x, \\server\x), and a table may have been made there.
    named = PureWindowsPath(file)
    if named.anchor or ".." in named.parts:
        raise FolderError("is outside the folder; name files relative to it, without ..")
    # "é" is one character or two, and systems differ in which they write to disk.
    spellings = dict.fromkeys([file, *(unicodedata.normalize(f, file) for f in ("NFC", "NFD"))])
    for spelling in spellings:
        path = folder.joinpath(*PureWindowsPath(spelling).parts)
        try:
            if path.is_file():
                return path
        except OSError as error:  # a name too long, a folder that may not be entered
            raise FolderError(f"cannot be opened: {error.strerror}") from None
    raise FolderError("is missing, or is not a file")


def _check_memory(files: int, resolution: int, shift: int) -> None:
    """Raise `FolderError` if so many pictures are too many to keep, before any is decoded."""
    needed = 3 * files * (resolution + 2 * shift) ** 2
    if needed > MEMORY_LIMIT:
        fits = int((MEMORY_LIMIT / 3 / files) ** 0.5) - 2 * shift
        instead = f"take a resolution of {fits} or less, or" if fits >= 16 else "take"
        raise FolderError(
            f"{files:,} pictures of {resolution}×{resolution} need {needed / 2**30:,.1f} GiB, and "
            f"at most {MEMORY_LIMIT / 2**30:,.1f} are kept in memory: {instead} fewer pictures."
        )


def _refuse(folder: Path, faults: list[tuple[int, str]]) -> None:
    """Raise `FolderError` if there are faults, with the first of them in the file's order."""
    if not faults:
        return
    lines = [f"line {line}: {reason}." for line, reason in sorted(faults)]
    if len(lines) > LISTED:
        lines[LISTED:] = [f"… and {len(lines) - LISTED:,} more"]
    bad = len({line for line, _ in faults})
    raise FolderError(
        f"{folder / CAPTIONS} has {bad:,} bad row{'s'[: bad > 1]}; mend or remove:\n  "
        + "\n  ".join(lines)
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")

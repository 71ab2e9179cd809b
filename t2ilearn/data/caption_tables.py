"""The table of a picture folder: which caption belongs to which picture file.

A folder holds one of these three files, in UTF-8:

| file | one row for each caption | where it comes from |
|---|---|---|
| `captions.csv` | columns `file`, `caption` | this book |
| `metadata.csv` | columns `file_name`, `text` | ImageFolder of Hugging Face Datasets |
| `metadata.jsonl` | a JSON object with the keys `file_name` and `text` | the same |

The rules are the same for all three. A file's name is relative to the folder. Several rows for one
file are several captions of it. Other columns or keys, and empty lines, are ignored. Spaces around
a file's name are dropped, and any run of white space in a caption becomes one space.

Differs from ImageFolder: one table for the whole folder, and no `metadata.parquet`. Two tables in
one folder are an error, because they could contradict each other.

A table that cannot be read at all raises an error at once. A single bad row becomes a *fault*
instead, so that one error can list all of them with their line numbers.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from t2ilearn.data.picture_files import FolderError

LISTED = 20  # the bad rows, or the columns, that an error spells out


class Columns(NamedTuple):
    """What a kind of table calls its two columns."""

    file: str
    caption: str


COLUMNS = {
    "captions.csv": Columns("file", "caption"),
    "metadata.csv": Columns("file_name", "text"),
    "metadata.jsonl": Columns("file_name", "text"),
}


class Row(NamedTuple):
    """A row of a table and the line that it begins in, counted from 1."""

    line: int
    file: str
    caption: str


class Fault(NamedTuple):
    """What is wrong with a row, and the line that the row begins in, counted from 1."""

    line: int
    reason: str


class CaptionTable(NamedTuple):
    """A table as read: its path, its rows in the table's order, and the faults of its rows.

    A row whose file is named and whose caption is empty is in both lists, so that a fault of the
    file is reported, too.
    """

    path: Path
    rows: list[Row]
    faults: list[Fault]


def read_table(folder: Path) -> CaptionTable:
    """Read the one table of a folder.

    Raises:
        FolderError: if there is no such folder, no table or more than one in it, or if the table
            cannot be read: not UTF-8, empty, broken quoting, or a column is missing or doubled.
    """
    path = find_table(folder)
    text = _read_text(path)
    return _parse_jsonl(path, text) if path.suffix == ".jsonl" else _parse_csv(path, text)


def find_table(folder: Path) -> Path:
    """The path of a folder's one table.

    Raises:
        FolderError: if there is no such folder, or no table or more than one in it.
    """
    if not folder.exists():
        raise FolderError(f"There is no folder {folder}.")
    if not folder.is_dir():
        raise FolderError(f"{folder} is a file; name the folder that holds pictures and captions.")
    found = [name for name in COLUMNS if (folder / name).is_file()]
    if len(found) > 1:
        raise FolderError(
            f"{folder} holds {' and '.join(found)}, which may contradict each other. Keep the one "
            "that you want to use, and rename or remove the others."
        )
    if not found:
        below = sorted(path for name in COLUMNS for path in folder.glob(f"*/{name}"))
        remedy = (
            f"There is {below[0]}: name the folder that holds it."
            if below
            else "Write one: the line file,caption and then, for each picture, a line like "
            "rex.jpg,a brown dog."
        )
        raise FolderError(
            f"{folder} holds no captions.csv (and no metadata.csv or metadata.jsonl). {remedy}"
        )
    return folder / found[0]


def refuse_faults(path: Path, faults: list[Fault]) -> None:
    """Raise `FolderError` if there are faults; it lists the first of them in the table's order."""
    if not faults:
        return
    lines = [f"line {line}: {reason}." for line, reason in sorted(faults)]
    if len(lines) > LISTED:
        lines[LISTED:] = [f"… and {len(lines) - LISTED:,} more"]
    bad = len({fault.line for fault in faults})
    raise FolderError(
        f"{path} has {bad:,} bad row{'s'[: bad > 1]}; correct or remove:\n  " + "\n  ".join(lines)
    )


def shorten(text: str) -> str:
    """A text in quotes for an error message, cut after 60 characters."""
    return repr(text if len(text) <= 60 else text[:59] + "…")


def _read_text(path: Path) -> str:
    """The text of a table in UTF-8, with or without a byte order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FolderError(f"{path} cannot be opened: {error.strerror}.") from None
    remedy = "Save it again as UTF-8 (in an editor: encoding UTF-8)."
    if path.suffix == ".csv":
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


class _Collector:
    """Gathers the rows of a table, by the rules that all kinds of table share."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.faults: list[Fault] = []

    def add(self, line: int, file: str, caption: str) -> None:
        row = Row(line, file.strip(), " ".join(caption.split()))
        if not row.caption:
            self.fault(line, f"the caption of {shorten(row.file)} is empty")
        self.rows.append(row)

    def fault(self, line: int, reason: str) -> None:
        self.faults.append(Fault(line, reason))


# --- captions.csv and metadata.csv ---


def _parse_csv(path: Path, text: str) -> CaptionTable:
    """The rows of a table whose first line names its columns."""
    columns = COLUMNS[path.name]
    table = [(line, cells) for line, cells in _csv_lines(path, text) if cells]
    if not table:
        raise FolderError(f"{path} is empty. Begin it with the line {','.join(columns)}.")
    header = [cell.strip() for cell in table[0][1]]
    _check_header(path, header)
    if len(table) == 1:
        raise FolderError(f"{path} has a header and no rows: add one row for each picture.")
    file_at, caption_at = map(header.index, columns)
    found = _Collector()
    for line, cells in table[1:]:
        if len(cells) == len(header):
            found.add(line, cells[file_at], cells[caption_at])
            continue
        hint = "; a caption with commas goes in quotes" if len(cells) > len(header) else ""
        found.fault(line, f"columns: {len(cells)} here, {len(header)} in the header{hint}")
    return CaptionTable(path, found.rows, found.faults)


def _csv_lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row, and the line that it begins in: a quoted cell may hold line ends."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise FolderError(
                f"{path} has broken quoting in the row that begins in line {line} ({error}). "
                'Close every quote, and write "" for a quote inside quotes.'
            ) from None


def _check_header(path: Path, header: list[str]) -> None:
    """Raise `FolderError` unless both columns are there, once each."""
    columns = COLUMNS[path.name]
    if all(header.count(column) == 1 for column in columns):
        return
    mark = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    others = [
        name
        for name, other in COLUMNS.items()
        if name.endswith(".csv") and name != path.name and set(other) <= set(header)
    ]
    hint = ""
    if mark:
        hint = f" The mark between columns is {mark!r}: save it with commas instead."
    elif others:
        hint = f" These are the columns of a {others[0]}: rename the file."
    elif columns.file in header and columns.caption not in header:
        hint = f' The column that holds the captions must be called "{columns.caption}".'
    raise FolderError(
        f"{path} must begin with a line that names the columns {columns.file} and "
        f"{columns.caption}, once each; found: {', '.join(map(shorten, header[:LISTED]))}.{hint}"
    )


# --- metadata.jsonl ---


def _parse_jsonl(path: Path, text: str) -> CaptionTable:
    """The rows of a table that has a JSON object in each line."""
    columns, found = COLUMNS[path.name], _Collector()
    for line, written in enumerate(text.split("\n"), start=1):
        if not written.strip():
            continue
        try:
            file, caption = _parse_object(written, columns)
        except ValueError as error:
            found.fault(line, str(error))
        else:
            found.add(line, file, caption)
    if not found.rows and not found.faults:
        example = json.dumps(dict(zip(columns, ("rex.jpg", "a brown dog"), strict=True)))
        raise FolderError(f"{path} is empty. Write one line like {example} for each picture.")
    return CaptionTable(path, found.rows, found.faults)


class _Pairs(list[tuple[str, Any]]):
    """The keys and values of a JSON object in order; a dict would drop a key that comes twice."""


def _parse_object(written: str, columns: Columns) -> tuple[str, str]:
    """The file and the caption in one line of JSON. Raises ValueError with what is wrong."""
    try:
        pairs = json.loads(written, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        at = f"{error.msg}, character {error.pos + 1}"
        raise ValueError(f"not a JSON object of its own ({at})") from None
    except (ValueError, RecursionError):  # thousands of digits, or thousands of brackets
        raise ValueError("not a JSON object of its own (too long a number, or too deep)") from None
    if not isinstance(pairs, _Pairs):
        raise ValueError("not a JSON object of its own (it begins without {)")
    for column in columns:
        values = [value for key, value in pairs if key == column]
        if len(values) != 1:
            raise ValueError(f"the key {column} occurs {len(values)} times; it must occur once")
        _check_text(column, values[0])
    facts = dict(pairs)
    return facts[columns.file], facts[columns.caption]


def _check_text(key: str, value: object) -> None:
    """Raise ValueError unless a value is text that UTF-8 can hold. JSON's "\\ud800" is not."""
    if not isinstance(value, str):
        raise ValueError(f"the value of {key} must be a text in double quotes")
    if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"the value of {key} holds a NUL or half a surrogate pair")

"""The emoji archives that ship: an index, one archive of drawings a style, and their licences.

    assets/emoji/index.json      concepts with their phrases; archives with SHA-256 and licence
    assets/emoji/STYLE.tar.gz    000123.webp, a drawing with alpha, and 000123.json, its facts
    assets/emoji/LICENCE-STYLE.txt

Built by `tools/build_emoji.py`. An archive is read whole and held against its SHA-256 before a
drawing is used.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t2ilearn.data.picture_files import load_picture

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "emoji"
STYLES = ("soft", "flat", "glossy", "outline", "ink")
DRAWN = 64  # pixels a side in the archives
AGAIN = "Install the package again."


class EmojiError(ValueError):
    """Drawings that cannot be used; the message names the file, the reason and the remedy."""


class Licence(NamedTuple):
    """Whom to thank for one style (or for the names), and on what terms."""

    style: str
    studio: str
    licence: str
    attribution: str
    link: str


def read_index(directory: Path | None = None) -> dict[str, Any]:
    """The list of concepts, with their phrases, and of archives, with their SHA-256 and licence.

    Raises:
        EmojiError: if it is missing, is no JSON, or lacks one of these lists.
    """
    path = (directory or ASSETS) / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        styles = [shard["style"] for shard in index["shards"]]
        concepts = [name for name, phrases in index["concepts"].items() if phrases]
    except FileNotFoundError:
        raise EmojiError(
            f"The index {path} is missing. Install the package again, or build it with "
            "tools/build_emoji.py."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EmojiError(f"The index {path} is damaged ({error!r}). {AGAIN}") from None
    if unknown := [style for style in styles if style not in STYLES]:
        raise EmojiError(
            f"The index {path} names an unknown style {unknown[0]!r}; one of {', '.join(STYLES)}."
        )
    if not concepts or not styles:
        raise EmojiError(f"The index {path} lists no drawings. {AGAIN}")
    return index


def _read_archive(path: Path, shard: dict[str, Any]) -> bytes:
    """An archive's bytes, held against the length and SHA-256 that the index states."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise EmojiError(f"The archive {path} is missing. {AGAIN}") from None
    if len(data) < shard["bytes"]:
        raise EmojiError(f"{path} is truncated: {len(data):,} of {shard['bytes']:,} bytes. {AGAIN}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard["sha256"]:
        raise EmojiError(
            f"{path} is not the file its index describes: its SHA-256 begins {digest[:12]}, the "
            f"index says {shard['sha256'][:12]}. {AGAIN}"
        )
    return data


def read_shard(path: Path, shard: dict[str, Any]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """The facts and the drawing, (64, 64, 4) uint8 RGBA, of each member of an archive, in order.

    Members are read in memory; nothing is unpacked to disk.

    Raises:
        EmojiError: if the archive is missing, truncated, damaged, or another one than the index
            describes.
    """
    data = _read_archive(path, shard)
    facts: dict[str, Any] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is None or member.name.startswith("__"):  # the licence
                    continue
                if member.name.endswith(".json"):
                    facts = json.loads(file.read().decode("utf-8"))
                    continue
                drawing = np.asarray(load_picture(file.read()).convert("RGBA"))
                if facts["style"] != shard["style"] or drawing.shape != (DRAWN, DRAWN, 4):
                    raise EmojiError(
                        f"{path} holds a {facts['style']} drawing of shape {drawing.shape} in "
                        f"{member.name}; expected {shard['style']}, {DRAWN} × {DRAWN}. {AGAIN}"
                    )
                yield facts, drawing
    except EmojiError:
        raise
    # OSError is what gzip and Pillow raise for what they cannot read.
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, KeyError) as error:
        raise EmojiError(f"The archive {path} is damaged: {error}. {AGAIN}") from None


def licences(directory: Path | None = None) -> list[Licence]:
    """A row for each style, in the order of `STYLES`, and one for the names.

    Raises:
        EmojiError: if the index is missing or damaged.
    """
    index = read_index(directory)
    rows = [
        Licence(s["style"], s["studio"], s["licence"], s["attribution"], s["link"])
        for s in sorted(index["shards"], key=lambda shard: STYLES.index(shard["style"]))
    ]
    names = index["words"]
    package = names["package"].rsplit("@", 1)[0]
    terms = (names["licence"], names["attribution"], names["link"])
    return [*rows, Licence("names and synonyms", package, *terms)]

"""Files of other people, fetched when somebody asks for them, and only then.

    path = download("ViT-B-32")          # 337.6 MiB, once; afterwards the file that is there

A file is written beside its place (`NAME.part`), goes on where it was cut off, and is moved to its
place only if its SHA-256 is the expected one: what lies in the final place is whole.

| name | what it is |
|---|---|
| `FILES` | what can be fetched: address, size, SHA-256 and licence |
| `download` | name → path |
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from t2ilearn.weights import WeightsError

_CHUNK = 2**20  # bytes read at once
_TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class RemoteFile:
    """A file on the internet.

    Args:
        address: where it is.
        size: in bytes.
        sha256: of the whole file.
        licence: under which its authors give it away.
    """

    address: str
    size: int
    sha256: str
    licence: str

    @property
    def file_name(self) -> str:
        """The last part of its address."""
        return self.address.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.address} ({self.size / 2**20:.1f} MiB, SHA-256 {self.sha256})"


_CLIP = "https://openaipublic.azureedge.net/clip/"
_B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
FILES = {
    "ViT-B-32": RemoteFile(f"{_CLIP}models/{_B32}/ViT-B-32.pt", 353_976_522, _B32, "MIT"),
    "clip-vocabulary": RemoteFile(
        f"{_CLIP}bpe_simple_vocab_16e6.txt.gz",
        1_356_917,
        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        "MIT",
    ),
}


def default_folder() -> Path:
    """Where downloads go: beside those of torch.hub, so that TORCH_HOME moves both."""
    return Path(torch.hub.get_dir()) / "t2ilearn"


def download(name: str, folder: str | Path | None = None, progress: bool = True) -> Path:
    """The path of a file of `FILES`, fetched if it is not there yet.

    A download that was cut off goes on where it ended.

    Args:
        folder: where it goes; see `default_folder`.
        progress: show a progress bar.

    Raises:
        WeightsError: for an unknown name; if the file cannot be fetched, saying what to fetch, how
            large it is and where to put it; or if what arrived is another file.
        OSError: if it cannot be written, for example on a full disk.
    """
    if name not in FILES:
        raise WeightsError(f"Nothing is called {name!r}. There are: {', '.join(FILES)}.")
    wanted = FILES[name]
    path = Path(folder if folder is not None else default_folder()) / wanted.file_name
    if path.exists():
        _check_digest(path, wanted)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        _fetch(wanted, part, progress)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise  # of the disk, not of the network
        there = ""
        if part.exists():
            there = f"; {part.stat().st_size:,} bytes are there, and the next call goes on"
        raise WeightsError(
            f"{path.name} cannot be fetched ({_reason(error)}{there}): on a machine with internet "
            f"fetch {wanted}, and put it at {path}."
        ) from None
    try:
        _check_digest(part, wanted)
    except WeightsError:
        part.unlink()  # to go on from it would end the same way
        raise
    os.replace(part, path)
    return path


def _fetch(wanted: RemoteFile, part: Path, progress: bool) -> None:
    """Append to a partial file what it lacks."""
    have = part.stat().st_size if part.exists() else 0
    if have >= wanted.size:
        return
    request = urllib.request.Request(wanted.address)
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        if answer.status != 206:  # the server sends the whole
            have = 0
        bar = tqdm(total=wanted.size, initial=have, unit="B", unit_scale=True, disable=not progress)
        with bar, open(part, "ab") as file:
            file.truncate(have)
            while have < wanted.size and (chunk := answer.read(min(_CHUNK, wanted.size - have))):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
    if have < wanted.size:
        raise http.client.IncompleteRead(b"", wanted.size - have)


def _check_digest(path: Path, wanted: RemoteFile) -> None:
    """Raise WeightsError unless a file is the wanted one."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted.sha256:
        raise WeightsError(
            f"{path} is another file than {wanted.address}: its SHA-256 is {found}, not "
            f"{wanted.sha256}. Remove it and fetch it again."
        )


def _reason(error: Exception) -> str:
    """Why a connection failed, in a few words."""
    if isinstance(error, http.client.IncompleteRead):
        return f"the connection ended {error.expected:,} bytes early"
    if isinstance(error, urllib.error.HTTPError):
        return f"the server says {error.code} {error.reason}"
    reason = getattr(error, "reason", None)
    return str(reason or error) or type(error).__name__

"""Where training runs are kept, so that a machine that forgets does not take them along.

A Colab machine is wiped when its time is up. `runs_folder` keeps runs on Google Drive where that is
mounted, and says what to do where it is not; `lab_folder` does so for the labs of the chapters.
`archive_run` makes one file of a run, to be downloaded, and `restore_run` brings it back: training
then goes on at its last checkpoint.

    runs = runs_folder()
    train_system("prior", "tiny", runs)
    archive_run(runs / "prior-tiny")         # prior-tiny.zip, beside the folder
    restore_run("prior-tiny.zip", runs)      # on another machine, another day
"""

import atexit
import os
import shutil
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from t2ilearn.weights import claim_new

DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts it
NAME = "t2ilearn-runs"
LARGEST = 2**31  # bytes of an unpacked run: far above any of ours, far below a full disk


class RunFileError(ValueError):
    """A file that is no archived run, or a damaged one."""


def on_colab() -> bool:
    """Whether this is a Colab machine."""
    return "COLAB_RELEASE_TAG" in os.environ


def runs_folder() -> Path:
    """The folder for runs: on Drive if a Colab machine has it mounted, else "runs" here.

    Warns on a Colab machine without Drive, since all will be lost with it.
    """
    return _colab_folder() if on_colab() else Path("runs")


def lab_folder(lab: str) -> Path:
    """The folder for the runs that a reader trains in a lab.

    On a Colab machine it is `lab` within `runs_folder()`, with its warning, and a lab that is run
    again goes on where it was. Elsewhere it is new and empty, and goes when Python goes: a lab that
    is run again starts from nothing, and leaves nothing behind. Keep a run with `archive_run`.

    Args:
        lab: its name, such as "vqvae-lab".
    """
    if on_colab():
        return _colab_folder() / lab
    folder = tempfile.mkdtemp(prefix=f"{lab}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _colab_folder() -> Path:
    if DRIVE.is_dir():
        return DRIVE / NAME
    warnings.warn(
        "This Colab machine forgets everything when it is recycled, and Google Drive is not "
        "mounted. Either mount it first (from google.colab import drive; "
        "drive.mount('/content/drive')), or download the run when it is done: "
        "t2ilearn.training.archive_run(run_folder) makes one file of it.",
        stacklevel=3,  # where the caller of the public function stands
    )
    return Path("runs")


def archive_run(run: str | Path, file: str | Path | None = None) -> Path:
    """Make one file of a run: checkpoint, curves, frames, weights and card.

    Args:
        run: the run's folder, such as runs/prior-tiny.
        file: by default the folder's name with .zip, beside it; where an archive of that name is
            there already, prior-tiny-2.zip, and so on.

    Returns:
        The archive.

    Raises:
        FileNotFoundError: if there is no such run.
        OSError: if the file cannot be written; an older one is then untouched.
    """
    run = Path(run).resolve() if not Path(run).name else Path(run)
    if not (run / "flight.json").is_file():
        raise FileNotFoundError(f"{run} holds no training run: there is no flight.json in it.")
    if file is None:
        file = claim_new(run.with_name(run.name + ".zip"))
        try:
            return archive_run(run, file)
        except BaseException:
            file.unlink()  # it is still empty
            raise
    file = Path(file)
    partial = file.with_name(file.name + ".partial")
    try:
        with open(partial, "wb") as opened:
            with zipfile.ZipFile(opened, "w") as archive:  # deflating tensors gains nothing
                for path in sorted(run.rglob("*")):
                    if path.is_file() and path.suffix != ".partial":
                        archive.write(path, f"{run.name}/{path.relative_to(run).as_posix()}")
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def restore_run(file: str | Path, runs: str | Path) -> Path:
    """Bring an archived run back into a folder of runs; returns the run's own folder.

    The archive may have been unpacked and zipped again by another program: what macOS and Windows
    put beside the files of a folder is passed over.

    Raises:
        FileExistsError: if a run of that name is there already; it stays as it is.
        FileNotFoundError: if there is no such file.
        RunFileError: if the file is no archived run, damaged, encrypted, or would write elsewhere.
        OSError: if it cannot be unpacked there, for example on a full disk; nothing is left then.
    """
    file, runs = Path(file), Path(runs)
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise RunFileError(
            f"{file} is not an archived run, or it was cut off on the way."
        ) from None
    with archive:
        name, members = _run_in(file, archive)
        target = runs / name
        if target.exists():
            raise FileExistsError(f"{target} is there already: move it away, or name other runs.")
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=runs) as folder:  # whole, or not at all
            for path, info in members.items():
                _unpack(file, archive, info, Path(folder, name, path))
            shutil.move(str(Path(folder) / name), target)
    return target


def _run_in(file: Path, archive: zipfile.ZipFile) -> tuple[str, dict[PurePosixPath, Any]]:
    """The name of the run in an archive, and its members by their paths within it.

    Raises:
        RunFileError: naming what stands in the way.
    """
    members: dict[PurePosixPath, Any] = {}
    for info in archive.infolist():
        path = PurePosixPath(info.filename.replace("\\", "/"))  # as old programs for Windows write
        if info.is_dir() or path.parts[:1] == ("__MACOSX",) or _is_of_system(path.name):
            continue
        if path.is_absolute() or ".." in path.parts or ":" in str(path):
            raise RunFileError(f"{file} would write outside the folder: {info.filename!r}.")
        if path in members:
            raise RunFileError(f"{file} holds {info.filename!r} twice.")
        members[path] = info
    roots = [path.parent for path in members if path.name == "flight.json"]
    if len(roots) != 1:
        listed = ", ".join(map(str, roots[:4])) or "no flight.json is in it"
        raise RunFileError(f"{file} does not hold one training run and nothing else: {listed}.")
    (root,) = roots
    if not root.name:
        raise RunFileError(
            f"{file} holds the files of a run without their folder: zip the folder itself."
        )
    beside = [path for path in members if not path.is_relative_to(root)]
    if beside:
        raise RunFileError(
            f"{file} does not hold one training run and nothing else: {beside[0]} is beside {root}."
        )
    if sum(info.file_size for info in members.values()) > LARGEST:
        raise RunFileError(f"{file} would unpack to more than {LARGEST / 2**30:.0f} GiB.")
    return root.name, {path.relative_to(root): info for path, info in members.items()}


def _is_of_system(name: str) -> bool:
    """Whether macOS or Windows put this file into a folder, for icons and views."""
    return name.startswith("._") or name.lower() in (".ds_store", "thumbs.db", "desktop.ini")


def _unpack(file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    """Write one member; raises RunFileError if it cannot be read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with archive.open(info) as source, open(target, "wb") as written:
            shutil.copyfileobj(source, written)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise RunFileError(f"{file} is damaged: {error}.") from None
    except NotImplementedError as error:  # other methods, such as Deflate64 of Windows
        raise RunFileError(f"{info.filename} in {file} cannot be read: {error}.") from None
    except RuntimeError:
        raise RunFileError(f"{file} is encrypted: zip it again without a password.") from None

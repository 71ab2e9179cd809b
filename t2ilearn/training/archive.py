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
from pathlib import Path, PurePosixPath

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

    Raises:
        FileExistsError: if a run of that name is there already; it stays as it is.
        FileNotFoundError: if there is no such file.
        RunFileError: if the file is no archived run, damaged, or would write elsewhere.
    """
    file, runs = Path(file), Path(runs)
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise RunFileError(
            f"{file} is not an archived run, or it was cut off on the way."
        ) from None
    with archive:
        members = [PurePosixPath(info.filename) for info in archive.infolist()]
        tops = {member.parts[0] for member in members if member.parts}
        sound = len(tops) == 1 and all(
            not m.is_absolute() and ".." not in m.parts and "\\" not in str(m) and ":" not in str(m)
            for m in members
        )
        name = next(iter(tops), "")
        if not sound or PurePosixPath(name, "flight.json") not in members:
            raise RunFileError(f"{file} does not hold one training run and nothing else.")
        if sum(info.file_size for info in archive.infolist()) > LARGEST:
            raise RunFileError(f"{file} would unpack to more than {LARGEST / 2**30:.0f} GiB.")
        target = runs / name
        if target.exists():
            raise FileExistsError(f"{target} is there already: move it away, or name other runs.")
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=runs) as folder:  # whole, or not at all
            try:
                archive.extractall(folder)
            except (zipfile.BadZipFile, EOFError, OSError) as error:
                raise RunFileError(f"{file} is damaged: {error}.") from None
            shutil.move(str(Path(folder) / name), target)
    return target

"""Archived runs: a run that is kept on Drive or in one file resumes on another machine."""

import ast
import json
import sys
import warnings
import zipfile
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from t2ilearn import training, weights
from t2ilearn.systems import STAGES, train_system
from t2ilearn.systems import stage as stages
from t2ilearn.training import (
    RunFileError,
    archive,
    archive_run,
    lab_folder,
    restore_run,
    runs_folder,
)

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@pytest.fixture
def quick(monkeypatch):
    """The first stage of the VQ-VAE without the measurements for its card."""
    unmeasured = replace(STAGES["vqvae"], evaluate=lambda job, model: {"measured": 1.0}, bars={})
    monkeypatch.setitem(STAGES, "vqvae", unmeasured)


def train_vqvae(runs: Path, steps: int) -> weights.Weights:
    """The weights that a short run of that stage leaves."""
    how = {"stage": "vqvae", "steps": steps, "progress": False}
    return weights.load(train_system("vqvae", "tiny", runs, **how))


def interrupted_at(monkeypatch, step):
    real = stages.train

    def train(model, make_batch, *args, **options):
        def make(number, generator):
            if number == step:
                raise KeyboardInterrupt
            return make_batch(number, generator)

        return real(model, make, *args, **options)

    monkeypatch.setattr(stages, "train", train)
    return lambda: monkeypatch.setattr(stages, "train", real)


def test_an_archived_run_resumes_bit_for_bit(tmp_path, monkeypatch, quick):
    """Stopped after two of four steps, archived, restored elsewhere: the same final weights."""
    whole = train_vqvae(tmp_path / "whole", steps=4)
    undo = interrupted_at(monkeypatch, 2)
    assert train_vqvae(tmp_path / "colab", steps=4).card.steps == 2
    undo()
    file = archive_run(tmp_path / "colab" / "vqvae-tiny")
    assert file == tmp_path / "colab" / "vqvae-tiny.zip"
    assert restore_run(file, tmp_path / "home") == tmp_path / "home" / "vqvae-tiny"
    resumed = train_vqvae(tmp_path / "home", steps=4)
    assert resumed.card.steps == 4
    for name, tensor in whole.state.items():
        assert torch.equal(tensor, resumed.state[name]), name


def test_archives_and_runs_are_never_overwritten_nor_written_in_part(tmp_path, monkeypatch):
    run = tmp_path / "vqvae-tiny"
    run.mkdir()
    (run / "flight.json").write_text("{}", encoding="utf-8")
    file = archive_run(run)
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match="there already"):
        restore_run(file, tmp_path)

    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    with pytest.raises(OSError, match="No space"):
        archive_run(run)
    assert file.read_bytes() == before and not list(tmp_path.glob("*.partial"))
    with pytest.raises(FileNotFoundError, match="no training run"):
        archive_run(tmp_path / "nothing")


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"notes.txt": "hello"},
        {"run/flight.json": "{}", "other/flight.json": "{}"},
        {"run/flight.json": "{}", "run/../../evil.txt": "x"},
        {"/run/flight.json": "{}"},
        {"run/flight.json": "{}", "run/..\\..\\evil.txt": "x"},
    ],
)
def test_a_file_that_is_no_archived_run_raises_an_error(tmp_path, members):
    file, home = tmp_path / "run.zip", tmp_path / "home"
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    with pytest.raises(RunFileError):
        restore_run(file, home)
    assert not home.exists() or not any(home.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) in (["run.zip"], ["home", "run.zip"])


def test_a_damaged_archive_raises_an_error_and_leaves_no_files(tmp_path):
    file, home = tmp_path / "run.zip", tmp_path / "home"
    file.write_bytes(b"PK but not really")
    with pytest.raises(RunFileError, match="cut off"):
        restore_run(file, home)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("run/flight.json", "x" * 1000)
    data = bytearray(file.read_bytes())
    data[200] ^= 0xFF  # a byte of the content: its checksum no longer fits
    file.write_bytes(data)
    with pytest.raises(RunFileError, match="damaged"):
        restore_run(file, home)
    assert list(home.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        restore_run(tmp_path / "none.zip", home)


def test_runs_stay_in_the_working_folder_outside_colab(monkeypatch):
    monkeypatch.setattr(archive, "on_colab", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(runs_folder()) == "runs"


def test_on_colab_runs_are_kept_on_drive_or_a_warning_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setattr(archive, "DRIVE", tmp_path)
    assert runs_folder() == tmp_path / "t2ilearn-runs"
    assert lab_folder("a-lab") == tmp_path / "t2ilearn-runs" / "a-lab" == lab_folder("a-lab")
    monkeypatch.setattr(archive, "DRIVE", tmp_path / "not mounted")
    for folder, wanted in ((runs_folder, "runs"), (lambda: lab_folder("a-lab"), "runs/a-lab")):
        with pytest.warns(UserWarning, match="archive_run"):
            assert folder().as_posix() == wanted


def test_outside_colab_a_lab_folder_is_new_and_removed_at_exit(monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    at_exit = []
    monkeypatch.setattr(
        archive.atexit, "register", lambda *call, **how: at_exit.append((call, how))
    )
    one, two = lab_folder("a-lab"), lab_folder("a-lab")
    assert one != two and one.is_dir() and not any(two.iterdir())
    (one / "checkpoint").write_text("weights", encoding="utf-8")
    for (function, *arguments), options in at_exit:
        function(*arguments, **options)
    assert len(at_exit) == 2 and not one.exists() and not two.exists()


# ---------------------------------------------------------------- the labs, on a simulated Colab

STEPS, STOP = 4, 2
SMALLER = {"02_vqvae_lab": ("learn", "2048", "64"), "03_priors_lab": ("train-data", "1500", "96")}
# The cells that lead to a lab's own run, its folder and itself; its model's name; its folder's.
LABS = {
    "01_pictures_lab": ("imports recipe forecast run train-reader", "reader", f"first-{STEPS}"),
    "02_vqvae_lab": ("imports learn forecast train-folder train-run", "own", "small"),
    "03_priors_lab": ("imports train-data forecast train-folder train-run", "mine", "small"),
}


def cells_of(lab: str) -> dict[str, str]:
    """The sources of a lab's code cells."""
    book = json.loads((NOTEBOOKS / f"{lab}.ipynb").read_text(encoding="utf-8"))
    return {c["id"]: "".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code"}


class WithoutAsserts(ast.NodeTransformer):
    """Code that asserts nothing."""

    def visit_Assert(self, node: ast.Assert) -> ast.Pass:
        return ast.Pass()


class Reader:
    """Runs a lab's cells, without what they assert about the quality of a whole run."""

    def __init__(self, lab: str) -> None:
        self.cells, self.names = cells_of(lab), {}
        if lab in SMALLER:  # so many pictures: the run itself is what is tested
            cell, many, few = SMALLER[lab]
            assert many in self.cells[cell]
            self.cells[cell] = self.cells[cell].replace(many, few)
        cells, self.model, self.run_name = LABS[lab]
        *before, self.folder, self.training = cells.split()
        for cell in before:
            self.run(self.cells[cell], whole=cell != "forecast")
        for sizes in (self.names.get("RUNS"), self.names.get("sizes")):  # a few steps of hundreds
            for size, (model, plan) in (sizes or {}).items():
                sizes[size] = model, replace(plan, steps=STEPS)
        self.names |= {"STEPS": STEPS, "train": self.train}

    def run(self, source: str, whole: bool = True) -> None:
        """A cell, or the part of it before its first block: forecasts are not tested here."""
        tree = WithoutAsserts().visit(ast.parse(source))
        if not whole:
            tree.body = [*takewhile(lambda n: not isinstance(n, ast.For | ast.With), tree.body)]
        exec(compile(ast.fix_missing_locations(tree), "cell", "exec"), self.names)

    def train(self, model, make_batch, *arguments, **options):
        """`train`, stopped at the step `stop` as by the stop button."""

        def make(number, generator):
            if number == self.stop:
                raise KeyboardInterrupt
            return make_batch(number, generator)

        return training.train(model, make, *arguments, **options)

    def sit(self, brought: str = "", stop: int | None = None) -> tuple[int, dict]:
        """Train, and archive the run: steps done so far, and the weights."""
        self.stop = stop
        assert 'BROUGHT = ""' in self.cells[self.folder]
        self.run(self.cells[self.folder].replace('BROUGHT = ""', f"BROUGHT = {brought!r}"))
        self.run(self.cells[self.training])
        self.run(self.cells["take-along"])
        return self.names["result"].steps_done, self.names[self.model].state_dict()


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """A simulated Colab machine, Drive not mounted: the files that it downloaded."""
    downloaded, files = [], ModuleType("google.colab.files")
    files.download = downloaded.append
    package = ModuleType("google.colab")
    package.files = files
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setattr(archive, "DRIVE", tmp_path / "drive")
    return downloaded


@pytest.mark.filterwarnings("ignore:This Colab machine forgets")
@pytest.mark.parametrize("lab", LABS)
def test_the_run_of_a_lab_resumes_on_another_colab_machine(
    lab, colab, tmp_path, monkeypatch, unchecked
):
    """Stopped on one machine and resumed on the next, by a file or by Drive: the same weights as
    without a stop."""

    def machine(name: str) -> Path:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        return tmp_path / name

    first = machine("first")
    reader = Reader(lab)
    assert reader.sit(stop=STOP)[0] == STOP
    (file,) = colab
    assert (first / file).is_file()
    machine("second")
    steps, by_file = reader.sit(brought=str(first / file))
    assert steps == STEPS and len(colab) == 2

    third, drive = machine("third"), tmp_path / "drive"
    drive.mkdir()
    reader.run(reader.cells["imports"])  # the cell that looks for Drive
    reader.names["train"] = reader.train
    assert reader.sit(stop=STOP)[0] == STOP
    steps, by_drive = reader.sit()
    assert steps == STEPS and len(colab) == 2, "what lies on Drive needs no download"
    assert [run.name for run in drive.glob("t2ilearn-runs/*/*")] == [reader.run_name]
    assert not any(third.iterdir())

    drive.rename(tmp_path / "another drive")
    drive.mkdir()
    steps, whole = reader.sit()
    assert steps == STEPS
    for name, tensor in whole.items():
        assert torch.equal(tensor, by_file[name]) and torch.equal(tensor, by_drive[name]), name

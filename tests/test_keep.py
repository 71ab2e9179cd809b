"""Runs survive a machine that forgets: on Drive, or as one file that training goes on from."""

import ast
import json
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from t2ilearn import keep, recipes, training, weights
from t2ilearn.keep import RunFileError, lab_folder, pack, runs_folder, unpack
from t2ilearn.recipes import train_system

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(recipes, "_evaluate_vqvae", lambda job, model: {})
    monkeypatch.setitem(
        recipes._SYSTEMS, "vqvae", (recipes._train_vqvae, lambda job, model: {"measured": 1.0})
    )
    monkeypatch.setitem(recipes.BARS, ("vqvae", "tiny"), {})


def interrupted_at(monkeypatch, step):
    real = recipes.train

    def train(model, make_batch, *args, **options):
        def make(number, generator):
            if number == step:
                raise KeyboardInterrupt
            return make_batch(number, generator)

        return real(model, make, *args, **options)

    monkeypatch.setattr(recipes, "train", train)
    return lambda: monkeypatch.setattr(recipes, "train", real)


def test_training_goes_on_from_the_one_file(tmp_path, monkeypatch, quick):
    """Stopped after three of six steps, packed, unpacked elsewhere: the same weights at the end."""
    how = {"steps": 6, "progress": False}
    whole = weights.load(train_system("vqvae", "tiny", tmp_path / "whole", **how))
    mend = interrupted_at(monkeypatch, 3)
    card = weights.load(train_system("vqvae", "tiny", tmp_path / "colab", **how)).card
    assert card["steps"] == 3
    mend()
    file = pack(tmp_path / "colab" / "vqvae-tiny")
    assert file == tmp_path / "colab" / "vqvae-tiny.zip"
    assert unpack(file, tmp_path / "home") == tmp_path / "home" / "vqvae-tiny"
    resumed = weights.load(train_system("vqvae", "tiny", tmp_path / "home", **how))
    assert resumed.card["steps"] == 6
    for name, tensor in whole.state.items():
        assert torch.equal(tensor, resumed.state[name]), name


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch, quick):
    run = tmp_path / "vqvae-tiny"
    train_system("vqvae", "tiny", tmp_path, steps=2, progress=False)
    file = pack(run)
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match="there already"):
        unpack(file, tmp_path)

    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    with pytest.raises(OSError, match="No space"):
        pack(run)
    assert file.read_bytes() == before and not list(tmp_path.glob("*.partial"))
    with pytest.raises(FileNotFoundError, match="no training run"):
        pack(tmp_path / "nothing")


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
def test_what_is_no_packed_run_is_refused(tmp_path, members):
    file, home = tmp_path / "run.zip", tmp_path / "home"
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    with pytest.raises(RunFileError):
        unpack(file, home)
    assert not home.exists() or not any(home.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) in (["run.zip"], ["home", "run.zip"])


def test_a_damaged_file_is_refused_and_leaves_nothing(tmp_path):
    file, home = tmp_path / "run.zip", tmp_path / "home"
    file.write_bytes(b"PK but not really")
    with pytest.raises(RunFileError, match="cut off"):
        unpack(file, home)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("run/flight.json", "x" * 1000)
    data = bytearray(file.read_bytes())
    data[200] ^= 0xFF  # a byte of the content: its checksum no longer fits
    file.write_bytes(data)
    with pytest.raises(RunFileError, match="damaged"):
        unpack(file, home)
    assert list(home.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        unpack(tmp_path / "none.zip", home)


def test_a_machine_that_remembers_is_left_alone(monkeypatch):
    monkeypatch.setattr(keep, "on_colab", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(runs_folder()) == "runs"


def test_colab_keeps_runs_on_drive_or_warns(tmp_path, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setattr(keep, "DRIVE", tmp_path)
    assert runs_folder() == tmp_path / "t2ilearn-runs"
    assert lab_folder("a-lab") == tmp_path / "t2ilearn-runs" / "a-lab" == lab_folder("a-lab")
    monkeypatch.setattr(keep, "DRIVE", tmp_path / "not mounted")
    for folder, wanted in ((runs_folder, "runs"), (lambda: lab_folder("a-lab"), "runs/a-lab")):
        with pytest.warns(UserWarning, match="pack"):
            assert folder().as_posix() == wanted


def test_elsewhere_a_lab_gets_a_new_folder_that_goes_when_python_goes(monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    code = """
from t2ilearn.keep import lab_folder
one, two = lab_folder("a-lab"), lab_folder("a-lab")
assert one != two and one.is_dir() and not any(two.iterdir())
(one / "checkpoint").write_text("weights", encoding="utf-8")
print(one, two, sep="\\n")
"""
    command = [sys.executable, "-W", "error", "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(said) == 2 and not any(Path(folder).exists() for folder in said)


# ---------------------------------------------------------------- the labs, on a pretended Colab

STEPS, STOP = 6, 3
# The cells that lead to a lab's own run, its folder and itself; its model's name; its folder's.
LABS = {
    "01_pictures_lab": ("imports recipe forecast run train-reader", "reader", "first-6"),
    "02_vqvae_lab": ("imports learn forecast train-folder train-run", "own", "small"),
    "03_priors_lab": ("imports train-data forecast train-folder train-run", "mine", "small"),
}


def cells_of(lab: str) -> dict[str, str]:
    """The sources of a lab's code cells."""
    book = json.loads((NOTEBOOKS / f"{lab}.ipynb").read_text(encoding="utf-8"))
    return {c["id"]: "".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code"}


class Unsure(ast.NodeTransformer):
    """Code that asserts nothing."""

    def visit_Assert(self, node: ast.Assert) -> ast.Pass:
        return ast.Pass()


class Reader:
    """Who runs a lab's cells, but for what they assert of the quality of a whole run."""

    def __init__(self, lab: str) -> None:
        self.cells, self.names = cells_of(lab), {}
        cells, self.model, self.run_name = LABS[lab]
        *before, self.folder, self.training = cells.split()
        for cell in before:
            self.run(self.cells[cell], whole=cell != "forecast")
        for sizes in (self.names.get("RUNS"), self.names.get("sizes")):  # six steps of hundreds
            for size, (model, plan) in (sizes or {}).items():
                sizes[size] = model, replace(plan, steps=STEPS)
        self.names |= {"STEPS": STEPS, "train": self.train}

    def run(self, source: str, whole: bool = True) -> None:
        """A cell, or what it says before its first block: a forecast is not what is tested."""
        tree = Unsure().visit(ast.parse(source))
        if not whole:
            tree.body = [*takewhile(lambda n: not isinstance(n, ast.For | ast.With), tree.body)]
        exec(compile(ast.fix_missing_locations(tree), "cell", "exec"), self.names)

    def train(self, model, make_batch, *arguments, **options):
        """`train`, and somebody who presses the stop button."""

        def make(number, generator):
            if number == self.stop:
                raise KeyboardInterrupt
            return make_batch(number, generator)

        return training.train(model, make, *arguments, **options)

    def sit(self, brought: str = "", stop: int | None = None) -> tuple[int, dict]:
        """Train, and take the run along: steps done so far, and the weights."""
        self.stop = stop
        assert 'BROUGHT = ""' in self.cells[self.folder]
        self.run(self.cells[self.folder].replace('BROUGHT = ""', f"BROUGHT = {brought!r}"))
        self.run(self.cells[self.training])
        self.run(self.cells["take-along"])
        return self.names["result"].steps_done, self.names[self.model].state_dict()


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """A pretended Colab machine, Drive not mounted: the files that it downloaded."""
    downloaded, files = [], ModuleType("google.colab.files")
    files.download = downloaded.append
    package = ModuleType("google.colab")
    package.files = files
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setattr(keep, "DRIVE", tmp_path / "drive")
    return downloaded


@pytest.mark.filterwarnings("ignore:This Colab machine forgets")
@pytest.mark.parametrize("lab", LABS)
def test_a_labs_run_survives_a_colab_machine(lab, colab, tmp_path, monkeypatch, unchecked):
    """Stopped on one machine and gone on with on the next, by a file or by Drive: the same weights
    as in one sitting."""

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
    reader.run(reader.cells["imports"])  # which look for Drive
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

"""Runs survive a machine that forgets: on Drive, or as one file that training goes on from."""

import warnings
import zipfile

import pytest
import torch

from t2ilearn import keep, recipes, weights
from t2ilearn.keep import RunFileError, pack, runs_folder, unpack
from t2ilearn.recipes import train_system


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
    monkeypatch.setattr(keep, "DRIVE", tmp_path / "not mounted")
    with pytest.warns(UserWarning, match="pack"):
        assert str(runs_folder()) == "runs"

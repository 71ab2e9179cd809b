"""Weights: sound files load exactly; damaged ones give an error that says what to do."""

import errno
import hashlib
import json

import pytest
import torch
from torch import nn

from t2ilearn import weights
from t2ilearn.weights import (
    Card,
    Leg,
    Weights,
    WeightsError,
    available,
    files,
    load,
    load_into,
    save,
)


def card(name="tiny", **changes):
    """A card of a model that does not exist."""
    leg = Leg("t2ilearn train vqvae --preset tiny", 3, 0.5, "x86_64 CPU, 1 thread", "no")
    facts = {
        "stage": "vqvae",
        "preset": "tiny",
        "configs": {"TinyConfig": {"width": 8}},
        "data": {"world": "tiny-shapes", "split": "train", "seed": 0},
        "settings": {"steps": 3},
        "legs": (leg,),
        "parameters": 1,
    }
    return Card(name, **(facts | changes))


class Tiny(nn.Module):
    """Floats of several sizes, a running mean, and counts."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("codes", torch.arange(5))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture
def saved(model, tmp_path):
    """The path of a model's weights."""
    return save(tmp_path, card(), model.state_dict())


@pytest.fixture
def shelf(monkeypatch, tmp_path):
    """A directory in the place of the one that ships, with three weights."""
    monkeypatch.setattr(files, "ASSETS", tmp_path)
    for name in ("vqvae-tiny", "vqvae-book", "reader"):
        save(tmp_path, card(name), {"x": torch.ones(2)})
    return tmp_path


# ---------------------------------------------------------------- whole


def test_float16_on_disk_is_float32_in_memory(model, saved):
    from safetensors.torch import load_file

    stored = load_file(saved)
    assert stored["first.weight"].dtype == torch.float16 and stored["codes"].dtype == torch.int64
    state, loaded, path = load(saved)
    assert state["first.weight"].dtype == torch.float32 and state["codes"].dtype == torch.int64
    assert torch.equal(state["first.weight"], model.first.weight.half().float())
    assert path == saved and loaded.configs == {"TinyConfig": {"width": 8}} and loaded.steps == 3
    assert loaded.sha256 == hashlib.sha256(saved.read_bytes()).hexdigest()


def test_full_precision_comes_back_exactly(model, tmp_path):
    state = load(save(tmp_path, card("whole"), model.state_dict(), half=False)).state
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_values_too_large_for_float16_stay_float32(tmp_path):
    state = {"counts": torch.tensor([1.0, 1e6]), "scale": torch.tensor([0.1])}
    back = load(save(tmp_path, card("large"), state)).state
    assert torch.equal(back["counts"], state["counts"])
    assert back["scale"].item() == state["scale"].half().float().item()


def test_bfloat16_and_float64_load_as_float32(tmp_path):
    state = {"b": torch.ones(2, dtype=torch.bfloat16), "d": torch.ones(2, dtype=torch.float64)}
    back = load(save(tmp_path, card("kinds"), state, half=False)).state
    assert {value.dtype for value in back.values()} == {torch.float32}


def test_tied_and_transposed_tensors_are_saved(tmp_path):
    x = torch.randn(3, 4)
    state = load(save(tmp_path, card("tied"), {"a": x, "b": x, "c": x.T}, half=False)).state
    assert torch.equal(state["a"], state["b"]) and torch.equal(state["c"], x.T)


def test_load_into_fills_every_tensor_and_keeps_the_models_precision(saved):
    other = Tiny().double()
    load_into(other, load(saved))
    assert other.first.weight.dtype == torch.float64
    for key, value in load(saved).state.items():
        assert torch.equal(other.state_dict()[key].to(value.dtype), value)


def test_saving_leaves_state_and_card_as_they_were(model, tmp_path):
    facts, before = card(), {k: v.clone() for k, v in model.state_dict().items()}
    save(tmp_path, facts, model.state_dict())
    assert facts == card()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert model.first.weight.requires_grad


def test_names_load_from_the_shelf_and_paths_from_anywhere(shelf):
    assert available() == ("reader", "vqvae-book", "vqvae-tiny")
    for name in ("reader", shelf / "reader.safetensors", str(shelf / "reader"), shelf / "reader"):
        assert torch.equal(load(name).state["x"], torch.ones(2))


def test_everything_that_ships_loads_with_its_card():
    assert available()
    for name in available():
        loaded = load(name)
        assert loaded.card.name == name == loaded.path.stem and loaded.card.configs


# ---------------------------------------------------------------- damaged


def test_unknown_names_list_the_nearest_and_all(shelf):
    with pytest.raises(WeightsError, match="'vqvae-tyni'.*mean vqvae-tiny.*reader, vqvae-book"):
        load("vqvae-tyni")
    with pytest.raises(WeightsError, match="'zzz'. What ships: reader"):
        load("zzz")
    for file in shelf.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(WeightsError, match="none yet"):
        load("reader")


def test_missing_files_are_named(tmp_path):
    for path in (tmp_path / "no.safetensors", str(tmp_path / "no"), "no/such"):
        with pytest.raises(WeightsError, match=r"no file .*no"):
            load(path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 60, -1, -200])
def test_truncated_files_are_reported(saved, keep):
    data = saved.read_bytes()
    saved.write_bytes(data[:keep] if keep >= 0 else data[: len(data) + keep])
    with pytest.raises(WeightsError, match=r"tiny.safetensors is truncated.*Fetch it again"):
        load(saved)


@pytest.mark.parametrize("where", [-1, 30, 400])
def test_one_flipped_bit_is_detected(saved, where):
    data = bytearray(saved.read_bytes())
    data[where] ^= 1
    saved.write_bytes(data)
    with pytest.raises(WeightsError, match=r"tiny.safetensors"):
        load(saved)


def test_the_file_of_another_run_is_not_what_the_card_describes(saved, tmp_path):
    other = save(tmp_path / "other", card(), {"x": torch.ones(1)})
    saved.write_bytes(other.read_bytes())
    with pytest.raises(WeightsError, match="not the file its card describes.*SHA-256"):
        load(saved)


def test_bytes_after_the_tensors_are_detected(saved):
    saved.write_bytes(saved.read_bytes() + b"more")
    with pytest.raises(WeightsError, match="SHA-256"):
        load(saved)


def test_a_missing_card_is_named(saved):
    saved.with_suffix(".json").unlink()
    with pytest.raises(WeightsError, match=r"card .*tiny.json is missing"):
        load(saved)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not readable as JSON"),
        (100_000 * "[", "is not readable as JSON"),
        ("[1]", ": the whole is .1., expected an object"),
        ("{}", ": field schema is missing.*first edition"),
        ('{"sha256": 3}', ": field schema is missing.*first edition"),
        ('{"schema": 2}', ": field bars is missing"),
    ],
)
def test_damaged_cards_are_reported(saved, text, reason):
    saved.with_suffix(".json").write_text(text, encoding="utf-8")
    with pytest.raises(WeightsError, match=f"card .*tiny.json ?{reason}"):
        load(saved)


def test_cards_that_are_not_text_are_reported(saved):
    saved.with_suffix(".json").write_bytes(b"\xff\xfe{")
    with pytest.raises(WeightsError, match=r"tiny.json is not readable"):
        load(saved)


@pytest.mark.parametrize(
    "data",
    [
        b"version https://git-lfs.github.com/spec/v1",
        b"<!DOCTYPE html><html>",
        b"\x00" * 64,
        (5).to_bytes(8, "little") + b"{nope",
        (2).to_bytes(8, "little") + b"{]",
        (9).to_bytes(8, "little") + b'{"a": 17}',
    ],
)
def test_files_of_another_format_are_reported(saved, data):
    saved.write_bytes(data)
    with pytest.raises(WeightsError, match=r"tiny.safetensors is not a safetensors file"):
        load(saved)


def test_a_header_with_wrong_sizes_is_detected_although_the_card_matches(saved):
    metadata = files.header_metadata(card())
    place = {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": metadata, "x": place}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    saved.write_bytes(data)
    facts = json.loads(saved.with_suffix(".json").read_text(encoding="utf-8"))
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    saved.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"tiny.safetensors is damaged"):
        load(saved)


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "model.bin", "tiny.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_by_suffix_and_by_content(tmp_path, name, zipped):
    torch.save({"x": torch.ones(1)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="is a pickle.*runs whatever code"):
        load(tmp_path / name)


def test_no_code_runs_from_a_pickle(tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"cos\nabort\n(tR.")  # protocol 0: calls os.abort when loaded
    with pytest.raises(WeightsError, match="is a pickle"):
        load(tmp_path / "bad.pt")


# ---------------------------------------------------------------- of another model


def test_every_misfit_is_named_and_the_model_stays_as_it_was(saved):
    state = load(saved).state
    state["extra.weight"] = state.pop("first.bias")
    state["first.weight"] = torch.zeros(2, 2)
    state["codes"] = torch.zeros(5)
    model = Tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_into(model, Weights(state, card(), saved))
    message = str(caught.value)
    for part in (
        "do not fit Tiny",
        "missing first.bias",
        "left over extra.weight",
        "first.weight is (2, 2), not (4, 8)",
        "codes is torch.float32, not torch.int64",
    ):
        assert part in message
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


# ---------------------------------------------------------------- writing


def test_nan_is_not_saved(tmp_path):
    with pytest.raises(WeightsError, match="bad is not saved: NaN or infinity in b"):
        save(tmp_path, card("bad"), {"a": torch.ones(1), "b": torch.tensor([float("nan")])})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "a/b", "../up", "tiny.safetensors"])
def test_names_that_are_paths_are_refused(tmp_path, name):
    with pytest.raises(WeightsError, match="is no name for weights"):
        save(tmp_path, card(name), {"x": torch.ones(1)})


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"settings": {"steps": torch.ones(1)}}, "field settings.steps is of type Tensor"),
        ({"metrics": {"loss": float("nan")}}, "field metrics.loss is NaN, expected a finite"),
        ({"metrics": {"loss": None}}, "field metrics.loss is null, expected a number"),
        ({"legs": ()}, "field legs is .., expected at least one leg"),
        ({"parameters": -1}, "field parameters is -1, expected a number from 0"),
    ],
)
def test_cards_that_load_would_refuse_are_refused_before_anything_is_written(
    tmp_path, changes, said
):
    with pytest.raises(WeightsError, match=f"card tiny: {said}"):
        save(tmp_path, card(**changes), {"x": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_cards_keep_their_letters(tmp_path):
    path = save(tmp_path, card(note="β = 0.25"), {"x": torch.ones(1)})
    assert "β = 0.25" in path.with_suffix(".json").read_text(encoding="utf-8")
    assert load(path).card.note == "β = 0.25"


def test_a_full_disk_leaves_the_old_weights(saved, monkeypatch):
    before = load(saved)

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        save(saved.parent, card(), {"x": torch.ones(1)})
    after = load(saved)
    assert after.card == before.card and after.state.keys() == before.state.keys()
    assert {path.name for path in saved.parent.iterdir()} == {"tiny.safetensors", "tiny.json"}


@pytest.mark.parametrize(
    "value, text",
    [
        ({"value": 0.9513, "half_width": 0.012}, "95.1 ± 1.2 %"),
        ({"value": 2.5, "low": 2.25, "high": 2.75}, "2.5 (2.25 … 2.75)"),
        ({"a": 1, "b": 0.5}, "a 1, b 0.5"),
        (0.123456, "0.1235"),
        ("a sha256", "a sha256"),
    ],
)
def test_metrics_are_formatted_for_people(value, text):
    assert weights.figure(value) == text

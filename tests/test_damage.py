"""Damaged weights and cards, killed trainings, full disks: an error that says so, and nothing lost.

`python tests/kills.py` measures twenty kills; here are two.
"""

import builtins
import errno
import hashlib
import io
import json
import random
import shutil
import warnings
from typing import NamedTuple

import pytest
import torch
from kills import killed_runs

from t2ilearn import weights
from t2ilearn.drawing import Drawing
from t2ilearn.models.vqvae import VQVAE, VQVAEConfig
from t2ilearn.systems import Request
from t2ilearn.systems.registry import load_part
from t2ilearn.systems.tokens import TokenOptions
from t2ilearn.training import (
    TrainConfig,
    archive_run,
    read_record,
    restore_run,
    train,
)
from t2ilearn.weights import Card, Leg, WeightsError, configs_of

MUTATIONS = 1000
CONFIG = VQVAEConfig(16, (8,), codebook_size=16, code_dim=4)


# --- mutated files -----------------------------------------------------------------------------


def flip(data, dice):
    at = dice.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]


def cut(data, dice):
    return data[: dice.randrange(len(data))]


def drop(data, dice):
    at = dice.randrange(len(data))
    return data[:at] + data[at + dice.choice((1, 2, 8, 100)) :]


def insert(data, dice):
    at = dice.randrange(len(data))
    return data[:at] + dice.randbytes(dice.choice((1, 2, 8, 100))) + data[at:]


def zeros(data, dice):
    at, count = dice.randrange(len(data)), dice.choice((1, 8, 100, 4096))
    return (data[:at] + bytes(count) + data[at + count :])[: len(data)]


def grow(data, dice):
    return data + dice.randbytes(dice.choice((1, 8, 4096)))


def swap(data, dice):
    a, b = sorted(dice.randrange(len(data)) for _ in range(2))
    return data[b:] + data[a:b] + data[:a]


def header(data, dice):
    """A byte of the header alone, where names, shapes and configs stand."""
    end = 8 + int.from_bytes(data[:8], "little")
    return flip(data[:end], dice) + data[end:]


MUTATE = (flip, cut, drop, insert, zeros, grow, swap, header)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Weights of a few thousand numbers with their card."""
    torch.manual_seed(0)
    model = VQVAE.from_config(CONFIG)
    leg = Leg("t2ilearn train vqvae", 1, 0.1, "CPU", "no")
    data = {"world": "shapes", "split": "train", "seed": 0}
    count = sum(p.numel() for p in model.parameters())
    facts = ("small", "vqvae", "tiny", configs_of(CONFIG), data, {}, (leg,), count)
    return weights.save(tmp_path_factory.mktemp("stored"), Card(*facts), model.state_dict())


def mutated(stored, path, dice):
    """Write one mutation of weights, of their card, or of both, so that the SHA-256 fits again."""
    source, card = stored.read_bytes(), stored.with_suffix(".json").read_bytes()
    kind, mutate = dice.choice(("weights", "card", "both")), dice.choice(MUTATE[:-1])
    if kind == "card":
        card = mutate(card, dice)
    else:
        source = dice.choice(MUTATE)(source, dice)
    if kind == "both":
        facts = {**json.loads(card), "sha256": hashlib.sha256(source).hexdigest()}
        card = json.dumps(facts).encode("utf-8")
    path.write_bytes(source)
    path.with_suffix(".json").write_bytes(card)
    return kind, source


def test_a_thousand_mutated_weights_and_cards_are_refused_or_change_nothing(stored, tmp_path):
    whole, dice, path = weights.load(stored), random.Random(0), tmp_path / stored.name
    refused = 0
    for number in range(MUTATIONS):
        kind, data = mutated(stored, path, dice)
        try:
            found = weights.load(path)
            part = load_part(path)
        except WeightsError as error:
            assert str(path.parent) in str(error) or "weights" in str(error), str(error)
            refused += 1
            continue
        assert found.card.configs == whole.card.configs and found.card.stage == whole.card.stage
        assert part.config == CONFIG, number
        if kind != "both":  # there the card vouches for the new numbers
            assert data == stored.read_bytes()
            assert all(torch.equal(found.state[key], t) for key, t in whole.state.items())
    assert refused > MUTATIONS / 2


# --- killed trainings --------------------------------------------------------------------------


def test_a_killed_training_ends_as_if_nobody_had_killed_it(tmp_path):
    assert all(equal for _, equal in killed_runs(2, 12, tmp_path))


# --- a full disk -------------------------------------------------------------------------------


class FullDisk:
    """Files opened for writing within the block, whose n-th write finds the disk full."""

    def __init__(self, monkeypatch, fails_at):
        self.left, self.failed, real = fails_at, False, builtins.open

        def opened(file, mode="r", *arguments, **options):
            stream = real(file, mode, *arguments, **options)
            return self.watched(stream) if set(mode) & set("wxa+") else stream

        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)

    def watched(self, stream):
        disk = self

        class Watched:
            def write(self, data):
                disk.left -= 1
                if disk.left == 0:
                    disk.failed = True
                    stream.write(data[: len(data) // 2])
                    raise OSError(errno.ENOSPC, "No space left on device")
                return stream.write(data)

            def __getattr__(self, name):
                return getattr(stream, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                stream.close()

            def __iter__(self):
                return iter(stream)

        return Watched()


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fails_at_every_write(monkeypatch, act, check):
    """Do something with a disk that is full at its first write, its second, and so on."""
    for number in range(1, 1000):
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, number)
            try:
                act(number)
            except OSError as error:
                assert error.errno == errno.ENOSPC and disk.failed
        check(number, disk.failed)
        if not disk.failed:
            return number - 1
    raise AssertionError("it never ends")


def test_a_drawing_on_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    request = Request(("a star",), "vqvae", options=TokenOptions())
    drawn = Drawing(torch.zeros(1, 3, 8, 8), request, "none")
    drawn.save(tmp_path / "star.png")
    before = contents(tmp_path)

    def check(number, failed):
        assert not failed or contents(tmp_path) == before

    other = Drawing(torch.ones(1, 3, 8, 8), request, "none")
    for save in (other.save_new, other.save):
        writes = fails_at_every_write(
            monkeypatch, lambda _, s=save: s(tmp_path / "star.png"), check
        )
        assert writes >= 1
        before = contents(tmp_path)


class Terms(NamedTuple):
    total: torch.Tensor


def small_run(folder, steps=4, **how):
    """A run of a few steps that writes a checkpoint, curves and a frame at each."""
    torch.manual_seed(0)
    return train(
        torch.nn.Linear(3, 2),
        lambda step, generator: torch.randn(4, 3, generator=generator),
        lambda model, batch, generator: Terms(model(batch).square().mean()),
        TrainConfig(steps=steps, batch_size=4, warmup_steps=1),
        folder,
        draw_samples=lambda model: torch.zeros(4, 3, 8, 8),
        sample_every=1,
        checkpoint_seconds=0.0,
        progress=False,
        **how,
    )


def test_archives_on_a_full_disk_leave_what_was_there(tmp_path, monkeypatch):
    run = tmp_path / "a" / "run"
    small_run(run)
    file = archive_run(run, tmp_path / "a" / "run.zip")
    before, unpacked = contents(tmp_path), contents(run)

    def check(number, failed):
        assert not failed or contents(tmp_path) == before

    for out in (None, file):  # a new archive, and one in the place of an older one
        assert fails_at_every_write(monkeypatch, lambda _, o=out: archive_run(run, o), check) > 5
        before = contents(tmp_path)
    home = tmp_path / "home"
    assert fails_at_every_write(monkeypatch, lambda _: restore_run(file, home), check) > 3
    assert contents(home / "run") == unpacked


def test_a_training_on_a_full_disk_warns_and_goes_on_from_what_was_there(tmp_path, monkeypatch):
    whole = small_run(tmp_path / "whole").model.state_dict()

    def act(number):
        folder = tmp_path / str(number)
        small_run(folder, resume=True)

    def check(number, failed):
        folder = tmp_path / str(number)
        if failed:  # whatever of it could not be written: the run goes on and ends the same
            read_record(folder) if (folder / "flight.json").exists() else None
            again = small_run(folder).model.state_dict()
            assert all(torch.equal(again[key], value) for key, value in whole.items())
        assert not list(folder.rglob("*.partial"))
        shutil.rmtree(folder)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        writes = fails_at_every_write(monkeypatch, act, check)
    texts = [str(warning.message) for warning in said]
    assert writes >= 6 and all("could not be saved" in text for text in texts)
    assert sum("No space left on device" in text for text in texts) == writes


def test_weights_on_a_full_disk_leave_what_was_there(stored, tmp_path, monkeypatch):
    found = weights.load(stored)
    weights.save(tmp_path, found.card, found.state, half=False)
    other = {key: 2 * t if t.is_floating_point() else t for key, t in found.state.items()}
    before = contents(tmp_path)

    def act(number):
        weights.save(tmp_path, found.card, other, half=False)

    def check(number, failed):
        again = weights.load(tmp_path / stored.name).state
        assert not failed or contents(tmp_path) == before
        wanted = found.state if failed else other
        assert all(torch.equal(again[key], value) for key, value in wanted.items())

    assert fails_at_every_write(monkeypatch, act, check) == 2

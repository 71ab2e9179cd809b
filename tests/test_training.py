"""The training loop: a run that was stopped, killed or damaged resumes bit for bit, and nothing but
its arguments decides it."""

import copy
import errno
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import nn

import t2ilearn.weights.files
from t2ilearn.training import (
    AveragedWeights,
    TrainConfig,
    TrainingError,
    contact_sheet,
    ema_decay_at,
    is_first_process,
    learning_rate_at,
    precision_for,
    read_record,
    seeded,
    train,
)
from t2ilearn.training.batches import made_ahead
from t2ilearn.training.checkpoint import load_checkpoint
from t2ilearn.training.flight import Curves

CONFIG = TrainConfig(steps=30, batch_size=16, learning_rate=1e-2, warmup_steps=5, ema_decay=0.9)
posix = pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL are POSIX's")


class Loss(NamedTuple):
    error: torch.Tensor
    total: torch.Tensor


def network() -> nn.Module:
    """Every kind of state: matrices, biases, running means, and dropout's global randomness."""
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, 2))
    )


def make_batch(step, generator):
    x = torch.randn(16, 4, generator=generator)
    return {"x": x, "y": torch.stack([x.sum(1), x.prod(1)], 1)}


def compute_loss(model, batch, generator):
    noise = 0.01 * torch.randn(batch["x"].shape, generator=generator)
    error = (model(batch["x"] + noise) - batch["y"]).square().mean()
    return Loss(error, 0.5 * error)


def move_bias(model, batch, step, generator):
    """As when dead codes are restarted: weights change outside the optimiser, at random."""
    if step % 7 == 0:
        with torch.no_grad():
            model[4].bias += 0.01 * torch.randn(2, generator=generator)


def run(run_dir, loss=compute_loss, config=CONFIG, batch=make_batch, wrap=None, **options):
    options = {"after_step": move_bias, "checkpoint_seconds": 0.0, "progress": False, **options}
    model = network() if wrap is None else wrap(network())
    return train(model, batch, loss, config, run_dir, **options)


def saved_digest(run_dir: Path) -> tuple[int, str]:
    """Step and SHA-256 of all tensors on disk: weights, average and the optimiser's moments."""
    _, facts = load_checkpoint(run_dir)
    return facts["steps_done"], facts["sha256"]


def files(run_dir: Path) -> set[str]:
    return {path.name.split("-")[0] for path in run_dir.iterdir()}


WHOLE = {"checkpoint", "checkpoint.json", "flight.json", "frames"}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Bit-exactness is promised on a CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing disturbed: (result, step and digest of its last checkpoint)."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        folder = tmp_path_factory.mktemp("reference")
        return run(folder), saved_digest(folder)


def assert_same(result, run_dir, reference):
    """Same weights, average, moments, buffers and curves as the undisturbed run."""
    expected, digest = reference
    assert not result.stopped and result.steps_done == CONFIG.steps
    assert result.curves == expected.curves
    for key, value in expected.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[key], value), key
    assert saved_digest(run_dir) == digest
    assert files(run_dir) == WHOLE


# ---------------------------------------------------------------- stopping and going on


def stop_in_batch(at):
    def batch(step, generator):
        if step == at:
            raise KeyboardInterrupt
        return make_batch(step, generator)

    return batch


@pytest.mark.parametrize("at", [0, 7, 20, 29])
def test_a_run_stopped_between_steps_resumes_bit_for_bit(tmp_path, reference, at):
    first = run(tmp_path, batch=stop_in_batch(at), checkpoint_seconds=60.0)
    assert first.stopped and first.steps_done == at == saved_digest(tmp_path)[0]
    assert json.loads((tmp_path / "flight.json").read_text(encoding="utf-8"))["stopped"]
    assert_same(run(tmp_path), tmp_path, reference)


@pytest.mark.parametrize("at", [3, 25])
def test_a_run_stopped_within_a_step_resumes_from_the_last_checkpoint(tmp_path, reference, at):
    def loss(model, batch, generator):
        terms = compute_loss(model, batch, generator)  # running means have moved by now
        if len(seen) == at:
            raise KeyboardInterrupt
        seen.append(1)
        return terms

    seen = []
    first = run(tmp_path, loss)
    assert first.stopped and first.steps_done == at
    assert all(p.isfinite().all() for p in first.model.parameters())
    found = load_checkpoint(tmp_path)
    assert found is None if at == 3 else found[1]["steps_done"] == 20
    assert_same(run(tmp_path), tmp_path, reference)


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
def test_ctrl_c_finishes_the_step_and_returns_the_partial_model(tmp_path, reference):
    def after(model, batch, step, generator):
        if step == 13:
            os.kill(os.getpid(), signal.SIGINT)
        move_bias(model, batch, step, generator)

    handler = signal.getsignal(signal.SIGINT)
    first = run(tmp_path, after_step=after, checkpoint_seconds=60.0)
    assert first.stopped and first.steps_done == 14 == saved_digest(tmp_path)[0]
    assert first.curves["step"] == list(range(1, 15))
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same(run(tmp_path), tmp_path, reference)


def test_a_run_stopped_twice_resumes_and_a_finished_run_returns_at_once(tmp_path, reference):
    for at in (11, 22):
        run(tmp_path, batch=stop_in_batch(at))
    assert_same(run(tmp_path), tmp_path, reference)

    def never(model, batch, generator):
        raise AssertionError("a finished run trains no further")

    assert_same(run(tmp_path, never), tmp_path, reference)


# Each moment: (the function that is called for the nth time, n). A checkpoint replaces three files
# (tensors, listing, flight record), and one is written every ten steps.
MOMENTS = [
    ("compute_loss", 7),  # before any checkpoint
    ("compute_loss", 24),
    ("fsync", 4),  # the second checkpoint's tensors lie in a .partial
    ("replace", 1),  # the very first file
    ("replace", 5),  # new tensors, old listing
    ("unlink", 1),  # new listing, old tensors still there
    ("replace", 6),  # before the flight record
]


def killed_at(monkeypatch, function, n):
    """Let the process kill itself when a function is called for the nth time; returns the loss."""

    def dying(*args, **options):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    calls = []
    if function == "compute_loss":
        real = compute_loss
        return dying
    owner = Path if function == "unlink" else os
    real = getattr(owner, function)
    monkeypatch.setattr(owner, function, dying)
    return compute_loss


def in_a_fork(work, seconds=60):
    """How a child process ended that did the work: its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    return pytest.fail(f"the child did not end within {seconds} seconds")


@posix
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda m: f"{m[0]}-{m[1]}")
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(tmp_path, reference, monkeypatch, moment):
    def work():
        run(tmp_path, killed_at(monkeypatch, *moment))

    status = in_a_fork(work)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    assert not (tmp_path / "checkpoint.json").exists() or saved_digest(tmp_path)[0] < CONFIG.steps
    assert_same(run(tmp_path), tmp_path, reference)


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_the_time_between_checkpoints_does_not_change_the_run(tmp_path, reference, seconds):
    assert_same(run(tmp_path, checkpoint_seconds=seconds), tmp_path, reference)


def test_another_seed_gives_another_run(tmp_path, reference):
    run(tmp_path, config=replace(CONFIG, seed=1))
    assert saved_digest(tmp_path) != reference[1]


# ---------------------------------------------------------------- NaN


def nan_at(step):
    """A loss that is NaN at one step."""

    def loss(model, batch, generator):
        terms = compute_loss(model, batch, generator)
        seen.append(1)
        return Loss(terms.error, terms.total * (math.nan if len(seen) == step + 1 else 1))

    seen = []
    return loss


def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, reference):
    with pytest.raises(TrainingError, match=r"step 26 total.* became NaN.*step 20 .*stays"):
        run(tmp_path, nan_at(25))
    tensors, facts = load_checkpoint(tmp_path)
    assert facts["steps_done"] == 20
    assert all(t.isfinite().all() for t in tensors.values())
    assert_same(run(tmp_path), tmp_path, reference)


def test_a_nan_loss_before_any_checkpoint_is_reported_as_such(tmp_path):
    with pytest.raises(TrainingError, match="step 3 .*no checkpoint yet.*learning rate below 0.01"):
        run(tmp_path, nan_at(2))
    assert load_checkpoint(tmp_path) is None


def test_a_nan_loss_on_the_last_step_is_not_saved(tmp_path):
    with pytest.raises(TrainingError, match="step 30"):
        run(tmp_path, nan_at(29))
    assert saved_digest(tmp_path)[0] == 20


def test_a_nan_in_the_gradient_alone_stops_the_run(tmp_path):
    def loss(model, batch, generator):
        total = compute_loss(model, batch, generator).total
        return Loss(total, total + (model[4].bias * 0).square().sum().sqrt())

    with pytest.raises(TrainingError, match="step 1 gradient_norm"):
        run(tmp_path, loss)


def test_updates_skipped_in_float16_leave_finite_curves():
    curves = Curves(steps=4)
    for norm in (1.0, math.inf, 3.0):
        curves.note(("total", "gradient_norm"), [torch.tensor(2.0), norm], torch.device("cpu"))
    last = curves.read(3, lambda x: x, lambda bad: bad == ["gradient_norm"])
    assert last == {"total": 2.0, "gradient_norm": 3.0}
    assert curves.points == {"step": [1, 3], "total": [2.0, 2.0], "gradient_norm": [1.0, 3.0]}


# ---------------------------------------------------------------- damaged checkpoints, full disks


@pytest.fixture
def partial_run(tmp_path):
    """A folder with a checkpoint of step 20."""
    run(tmp_path, batch=stop_in_batch(20))
    return tmp_path


def truncate(folder):
    (file,) = folder.glob("checkpoint-*")
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(folder):
    (file,) = folder.glob("checkpoint-*")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def lose_tensors(folder):
    (file,) = folder.glob("checkpoint-*")
    file.unlink()


def cut_listing(folder):
    file = folder / "checkpoint.json"
    file.write_bytes(file.read_bytes()[:50])


def lose_digest(folder):
    (folder / "checkpoint.json").write_text('{"format": 2, "file": "x"}', encoding="utf-8")


def later_format(folder):
    (folder / "checkpoint.json").write_text('{"format": 3}', encoding="utf-8")


def list_a_list(folder):
    (folder / "checkpoint.json").write_text("[]", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "truncated"),
        (flip_a_bit, "SHA-256"),
        (lose_tensors, "no file"),
        (cut_listing, "checkpoint.json is damaged"),
        (lose_digest, "lacks 'sha256'"),
        (later_format, "format 3"),
        (list_a_list, "is damaged"),
    ],
)
def test_a_damaged_checkpoint_raises_an_error_and_can_be_started_over(
    partial_run, reference, damage, reason
):
    damage(partial_run)
    with pytest.raises(TrainingError, match=f"damaged(.|\n)*{reason}|{reason}") as caught:
        run(partial_run)
    assert "resume=False" in str(caught.value) and "\n" not in str(caught.value)
    assert_same(run(partial_run, resume=False), partial_run, reference)


def make_first_edition(folder):
    """As the first edition wrote it: the same files with format 1."""
    file = folder / "checkpoint.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**facts, "format": 1}), encoding="utf-8")


def make_bare_first_edition(folder):
    (folder / "checkpoint.json").write_text('{"format": 1}', encoding="utf-8")


@pytest.mark.parametrize("make", [make_first_edition, make_bare_first_edition])
def test_a_checkpoint_of_the_first_edition_is_named_as_such(partial_run, reference, make):
    make(partial_run)
    with pytest.raises(TrainingError, match=r"made by the first edition.*resume=False"):
        run(partial_run)
    assert_same(run(partial_run, resume=False), partial_run, reference)


def test_a_checkpoint_of_another_config_or_model_raises_an_error(partial_run):
    before = saved_digest(partial_run)
    with pytest.raises(TrainingError, match="learning_rate 0.01 → 0.1.*resume=False"):
        run(partial_run, config=replace(CONFIG, learning_rate=0.1))
    other = nn.Sequential(nn.Linear(4, 5))
    with pytest.raises(TrainingError, match=r"another model(.|\n)*left over 4.weight"):
        train(other, make_batch, compute_loss, CONFIG, partial_run, progress=False)
    assert saved_digest(partial_run) == before


@pytest.mark.parametrize("file", [1, 2, 3])
def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_continues(
    partial_run, reference, monkeypatch, file
):
    """The disk has room for `file − 1` more files: tensors, listing, flight record."""
    before, written = saved_digest(partial_run), []

    def fsync(descriptor):
        written.append(1)
        if len(written) >= file:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(t2ilearn.weights.files.os, "fsync", fsync)
        with pytest.warns(UserWarning, match="could not be saved.*No space left") as caught:
            result = run(partial_run)
        assert f"step {20 if file < 3 else 30} stays" in str(caught[-1].message)
    assert result.steps_done == CONFIG.steps  # the model is still in memory
    assert saved_digest(partial_run) == before if file < 3 else saved_digest(partial_run)[0] == 30
    assert files(partial_run) == WHOLE and len(list(partial_run.glob("checkpoint-*"))) == 1
    assert_same(run(partial_run), partial_run, reference)


def test_a_frame_that_cannot_be_written_only_warns(tmp_path, reference, monkeypatch):
    def save(self, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.warns(UserWarning, match="frames/0000.0.webp could not be saved"):
        result = run(tmp_path, draw_samples=lambda m: torch.zeros(1, 3, 4, 4), sample_every=10)
    assert_same(result, tmp_path, reference)


# ---------------------------------------------------------------- the loop's parts


def test_averaged_weights_follow_the_formula_and_the_decay_warms_up():
    model, decays = nn.Linear(3, 3), [ema_decay_at(CONFIG, step) for step in range(100)]
    assert decays[0] == 1 / 10 and decays[5] == 6 / 15 and decays[-1] == CONFIG.ema_decay
    average = AveragedWeights(model)
    expected = model.weight.detach().clone().double()
    for decay in decays[:20]:
        with torch.no_grad():
            model.weight += torch.randn(3, 3)
        average.update(decay)
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(average.values["weight"].double(), expected, atol=1e-6, rtol=0)


def test_swapping_the_average_in_restores_the_weights_even_after_an_error():
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    average = AveragedWeights(model)
    average.values["weight"] += 1
    with pytest.raises(ZeroDivisionError), average.swapped_in():
        assert torch.equal(model.weight, before["weight"] + 1)
        raise ZeroDivisionError
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_the_result_has_averaged_parameters_and_the_models_own_buffers(tmp_path):
    result = run(tmp_path)
    tensors, _ = load_checkpoint(tmp_path)
    for name, value in result.model.named_parameters():
        assert torch.equal(value, tensors[f"average/{name}"])
        assert not torch.equal(value, tensors[f"model/{name}"])
    for name, value in result.model.named_buffers():
        assert torch.equal(value, tensors[f"model/{name}"])
    assert not any(key.startswith("average/1.running") for key in tensors)


def test_learning_rate_warms_up_and_falls_by_half_a_cosine():
    config = TrainConfig(steps=110, batch_size=1, learning_rate=2.0, warmup_steps=10)
    rates = [learning_rate_at(config, step) for step in range(110)]
    torch.testing.assert_close(torch.tensor(rates[:10]), torch.arange(1, 11) * 0.2)
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.0) and 0 < rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)
    short = TrainConfig(steps=4, batch_size=1, learning_rate=1.0, warmup_steps=100)
    assert max(learning_rate_at(short, step) for step in range(4)) == 1.0
    assert learning_rate_at(TrainConfig(steps=1, batch_size=1, warmup_steps=0), 0) == 3e-4


def test_gradients_are_clipped_and_the_curve_shows_them_unclipped(tmp_path):
    norms = []

    def after(model, batch, step, generator):
        grads = [p.grad.norm() for p in model.parameters()]
        norms.append(torch.stack(grads).norm().item())

    def loss(model, batch, generator):
        return Loss(*(100 * term for term in compute_loss(model, batch, generator)))

    config = replace(CONFIG, steps=10, gradient_clip=0.5)
    result = run(tmp_path, loss, config, after_step=after)
    assert max(norms) <= 0.5 + 1e-5 and min(result.curves["gradient_norm"]) > 10


def test_weight_decay_acts_on_matrices_only(tmp_path):
    def loss(model, batch, generator):
        nothing = sum((p * 0).sum() for p in model.parameters())
        return Loss(nothing, nothing)

    before = network().state_dict()
    config = replace(CONFIG, steps=10, weight_decay=1.0, ema_decay=0.0)
    model = run(tmp_path, loss, config, after_step=None).model
    for name, value in model.named_parameters():
        if value.ndim >= 2:
            assert value.norm() < before[name].norm() * 0.99
        else:
            assert torch.equal(value, before[name])


def test_training_reduces_the_loss_and_returns_the_model_without_hooks_or_gradients(tmp_path):
    model, before = network(), torch.get_rng_state()
    config = replace(CONFIG, steps=60)
    result = train(model, make_batch, compute_loss, config, tmp_path, progress=False)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's randomness is untouched
    assert result.model is model and not model.training
    assert "forward" not in vars(model) and "_original_forward" not in vars(model)
    assert all(p.grad is None for p in model.parameters())
    assert result.curves["error"][-1] < 0.7 * result.curves["error"][0]


def test_frozen_parameters_do_not_change_and_a_frozen_model_raises_an_error(tmp_path):
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    train(model, make_batch, compute_loss, CONFIG, tmp_path, progress=False)
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="no parameter to train"):
        train(model.requires_grad_(False), make_batch, compute_loss, CONFIG, tmp_path / "none")


def test_tied_parameters_stay_tied_through_a_checkpoint(tmp_path):
    def tied():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4), nn.Linear(4, 2))
        model[2].weight = model[0].weight
        return model

    def go(folder, batch=make_batch):
        return train(tied(), batch, compute_loss, CONFIG, folder, progress=False)

    whole = go(tmp_path / "whole")
    go(tmp_path / "parts", stop_in_batch(21))
    again = go(tmp_path / "parts")
    assert again.model[2].weight is again.model[0].weight
    assert saved_digest(tmp_path / "parts") == saved_digest(tmp_path / "whole")
    assert torch.equal(whole.model[0].weight, again.model[0].weight)


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((7, 5), "fp16"), ((6, 1), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")],
)
def test_the_default_precision_depends_on_the_device(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision_for(torch.device("cuda")) == precision
    assert precision_for(torch.device("cpu")) == "no" == precision_for(torch.device("mps"))


def test_one_process_trains_in_several_precisions_and_losses_are_float32(tmp_path):
    def loss(model, batch, generator):
        prediction = model(batch["x"])
        inner.append(model[0](batch["x"]).dtype)
        outer.append(prediction.dtype)
        error = (prediction - batch["y"]).square().mean()
        return Loss(error, error)

    inner, outer = [], []
    for precision in ("no", "bf16", "no"):
        folder = tmp_path / str(len(inner))
        run(folder, loss, replace(CONFIG, steps=1), precision=precision)
        flight = json.loads((folder / "flight.json").read_text(encoding="utf-8"))
        assert flight["precision"] == precision
    assert inner == [torch.float32, torch.bfloat16, torch.float32]
    assert set(outer) == {torch.float32}
    with pytest.raises(ValueError, match="'fp8'; one of no, bf16, fp16"):
        run(tmp_path / "fp8", precision="fp8")


def test_generators_depend_only_on_seed_step_stream_and_process():
    def draw(*key):
        return torch.rand(3, generator=seeded(*key)).tolist()

    assert draw(0, 1, "batch") == draw(0, 1, "batch", 0)
    keys = [(0, 1, "batch"), (1, 0, "batch"), (0, 2, "batch"), (0, 1, "loss"), (0, 1, "batch", 1)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"steps": 0}, {"batch_size": -1}, {"learning_rate": 0.0}, {"gradient_clip": math.nan}),
        *({"ema_decay": 1.0}, {"warmup_steps": -1}, {"weight_decay": -0.1}),
    ],
)
def test_a_config_out_of_range_raises_an_error(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        run(tmp_path, config=replace(CONFIG, **wrong))


def test_batches_made_ahead_are_the_same_and_their_errors_are_raised(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    device, made = torch.device("cuda", 0), []

    def make(step):
        made.append(step)
        if step == 9:
            raise ValueError("no batch nine")
        return step * 10

    ahead = made_ahead(make, range(3, 7), device)
    assert next(ahead) == 30 and list(ahead) == [40, 50, 60] and made == [3, 4, 5, 6]
    assert list(made_ahead(make, range(4, 4), device)) == []
    with pytest.raises(ValueError, match="batch nine"):
        list(made_ahead(make, range(8, 11), device))


# ---------------------------------------------------------------- wrapped models


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_data_parallel(model):
    return compiled(nn.DataParallel(model))


def with_compiled_part(model):
    model[0] = compiled(model[0])
    return model


OUTER = [compiled, nn.DataParallel, compiled_data_parallel]
WRAPPED = [*OUTER, compiled_in_place, with_compiled_part]


@pytest.mark.parametrize("wrap", WRAPPED, ids=lambda wrap: wrap.__name__)
def test_a_wrapped_model_and_a_plain_one_resume_each_others_runs(tmp_path, reference, wrap):
    for first, second in ((wrap, None), (None, wrap)):
        folder = tmp_path / str(first)
        assert run(folder, batch=stop_in_batch(20), wrap=first).stopped
        tensors, _ = load_checkpoint(folder)
        assert not any("_orig_mod" in key or "module." in key for key in tensors)
        result = run(folder, wrap=second)
        assert saved_digest(folder) == reference[1] and result.curves == reference[0].curves
        assert second is with_compiled_part or (
            result.model.state_dict().keys() == reference[0].model.state_dict().keys()
        )


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("wrap", OUTER, ids=lambda wrap: wrap.__name__)
def test_after_training_the_wrapper_still_computes_with_the_trained_weights(
    tmp_path, wrap, precision
):
    model, config = network(), replace(CONFIG, steps=2)
    wrapped, x = wrap(model), torch.ones(3, 4)
    result = train(wrapped, make_batch, compute_loss, config, tmp_path, precision=precision)
    assert result.model is model and not model.training
    assert torch.equal(wrapped(x), model(x)) and wrapped(x).dtype == torch.float32
    assert "_original_forward" not in vars(model)


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_of_the_callers_own_is_restored(partial_run, tmp_path, fails):
    """In a precision where Accelerate replaces it; also when the checkpoint does not fit."""
    model = network()
    model.forward = own = lambda x: nn.Sequential.forward(model, x)
    config = replace(CONFIG, seed=1)
    if fails:
        with pytest.raises(TrainingError, match="another config"):
            train(model, make_batch, compute_loss, config, partial_run, precision="bf16")
    else:
        config = replace(config, steps=1)
        train(model, make_batch, compute_loss, config, tmp_path / "new", precision="bf16")
    assert model.forward is own and "_original_forward" not in vars(model)


# ---------------------------------------------------------------- only arguments decide a run

LEFT_BEHIND = [
    {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    {"ACCELERATE_MIXED_PRECISION": "bf16"},
    {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_DYNAMO_MODE": "default"},
    {"ACCELERATE_USE_FSDP": "true"},
    {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    {"ACCELERATE_USE_MEGATRON_LM": "true"},
    {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
]
LEFT_RANKS = [
    {"RANK": "1"},
    {"LOCAL_RANK": "1"},
    {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "1"},
    {"RANK": "1", "WORLD_SIZE": ""},
    {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"},
    {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
    {"PMI_RANK": "1", "PMI_SIZE": "2"},
]


def set_environment(monkeypatch, variables):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("variables", LEFT_BEHIND, ids=lambda v: next(iter(v)))
def test_variables_of_accelerate_left_in_the_environment_do_not_change_a_run(
    tmp_path, reference, monkeypatch, variables
):
    set_environment(monkeypatch, variables)
    before = dict(os.environ)
    result = run(tmp_path)
    assert dict(os.environ) == before and result.precision == "no"
    assert_same(result, tmp_path, reference)


@pytest.mark.parametrize("forced", [True, False], ids=["cpu-forced", "device-free"])
@pytest.mark.parametrize("variables", LEFT_RANKS, ids=lambda v: "-".join(v))
def test_ranks_left_in_the_environment_do_not_stop_the_only_process_from_writing(
    tmp_path, reference, monkeypatch, variables, forced
):
    set_environment(monkeypatch, variables)
    if not forced and not torch.cuda.is_available():
        monkeypatch.delenv("ACCELERATE_USE_CPU")
    before = dict(os.environ)
    assert is_first_process()
    result = run(tmp_path)
    assert dict(os.environ) == before
    assert_same(result, tmp_path, reference)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is missing.*torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, not one of 0 … 1"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two', not a number"),
        ({"WORLD_SIZE": "2", "RANK": "first"}, "RANK is 'first', not a number"),
    ],
)
def test_an_incomplete_set_of_processes_raises_an_error(tmp_path, monkeypatch, variables, message):
    set_environment(monkeypatch, variables)
    with pytest.raises(ValueError, match=message):
        is_first_process()
    with pytest.raises(ValueError, match=message):
        run(tmp_path)


def test_another_accelerator_that_accumulates_gradients_does_not_change_a_run(tmp_path, reference):
    other = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with other.accumulate(network()):
        assert not other.sync_gradients  # it ends in the middle of an accumulation
    assert_same(run(tmp_path), tmp_path, reference)
    GradientState._reset_state()


def test_no_grad_around_training_does_not_change_a_run(tmp_path, reference):
    with torch.no_grad():
        result = run(tmp_path)
        assert not torch.is_grad_enabled()
    assert_same(result, tmp_path, reference)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_default_dtype_raises_an_error(tmp_path, dtype):
    torch.set_default_dtype(dtype)
    try:
        with pytest.raises(ValueError, match=rf"default dtype is {dtype}.*model.double\(\)"):
            run(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_around_training_raises_an_error(tmp_path, enabled):
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        with pytest.raises(ValueError, match="within torch.autocast.*precision="):
            run(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_run_in_bfloat16_stays_near_the_run_in_float32(tmp_path, reference):
    """Autocast copies weights for one step: with older copies the loss would not fall alike."""
    exact, curve = reference[0].curves["total"], run(tmp_path, precision="bf16").curves["total"]
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(exact), rtol=0.05, atol=0.02)


# ---------------------------------------------------------------- the flight record


def test_the_flight_record_holds_config_curves_and_frames(tmp_path):
    modes = []

    def draw(model):
        modes.append((model.training, torch.is_grad_enabled(), model[0].weight.clone()))
        return torch.zeros(6, 3, 64, 64)

    result = run(tmp_path, draw_samples=draw, sample_every=10)
    text = (tmp_path / "flight.json").read_text(encoding="utf-8")
    flight = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert flight["frames"] == [
        {"step": step, "file": f"frames/{step:06d}.webp"} for step in (10, 20, 30)
    ]
    for frame in flight["frames"]:
        assert Image.open(tmp_path / frame["file"]).size == (256, 128)
        assert (tmp_path / frame["file"]).stat().st_size < 50_000
    assert flight["curves"] == result.curves
    assert set(flight["curves"]) == {"step", "error", "total", "gradient_norm", "learning_rate"}
    assert len({len(values) for values in flight["curves"].values()}) == 1
    assert flight["steps_done"] == 30 and not flight["stopped"] and flight["seconds_left"] == 0
    assert [mode[:2] for mode in modes] == [(False, False)] * 3
    assert torch.equal(modes[-1][2], result.model[0].weight)  # drawn by the averaged model
    record = read_record(tmp_path)
    assert record.facts == flight and [step for step, _ in record.frames] == [10, 20, 30]
    assert all(frame.size == (256, 128) for _, frame in record.frames)


def test_drawing_frames_does_not_change_the_run(tmp_path, reference):
    def draw(model):
        torch.manual_seed(0)
        return torch.rand(2, 3, 8, 8)

    assert_same(run(tmp_path, draw_samples=draw, sample_every=10), tmp_path, reference)


def test_the_curves_of_long_runs_are_means_over_groups_of_steps():
    curves = Curves(steps=1200)
    for step in range(1, 1201):
        curves.note(("total",), [float(step)], torch.device("cpu"))
        if step % 10 == 0:
            curves.read(step, lambda x: x, lambda bad: False)
    assert len(curves.points["step"]) == 400 and curves.points["step"][:2] == [3, 6]
    assert curves.points["total"][:2] == [2.0, 5.0]


def test_the_progress_bar_shows_the_loss_and_the_time_of_the_end(tmp_path, capsys):
    run(tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "30/30" in shown and "loss " in shown and "ends " in shown
    run(tmp_path, progress=True)
    assert capsys.readouterr().err == ""  # nothing left to do, nothing to show


def test_a_contact_sheet_places_pictures_row_by_row():
    pictures = torch.full((5, 3, 2, 2), -1.0)
    pictures[4] = 1.0
    pictures[1, 0] = 1.0
    sheet = contact_sheet(pictures)
    assert sheet.size == (8, 4)
    assert sheet.getpixel((0, 0)) == (0, 0, 0) and sheet.getpixel((2, 0)) == (255, 0, 0)
    assert sheet.getpixel((0, 2)) == (255, 255, 255)
    assert contact_sheet(torch.zeros(40, 3, 2, 2)).size == (8, 8)


def test_a_checkpoint_is_safetensors_and_its_digest_is_listed(tmp_path):
    run(tmp_path)
    (file,) = tmp_path.glob("checkpoint-*")
    assert file.suffix == ".safetensors"
    listing = json.loads((tmp_path / "checkpoint.json").read_text(encoding="utf-8"))
    assert listing["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


# ---------------------------------------------------------------- other devices


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_on_a_gpu_a_run_learns_stops_and_resumes(tmp_path, monkeypatch, precision):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    first = run(tmp_path, batch=stop_in_batch(20), after_step=None, precision=precision)
    assert first.stopped and first.steps_done == 20
    result = run(tmp_path, after_step=None, precision=precision)
    flight = json.loads((tmp_path / "flight.json").read_text(encoding="utf-8"))
    assert flight["device"].startswith("cuda") and flight["precision"] == precision
    assert {p.device.type for p in result.model.parameters()} == {"cpu"}
    assert result.curves["error"][-1] < result.curves["error"][0]

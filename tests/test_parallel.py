"""Data-parallel training: two processes, each with half a batch, learn what one learns from all.

The processes are real and communicate by gloo. One program imports everything once and forks them;
the tests read what they left.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from t2ilearn import training, weights
from t2ilearn.models.distributed import num_ranks, sum_over_ranks
from t2ilearn.systems import STAGES
from t2ilearn.systems import stage as stages

ROOT = Path(__file__).resolve().parent.parent
TINY = 1e-9
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="fork and the loopback's name are Linux's"),
]

# Children of one process that has imported everything: two that train together, one alone; and two
# that torchrun's agent starts with the command line.
PROGRAM = '''
import hashlib, json, os, sys
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # which the first optimiser imports: once here, not in each child
from safetensors.torch import save_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from t2ilearn import cli, training
from t2ilearn.models import dalle, dvae, vqvae
from t2ilearn.models.tokens import END, PAD, null_caption
from t2ilearn.models.transformer import PriorConfig
from t2ilearn.systems import STAGES
from t2ilearn.systems import stage as stages
from t2ilearn.training import TrainConfig
from t2ilearn.training.checkpoint import load_checkpoint

torch.set_num_threads(1)
CONFIG = TrainConfig(steps=4, batch_size=4, learning_rate=1e-2, warmup_steps=0, gradient_clip=0.5)
SIZES = {"resolution": 16, "channels": (8, 16), "blocks": 1, "codebook_size": 12, "code_dim": 4}


def pictures(generator):
    return 2 * torch.rand(8, 3, 16, 16, generator=generator, dtype=torch.float64) - 1


def half(*parts):
    """This process's half of the joint batch; all of it, if there is only one."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return tuple(part.chunk(world)[rank] for part in parts)


def train_vqvae(folder, quantizer):
    model = vqvae.VQVAE.from_config(vqvae.VQVAEConfig(**SIZES, quantizer=quantizer)).double()

    def make_batch(step, _):
        return *half(pictures(torch.Generator().manual_seed(step))), step > 0

    def compute_loss(model, batch, generator):
        x, quantize = batch
        return vqvae.vqvae_loss(x, model(x, quantize))

    def after_step(model, batch, step, generator):
        book = model.quantizer
        if step == 0:
            model.kmeans_init(batch[0], generator)
        if step == 1:
            book.counts[3:8] = 0.0
            assert model.restart_dead_codes(batch[0], generator) >= 5
        book.register_buffer(f"book_{step}", book.codebook.detach().clone(), persistent=False)
        seen[f"book_{step}"] = book.codebook.detach().clone()

    seen = {}
    return *training.train(
        model, make_batch, compute_loss, CONFIG, folder, after_step=after_step, progress=False
    )[:2], seen


def train_dvae(folder):
    model = dvae.DVAE(dvae.DVAEConfig(**SIZES)).double()

    def make_batch(step, _):
        generator = torch.Generator().manual_seed(step)
        noise = dvae.gumbel_noise((8, 12, 4, 4), generator, torch.float64)
        return *half(pictures(generator), noise), step / 4

    def compute_loss(model, batch, generator):
        x, noise, share = batch
        return dvae.dvae_loss(x, model(x, dvae.temperature_at(share), noise), 1 + share)

    return *training.train(
        model, make_batch, compute_loss, CONFIG, folder, progress=False
    )[:2], {}


def train_dalle(folder):
    model = dalle.DALLE(PriorConfig(7, 3, 8, 2, 2, vocabulary=11, text_length=6)).double()

    def make_batch(step, _):
        generator = torch.Generator().manual_seed(step)
        caption = torch.randint(3, 11, (8, 6), generator=generator)
        caption[:4, 2], caption[:4, 3:] = END, PAD  # shorter captions in the first half
        caption[4:, 5] = END
        caption[1], caption[6] = null_caption(2, 6)
        if step == 2:
            caption[:4] = null_caption(4, 6)  # no captions in the first half
        if step == 3:
            caption[:] = null_caption(8, 6)  # no captions at all
        return half(torch.randint(7, (8, 9), generator=generator), caption)

    def compute_loss(model, batch, generator):
        indices, caption = batch
        return dalle.dalle_loss(model(indices, caption), caption, indices)

    return *training.train(
        model, make_batch, compute_loss, CONFIG, folder, progress=False
    )[:2], {}


def everything(who, out):
    cases = {
        "ema": lambda folder: train_vqvae(folder, "ema"),
        "gradient": lambda folder: train_vqvae(folder, "gradient"),
        "dvae": train_dvae,
        "dalle": train_dalle,
    }
    for name, case in cases.items():
        torch.manual_seed(0)
        shared = who if who == "alone" else "together"
        model, curves, seen = case(out / shared / name)
        tensors = {f"averaged/{k}": v.clone() for k, v in model.state_dict().items()} | seen
        if who != "1":
            tensors |= load_checkpoint(out / shared / name)[0]
        save_file(tensors, out / f"{name}-{who}.safetensors")
        (out / f"{name}-{who}.json").write_text(json.dumps(curves), encoding="utf-8")


out, port = Path(sys.argv[1]), sys.argv[2]
children = []
for who in ("0", "1", "alone"):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if who != "alone":
                os.environ |= {"RANK": who, "LOCAL_RANK": who, "WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            everything(who, out)
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    children.append(child)
if any(os.waitpid(child, 0)[1] for child in children):
    sys.exit("a process of the three failed")


def command(arguments):
    """As `t2ilearn` under torchrun, without measurements; notes which pictures a process uses."""

    def noting(model, make_batch, *rest, **options):
        def make(step, generator):
            batch = make_batch(step, generator)
            seen.append(hashlib.sha256(batch[0].numpy().tobytes()).hexdigest())
            return batch

        return train(model, make, *rest, **options)

    train, seen, rank = stages.train, [], os.environ["RANK"]
    stages.train = noting
    measured = {"measured by rank": int(rank)}
    STAGES["vqvae"] = replace(STAGES["vqvae"], evaluate=lambda job, model: measured, bars={})
    sys.argv = ["t2ilearn", *arguments]
    cli.main()
    Path(f"seen-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")


launch = LaunchConfig(
    1, 1, 2, rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{sys.argv[3]}",
    rdzv_configs={"rank": 0}, start_method="fork", max_restarts=0, monitor_interval=0.1,
)
elastic_launch(launch, command)(sys.argv[4:])
'''


def free_port() -> str:
    """A port that is not in use now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def finish(command, folder, **environment):
    """Run a command that may start others; one that hangs is ended with all that it started."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU")
    clean = {k: v for k, v in os.environ.items() if k not in ours}
    settings = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    paths = {"PYTHONPATH": str(ROOT), **settings, **environment}
    started = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=clean | paths,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = started.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        printed, _ = started.communicate()
        pytest.fail(f"did not finish:\n{printed[-3000:]}")
    assert started.returncode == 0, printed[-5000:]
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the program ran, with all that its processes left."""
    folder = tmp_path_factory.mktemp("parallel")
    train = ["train", "vqvae", "--preset", "tiny", "--stage", "vqvae", "--steps", "4"]
    finish(["-c", PROGRAM, folder, free_port(), free_port(), *train], folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """What the two processes that trained together, and the one alone, left: (tensors, curves)."""

    def read(name, who):
        curves = (folder / f"{name}-{who}.json").read_text(encoding="utf-8")
        return load_file(folder / f"{name}-{who}.safetensors"), json.loads(curves)

    return read


CASES = pytest.mark.parametrize("name", ["ema", "gradient", "dvae", "dalle"])


def difference(a, b):
    assert a.dtype == b.dtype == torch.float64 and a.shape == b.shape
    return (a - b).abs().max().item()


@CASES
def test_two_processes_with_half_a_batch_learn_what_one_learns_from_all_of_it(trained, name):
    """Weights, their averages, the optimiser's moments; of a codebook its counts and sums."""
    (together, _), (alone, _) = trained(name, "0"), trained(name, "alone")
    assert together.keys() == alone.keys()
    for key, value in alone.items():
        if not key.endswith("/step"):
            assert difference(together[key], value) <= TINY, key
    assert any(key.startswith("optimizer/") for key in alone)
    if name == "ema":
        assert {"model/quantizer.counts", "model/quantizer.sums"} <= alone.keys()


@CASES
def test_both_processes_end_with_the_same_model(trained, name):
    (first, _), (second, _) = trained(name, "0"), trained(name, "1")
    for key, value in second.items():
        assert torch.equal(first[key], value), key
    assert any(key.startswith("averaged/") for key in second)


@CASES
def test_the_curves_are_means_over_the_joint_batch(trained, name):
    (_, first), (_, second), (_, alone) = (trained(name, who) for who in ("0", "1", "alone"))
    assert first == second and first.keys() == alone.keys() and first["step"] == [1, 2, 3, 4]
    for term, values in alone.items():
        assert first[term] == pytest.approx(values, rel=0, abs=TINY), term
    if name == "dalle":
        assert first["text"][0] > 1 and first["text"][2] > 1 and first["text"][3] == 0


@pytest.mark.parametrize("name", ["ema", "gradient"])
def test_the_codebook_is_initialised_and_restarted_from_encodings_of_all_processes(trained, name):
    (first, _), (second, _), (alone, _) = (trained(name, who) for who in ("0", "1", "alone"))
    for step in range(4):
        book = f"book_{step}"
        assert torch.equal(first[book], second[book]), step
        assert difference(first[book], alone[book]) <= TINY, step
    moved = (alone["book_1"] - alone["book_0"]).abs().amax(1)
    assert (moved[3:8] > 1e-3).all()  # the five dead codes


def test_torchrun_trains_on_different_batches_and_writes_one_set_of_files(folder):
    """`torchrun --nproc-per-node 2 -m t2ilearn train vqvae --stage vqvae --steps 4`."""
    (run,) = (folder / "runs").iterdir()
    (checkpoint,) = run.glob("checkpoint-*.safetensors")
    assert run.name == "vqvae-tiny" and {path.name for path in run.iterdir()} == {
        *("vqvae-tiny.safetensors", "vqvae-tiny.json", "inputs.json", "flight.json"),
        *("frames", "checkpoint.json", checkpoint.name),
    }
    card = weights.load(run / "vqvae-tiny.safetensors").card
    assert card.steps == 4 and card.metrics == {"measured by rank": 0}
    first, second = (
        json.loads((folder / f"seen-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)
    )
    assert len(first) == len(second) == 4 and len({*first, *second}) == 8


# ---------------------------------------------------------------- who writes


def test_without_a_world_size_this_process_is_the_first_and_only_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert training.is_first_process() and num_ranks() == 1
    for world, rank, first in (("2", "0", True), ("2", "1", False), ("1", "1", True)):
        monkeypatch.setenv("WORLD_SIZE", world)
        monkeypatch.setenv("RANK", rank)
        assert training.is_first_process() is first
    x = torch.ones(2)
    assert sum_over_ranks(x) is x and x.tolist() == [1, 1]


def test_only_the_first_process_claims_a_folder_and_writes_weights(tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(stages, "is_first_process", lambda: False)
    path = stages.train_stage(STAGES["vqvae"], "tiny", tmp_path, {}, steps=1, progress=False)
    assert path == tmp_path / "vqvae-tiny" / "vqvae-tiny.safetensors" and not path.exists()
    assert not (path.parent / stages.RECORD).exists()
    AcceleratorState._reset_state(reset_partial_state=True)

"""Where and in which precision a run computes: device, processes, mixed precision.

Paper: mixed precision with loss scaling (Micikevicius et al. 2018). Accelerate does the work; it
also reads some sixty environment variables, and a variable that another program left behind must
not change a run. Of the environment only this counts:

    CUDA_VISIBLE_DEVICES       which GPUs there are
    ACCELERATE_USE_CPU=1       the CPU, although there is a GPU
    ACCELERATE_TORCH_DEVICE    a device by its name in torch
    WORLD_SIZE above 1         several processes, as `torchrun` starts them; then RANK, LOCAL_RANK,
                               LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT too

Without a WORLD_SIZE above 1 this process is the only one, whatever RANK, LOCAL_RANK, or the
variables of Slurm and MPI contain. Precision, gradient accumulation, compilation and sharding are
decided by arguments only.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2ilearn.training.wrappers import is_data_parallel, unwrap

PRECISIONS = ("no", "bf16", "fp16")
_DEVICE_VARIABLES = {"ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_DEBUG_MODE"}
_PROCESS_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_OTHER_LAUNCHERS = ("PMI_", "MPI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")


def num_processes() -> int:
    """How many processes train together.

    Raises:
        ValueError: if WORLD_SIZE is not a number, or RANK is missing beside it.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    count = _number("WORLD_SIZE", "1")
    if count > 1 and not 0 <= _number("RANK", "-1") < count:
        raise ValueError(
            f"WORLD_SIZE={count} in the environment means that {count} processes train together, "
            f"but RANK is {os.environ.get('RANK', 'missing')}, not one of 0 … {count - 1}. Start "
            "them with torchrun, which sets both, or remove WORLD_SIZE from the environment."
        )
    return max(1, count)


def is_first_process() -> bool:
    """Whether this process is the one that writes files: the only one, or the first of several."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return num_processes() == 1 or _number("RANK", "0") == 0


def precision_for(device: torch.device) -> str:
    """'bf16' from compute capability 8.0, 'fp16' on older CUDA devices, elsewhere 'no'.

    A T4 (7.5) only emulates bf16, and most CPUs are slower with it than in float32.
    """
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def make_accelerator(precision: str | None) -> Accelerator:
    """An Accelerator in the precision asked for, or the one that suits the device.

    Raises:
        ValueError: if there is no such precision, or the environment describes no set of processes.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}; one of {', '.join(PRECISIONS)}.")
    # Without a GPU Accelerate takes `torchrun` for so many runs of one process, unless told `cpu`.
    no_gpu = num_processes() > 1 and not torch.cuda.is_available()
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or no_gpu
    with only_device_variables():
        chosen = precision or precision_for(PartialState(cpu=cpu).device)
        AcceleratorState._reset_state()  # else one notebook could train in one precision only
        accelerator = Accelerator(mixed_precision=chosen, cpu=cpu)
    if accelerator.num_processes != num_processes():
        raise ValueError(
            f"The environment tells of {num_processes()} processes, but Accelerate has set up "
            f"{accelerator.num_processes}. Start them with torchrun, and train before anything "
            "else in the program uses Accelerate."
        )
    # Another Accelerator of this program may have stopped between two updates.
    accelerator.gradient_state._set_sync_gradients(True)
    return accelerator


def prepare(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[nn.Module, Any]:
    """Model and optimiser as the training step calls them: in its precision, over all processes.

    Of several processes each trains the whole model, and Accelerate shares gradients among them:
    `DataParallel` and `DistributedDataParallel` around the model are taken off first.
    """
    if accelerator.num_processes > 1 and is_data_parallel(model):
        model = unwrap(model)
    with only_device_variables():
        return accelerator.prepare(model, optimizer)


@contextmanager
def only_device_variables() -> Iterator[None]:
    """Within the block the environment has no variable that changes more than the device."""
    alone = num_processes() == 1

    def counts(name: str) -> bool:
        if name.startswith("ACCELERATE_"):
            return name in _DEVICE_VARIABLES
        return not (name.startswith(_OTHER_LAUNCHERS) or (alone and name in _PROCESS_VARIABLES))

    hidden = {name: value for name, value in os.environ.items() if not counts(name)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def back_home(model: nn.Module) -> Iterator[None]:
    """After the block the model is on its device of before, with the `forward` of before.

    Accelerate replaces `forward` by one in mixed precision. Gradients are removed.
    """
    plain = unwrap(model)
    home = next((p.device for p in plain.parameters()), torch.device("cpu"))
    names = ("forward", "_original_forward")
    kept = [(m, {n: vars(m)[n] for n in names if n in vars(m)}) for m in (model, plain)]
    try:
        yield
    finally:
        for module, before in kept:
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(before)
        plain.zero_grad()
        plain.to(home)


def attention_on(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU attention by plain matrix products: a step of the `book` prior in bfloat16 took half
    the time so, on one thread with six narrow heads; with three wide ones a tenth less."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _number(name: str, default: str) -> int:
    """An environment variable as an integer; empty counts as missing."""
    value = os.environ.get(name) or default
    try:
        return int(value)
    except ValueError:
        raise ValueError(
            f"The environment variable {name} is {value!r}, not a number. torchrun sets it; "
            "without several processes, remove it."
        ) from None

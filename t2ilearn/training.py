"""One training loop for every system of the book, in the open: read `train` from top to bottom.

    terms   = compute_loss(model, batch, generator)         # what a chapter is about
    weights = weights − η · AdamW(clip(∇ terms.total))
    average = μ · average + (1 − μ) · weights               # what is evaluated and shipped

Papers: AdamW (Loshchilov & Hutter 2019), cosine schedule (Loshchilov & Hutter 2017), averaged
weights (Polyak & Juditsky 1992), mixed precision with loss scaling (Micikevicius et al. 2018).

| symbol | name |
|---|---|
| η | `learning_rate_at(config, step)`, at most `TrainConfig.learning_rate` |
| μ | `ema_decay_at(config, step)`, at most `TrainConfig.ema_decay` |
| ‖∇‖ | `gradient_norm` in the curves, before clipping |

Differs from the papers in: β₂ = 0.99, a memory that suits runs of a few thousand steps; weight
decay on matrices and kernels only; the average's decay warms up.

Every random number comes from (seed, step), so that a run that was stopped, or killed, goes on as
if nothing had happened: bit for bit on a CPU.
"""

import hashlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env, send_to_device
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from t2ilearn.flight import Run, TrainingError

__all__ = ["TrainConfig", "TrainResult", "TrainingError", "train"]

BETAS = (0.9, 0.99)
READ_EVERY = 10  # steps between looks at the loss


@dataclass(frozen=True)
class TrainConfig:
    """What decides a run. `batch_size` is for the recipe's `make_batch`, on each process."""

    steps: int
    batch_size: int
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 100
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0


class TrainResult(NamedTuple):
    """The trained model: averaged weights, evaluation mode, on the device where it was before.

    `curves` maps "step", each loss term, "gradient_norm" and "learning_rate" to lists of equal
    length; `seconds` counts all sittings; `stopped` says that the run was interrupted;
    `precision` is "no" (float32), "bf16" or "fp16".
    """

    model: nn.Module
    curves: dict[str, list[float]]
    steps_done: int
    seconds: float
    stopped: bool
    precision: str


def train(
    model: nn.Module,
    make_batch: Callable[[int, torch.Generator], Any],
    compute_loss: Callable[[nn.Module, Any, torch.Generator], Any],
    config: TrainConfig,
    run_dir: str | Path,
    *,
    after_step: Callable[[nn.Module, Any, int, torch.Generator], None] | None = None,
    draw_samples: Callable[[nn.Module], Tensor] | None = None,
    sample_every: int = 500,
    checkpoint_seconds: float = 60.0,
    betas: tuple[float, float] = BETAS,
    precision: str | None = None,
    progress: bool = True,
    resume: bool = True,
) -> TrainResult:
    """Train a model in place; go on from the checkpoint in `run_dir` if there is one.

    Args:
        model: where two play against each other, its `players` are both; their gradients are then
            clipped apart, and `gradient_norm` is the first one's.
        make_batch: (step, generator) → any nest of tensors; it is moved to the device. On a GPU
            another thread makes the next batch while this one trains.
        compute_loss: (model, batch, generator) → NamedTuple of scalars, one of them `total`.
            Under data-parallel training gradients flow only through `model(...)` itself.
        run_dir: gets checkpoints, `flight.json` and `frames/`; see `flight`.
        after_step: (model, batch, step, generator), after the update; dead codes are revived here.
            Under data-parallel training buffers follow the first process.
        draw_samples: averaged model, on the device → pictures (B, 3, H, W) in [−1, 1], kept small
            as a frame every `sample_every` steps.
        checkpoint_seconds: least time between checkpoints.
        betas: AdamW's memories of gradient and of its square; players want a shorter first one.
        precision: "no" (float32), "bf16" or "fp16"; by default what suits the device.
        resume: False starts over.

    Ctrl-C finishes the step, writes a checkpoint and returns what there is; a second one does not
    wait for the step. Of several processes all end at once; the last checkpoint stays. All
    generators are on the CPU.

    Raises:
        TrainingError: if a loss or gradient is NaN or infinite (the last good checkpoint stays),
            or the checkpoint is damaged or of another config or model.
        ValueError: if the config makes no sense.
    """
    _check(config)
    accelerator, home = _accelerator(precision), _device_of(model)
    optimizer = _adamw(model.to(accelerator.device), config, betas)
    bare, (model, optimizer) = model, accelerator.prepare(model.train(), optimizer)
    average = AveragedWeights(bare)
    run = Run(bare, optimizer, average, config, Path(run_dir), accelerator)
    if resume:
        run.restore()
    with _own_randomness(accelerator), _interrupt_between_steps(accelerator) as interrupt:
        try:
            for step, batch in _batches(make_batch, run, progress):
                generator = seeded(config.seed, step, "loss", accelerator.process_index)
                torch.manual_seed(generator.initial_seed())  # dropout takes no generator
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(config, step)

                run.between_steps = False
                with accelerator.autocast(), _attention_on(accelerator.device):
                    terms = compute_loss(model, batch, generator)
                optimizer.zero_grad()
                accelerator.backward(terms.total)
                norm = _clip(bare, config.gradient_clip, accelerator)
                optimizer.step()
                average.update(ema_decay_at(config, step))
                if after_step is not None:
                    after_step(bare, batch, step, generator)
                run.finish_step(terms, norm)

                if run.done % READ_EVERY == 0 or run.done == config.steps or interrupt.wanted:
                    run.read_losses()
                    run.checkpoint(checkpoint_seconds)
                if draw_samples is not None and run.done % sample_every == 0:
                    run.draw_frame(draw_samples)
                if interrupt.wanted:
                    run.stopped = True
                    break
        except KeyboardInterrupt:
            if accelerator.num_processes > 1:  # the others may wait for us in the middle of a step
                raise
            run.stopped = True
        finally:
            _unwrap(bare, home)
        # Within a step, weights or buffers may have moved already: the last checkpoint is truer.
        if run.between_steps:
            run.read_losses()
            run.checkpoint()
    accelerator.wait_for_everyone()
    average.store()
    return TrainResult(
        bare.eval(),
        run.curves.points,
        run.done,
        run.seconds(),
        run.stopped,
        accelerator.mixed_precision,
    )


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero (Loshchilov & Hutter 2017, Eq. 5)."""
    warmup = min(config.warmup_steps, config.steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def ema_decay_at(config: TrainConfig, step: int) -> float:
    """The average's decay: a short memory at first, else it still holds the random start."""
    return min(config.ema_decay, (1 + step) / (10 + step))


def seeded(seed: int, step: int, stream: str, process: int = 0) -> torch.Generator:
    """A CPU generator that depends on these four and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{step}/{stream}/{process}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def is_first_process() -> bool:
    """Whether this process is the one that writes files: the only one, or the first of several."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def precision_for(device: torch.device) -> str:
    """'bf16' from compute capability 8.0, 'fp16' on older CUDA devices, elsewhere 'no'.

    A T4 (7.5) only emulates bf16, and most CPUs are slower with it than in float32.
    """
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


class AveragedWeights:
    """Exponential moving average of a model's parameters (Polyak & Juditsky 1992).

    Buffers are the model's own: a count or a codebook that is already a running mean would lag
    twice if it were averaged again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.live = dict(model.named_parameters())
        self.values = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """values ← decay · values + (1 − decay) · live."""
        torch._foreach_lerp_(list(self.values.values()), list(self.live.values()), 1 - decay)

    @torch.no_grad()
    def store(self) -> None:
        """Overwrite the model's parameters by their averages."""
        for name, parameter in self.live.items():
            parameter.copy_(self.values[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the model has the averages; afterwards its own values again."""
        kept = {name: p.detach().clone() for name, p in self.live.items()}
        self.store()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.live.items():
                    parameter.copy_(kept[name])


def _batches(
    make_batch: Callable[[int, torch.Generator], Any], run: Run, progress: bool
) -> Iterator[tuple[int, Any]]:
    """(step, batch on the device) for each step that is left, with a progress bar."""
    config, accelerator, device = run.config, run.accelerator, run.accelerator.device

    def make(step: int) -> Any:
        return make_batch(step, seeded(config.seed, step, "batch", accelerator.process_index))

    steps = range(run.done, config.steps)
    hidden = not (progress and accelerator.is_main_process and steps)
    options = {"initial": run.done, "disable": hidden, "unit": "step", "mininterval": 0.5}
    with tqdm(total=config.steps, **options) as run.bar:
        for step, batch in zip(steps, _made_ahead(make, steps, device), strict=True):
            yield step, send_to_device(batch, device, non_blocking=device.type == "cuda")
            run.bar.update()


def _made_ahead(make: Callable[[int], Any], steps: range, device: torch.device) -> Iterator[Any]:
    """make(step) for each step; on a GPU each is made while the one before is being used."""
    if device.type != "cuda" or not steps:  # on a CPU the two would only compete
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as thread:
        coming = thread.submit(make, steps[0])
        for step in steps:
            batch = coming.result()
            if step + 1 in steps:
                coming = thread.submit(make, step + 1)
            yield batch


def _device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter lives."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _unwrap(model: nn.Module, home: torch.device) -> None:
    """Bring a model home without gradients and without Accelerate's mixed-precision forward."""
    for name in ("forward", "_original_forward"):
        model.__dict__.pop(name, None)
    model.zero_grad()
    model.to(home)


@dataclass
class _Interrupt:
    """Whether Ctrl-C was pressed."""

    wanted: bool = False


@contextmanager
def _interrupt_between_steps(accelerator: Accelerator) -> Iterator[_Interrupt]:
    """Within the block the first Ctrl-C only sets `wanted`; the next raises as ever."""
    interrupt = _Interrupt()
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or accelerator.num_processes > 1:  # only a main thread can take signals
        yield interrupt
        return

    def take(number: int, frame: Any) -> None:
        if interrupt.wanted:
            raise KeyboardInterrupt
        interrupt.wanted = True

    before = signal.signal(signal.SIGINT, take)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _own_randomness(accelerator: Accelerator) -> Iterator[None]:
    """Within the block torch's global generator is ours; afterwards the caller's again."""
    device = accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _attention_on(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU attention by plain matrix products: a step of the `book` prior in bfloat16 took half
    the time so, on one thread with six narrow heads; with three wide ones a tenth less."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _accelerator(precision: str | None) -> Accelerator:
    """An Accelerator in the precision asked for, or the one that suits the device."""
    choices = ("no", "bf16", "fp16")
    if precision is not None and precision not in choices:
        raise ValueError(f"Unknown precision {precision!r}; one of {', '.join(choices)}.")
    # Without a GPU Accelerate takes `torchrun` for so many runs of one process, unless told `cpu`.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.cuda.is_available())
    chosen = precision or precision_for(PartialState(cpu=cpu).device)
    AcceleratorState._reset_state()  # else one notebook could train in one precision only
    return Accelerator(mixed_precision=chosen, cpu=cpu)


def _adamw(model: nn.Module, config: TrainConfig, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels, but no bias and no normalisation's gain."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("The model has no parameter to train.")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = {p.device.type for p in trained} <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)


def _clip(model: nn.Module, limit: float, accelerator: Accelerator) -> Tensor:
    """Shorten each player's gradient to `limit`; returns the length that the first one's had."""
    accelerator.unscale_gradients()
    players = getattr(model, "players", (model,))
    return [nn.utils.clip_grad_norm_(player.parameters(), limit) for player in players][0]


def _check(config: TrainConfig) -> None:
    """Raise `ValueError` if a config makes no sense."""
    for name in ("steps", "batch_size", "learning_rate", "gradient_clip"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be above 0, not {getattr(config, name)}.")
    for name in ("weight_decay", "warmup_steps", "seed"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must be at least 0, not {getattr(config, name)}.")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), not {config.ema_decay}.")

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

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from t2ilearn.training.batches import batches, seeded
from t2ilearn.training.config import TrainConfig, check_run
from t2ilearn.training.device import attention_on, back_home, make_accelerator, prepare
from t2ilearn.training.ema import AveragedWeights, ema_decay_at
from t2ilearn.training.flight import Run
from t2ilearn.training.optimizer import (
    BETAS,
    clip_gradients,
    learning_rate_at,
    make_optimizer,
    set_learning_rate,
)
from t2ilearn.training.session import own_state, steps_of
from t2ilearn.training.wrappers import unwrap

__all__ = ["TrainConfig", "TrainResult", "train"]

READ_EVERY = 10  # steps between looks at the loss


class TrainResult(NamedTuple):
    """The trained model: averaged weights, evaluation mode, on the device where it was before.

    `model` comes without the wrappers that were around it (`torch.compile`, `DataParallel`), so
    that its state has plain keys. `curves` maps "step", each loss term, "gradient_norm" and
    "learning_rate" to lists of equal length; `seconds` counts all sittings; `stopped` says that the
    run was interrupted; `precision` is "no" (float32), "bf16" or "fp16".
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
        model: with wrappers (`torch.compile`) or without. A generator and a discriminator that
            train together are one model, whose `networks` are both; their gradients are then
            clipped apart, and `gradient_norm` is the first one's.
        make_batch: (step, generator) → any nest of tensors; it is moved to the device. On a GPU
            another thread makes the next batch while this one trains.
        compute_loss: (model, batch, generator) → NamedTuple of scalars, one of them `total`.
            Under data-parallel training gradients flow only through `model(...)` itself.
        run_dir: gets checkpoints, `flight.json` and `frames/`; see `checkpoint` and `flight`.
        after_step: (model, batch, step, generator), after the update; dead codes are restarted
            here. The model comes without wrappers. Under data-parallel training buffers follow
            the first process.
        draw_samples: averaged model, on the device → pictures (B, 3, H, W) in [−1, 1], kept small
            as a frame every `sample_every` steps.
        checkpoint_seconds: least time between checkpoints.
        betas: AdamW's memories of gradient and of its square; a generator and its discriminator
            need a shorter first one.
        precision: "no" (float32), "bf16" or "fp16"; by default what suits the device.
        resume: False starts over.

    Ctrl-C finishes the step, writes a checkpoint and returns what there is; a second one does not
    wait for the step. Of several processes all end at once; the last checkpoint stays. All
    generators are on the CPU. Of the environment only the variables listed in `device` count.

    Raises:
        TrainingError: if a loss or gradient is NaN or infinite (the last good checkpoint stays),
            or the checkpoint is damaged, of another config or model, or of the first edition.
        ValueError: if the config makes no sense, or torch's default dtype is not float32.
    """
    check_run(config)
    plain, accelerator = unwrap(model), make_accelerator(precision)
    with back_home(model), own_state(accelerator):
        optimizer = make_optimizer(plain.to(accelerator.device), config, betas)
        model, optimizer = prepare(model.train(), optimizer, accelerator)
        average = AveragedWeights(plain)
        run = Run(plain, optimizer, average, config, Path(run_dir), accelerator)
        if resume:
            run.restore()
        with steps_of(run) as interrupt:
            for step, batch in batches(make_batch, run, progress):
                generator = seeded(config.seed, step, "loss", accelerator.process_index)
                torch.manual_seed(generator.initial_seed())  # dropout takes no generator
                set_learning_rate(optimizer, learning_rate_at(config, step))

                run.begin_step()
                with accelerator.autocast(), attention_on(accelerator.device):
                    terms = compute_loss(model, batch, generator)
                optimizer.zero_grad()
                accelerator.backward(terms.total)
                norm = clip_gradients(plain, config.gradient_clip, accelerator)
                optimizer.step()
                average.update(ema_decay_at(config, step))
                if after_step is not None:
                    after_step(plain, batch, step, generator)
                run.finish_step(terms, norm)

                if run.done % READ_EVERY == 0 or run.done == config.steps or interrupt.wanted:
                    run.read_losses()
                    run.checkpoint(checkpoint_seconds)
                if draw_samples is not None and run.done % sample_every == 0:
                    run.draw_frame(draw_samples)
                if interrupt.wanted:
                    run.stopped = True
                    break
    accelerator.wait_for_everyone()
    average.store()
    return TrainResult(
        plain.eval(),
        run.curves.points,
        run.done,
        run.seconds(),
        run.stopped,
        accelerator.mixed_precision,
    )

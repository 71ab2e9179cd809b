"""What surrounds the steps of a run: its own global state, Ctrl-C, the last checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from t2ilearn.training.flight import Run


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed."""

    wanted: bool = False


@contextmanager
def own_state(accelerator: Accelerator) -> Iterator[None]:
    """Within the block torch's global generators are the run's own and gradients are on;
    afterwards both are the caller's again."""
    device = accelerator.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        yield


@contextmanager
def steps_of(run: Run) -> Iterator[Interrupt]:
    """The block of all steps: Ctrl-C ends it without an error, and a checkpoint is written last.

    None is written if a step was under way: weights or buffers may have changed already, and the
    checkpoint before it is the one to go on from.
    """
    with _interrupt_between_steps(run.accelerator) as interrupt:
        try:
            yield interrupt
        except KeyboardInterrupt:
            if run.accelerator.num_processes > 1:  # the others may wait in the middle of a step
                raise
            run.stopped = True
        if run.between_steps:
            run.read_losses()
            run.checkpoint()


@contextmanager
def _interrupt_between_steps(accelerator: Accelerator) -> Iterator[Interrupt]:
    """Within the block the first Ctrl-C only sets `wanted`; the next raises KeyboardInterrupt."""
    interrupt = Interrupt()
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

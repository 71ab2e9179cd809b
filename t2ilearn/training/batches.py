"""Batches and their random numbers: all from (seed, step), and made ahead on a GPU."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from accelerate.utils import send_to_device
from tqdm import tqdm

from t2ilearn.training.flight import Run


def seeded(seed: int, step: int, stream: str, process: int = 0) -> torch.Generator:
    """A CPU generator that depends on these four and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{step}/{stream}/{process}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def batches(
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
        for step, batch in zip(steps, made_ahead(make, steps, device), strict=True):
            yield step, send_to_device(batch, device, non_blocking=device.type == "cuda")
            run.bar.update()


def made_ahead(make: Callable[[int], Any], steps: range, device: torch.device) -> Iterator[Any]:
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

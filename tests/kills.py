"""Kill a training at random moments, let it go on, and compare with one that nobody disturbed.

    python tests/kills.py            # 20 kills of `t2ilearn train vqvae --preset tiny --steps 300`

Checkpoints are written every second instead of every minute, so that most kills hit one, and the
evaluation at the end is short: what is compared are the weights, byte by byte.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = """
import sys
from t2ilearn import cli
from t2ilearn.judging import report
from t2ilearn.systems import token_training
from t2ilearn.training import loop
loop.train.__kwdefaults__["checkpoint_seconds"] = 1.0
report.TEST_PICTURES = 16
whole = token_training.evaluate_tokenizer
token_training.evaluate_tokenizer = lambda *arguments: whole(*arguments, n=8)
cli.main()
"""
ROOT = Path(__file__).resolve().parent.parent


def start(folder: Path, steps: int) -> subprocess.Popen:
    """A training in a process of its own."""
    line = ["train", "vqvae", "--stage", "vqvae", "--preset", "tiny", "--steps", str(steps)]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *line, "--runs", str(folder)],
        env={**os.environ, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> None:
    """Wait for a training; raise if it failed."""
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(said.decode())


def weights_of(folder: Path) -> bytes:
    """The weights that a training wrote."""
    return (folder / "vqvae-tiny" / "vqvae-tiny.safetensors").read_bytes()


def killed_runs(kills: int, steps: int, folder: Path, seed: int = 0) -> list[tuple[float, bool]]:
    """For each kill the moment, in seconds, and whether the run then ended as the undisturbed."""
    began = time.monotonic()
    finish(start(folder / "whole", steps))
    lasts, whole, dice = time.monotonic() - began, weights_of(folder / "whole"), random.Random(seed)
    found = []
    for number in range(kills):
        # From the first moment that a run's folder may exist to the last.
        moment = lasts * (0.2 + 0.8 * (number + dice.random()) / kills)
        process = start(folder / str(number), steps)
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        finish(start(folder / str(number), steps))
        found.append((moment, weights_of(folder / str(number)) == whole))
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        results = killed_runs(20, 300, Path(name))
    for moment, equal in results:
        print(f"killed after {moment:5.1f} s: {'equal' if equal else 'DIFFERENT'}")
    print(f"{sum(equal for _, equal in results)} of {len(results)} equal, bit for bit")

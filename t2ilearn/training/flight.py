"""The flight record of a run: its curves, its frames, and what it carries from step to step.

    flight.json          config, device, pace and curves, for figures and for who waits
    frames/NNNNNN.webp   what the averaged model drew after so many steps

Beside them lie the files of `checkpoint`. Shapes: b pictures, h height, w width.
"""

import json
import math
import operator
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from t2ilearn.data.picture_files import FolderError, load_picture
from t2ilearn.data.pixels import bytes_from_pictures
from t2ilearn.training.checkpoint import (
    TrainingError,
    damaged,
    load_checkpoint,
    save_checkpoint,
)
from t2ilearn.training.config import TrainConfig
from t2ilearn.training.ema import AveragedWeights
from t2ilearn.training.wrappers import load_plain_state, plain_state
from t2ilearn.weights import WeightsError, check_state, write_atomically

CURVE_POINTS = 400
MAX_FRAME_PICTURES = 16
SMALLEST_SCALE = 2**-10  # of float16's loss: below this the gradient is not merely too large


class Record(NamedTuple):
    """A run as its flight recorder saw it: the facts of `flight.json`, and (step, picture)s."""

    facts: dict[str, Any]
    frames: list[tuple[int, Image.Image]]


def read_record(run_dir: str | Path) -> Record:
    """The flight record in a run's folder, or one that ships (`weights.ASSETS / "flights" / NAME`).

    Raises:
        FileNotFoundError: if there is none, or a frame is missing.
        TrainingError: if it is damaged, or a frame is no picture that can be read.
    """
    run_dir, frames = Path(run_dir), []
    facts = _read_flight(run_dir / "flight.json")
    for frame in facts["frames"]:
        path = run_dir / frame["file"]
        try:
            picture = load_picture(path, smallest=1)
        except FolderError as error:
            if not path.exists():
                raise FileNotFoundError(f"The frame {path} is missing.") from None
            raise TrainingError(f"The frame {path} {error}.") from None
        frames.append((frame["step"], picture.convert("RGB")))
    return Record(facts, frames)


def _read_flight(path: Path) -> dict[str, Any]:
    """The facts of a `flight.json`; raises `TrainingError` if it is damaged."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        _ = [(frame["step"], frame["file"]) for frame in facts["frames"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise TrainingError(f"The flight record {path} is damaged ({reason}).") from None
    return facts


class Curves:
    """Loss terms over time: read in groups, since each look makes the CPU wait for the GPU."""

    def __init__(self, steps: int) -> None:
        self.every = max(1, steps // CURVE_POINTS)
        self.points: dict[str, list[float]] = {}
        self.unplotted: list[dict[str, float]] = []  # read, but short of a point of the curves
        self._names: tuple[str, ...] = ()
        self._unread: list[Tensor] = []  # rows of terms, still on the device

    def note(self, names: tuple[str, ...], values: list[Any], device: torch.device) -> None:
        """Keep one step's numbers without waiting for the device."""
        self._names = names
        row = [torch.as_tensor(value, device=device).detach() for value in values]
        kinds = [torch.promote_types(value.dtype, torch.float32) for value in row]
        self._unread.append(torch.stack([x.to(kind) for x, kind in zip(row, kinds, strict=True)]))

    def read(
        self, done: int, mean: Callable[[Tensor], Tensor], skipped: Callable[[list[str]], bool]
    ) -> dict[str, float] | None:
        """Fetch the numbers of all steps up to `done`; return the last step's.

        Args:
            done: steps done, counting from 1.
            mean: over processes.
            skipped: told which numbers of a step are not finite, says whether that is harmless
                because the update was skipped.

        Raises:
            TrainingError: naming the first step, and the terms, with NaN or infinity.
        """
        if not self._unread:
            return None
        rows, self._unread = mean(torch.stack(self._unread)).tolist(), []
        for step, row in enumerate(rows, done - len(rows) + 1):
            values = dict(zip(self._names, row, strict=True))
            bad = [name for name, value in values.items() if not math.isfinite(value)]
            if not bad:
                self.unplotted.append(values)
            elif not skipped(bad):
                raise TrainingError(f"At step {step} {', '.join(bad)} became NaN or infinite")
            if step % self.every == 0 and self.unplotted:
                self._plot(step)
        return values

    def _plot(self, step: int) -> None:
        """A point: the mean of the steps since the last one."""
        self.points.setdefault("step", []).append(step)
        for name in self._names:
            mean = sum(values[name] for values in self.unplotted) / len(self.unplotted)
            self.points.setdefault(name, []).append(mean)
        self.unplotted = []


def contact_sheet(pictures: Float[Tensor, "b 3 h w"]) -> Image.Image:
    """Up to sixteen pictures in [−1, 1] as one, in rows of four; what is left over is white."""
    pictures = pictures[:MAX_FRAME_PICTURES].cpu()
    count, _, height, width = pictures.shape
    columns = min(4, count)
    rows = -(-count // columns)
    sheet = torch.full((rows * columns, 3, height, width), 255, dtype=torch.uint8)
    sheet[:count] = bytes_from_pictures(pictures)
    sheet = sheet.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * height, columns * width, 3)  # (rows·h, columns·w, 3)
    return Image.fromarray(sheet.numpy())


class Run:
    """What a run carries from step to step besides the model: average, curves, clock, files.

    `between_steps` is False while a step is under way, when weights, moments and buffers may not
    belong together; `saved` is the step of the checkpoint on disk.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        average: AveragedWeights,
        config: TrainConfig,
        run_dir: Path,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.optimizer, self.average = model, optimizer, average
        self.config, self.run_dir, self.accelerator = config, run_dir, accelerator
        self.curves = Curves(config.steps)
        self.frames: list[dict[str, Any]] = []
        self.done = self.start = 0
        self.saved: int | None = None
        self.between_steps, self.stopped = True, False
        self.seconds_before, self.clock = 0.0, time.monotonic()
        self.last_write = self.clock
        self.bar = tqdm(disable=True)
        (run_dir / "frames").mkdir(parents=True, exist_ok=True)

    def begin_step(self) -> None:
        """From here to `finish_step` there is nothing to save."""
        self.between_steps = False

    def finish_step(self, terms: Any, norm: Tensor | float | None) -> None:
        """Count the step and keep its loss terms."""
        rate = self.optimizer.param_groups[0]["lr"]
        values = [*terms, 0.0 if norm is None else norm, rate]
        names = (*terms._fields, "gradient_norm", "learning_rate")
        self.curves.note(names, values, self.accelerator.device)
        self.done += 1
        self.between_steps = True

    def read_losses(self) -> None:
        """Read the loss terms of the last steps; stop at the first NaN."""
        try:
            # The mean over processes, so that all of them stop.
            last = self.curves.read(
                self.done, lambda x: self.accelerator.reduce(x, "mean"), self._skipped
            )
        except TrainingError as error:
            kept = "there is no checkpoint yet"
            if self.saved is not None:
                kept = f"the checkpoint of step {self.saved} in {self.run_dir} is good and stays"
            raise TrainingError(
                f"{error}; {kept}. Usual cures: a learning rate below "
                f'{self.config.learning_rate:g}, a longer warm-up, precision="no", or a loss '
                "without the logarithm or root of zero."
            ) from None
        if last is not None:
            ends = time.strftime("%H:%M", time.localtime(time.time() + self.seconds_left()))
            self.bar.set_postfix_str(f"loss {last['total']:.4g}, ends {ends}", refresh=False)

    def _skipped(self, bad: list[str]) -> bool:
        """Float16 overflowed: the scaler left this update out and scales less from now on."""
        scaler = self.accelerator.scaler
        return bad == ["gradient_norm"] and bool(scaler) and scaler.get_scale() > SMALLEST_SCALE

    def seconds(self) -> float:
        """Seconds of training, over all sittings."""
        return self.seconds_before + time.monotonic() - self.clock

    def seconds_left(self) -> float:
        """Forecast from this sitting's mean pace."""
        pace = (time.monotonic() - self.clock) / max(1, self.done - self.start)
        return pace * (self.config.steps - self.done)

    def checkpoint(self, at_least: float = 0.0) -> None:
        """Write checkpoint and flight record if the last ones are so many seconds old."""
        due = time.monotonic() - self.last_write >= at_least
        if not (due and self.accelerator.is_main_process):
            return
        try:
            if self.saved != self.done:
                save_checkpoint(self.run_dir, self._tensors(), self._facts())
                self.saved = self.done
            self._write_flight()
        except OSError as error:
            kept = "there is none yet" if self.saved is None else f"that of step {self.saved} stays"
            warnings.warn(
                f"Step {self.done} could not be saved in {self.run_dir}: {error}. Training goes "
                f"on; of checkpoints on disk, {kept}.",
                stacklevel=3,
            )
        self.last_write = time.monotonic()

    def _write_flight(self) -> None:
        """`flight.json`: what a figure of this run, or a reader who waits for it, wants to know."""
        facts = {
            "config": asdict(self.config),
            "device": str(self.accelerator.device),
            "precision": self.accelerator.mixed_precision,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps_done": self.done,
            "stopped": self.stopped,
            "seconds": self.seconds(),
            "seconds_left": self.seconds_left(),
            "curves": self.curves.points,
            "frames": self.frames,
        }
        text = json.dumps(facts, allow_nan=False)
        write_atomically(self.run_dir / "flight.json", text.encode("utf-8"))

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint under one flat set of names."""
        tensors = {f"model/{k}": v for k, v in plain_state(self.model).items()}
        tensors |= {f"average/{k}": v for k, v in self.average.values.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{k}": v for k, v in state.items()}
        return tensors

    def _facts(self) -> dict[str, Any]:
        """Everything else in a checkpoint."""
        scaler = self.accelerator.scaler
        return {
            "config": asdict(self.config),
            "steps_done": self.done,
            "seconds": self.seconds(),
            "curves": self.curves.points,
            "unplotted": self.curves.unplotted,
            "frames": self.frames,
            "scaler": scaler.state_dict() if scaler else None,
        }

    def restore(self) -> None:
        """Go on from the folder's checkpoint, if there is one."""
        found = load_checkpoint(self.run_dir)
        if found is None:
            return
        tensors, facts = found
        if not isinstance(facts.get("config"), dict):
            raise damaged(self.run_dir, "it does not state its config")
        if facts["config"] != asdict(self.config):
            old, new = facts["config"], asdict(self.config)
            changed = [f"{k} {old.get(k)} → {new[k]}" for k in new if old.get(k) != new[k]]
            raise TrainingError(
                f"{self.run_dir} holds a run with another config ({', '.join(changed)}). Use "
                "another folder, or resume=False to start over."
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        try:
            for key, tensor in tensors.items():
                part, name = key.split("/", 1)
                parts[part][name] = tensor
            check_state(parts["model"], plain_state(self.model), "this model")
        except WeightsError as error:
            raise TrainingError(f"{self.run_dir} holds a run of another model. {error}") from None
        except (KeyError, ValueError):
            raise damaged(self.run_dir, f"{key!r} is a part of no training") from None
        load_plain_state(self.model, parts["model"])
        try:
            self._restore_others(parts, facts)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise damaged(self.run_dir, error) from None

    def _restore_others(self, parts: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        """What a checkpoint holds beside the model; raises nearly any error if it is damaged."""
        check_state(parts["average"], self.average.values, "the averaged model")
        for name, value in self.average.values.items():
            value.copy_(parts["average"][name])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, key = name.split("/")
            state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if facts["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        if not 0 <= operator.index(facts["steps_done"]) <= self.config.steps:
            raise ValueError(f"{facts['steps_done']} steps of {self.config.steps}")
        self.done = self.start = self.saved = facts["steps_done"]
        self.curves.points = {name: list(values) for name, values in facts["curves"].items()}
        self.curves.unplotted = [dict(values) for values in facts["unplotted"]]
        self.frames = [{"step": f["step"], "file": f["file"]} for f in facts["frames"]]
        self.seconds_before = float(facts["seconds"])

    def draw_frame(self, draw_samples: Callable[[nn.Module], Tensor]) -> None:
        """Keep a small picture of what the averaged model draws now."""
        if not self.accelerator.is_main_process:
            return
        modes = {module: module.training for module in self.model.modules()}
        with self.average.swapped_in(), torch.no_grad():
            pictures = draw_samples(self.model.eval())
        for module, mode in modes.items():
            module.training = mode
        name = f"frames/{self.done:06d}.webp"
        try:
            contact_sheet(pictures).save(self.run_dir / name, quality=80)
        except OSError as error:
            warnings.warn(f"The frame {name} could not be saved: {error}.", stacklevel=3)
            return
        self.frames = [f for f in self.frames if f["file"] != name]
        self.frames.append({"step": self.done, "file": name})

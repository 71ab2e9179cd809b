"""A stage: one training of a system, from a recipe to weights with a card.

    t2ilearn train vqvae --preset tiny           # every stage that is missing, in order
    t2ilearn train vqvae --stage prior           # this one alone
    t2ilearn train vqvae --data my-pictures      # the same on pictures of your own

A recipe is data: sizes, world, `TrainConfig`. Each file of `systems` states its recipes and has
one short function a stage that makes batches and computes the loss. Every run writes weights and
card into `RUNS/STAGE-PRESET/`, and what the card says was measured on the weights as they come
back from that file.
"""

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from datetime import timedelta
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from t2ilearn import __version__, weights
from t2ilearn.data import CaptionedPictures, CaptionTokenizer, Folder, Tokenizer, WordTokenizer
from t2ilearn.judging.report import against_bars
from t2ilearn.models.autoencoder import ImageTokenizer
from t2ilearn.training import TrainConfig, TrainingError, TrainResult, is_first_process, train
from t2ilearn.weights import Card, Leg, Weights

FOLDER_SHIFT = 2  # pixels by which pictures of your own are moved, at most
RECORD = "inputs.json"  # in a run's folder: what it learns from
OWN_PICTURES = "pictures and captions"  # the name of their SHA-256 there and on cards


@dataclass(frozen=True)
class Recipe:
    """What one run needs.

    Args:
        world: makes the world when a run begins, since some read archives.
        model: the config of the model, a frozen dataclass.
        train: length and pace of the training.
        split: of the world.
        text_tokenizer: makes what turns captions into ids.
        other_configs: of further networks that are trained along, such as a discriminator.
        settings: what else decides the run, by name; dataclasses, numbers and strings.
    """

    world: Callable[[], CaptionedPictures]
    model: Any
    train: TrainConfig
    split: str = "train"
    text_tokenizer: Callable[[], Tokenizer] = WordTokenizer
    other_configs: tuple[Any, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Stage:
    """One training.

    Args:
        name: weights are called NAME-PRESET, or NAME alone for a stage of one size.
        presets: the recipe of each preset.
        run: trains; see `Job`.
        evaluate: measures a trained model for its card.
        build: a model from stored weights, as its parts by name, the main one first.
        needs: stages whose weights must be there before.
        init_from: the stage whose weights it starts from; None for a random start.
        reads_captions: whether the model takes token ids of captions.
        trains_on_folders: whether it can learn from pictures of your own.
        bars: what weights must reach to be called good, by preset; a card says where they do not.
    """

    name: str
    presets: Mapping[str, Recipe]
    run: "Callable[[Job], TrainResult]"
    evaluate: "Callable[[Job, nn.Module], dict[str, Any]]"
    build: Callable[[Weights], dict[str, nn.Module]]
    needs: tuple[str, ...] = ()
    init_from: str | None = None
    reads_captions: bool = False
    trains_on_folders: bool = True
    one_size: bool = False
    bars: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def trained_on(self) -> tuple[str, ...]:
        """The stages whose weights must be there: what it needs, and what it starts from."""
        return tuple(dict.fromkeys([*self.needs, *([self.init_from] if self.init_from else [])]))

    def weights_name(self, preset: str) -> str:
        """What its weights are called."""
        return self.name if self.one_size else f"{self.name}-{preset}"

    def file_in(self, runs: Path, preset: str) -> Path:
        """Where a run writes them."""
        name = self.weights_name(preset)
        return runs / name / f"{name}.safetensors"


@dataclass(frozen=True)
class Job:
    """One run of a stage: where it goes, what it learns from, and how it is run.

    Args:
        parents: the weights of each stage that it needs, by the stage's name.
        digests: their SHA-256 when the run began.
        how: precision and progress, for `train`.
    """

    stage: Stage
    recipe: Recipe
    preset: str
    world: CaptionedPictures
    text_tokenizer: Tokenizer
    runs: Path
    parents: Mapping[str, Path]
    digests: Mapping[str, str]
    how: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of its weights."""
        return self.stage.weights_name(self.preset)

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.runs / self.name

    def train(
        self, model: nn.Module, make_batch: Any, compute_loss: Any, **options: Any
    ) -> TrainResult:
        """`training.train` with this run's config, folder and options."""
        return train(
            model, make_batch, compute_loss, self.recipe.train, self.folder, **options, **self.how
        )

    def data(self) -> dict[str, Any]:
        """What it learns from, as its card states it: a world, or pictures of your own."""
        facts = {"world": self.world.name, "split": self.recipe.split}
        if isinstance(self.world, Folder):
            facts[OWN_PICTURES] = self.world.fingerprint()
        return {**facts, "seed": self.recipe.train.seed}

    def claim(self) -> None:
        """Note in the run's folder what it learns from: a world, own pictures, other weights.

        Raises:
            TrainingError: if a run is there already that learned from something else (to go on
                would mix the two, and the card would tell of one), or weights without the
                checkpoint that they came from, which a new run would overwrite.
        """
        data = self.data()
        inputs = {name: data[name] for name in ("world", OWN_PICTURES) if name in data}
        inputs |= self.digests
        path = self.folder / RECORD
        before = _read_record(path)
        changed = [name for name in inputs if before and before.get(name) != inputs[name]]
        if changed:
            raise TrainingError(
                f"{self.folder} holds a run that learned from something else "
                f"({', '.join(changed)}). Remove that folder, or name another with --runs."
            )
        if (self.folder / "learns_from.json").exists():
            raise TrainingError(
                f"{self.folder} holds a run of the first edition, which cannot go on. Remove that "
                "folder, or name another with --runs."
            )
        file = self.folder / f"{self.name}.safetensors"
        if file.exists() and not (self.folder / "checkpoint.json").exists():
            raise TrainingError(
                f"{file} would be overwritten: its checkpoint is gone, so that the training would "
                "begin anew. Move that folder away, or name another with --runs."
            )
        if is_first_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            weights.write_atomically(path, json.dumps(inputs).encode("utf-8"))

    def settings(self) -> dict[str, Any]:
        """What decided the run, for its card."""
        others = {name: _plain(value) for name, value in self.recipe.settings.items()}
        return {**asdict(self.recipe.train), **others}

    def card(self, result: TrainResult, command: str, metrics: dict[str, Any]) -> Card:
        """What the run's weights say of themselves."""
        started = self.digests.get(self.stage.init_from or "")
        packages = {name: version_of(name) for name in ("torch", "torchvision", "accelerate")}
        leg = Leg(
            command=command,
            steps=result.steps_done,
            minutes=round(result.seconds / 60, 1),
            device=_device_name(),
            precision=result.precision,
            started_from=started,
            versions={"python": platform.python_version(), "t2ilearn": __version__, **packages},
        )
        bars = self.stage.bars.get(self.preset, {}) if not isinstance(self.world, Folder) else {}
        return Card(
            name=self.name,
            stage=self.stage.name,
            preset=self.preset,
            configs=weights.configs_of(self.recipe.model, *self.recipe.other_configs),
            data=self.data(),
            settings=self.settings(),
            legs=(leg,),
            parameters=sum(p.numel() for p in result.model.parameters()),
            parents=dict(self.digests),
            tokenizer=self._tokenizer_facts(),
            metrics=metrics,
            bars=against_bars(metrics, bars) if metrics else {},
        )

    def _tokenizer_facts(self) -> dict[str, Any] | None:
        """Which tokenizer reads captions for these weights; its file is written beside them."""
        if not self.stage.reads_captions or not isinstance(self.text_tokenizer, CaptionTokenizer):
            return None
        return self.text_tokenizer.save(self.folder / "tokenizer.json")


def _plain(value: Any) -> Any:
    """A dataclass as a dictionary; anything else as it is."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _read_record(path: Path) -> dict[str, Any]:
    """What a run noted that it learns from; nothing if there is no such file.

    Raises:
        TrainingError: if the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not found:
            raise ValueError("it holds nothing")
        return found
    except (ValueError, RecursionError) as error:
        raise TrainingError(
            f"{path} is damaged ({error}), so what this run learned from is not known. Remove the "
            "folder, or name another with --runs."
        ) from None


def train_stage(
    stage: Stage,
    preset: str,
    runs: Path | str,
    parents: Mapping[str, Path],
    *,
    data: Path | str | None = None,
    steps: int | None = None,
    precision: str | None = None,
    progress: bool = True,
    command: str = "",
) -> Path:
    """Train one stage by its recipe, measure it, and write weights and card.

    Args:
        parents: the weights of the stages that it needs, by their names.
        data: a folder of pictures of your own to train on instead of the recipe's world.
        steps: fewer or more steps than the recipe's.
        precision: "no", "bf16" or "fp16"; by default what suits the device.
        command: what the card says repeats the run.

    Returns:
        The safetensors file, with its card beside it. After Ctrl-C it holds the partial model, and
        the card has no metrics.

    Raises:
        ValueError: for an unknown preset, or a stage that cannot learn from a folder.
        FolderError: if the folder of pictures is not in order.
        TrainingError: if the run's folder holds a run that learned from other data.
    """
    job = make_job(stage, preset, runs, parents, data, steps, precision, progress)
    return run_job(job, command)


def run_job(job: Job, command: str = "") -> Path:
    """Train, measure and write; see `train_stage`."""
    job.claim()
    result = job.stage.run(job)
    if result.stopped and result.steps_done == 0:
        raise TrainingError(f"{job.name} was stopped before its first step: nothing is written.")
    if is_first_process():
        _write_measured(job, result, command)
    _wait_for_first_process()
    return job.folder / f"{job.name}.safetensors"


def _write_measured(job: Job, result: TrainResult, command: str) -> None:
    """Write weights and card; the card of a finished run says what was measured on the weights as
    they come back from their file."""
    file = weights.save(job.folder, job.card(result, command, {}), result.model.state_dict())
    if result.stopped:
        return
    stored = weights.load(file)
    weights.load_into(result.model, stored)
    metrics = job.stage.evaluate(job, result.model)
    weights.save(job.folder, job.card(result, command, metrics), stored.state)


def _wait_for_first_process() -> None:
    """Of several processes the first measures and writes, which may take longer than a collective
    call may on a GPU; the next stage reads what it wrote."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        if isinstance(group, dist.ProcessGroup):  # all processes are in it
            dist.barrier(group)


def make_job(
    stage: Stage,
    preset: str,
    runs: Path | str,
    parents: Mapping[str, Path],
    data: Path | str | None = None,
    steps: int | None = None,
    precision: str | None = None,
    progress: bool = True,
) -> Job:
    """A stage's run before it begins; arguments and errors as for `train_stage`."""
    if preset not in stage.presets:
        known = ", ".join(stage.presets)
        raise ValueError(f"{stage.name} has no preset {preset!r}. There are: {known}.")
    recipe = stage.presets[preset]
    if steps is not None:
        recipe = replace(recipe, train=replace(recipe.train, steps=steps))
    world: CaptionedPictures = recipe.world()
    text_tokenizer: Tokenizer = recipe.text_tokenizer()
    if data is not None:
        recipe, world, text_tokenizer = with_own_pictures(
            stage, recipe, world.resolution, Path(data)
        )
    digests = {
        name: weights.read_card(path.with_suffix(".json")).sha256 for name, path in parents.items()
    }
    how = {"precision": precision, "progress": progress}
    return Job(stage, recipe, preset, world, text_tokenizer, Path(runs), parents, digests, how)


def with_own_pictures(
    stage: Stage, recipe: Recipe, resolution: int, folder: Path
) -> tuple[Recipe, Folder, CaptionTokenizer]:
    """A recipe for pictures of your own, these, and the tokenizer learned from their captions.

    Raises:
        FolderError: if the folder is not in order.
        ValueError: if the stage's model reads attributes that such pictures do not have.
    """
    if not stage.trains_on_folders:
        raise ValueError(
            f"{stage.name} learns from our own worlds alone: own pictures state no attributes."
        )
    world = Folder(folder, resolution, FOLDER_SHIFT)
    tokenizer = CaptionTokenizer.train(world.captions).fitted(world.captions + world.test_captions)
    if stage.reads_captions:
        sizes = {"vocabulary": tokenizer.vocabulary, "text_length": tokenizer.length}
        recipe = replace(recipe, model=replace(recipe.model, **sizes))
    return recipe, world, tokenizer


def _device_name() -> str:
    """The accelerator's name, or what kind of CPU this is and how many threads are used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"


@torch.no_grad()
def encode_world(
    tokenizer: ImageTokenizer, world: CaptionedPictures, n: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Scenes (n, facts) and their tokens (n, N), computed once: training then needs no pixel."""
    generator = torch.Generator().manual_seed(seed)
    scenes = world.scenes(n, "train", generator=generator)
    parts = []
    with tqdm(total=n, desc="tokens", unit="picture", delay=2) as bar:
        for part in scenes.split(250):
            parts.append(tokenizer.tokens(world.pictures(part, generator)))
            bar.update(len(part))
    return scenes, torch.cat(parts).to(torch.int16)

"""Training: one visible loop, averaged weights, checkpoints, the flight record, archives for Colab.

| file | what it holds |
|---|---|
| `loop` | `train`, to be read from top to bottom |
| `config`, `optimizer`, `ema` | what decides a run; AdamW and its learning rate; averaged weights |
| `batches`, `device`, `session`, `wrappers` | random numbers; precision and processes; Ctrl-C |
| `checkpoint`, `flight`, `archive` | what a run leaves on disk, and how it survives a machine |
"""

from t2ilearn.training.archive import (
    RunFileError,
    archive_run,
    lab_folder,
    on_colab,
    restore_run,
    runs_folder,
)
from t2ilearn.training.batches import seeded
from t2ilearn.training.checkpoint import TrainingError
from t2ilearn.training.device import is_first_process, precision_for
from t2ilearn.training.ema import AveragedWeights, ema_decay_at
from t2ilearn.training.flight import Record, contact_sheet, read_record
from t2ilearn.training.loop import TrainConfig, TrainResult, train
from t2ilearn.training.optimizer import learning_rate_at

__all__ = [
    "AveragedWeights",
    "Record",
    "RunFileError",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "archive_run",
    "contact_sheet",
    "ema_decay_at",
    "is_first_process",
    "lab_folder",
    "learning_rate_at",
    "on_colab",
    "precision_for",
    "read_record",
    "restore_run",
    "runs_folder",
    "seeded",
    "train",
]

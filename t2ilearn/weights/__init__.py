"""Weights in two small files, the tensors and a card; see `files` and `card`."""

from t2ilearn.weights.card import SCHEMA, Card, Leg, configs_of
from t2ilearn.weights.fields import WeightsError
from t2ilearn.weights.files import (
    ASSETS,
    Weights,
    available,
    check_default_dtype,
    check_state,
    claim_new,
    figure,
    find,
    load,
    load_into,
    make_config,
    read_card,
    read_tensors,
    save,
    to_bytes,
    without_wrappers,
    write_atomically,
)

__all__ = [
    "ASSETS",
    "SCHEMA",
    "Card",
    "Leg",
    "Weights",
    "WeightsError",
    "available",
    "check_default_dtype",
    "check_state",
    "claim_new",
    "configs_of",
    "figure",
    "find",
    "load",
    "load_into",
    "make_config",
    "read_card",
    "read_tensors",
    "save",
    "to_bytes",
    "without_wrappers",
    "write_atomically",
]

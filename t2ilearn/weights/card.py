"""A card: what weights are, how they were made and what was measured on them.

    assets/NAME.json   beside assets/NAME.safetensors

A card lists every leg of the training, so that a reader can repeat it, and the SHA-256 of the
weights' file. Its `configs` repeat those in the header of that file. The header alone decides the
shape of a model: the SHA-256 covers it, so an edited card cannot change a shape unnoticed.

| name | what it is |
|---|---|
| `Leg` | one run without a change of settings: command, steps, minutes, device, precision |
| `Card` | all facts of one file of weights |
| `Header` | what stands in the header of the weights' file: schema, stage, configs |
| `SCHEMA` | the version of these fields; files of another version are refused |
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from t2ilearn.weights.fields import KIND_NAMES, Place, WeightsError, check_plain, plain, read_fields

SCHEMA = 2
FIRST_EDITION = (
    "it was made by the first edition of t2ilearn, whose files name neither their schema nor their "
    "configs. Train again with `t2ilearn train`, or take today's file"
)
_MAX_STEPS, _MAX_MINUTES, _MAX_PARAMETERS, _MAX_SEED = 10**12, 1e8, 10**13, 2**63 - 1


@dataclass(frozen=True)
class Leg:
    """One leg of a training: a run that began from some weights, or from nothing.

    Args:
        command: the line that ran it, such as "t2ilearn train vqvae --preset tiny".
        steps: optimiser steps of this leg.
        minutes: wall-clock time of this leg.
        device: the accelerator's name, or the kind of CPU and its threads.
        precision: "no" (float32), "bf16" or "fp16".
        started_from: SHA-256 of the weights it began from; None if from a random start.
        versions: of "python", "torch", "t2ilearn" and what else matters.
    """

    command: str
    steps: int
    minutes: float
    device: str
    precision: str
    started_from: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """All facts of one file of weights.

    Args:
        name: of the weights' file and of the card, without a suffix.
        stage: which stage of which system it is, such as "vqvae" or "vqgan-prior".
        preset: "tiny", "book" or "coco".
        configs: the name of each config's dataclass → its fields; see `configs_of`.
        data: "world", "split" and "seed", and what else says which pictures were used.
        settings: the fields of `TrainConfig`, and what else decided the run.
        legs: in order of time; the last one ended with these weights.
        parameters: how many numbers were trained.
        parents: role → SHA-256 of the weights it was trained on top of. The role is the stage that
            made them: "vqvae" for a prior on its tokens, "reader" for a perceptual loss.
        tokenizer: "file", "length" and "sha256" of the tokenizer of its captions; None if it has
            no captions, or splits them into words by itself.
        metrics: name → a number, or an object of numbers and strings such as a value with its
            interval. Empty if nothing was measured.
        bars: name of a metric → "bar", "measured" and "met".
        note: what the other fields cannot say.
        schema: the version of these fields.
        sha256: of the weights' file; filled by `save`.
    """

    name: str
    stage: str
    preset: str
    configs: dict[str, dict]
    data: dict
    settings: dict
    legs: tuple[Leg, ...]
    parameters: int
    parents: dict[str, str] = field(default_factory=dict)
    tokenizer: dict | None = None
    metrics: dict = field(default_factory=dict)
    bars: dict = field(default_factory=dict)
    note: str = ""
    schema: int = SCHEMA
    sha256: str = ""

    @property
    def steps(self) -> int:
        """Steps of all legs."""
        return sum(leg.steps for leg in self.legs)

    @property
    def minutes(self) -> float:
        """Minutes of all legs."""
        return round(sum(leg.minutes for leg in self.legs), 1)

    @property
    def command(self) -> str:
        """The command of the last leg."""
        return self.legs[-1].command

    @property
    def device(self) -> str:
        """The device of the last leg."""
        return self.legs[-1].device

    @property
    def precision(self) -> str:
        """The precision of the last leg."""
        return self.legs[-1].precision

    @classmethod
    def from_json(cls, values: object, name: str) -> "Card":
        """A card from what JSON holds.

        Args:
            values: what `json.loads` returned.
            name: of the card, for errors.

        Raises:
            WeightsError: naming the field that is missing, unknown, or of a wrong type or range.
        """
        place = Place(f"card {name}")
        if isinstance(values, dict) and "schema" not in values:
            raise WeightsError(f"card {name}: field schema is missing: {FIRST_EDITION}.")
        if isinstance(values, dict):
            check_schema(values["schema"], place.key("schema"))
        card = read_fields(cls, values, place)
        _check(card, place)
        return card

    def to_json(self) -> dict[str, Any]:
        """The card as JSON values, checked as `from_json` checks them.

        Raises:
            WeightsError: naming the field that would be refused.
        """
        values = plain(self, Place(f"card {self.name}"))
        Card.from_json({**values, "sha256": self.sha256 or "0" * 64}, self.name)
        return values


@dataclass(frozen=True)
class Header:
    """What stands in the header of a weights' file, under the metadata key "t2ilearn"."""

    schema: int
    stage: str
    configs: dict[str, dict]


def configs_of(*configs: Any) -> dict[str, dict]:
    """The `configs` of a card: the name of each dataclass → its fields.

    Raises:
        TypeError: if one of them is no dataclass.
    """
    for config in configs:
        if not is_dataclass(config) or isinstance(config, type):
            raise TypeError(f"A config is an instance of a dataclass, not {config!r}.")
    return {type(config).__name__: asdict(config) for config in configs}


def read_header(text: Any, file: str) -> Header:
    """The header's own facts, from the metadata of a safetensors file.

    Args:
        text: the value of the metadata key "t2ilearn"; None if the file has no such key.
        file: named in errors.

    Raises:
        WeightsError: if the facts are missing or not those of this schema.
    """
    place = Place(f"header of {file}")
    if text is None:
        raise WeightsError(
            f"{place.owner} does not say which model it belongs to: {FIRST_EDITION}."
        )
    try:
        values = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise WeightsError(f"{place.owner} is damaged: it is not readable as JSON.") from None
    if isinstance(values, dict) and "schema" in values:
        check_schema(values["schema"], place.key("schema"))
    header = read_fields(Header, values, place)
    check_plain(header.configs, place.key("configs"))
    return header


def check_schema(value: object, place: Place) -> None:
    """Raise `WeightsError` unless this is the schema that this version reads."""
    if type(value) is int and value > SCHEMA:
        place.refuse(value, f"{SCHEMA}: the file was made by a newer t2ilearn; update yours")
    if type(value) is not int or value != SCHEMA:
        place.refuse(value, f"{SCHEMA}: {FIRST_EDITION}" if value == 1 else str(SCHEMA))


def check_against_header(card: Card, header: Header, place: Place) -> None:
    """Raise `WeightsError` naming the first field in which card and header differ."""
    if card.stage != header.stage:
        place.key("stage").refuse(card.stage, f"{header.stage!r} as in the header of the weights")
    _same(card.configs, header.configs, place.key("configs"))


def _same(mine: Any, theirs: Any, place: Place) -> None:
    """Raise `WeightsError` where two JSON values differ, in value or in type."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in [*theirs, *mine]:
            if key not in mine:
                place.key(key).refuse_missing()
            if key not in theirs:
                place.key(key).refuse_unknown(", ".join(theirs) + " in the header of the weights")
            _same(mine[key], theirs[key], place.key(key))
    elif json.dumps(mine) != json.dumps(theirs):
        place.refuse(mine, f"{json.dumps(theirs)} as in the header of the weights")


# --- ranges ------------------------------------------------------------------------------------


def _check(card: Card, place: Place) -> None:
    """Raise `WeightsError` naming the first field whose value cannot be true."""
    if not is_name(card.name):
        place.key("name").refuse(card.name, "a file name without folder and suffix")
    for name in ("stage", "preset"):
        if not getattr(card, name).strip():
            place.key(name).refuse(getattr(card, name), "a name")
    if not card.configs:
        place.key("configs").refuse(card.configs, "at least one config")
    _between(card.parameters, 0, _MAX_PARAMETERS, place.key("parameters"))
    if not card.legs:
        place.key("legs").refuse([], "at least one leg")
    for index, leg in enumerate(card.legs):
        _check_leg(leg, place.key("legs").item(index))
    _check_data(card.data, place.key("data"))
    for role, digest in card.parents.items():
        _check_digest(digest, place.key("parents").key(role))
    if card.tokenizer is not None:
        _check_tokenizer(card.tokenizer, place.key("tokenizer"))
    for name, value in card.metrics.items():
        _check_metric(value, place.key("metrics").key(name))
    for name, value in card.bars.items():
        if name not in card.metrics:
            place.key("bars").key(name).refuse_unknown("names of metrics")
        _check_bar(value, place.key("bars").key(name))
    _check_digest(card.sha256, place.key("sha256"))


def is_name(name: str) -> bool:
    """Whether weights can have this name: a plain file name without folder and suffix."""
    return re.fullmatch(r"[\w][\w .+-]*", name) is not None and not name.endswith(
        (".safetensors", ".json", " ", ".")
    )


def _between(value: int | float, low: int | float, high: int | float, place: Place) -> None:
    if not low <= value <= high:
        place.refuse(value, f"a number from {low:,} to {high:,}")


def _check_leg(leg: Leg, place: Place) -> None:
    _between(leg.steps, 0, _MAX_STEPS, place.key("steps"))
    _between(leg.minutes, 0, _MAX_MINUTES, place.key("minutes"))
    for name in ("command", "device"):
        if not getattr(leg, name).strip():
            place.key(name).refuse(getattr(leg, name), "a line of text")
    if leg.precision not in ("no", "bf16", "fp16"):
        place.key("precision").refuse(leg.precision, '"no", "bf16" or "fp16"')
    if leg.started_from is not None:
        _check_digest(leg.started_from, place.key("started_from"))


def _check_digest(value: object, place: Place) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        place.refuse(value, "a SHA-256 of 64 hexadecimal digits")


def _check_kinds(values: Any, kinds: Mapping[str, type], place: Place, more: bool = False) -> None:
    """Raise `WeightsError` unless an object has these fields, of these types, and no `more`."""
    if not isinstance(values, dict):
        place.refuse(values, "an object with the fields " + ", ".join(kinds))
    for name, kind in kinds.items():
        if name not in values:
            place.key(name).refuse_missing()
        is_right = type(values[name]) is kind or (kind is float and type(values[name]) is int)
        if not is_right:
            place.key(name).refuse(values[name], KIND_NAMES[kind])
    for name in values:
        if name not in kinds and not more:
            place.key(name).refuse_unknown(", ".join(kinds))


def _check_data(data: dict, place: Place) -> None:
    _check_kinds(data, {"world": str, "split": str, "seed": int}, place, more=True)
    _between(data["seed"], 0, _MAX_SEED, place.key("seed"))


def _check_tokenizer(tokenizer: dict, place: Place) -> None:
    _check_kinds(tokenizer, {"file": str, "length": int, "sha256": str}, place)
    if not is_name(tokenizer["file"].removesuffix(".json")):
        place.key("file").refuse(tokenizer["file"], "the name of a file beside the card")
    _between(tokenizer["length"], 1, 1_000_000, place.key("length"))
    _check_digest(tokenizer["sha256"], place.key("sha256"))


def _check_metric(value: object, place: Place) -> None:
    """A number, or numbers and strings by name; a value with an interval has both its ends."""
    if not isinstance(value, dict):
        if type(value) not in (int, float):
            place.refuse(value, "a number, or an object of numbers and strings")
        return
    for name, part in value.items():
        if type(part) not in (int, float, str):
            place.key(name).refuse(part, "a number or a string")
    ends = {"half_width"} & set(value) or {"low", "high"} & set(value)
    if ends:
        kinds = ("value", "half_width") if ends == {"half_width"} else ("value", "low", "high")
        _check_kinds(value, dict.fromkeys(kinds, float), place, more=True)
    if "half_width" in value:
        for name in ("value", "half_width"):
            _between(value[name], 0, 1, place.key(name))
    elif ends and value["low"] > value["high"]:
        place.key("low").refuse(value["low"], f"at most {value['high']}, where the interval ends")


def _check_bar(value: object, place: Place) -> None:
    _check_kinds(value, {"bar": float, "measured": float, "met": bool}, place)

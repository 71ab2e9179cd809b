"""From JSON to typed values: every field of a card and of a config is checked by its name.

JSON that a person or a program has edited may hold anything. `read_fields` turns it into a
dataclass and compares each value with the field's annotation. What does not fit is refused with the
place where it stands: "card vqvae-tiny: field legs[0].minutes is "abc", expected a number".

| name | what it is |
|---|---|
| `Place` | an owner ("card vqvae-tiny") and the path of a field in it ("legs[0].minutes") |
| `read_fields` | JSON object → dataclass, strictly: no field is missing, none is unknown |
| `plain` | dataclass → JSON values; refuses what JSON cannot represent |
| `check_plain` | any JSON value: numbers are finite, and nesting has an end |
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
MAX_DEPTH = 6  # of lists and objects within each other, counted from a field
KIND_NAMES: dict[Any, str] = {  # as errors call them
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    type(None): "null",
}
_SHOWN = 60  # characters of a wrong value in an error


class WeightsError(RuntimeError):
    """Weights that cannot be used; the message names the file, the reason and the remedy."""


@dataclass(frozen=True)
class Place:
    """Where a value stands: whose it is, and the path of its field."""

    owner: str
    path: str = ""

    def key(self, name: str) -> "Place":
        """A field of an object: `.name`, or `["a name"]` if it is not an identifier."""
        step = f".{name}" if name.isidentifier() else f"[{json.dumps(name, ensure_ascii=False)}]"
        return Place(self.owner, (self.path + step).removeprefix("."))

    def item(self, index: int) -> "Place":
        """An element of a list."""
        return Place(self.owner, f"{self.path}[{index}]")

    def refuse(self, value: object, expected: str) -> NoReturn:
        """Raise `WeightsError`: this field holds a value that was not expected."""
        raise WeightsError(f"{self._field()} is {_shown(value)}, expected {expected}.")

    def refuse_missing(self, present: Iterable[str] = ()) -> NoReturn:
        """Raise `WeightsError`: this field is not there, and which ones are."""
        there = ", ".join(present)
        raise WeightsError(f"{self._field()} is missing{f'; there is {there}' if there else ''}.")

    def refuse_unknown(self, known: str) -> NoReturn:
        """Raise `WeightsError`: no such field exists."""
        raise WeightsError(f"{self._field()} is unknown; the fields are {known}.")

    def _field(self) -> str:
        return f"{self.owner}: field {self.path}" if self.path else f"{self.owner}: the whole"


def _shown(value: object) -> str:
    """A value as an error quotes it."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def read_fields(kind: type[T], values: object, place: Place) -> T:
    """A dataclass from a JSON object.

    Args:
        kind: a dataclass whose annotations are bool, int, float, str, None, literals, tuples,
            lists, dicts with str keys, other dataclasses, or unions of these.
        values: what JSON holds. Lists become tuples where the annotation is a tuple.
        place: named in errors.

    Raises:
        WeightsError: naming the field that is missing, unknown or of another type, or the
            dataclass whose own check raised a `ValueError`.
    """
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict):
        place.refuse(values, "an object with the fields " + ", ".join(sorted(fields)))
    for name in values:
        if name not in fields:
            place.key(str(name)).refuse_unknown(", ".join(sorted(fields)))
    for name in sorted(fields - set(values)):
        place.key(name).refuse_missing()
    hints = typing.get_type_hints(kind)
    typed = {name: _typed(hints[name], value, place.key(name)) for name, value in values.items()}
    try:
        return kind(**typed)
    except (ValueError, ArithmeticError) as error:
        where = f" (field {place.path})" if place.path else ""
        reason = str(error).rstrip(".")
        raise WeightsError(f"{place.owner}: no {kind.__name__}{where}: {reason}.") from None


def _typed(hint: Any, value: Any, place: Place) -> Any:
    """A JSON value as the annotation asks for it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is dict:
        return check_plain(value, place, expected="an object" if hint is dict else "")
    if origin in (types.UnionType, typing.Union):
        return _one_of(arguments, value, place)
    if origin is typing.Literal:
        if not any(type(value) is type(known) and value == known for known in arguments):
            place.refuse(value, "one of " + ", ".join(map(repr, arguments)))
        return value
    if origin is tuple:
        return _tuple(arguments, value, place)
    if origin is list:
        if not isinstance(value, list):
            place.refuse(value, "a list")
        return [_typed(arguments[0], item, place.item(i)) for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            place.refuse(value, "an object")
        return {key: _typed(arguments[1], item, place.key(key)) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return read_fields(hint, value, place)  # type: ignore[arg-type]
    return _scalar(hint, value, place)


def _one_of(hints: tuple[Any, ...], value: Any, place: Place) -> Any:
    """The first of several annotations that a value fits."""
    for hint in hints:
        try:
            return _typed(hint, value, place)
        except WeightsError as error:
            refused = error
    if len(hints) == 2 and type(None) in hints:  # what is not None has one reason not to fit
        (hint,) = (hint for hint in hints if hint is not type(None))
        return _typed(hint, value, place)
    raise refused


def _tuple(hints: tuple[Any, ...], value: Any, place: Place) -> tuple[Any, ...]:
    """A list as `tuple[X, ...]`, or as a tuple of fixed length."""
    if not isinstance(value, list):
        place.refuse(value, "a list")
    endless = len(hints) == 2 and hints[1] is Ellipsis
    if not endless and len(value) != len(hints):
        place.refuse(value, f"a list of length {len(hints)}")
    kinds = [hints[0]] * len(value) if endless else hints
    return tuple(_typed(k, v, place.item(i)) for i, (k, v) in enumerate(zip(kinds, value)))  # noqa: B905


def _scalar(hint: Any, value: Any, place: Place) -> Any:
    """A bool, int, float, str or None of exactly that type; an int may stand for a float."""
    if hint is float:
        return _number(value, place)
    if hint not in KIND_NAMES:
        raise TypeError(f"{place.path} has an annotation that no card can hold: {hint}.")
    if type(value) is not hint:
        place.refuse(value, KIND_NAMES[hint])
    return value


def _number(value: Any, place: Place) -> float:
    """A finite number."""
    if type(value) not in (int, float):
        place.refuse(value, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        place.refuse(value, "a finite number")
    return number


def check_plain(value: Any, place: Place, depth: int = 0, expected: str = "") -> Any:
    """The same value, if JSON can hold it: finite numbers, strings, booleans, null, and lists and
    objects of these, at most `MAX_DEPTH` within each other.

    Raises:
        WeightsError: naming the place of what is none of these.
    """
    if expected and not isinstance(value, dict):
        place.refuse(value, expected)
    if depth > MAX_DEPTH:
        place.refuse(value, f"at most {MAX_DEPTH} levels of nesting")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                place.refuse(key, "a string as the name of a field")
            check_plain(item, place.key(key), depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_plain(item, place.item(index), depth + 1)
    elif type(value) in (int, float):
        _number(value, place)
    elif value is not None and type(value) not in (str, bool):
        place.refuse(value, "a number, a string, true, false, null, a list or an object")
    return value


def plain(value: Any, place: Place) -> Any:
    """A dataclass, or what one holds, as JSON values: tuples become lists.

    Raises:
        WeightsError: naming the place of a value that JSON cannot represent.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item, place.key(str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, place.item(index)) for index, item in enumerate(value)]
    return check_plain(value, place)

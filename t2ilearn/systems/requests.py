"""Requests from what a person or a file gives: made, checked, and stored as JSON.

    make_request → Request → check_request → System.steps
    request_to_json ⇄ request_from_json        the metadata of a saved drawing

Whatever is wrong with them is said before anything is drawn.
"""

import base64
import io
import json
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from t2ilearn.data.captions import CaptionError, check_unicode
from t2ilearn.data.grammar import ReadCaption
from t2ilearn.data.picture_files import FolderError, load_picture
from t2ilearn.systems import registry
from t2ilearn.systems.base import Caption, Prompt, Request, System, shortened, single_text

MAX_CANDIDATES = 64  # pictures that one request may make, those that are not kept included
ROWS = 8  # in which it is counted what stays of a start picture


def make_request(
    caption: Caption,
    system: str | Path | None,
    seed: int,
    count: int,
    best_of: int,
    scorer: str | None,
    options: Mapping[str, Any],
) -> Request:
    """A request from what a person gives; see `draw`.

    Raises:
        CaptionError: if the caption is neither a text nor prompts.
        ValueError: for an unknown system, an option that it does not have, or a number that is
            none or out of range.
    """
    name = registry.best() if system is None else _system_name(system)
    made = registry.find(name).system.make_options(**options)
    given = {"count": count, "best-of": best_of, "seed": seed}
    numbers = tuple(whole_number(what, value) for what, value in given.items())
    _check_numbers(*numbers)
    if scorer is not None and not isinstance(scorer, str):
        raise ValueError(f"A scorer is named by a word, not {shortened(scorer)}.")
    return Request((_caption(caption),) * numbers[0], name, numbers[2], numbers[1], scorer, made)


def _system_name(system: Any) -> str:
    """A name or a path as a word."""
    try:
        return os.fsdecode(system)
    except TypeError:
        raise ValueError(
            f"A system is named by a word or the folder of a run, not {shortened(system)}."
        ) from None


def _caption(caption: Any) -> Caption:
    """A text, or a tuple of prompts with their weights as plain numbers."""
    if isinstance(caption, str):
        return str(caption)
    prompts = []
    for pair in caption if isinstance(caption, list | tuple) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise CaptionError(f"A prompt is a text and its weight, not {shortened(pair)}.")
        prompts.append(Prompt(str(pair[0]), _number("weight of a prompt", pair[1])))
    if not prompts:
        raise CaptionError(
            f"A caption is a text, or a tuple of Prompt(text, weight), not {shortened(caption)}."
        )
    return tuple(prompts)


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"The {name} must be a number, not {shortened(value)}.") from None


def whole_number(name: str, value: Any) -> int:
    """A number that is whole, of any kind, as Python's own."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, RuntimeError):
        raise ValueError(f"The {name} must be a whole number, not {shortened(value)}.") from None


def _check_numbers(count: int, best_of: int, seed: int) -> None:
    """Raise ValueError for a number out of range."""
    if not 1 <= count * best_of <= MAX_CANDIDATES or count < 1:
        raise ValueError(
            f"count × best-of must be 1 … {MAX_CANDIDATES}, not {shortened(count)} × "
            f"{shortened(best_of)}."
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"The seed must be 0 … 2^63 − 1, not {shortened(seed)}.")


def check_request(request: Request, system: System) -> list[ReadCaption | None]:
    """What each caption states in the worlds that the system learned; None where nothing reads it:
    for pictures of your own, several prompts or a weight, or a picture finished without a caption.

    Raises:
        CaptionError: if a caption cannot be read.
        ValueError: for a number out of range, a scorer that the system does not have or one that
            cannot read this, or a start picture that it cannot use.
    """
    _check_numbers(request.count, request.best_of, request.seed)
    try:  # what could not be stored is refused before anything is drawn
        json.dumps(request_to_json(request))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"The request holds what no file can store: {error}.") from None
    scorers = system.scorers()
    if request.scorer not in (None, *scorers):
        known = ", ".join(scorers) or "none at all"
        raise ValueError(f"A scorer of {request.system} is {known}, not {request.scorer!r}.")
    _check_start(request, system)
    each = {c: _read(c, request, system) for c in dict.fromkeys(request.captions)}
    read = [each[caption] for caption in request.captions]
    if request.scorer == "reader" and not all(r and r.world.reader for r in read):
        raise ValueError(
            "The training reader reads captions of shapes; let likelihood choose here."
        )
    return read


def _read(caption: Caption, request: Request, system: System) -> ReadCaption | None:
    """What a caption states; see `check_request`."""
    prompts = (Prompt(caption),) if isinstance(caption, str) else caption
    if not prompts:
        raise CaptionError("A picture without a prompt: say what to draw.")
    for prompt in prompts:
        check_unicode(prompt.text)
        if not math.isfinite(prompt.weight):
            raise ValueError(f"The weight of a prompt must be a number, not {prompt.weight}.")
    text = single_text(caption)
    if text is None or (not text and request.start is not None):
        return None
    return system.read(text)


def _check_start(request: Request, system: System) -> None:
    """Raise ValueError for a start picture that a system cannot use, or rows without one."""
    if not 0 <= request.rows < ROWS or (request.rows and request.start is None):
        raise ValueError(
            f"Of a start picture 0 … {ROWS - 1} rows of {ROWS} stay, and none without one, not "
            f"{shortened(request.rows)}."
        )
    if request.start is None:
        return
    if not system.takes_start:
        raise ValueError(f"{request.system} cannot begin from a picture.")
    count, side = len(request.start), system.resolution
    possible = {1, request.count} | ({2} if system.varies else set())
    if count not in possible or request.start.shape[1:] != (3, side, side):
        raise ValueError(
            f"{request.system} begins from one picture, or from one for each of {request.count}, "
            f"of shape (3, {side}, {side}); these are of shape {tuple(request.start.shape)}."
        )


def request_to_json(request: Request) -> dict[str, Any]:
    """A request as JSON values."""
    start = None
    if request.start is not None:
        buffer = io.BytesIO()
        rows = request.start.movedim(1, -1).flatten(0, 1)  # (n · H, W, 3)
        Image.fromarray(rows.contiguous().numpy()).save(buffer, format="PNG")
        start = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {
        "captions": [c if isinstance(c, str) else [list(p) for p in c] for c in request.captions],
        "system": request.system,
        "seed": request.seed,
        "best_of": request.best_of,
        "scorer": request.scorer,
        "options": asdict(request.options),
        "start": start,
        "rows": request.rows,
    }


def request_from_json(stored: Mapping[str, Any]) -> Request:
    """What `request_to_json` wrote.

    Raises:
        KeyError, TypeError, ValueError: if it is damaged.
    """
    known = ("captions", "system", "seed", "best_of", "scorer", "options", "start", "rows")
    facts = {name: stored[name] for name in known}
    if unknown := [name for name in stored if name not in known]:
        raise TypeError(f"field {shortened(unknown[0])} is unknown")
    if not isinstance(facts["captions"], list) or not facts["captions"]:
        raise TypeError("field captions is no list of captions")
    captions = tuple(_caption_from_json(each) for each in facts["captions"])
    if not isinstance(facts["system"], str) or not isinstance(facts["scorer"], str | None):
        raise TypeError("system and scorer are words")
    if not isinstance(facts["options"], dict):
        raise TypeError("field options is no object")
    names = ("system", "seed", "best_of", "scorer", "options")
    how = {name: facts[name] for name in names}
    request = make_request(captions[0], count=len(captions), **how)
    start = None if facts["start"] is None else _start_from_text(facts["start"])
    return replace(
        request, captions=captions, start=start, rows=whole_number("rows", facts["rows"])
    )


def _caption_from_json(stored: Any) -> Caption:
    """A text, or prompts with their weights, each a list of both."""
    if isinstance(stored, str):
        return stored
    prompts = []
    for pair in stored if isinstance(stored, list) else ():
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError("a prompt is a text and its weight")
        if type(pair[1]) not in (int, float) or not abs(pair[1]) < 1e9:  # NaN neither
            raise TypeError("the weight of a prompt is no number in its range")
        prompts.append(Prompt(pair[0], float(pair[1])))
    if not prompts:
        raise TypeError("a caption is a text, or a list of prompts")
    return tuple(prompts)


def _start_from_text(text: str) -> UInt8[Tensor, "n 3 h w"]:
    """Start pictures from their PNG file in base64: squares, one below the other."""
    try:
        image = load_picture(base64.b64decode(text, validate=True))
    except FolderError as error:
        raise TypeError(f"the start picture {error}") from None
    except (ValueError, TypeError) as error:
        raise TypeError(f"the start picture is damaged: {error}") from None
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    width, height = image.size
    if height % width:
        raise TypeError("the start picture is damaged: it is no row of squares")
    return pixels.view(height // width, width, width, 3).movedim(-1, 1).contiguous()

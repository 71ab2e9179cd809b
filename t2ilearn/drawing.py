"""From a caption to pictures, with the weights that ship.

    drawing = draw("a small red star above a large striped blue ring", seed=1)
    drawing.save("star.png")        # the file remembers the request and the weights
    redraw("star.png")              # and can be drawn again, pixel for pixel
"""

import base64
import html
import io
import json
import operator
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image, PngImagePlugin
from torch import Tensor

from t2ilearn import __version__
from t2ilearn.data.captions import CaptionError
from t2ilearn.data.grammar import ReadCaption
from t2ilearn.data.pixels import bytes_from_pictures
from t2ilearn.judging.alignment import aligned
from t2ilearn.judging.reader import load_reader
from t2ilearn.models.layers import RANGE_TOLERANCE
from t2ilearn.systems import Caption, Options, Prompt, Request, System, registry, rerank
from t2ilearn.weights import WeightsError

METADATA_KEY = "t2ilearn"
SCHEMA = 2  # of the metadata
MAX_CANDIDATES = 64  # pictures that one request may make, those that are not kept included
ROWS = 8  # in which `complete` counts what stays of a picture


@dataclass(frozen=True)
class Drawing:
    """Pictures drawn for one caption, and what the judge read in them.

    `aligned` is empty where there is no judge: for pictures of your own.
    """

    pictures: Float[Tensor, "n 3 h w"]
    request: Request
    weights_id: str
    aligned: list[bool] = field(default_factory=list)

    def image(self, columns: int | None = None) -> Image.Image:
        """The pictures side by side."""
        n, _, height, width = self.pictures.shape
        columns = columns or n
        sheet = Image.new("RGB", (columns * width, -(-n // columns) * height))
        for i, picture in enumerate(bytes_from_pictures(self.pictures).movedim(1, -1)):
            at = (i % columns * width, i // columns * height)
            sheet.paste(Image.fromarray(picture.numpy()), at)
        return sheet

    def metadata(self) -> dict[str, Any]:
        """What the file remembers: the request, the weights' id and the package's version."""
        return {
            **request_to_json(self.request),
            "weights": self.weights_id,
            "version": __version__,
            "schema": SCHEMA,
        }

    def save(self, path: str | Path) -> Path:
        """Write a PNG file whose metadata carry what `redraw` needs. An existing file is only
        replaced once the new one is complete.

        Raises:
            OSError: if the file cannot be written.
            ValueError: if its name does not end in .png.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise ValueError(f"Pictures are saved as .png, not {path.suffix or 'without ending'}.")
        info = PngImagePlugin.PngInfo()
        info.add_itxt(METADATA_KEY, json.dumps(self.metadata()))
        partial = path.with_name(path.name + ".part")
        try:
            self.image().save(partial, format="PNG", pnginfo=info)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def verdict(self) -> str:
        """How many pictures there are, and how many show what the caption states."""
        count = f"{len(self.pictures)} pictures"
        return f"{sum(self.aligned)} of {count} as stated" if self.aligned else count

    def __repr__(self) -> str:
        return f"Drawing({self.request.caption!r}, {self.verdict()})"

    def _repr_html_(self) -> str:
        """For notebooks. The caption is escaped: it is somebody's text, not markup."""
        buffer = io.BytesIO()
        self.image().save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        caption = html.escape(self.request.caption)
        note = f"{caption} · {self.verdict()}"
        count, height = len(self.pictures), 2 * self.pictures.shape[-2]
        return (
            f'<figure style="margin:0"><img alt="{count} pictures drawn for: {caption}" '
            f'src="data:image/png;base64,{data}" style="height:{height}px;'
            f'image-rendering:pixelated"><figcaption>{note}</figcaption></figure>'
        )


def draw(
    caption: Caption,
    *,
    system: str | Path | None = None,
    seed: int = 0,
    count: int = 4,
    best_of: int = 1,
    scorer: str | None = None,
    **options: Any,
) -> Drawing:
    """Draw pictures for a caption.

    Args:
        caption: a sentence of a world that the system learned, e.g. "a small red star above a blue
            ring" or "a dodo, outline, on a sky background"; any caption, if it learned pictures of
            your own. Systems that take several prompts with weights take a tuple of `Prompt`s.
        system: which model draws: one of `t2ilearn systems`, or the folder of a run of yours; by
            default the best that ships.
        seed: the same seed, system and weights give the same pictures on the same machine.
        count: how many pictures.
        best_of: draw this many for each picture kept.
        scorer: what chooses the best, one of the system's scorers.
        options: the system's own, such as guidance_scale; `t2ilearn systems` lists them.

    Raises:
        CaptionError: if the caption cannot be read.
        ValueError: if an argument is out of its range, or the system has no such option.
        WeightsError: if weights are missing or damaged.
    """
    return _finished(make_request(caption, system, seed, count, best_of, scorer, options))


def draw_steps(caption: Caption, **how: Any) -> Iterator[Float[Tensor, "n 3 h w"]]:
    """The pictures as they form, one for each of `count`; arguments and errors as for `draw`.

    All candidates are shown: with best_of 2 there are twice as many.
    """
    names = ("system", "seed", "count", "best_of", "scorer")
    known = {name: how.pop(name) for name in names if name in how}
    defaults = {"system": None, "seed": 0, "count": 4, "best_of": 1, "scorer": None}
    request = make_request(caption, **{**defaults, **known}, options=how)
    system = registry.load(request.system)
    check_request(request, system)
    yield from system.steps(request, torch.Generator().manual_seed(request.seed))


def complete(
    picture: Float[Tensor, "3 h w"],
    caption: str | None = None,
    *,
    rows: int = 4,
    system: str | Path | None = None,
    seed: int = 0,
    count: int = 4,
    best_of: int = 1,
    scorer: str | None = None,
    **options: Any,
) -> Drawing:
    """Finish a picture of which the upper part is given, so that it shows what the caption says.

    Args:
        picture: at the system's resolution, in [−1, 1]. What is below the rows that stay is
            ignored.
        caption: None continues without one.
        rows: how many eighths of the picture stay, from above.
        system, seed, count, best_of, scorer, options: see `draw`.

    Raises:
        CaptionError, ValueError, WeightsError: as `draw`, and for a picture of another size or
            range, or no row left to draw.
    """
    loaded = registry.load(system)
    if picture.ndim != 3:
        raise ValueError(f"One picture is of shape (3, H, W), not {tuple(picture.shape)}.")
    side = loaded.resolution
    if tuple(picture.shape) != (3, side, side) or not picture.is_floating_point():
        raise ValueError(
            f"A picture to finish is a float tensor of shape (3, {side}, {side}) with values in "
            f"[−1, 1]; this is {picture.dtype} of shape {tuple(picture.shape)}."
        )
    if not picture.abs().amax() <= 1 + RANGE_TOLERANCE:  # NaN neither
        low, high = picture.min(), picture.max()
        raise ValueError(f"Pictures lie in [−1, 1]; these go from {low:.3g} to {high:.3g}.")
    if not 1 <= rows < ROWS:
        raise ValueError(f"Keep 1 … {ROWS - 1} rows of {ROWS}, not {rows}.")
    request = make_request(caption or "", system, seed, count, best_of, scorer, options)
    return _finished(replace(request, start=bytes_from_pictures(picture[None]), rows=rows))


def redraw(path: str | Path) -> Drawing:
    """Draw again what a file made by `Drawing.save` remembers.

    Raises:
        ValueError: if the file carries no metadata of ours, damaged ones, or those of the first
            edition.
        WeightsError: if it was drawn with other weights than those installed.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(METADATA_KEY)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable picture: {error}.") from None
    if text is None:
        raise ValueError(f"{path} was not drawn by t2ilearn: it carries no caption and seed.")
    try:
        stored = json.loads(text)
        if isinstance(stored, dict) and "schema" not in stored and "caption" in stored:
            raise ValueError(
                f"{path} was drawn by the first edition of t2ilearn, whose weights are gone. Draw "
                f'its caption anew: "{stored["caption"]}".'
            )
        weights_id = stored.pop("weights")
        request = request_from_json(stored)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"The metadata of {path} are damaged: {error}.") from None
    installed = registry.load(request.system).weights_id
    if installed != weights_id:
        raise WeightsError(
            f"{path} was drawn with weights {weights_id}, but {installed} are installed; the "
            "picture would differ."
        )
    return _finished(request)


# --- requests ----------------------------------------------------------------------------------


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
        ValueError: for an unknown system, an option that it does not have, or a number that is
            none or out of range.
    """
    name = registry.best() if system is None else str(system)
    whole = {"seed": seed, "count": count, "best-of": best_of}
    numbers = {what: _whole(what, value) for what, value in whole.items()}
    made = registry.find(name).system.make_options(**options)
    if not 1 <= numbers["count"] * numbers["best-of"] <= MAX_CANDIDATES or numbers["count"] < 1:
        raise ValueError(
            f"count × best-of must be 1 … {MAX_CANDIDATES}, not {count} × {best_of}."
        )
    if not 0 <= numbers["seed"] < 2**63:
        raise ValueError(f"The seed must be 0 … 2^63 − 1, not {seed}.")
    captions = (caption,) * numbers["count"]
    return Request(captions, name, numbers["seed"], numbers["best-of"], scorer, made)


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"The {name} must be a whole number, not {value!r}.") from None


def check_request(request: Request, system: System) -> ReadCaption | None:
    """The caption as the system's worlds read it, parsed once; None where they do not.

    Raises:
        CaptionError: if the caption cannot be read.
        ValueError: for a scorer that the system does not have, or one that cannot read this.
    """
    scorers = system.scorers()
    if request.scorer not in (None, *scorers):
        known = ", ".join(scorers) or "none at all"
        raise ValueError(f"A scorer of {request.system} is {known}, not {request.scorer!r}.")
    _check_text(request.caption)
    read = system.read(request.caption) if request.caption or request.start is None else None
    if request.scorer == "reader" and not (read and read.world.reader):
        raise ValueError(
            "The training reader reads captions of shapes; let likelihood choose here."
        )
    return read


def _check_text(caption: str) -> None:
    """Raise CaptionError for text that no file could hold, such as half of a Unicode pair."""
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:
        raise CaptionError(
            f"The caption {caption!r} holds a character that is not valid Unicode."
        ) from None


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
    captions = tuple(
        c if isinstance(c, str) else tuple(Prompt(str(t), float(w)) for t, w in c)
        for c in stored["captions"]
    )
    if not captions:
        raise KeyError("captions")
    scorer = stored["scorer"]
    if not isinstance(stored["system"], str) or not isinstance(scorer, str | None):
        raise TypeError("system and scorer are words")
    request = make_request(
        captions[0],
        stored["system"],
        stored["seed"],
        len(captions),
        stored["best_of"],
        scorer,
        stored["options"],
    )
    start = None if stored["start"] is None else _start_from_text(stored["start"])
    rows = operator.index(stored["rows"])
    return replace(request, captions=captions, start=start, rows=rows)


def _start_from_text(text: str) -> UInt8[Tensor, "n 3 h w"]:
    """Start pictures from their PNG file in base64: squares, one below the other."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
            pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            width, height = image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise TypeError(f"the start picture is damaged: {error}") from None
    return pixels.view(height // width, width, width, 3).movedim(-1, 1).contiguous()


# --- drawing -----------------------------------------------------------------------------------


@torch.no_grad()
def _finished(request: Request) -> Drawing:
    """The pictures that a request decides."""
    system = registry.load(request.system)
    read = check_request(request, system)
    generator = torch.Generator().manual_seed(request.seed)
    candidates = system.candidates(request, generator)
    pictures = candidates.pictures
    if request.best_of > 1:
        name = request.scorer or system.default_scorer(read)
        if name not in system.scorers():
            raise ValueError(f"{request.system} has nothing that could choose the best of many.")
        pictures, _ = rerank(candidates, request.best_of, system.scorers()[name](system))
    return Drawing(pictures, request, system.weights_id, _judged(pictures, read))


def _judged(pictures: Float[Tensor, "n 3 h w"], read: ReadCaption | None) -> list[bool]:
    """Which pictures show what the caption states; nothing where no judge can read them."""
    if read is None or read.world.judge is None:
        return []
    judge = load_reader(read.world.judge)
    return aligned(judge, pictures, [read] * len(pictures), read.world).tolist()


def options_of(name: str) -> Options:
    """A system's options with their defaults."""
    return registry.find(name).system.Options()

"""From a caption to pictures, with the weights that ship.

    drawing = draw("a small red star above a large striped blue ring", seed=1)
    drawing.save("star.png")        # the file remembers the request and the weights
    redraw("star.png")              # and can be drawn again, pixel for pixel

| to | call |
|---|---|
| draw | `draw`, `draw_steps`, `complete`; `draw_request` for several captions at once |
| vary | `vary` one picture, `blend` two, with a system that embeds pictures (DALL·E 2) |
| keep a drawing | `Drawing.save`, `Drawing.save_new`, `redraw` |
"""

import base64
import html
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image, PngImagePlugin
from torch import Tensor

from t2ilearn import __version__
from t2ilearn.data.grammar import ReadCaption
from t2ilearn.data.interface import CaptionedPictures
from t2ilearn.data.picture_files import FolderError, load_picture
from t2ilearn.data.pixels import bytes_from_pictures
from t2ilearn.judging.alignment import aligned
from t2ilearn.judging.reader import load_reader
from t2ilearn.models.layers import RANGE_TOLERANCE
from t2ilearn.systems import Caption, Options, Request, registry, rerank
from t2ilearn.systems.base import shortened
from t2ilearn.systems.requests import (
    ROWS,
    check_request,
    make_request,
    request_from_json,
    request_to_json,
    whole_number,
)
from t2ilearn.weights import WeightsError, check_default_dtype, claim_new, write_atomically

METADATA_KEY = "t2ilearn"
_ABOUT_FILE = ("weights", "version", "schema")  # what metadata hold beside the request
SCHEMA = 2  # of the metadata


@dataclass(frozen=True)
class Drawing:
    """Pictures, one for each caption of a request, and what the judge read in them.

    `aligned` is empty where a judge cannot tell: for pictures of your own, or without a caption.
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
            OSError: if the file cannot be written: there is no such folder, or the disk is full.
            ValueError: if its name does not end in .png.
        """
        path = check_png(path)
        info = PngImagePlugin.PngInfo()
        info.add_itxt(METADATA_KEY, json.dumps(self.metadata()))
        buffer = io.BytesIO()
        self.image().save(buffer, format="PNG", pnginfo=info)
        write_atomically(path, buffer.getvalue())
        return path

    def save_new(self, path: str | Path) -> Path:
        """As `save`, but no existing file is replaced: star.png, then star-2.png, and so on.

        Returns:
            The file that was written.

        Raises:
            OSError, ValueError: as `save`.
        """
        path = claim_new(check_png(path))
        try:
            return self.save(path)
        except BaseException:
            path.unlink()  # it is still empty
            raise

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


def check_png(path: str | Path) -> Path:
    """A file's name as a path.

    Raises:
        ValueError: if it does not end in .png.
        FileNotFoundError: if there is no such folder.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"Pictures are saved as .png, not {path.suffix or 'without ending'}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to save {path.name} in.")
    return path


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
            your own. Systems that take several prompts take a tuple of `Prompt` with weights.
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
    return draw_request(make_request(caption, system, seed, count, best_of, scorer, options))


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
    return system.steps(request, torch.Generator().manual_seed(request.seed))


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
    loaded, rows = registry.load(system), whole_number("number of rows", rows)
    start = _start_picture(picture, loaded.resolution)
    if not 1 <= rows < ROWS:
        raise ValueError(f"Keep 1 … {ROWS - 1} rows of {ROWS}, not {rows}.")
    request = make_request(caption or "", system, seed, count, best_of, scorer, options)
    return draw_request(replace(request, start=start, rows=rows))


def _start_picture(picture: Float[Tensor, "3 h w"], side: int) -> UInt8[Tensor, "1 3 h w"]:
    """A picture to begin from, as bytes.

    Raises:
        ValueError: for another size, type or range.
    """
    if not isinstance(picture, Tensor):
        kind = type(picture).__name__
        raise ValueError(f"A picture to begin from is a tensor of shape (3, H, W), not a {kind}.")
    if picture.ndim != 3:
        raise ValueError(f"One picture is of shape (3, H, W), not {tuple(picture.shape)}.")
    if tuple(picture.shape) != (3, side, side) or not picture.is_floating_point():
        raise ValueError(
            f"A picture to begin from is a float tensor of shape (3, {side}, {side}) with values "
            f"in [−1, 1]; this is {picture.dtype} of shape {tuple(picture.shape)}."
        )
    if not picture.abs().amax() <= 1 + RANGE_TOLERANCE:  # NaN neither
        low, high = picture.min(), picture.max()
        raise ValueError(f"Pictures lie in [−1, 1]; these go from {low:.3g} to {high:.3g}.")
    return bytes_from_pictures(picture[None])


def vary(
    picture: Float[Tensor, "3 h w"],
    caption: Caption = "",
    *,
    system: str | Path | None = None,
    seed: int = 0,
    count: int = 4,
    **options: Any,
) -> Drawing:
    """Pictures with the same content as a given one: what its embedding keeps.

    Args:
        picture: at the system's resolution, in [−1, 1].
        caption: "" draws from the embedding alone. A text is read by the decoder as well; prompts
            with weights turn the embedding: (Prompt("a red star", -1), Prompt("a blue star")).
        system: one that varies pictures; by default the first that ships.
        seed, count, options: see `draw`.

    Raises:
        CaptionError, ValueError, WeightsError: as `draw`, and for a picture of another size or
            range, or if no such system ships.
    """
    name = _varying_system() if system is None else system
    start = _start_picture(picture, registry.load(name).resolution)
    request = make_request(caption, name, seed, count, 1, None, options)
    return draw_request(replace(request, start=start))


def blend(
    first: Float[Tensor, "3 h w"],
    second: Float[Tensor, "3 h w"],
    *,
    system: str | Path | None = None,
    seed: int = 0,
    count: int = 5,
    **options: Any,
) -> Drawing:
    """Pictures from the content of one to that of another: their embeddings and those between, at
    equal angles.

    Args:
        first, second: see `vary`.
        count: 2 or more, both ends included.
        system, seed, options: see `vary`.

    Raises:
        CaptionError, ValueError, WeightsError: as `vary`, and for fewer than two pictures.
    """
    if whole_number("count", count) < 2:
        raise ValueError(f"A blend has two pictures or more, not {count}: both ends count.")
    name = _varying_system() if system is None else system
    side = registry.load(name).resolution
    start = torch.cat([_start_picture(each, side) for each in (first, second)])
    request = make_request("", name, seed, count, 1, None, {**options, "blend": True})
    return draw_request(replace(request, start=start))


def resolution_of(system: str | Path | None) -> int:
    """The side of the pictures of a system that varies them; None for the first that ships.

    Raises:
        ValueError, WeightsError: as `vary`.
    """
    return registry.load(_varying_system() if system is None else system).resolution


def _varying_system() -> str:
    """The first system that ships and draws variations.

    Raises:
        WeightsError: if there is none.
    """
    for name in registry.names():
        if registry.find(name).system.varies:
            return name
    varying = [name for name, system in registry.SYSTEMS.items() if system.varies]
    raise WeightsError(
        f"No weights of a system that varies pictures ship. Train one (t2ilearn train "
        f"{varying[0]}), and name its folder."
    )


def redraw(path: str | Path) -> Drawing:
    """Draw again what a file made by `Drawing.save` remembers.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file carries no metadata of ours, damaged ones, or those of another
            edition, or its system is unknown here.
        WeightsError: if it was drawn with other weights than those installed.
    """
    stored = _read_metadata(Path(path))
    weights_id, system = stored.get("weights"), stored.get("system")
    if isinstance(system, str):
        registry.find(system)  # what is unknown here need not be damaged
    try:
        if not isinstance(weights_id, str):
            raise TypeError("field weights is no word")
        request = request_from_json({k: v for k, v in stored.items() if k not in _ABOUT_FILE})
    except KeyError as error:
        raise ValueError(f"The metadata of {path} are damaged: they lack {error}.") from None
    except (TypeError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"The metadata of {path} are damaged: {reason}.") from None
    installed = registry.load(request.system).weights_id
    if installed != weights_id:
        raise WeightsError(
            f"{path} was drawn with weights {weights_id}, but {installed} are installed; the "
            "picture would differ."
        )
    return draw_request(request)


def _read_metadata(path: Path) -> dict[str, Any]:
    """What `Drawing.metadata` said when a file was saved.

    Raises:
        FileNotFoundError, ValueError: as `redraw`.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no picture {path}.")
    try:
        text = load_picture(path).info.get(METADATA_KEY)
    except FolderError as error:
        raise ValueError(f"{path} is not a readable picture: it {error}.") from None
    if text is None:
        raise ValueError(f"{path} was not drawn by t2ilearn: it carries no caption and seed.")
    try:
        stored = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"The metadata of {path} are damaged: they are no JSON.") from None
    if not isinstance(stored, dict):
        raise ValueError(f"The metadata of {path} are damaged: they are no JSON object.")
    if "schema" not in stored and "caption" in stored:
        raise ValueError(
            f"{path} was drawn by the first edition of t2ilearn, whose weights are gone. Draw its "
            f"caption anew: {stored['caption']!r}."
        )
    schema = stored.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise ValueError(f"{path} was drawn by a newer t2ilearn: update yours to draw it again.")
    if type(schema) is not int or schema != SCHEMA:
        raise ValueError(
            f"The metadata of {path} are damaged: field schema is {shortened(schema)}, not "
            f"{SCHEMA}."
        )
    return stored


# --- drawing -----------------------------------------------------------------------------------


@torch.no_grad()
def draw_request(request: Request) -> Drawing:
    """The pictures that a request decides, one for each of its captions.

    Raises:
        CaptionError, ValueError, WeightsError: as `draw`, and as `check_request`.
    """
    check_default_dtype()
    system = registry.load(request.system)
    read = check_request(request, system)
    name = request.scorer or system.default_scorer(read)
    if request.best_of > 1 and name not in system.scorers():
        raise ValueError(f"{request.system} has nothing that could choose the best of many.")
    generator = torch.Generator().manual_seed(request.seed)
    candidates = system.candidates(request, generator)
    pictures = candidates.pictures
    if request.best_of > 1:
        pictures, _ = rerank(candidates, request.best_of, system.scorers()[name](system))
    return Drawing(pictures, request, system.weights_id, _judged(pictures, read))


def _judged(pictures: Float[Tensor, "n 3 h w"], read: Sequence[ReadCaption | None]) -> list[bool]:
    """Which pictures show what their captions state; nothing where a judge cannot tell of all."""
    rows_of: dict[type[CaptionedPictures], list[int]] = {}
    for row, caption in enumerate(read):
        if caption is not None and caption.world.judge is not None:
            rows_of.setdefault(caption.world, []).append(row)
    if sum(map(len, rows_of.values())) < len(pictures):
        return []
    right = [False] * len(pictures)
    for world, rows in rows_of.items():
        captions = [each for each in (read[row] for row in rows) if each is not None]
        found = aligned(load_reader(world.judge or ""), pictures[rows], captions, world)
        for row, shown in zip(rows, found.tolist(), strict=True):
            right[row] = shown
    return right


def options_of(name: str) -> Options:
    """A system's options with their defaults."""
    return registry.find(name).system.Options()

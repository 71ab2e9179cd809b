"""Draw the pictures that README and intro page show, with the weights that ship.

    python tools/make_strip.py
    python tools/make_strip.py --keep strip.json   # keeps each drawing there, to go on later

Nothing is picked by hand: seed 0, the best of sixteen drawings. The training reader chooses among
shapes, the prior itself among emoji; and of the twenty emoji captions on the Play page those six
are shown that the emoji judge reads best. Writes, under book/_static/: strip.png (emoji above,
shapes below), pairs.webp (every colour with every shape) and pairs.html (which shows one pair).
"""

import argparse
import base64
import io
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import make_play
from t2ilearn.data.captions import COLOURS, SHAPES
from t2ilearn.data.grammar import read_caption
from t2ilearn.data.shapes import HELD_OUT
from t2ilearn.drawing import draw
from t2ilearn.judging import load_reader
from t2ilearn.judging.alignment import score
from t2ilearn.systems import registry
from t2ilearn.systems.evaluation import Kept

STATIC = Path(__file__).resolve().parent.parent / "book" / "_static"
CAPTIONS = (
    "a small red star above a large striped blue ring",
    "a large dotted green heart on a sky background",
    "a large checkered orange diamond left of a small pink circle",
    "a small solid yellow cross below a large purple square on a black background",
    "a large striped brown triangle",
    "a small blue heart right of a large dotted red ring",
)
BEST_OF = 16
COLUMNS = 6
SCALE, GAP, TEXT = 3, 16, 66  # enlargement, pixels between pictures, pixels for the caption


class Drawings:
    """What is drawn of each caption, with a progress bar; if a file is named, it is kept there.

    Raises:
        ValueError: if the file is of something else.
    """

    def __init__(self, keep: Path | None = None) -> None:
        weights = {name: registry.load(name).weights_id for name in registry.names()}
        self.kept = Kept(keep, {"best of": BEST_OF, "weights": weights})

    def __call__(self, captions: Sequence[str]) -> list[dict[str, Any]]:
        """For each caption "picture", "aligned" (the judge reads it as stated) and "score"."""
        found = []
        for caption in tqdm(captions, desc="drawing", unit="caption"):
            self.kept.measure(caption, drawn, caption)
            part = self.kept.parts[caption]
            data = io.BytesIO(base64.b64decode(part["png"]))
            found.append({**part, "picture": Image.open(data).convert("RGB")})
        return found


@torch.no_grad()
def drawn(caption: str) -> dict[str, Any]:
    """The best drawing as a PNG in base64, and what the judge says of it: whether it is as stated,
    and the log-probability of what is stated."""
    read = read_caption(caption)
    drawing = draw(caption, count=1, seed=0, best_of=BEST_OF)
    buffer = io.BytesIO()
    drawing.image().save(buffer, "PNG")
    judge = load_reader(read.world.judge)
    return {
        "png": base64.b64encode(buffer.getvalue()).decode("ascii"),
        "aligned": drawing.aligned[0],
        "score": score(judge, drawing.pictures, [read], read.world).item(),
    }


def strip(drawings: Drawings) -> Image.Image:
    """Rows of drawings, each over its caption."""
    captions = (*best_read(drawings), *CAPTIONS)
    pictures = [drawing["picture"] for drawing in drawings(captions)]
    side = pictures[0].height * SCALE
    width, height = COLUMNS * (side + GAP) - GAP, side + TEXT
    sheet = Image.new("RGB", (width, len(pictures) // COLUMNS * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = number % COLUMNS * (side + GAP), number // COLUMNS * height
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
        text = "\n".join(textwrap.wrap(caption, width=27))
        pen.multiline_text((left, top + side + 6), text, fill=(40, 40, 40), font=font, spacing=3)
    return sheet


def best_read(drawings: Drawings) -> list[str]:
    """The emoji captions of the Play page whose drawings the emoji judge reads best, by
    log p(concept, style | drawing)."""
    emoji = [each for each in make_play.CAPTIONS if read_caption(each).world.name == "emoji"]
    scores = {each: found["score"] for each, found in zip(emoji, drawings(emoji), strict=True)}
    return sorted(scores, key=scores.__getitem__, reverse=True)[:COLUMNS]


def pairs(drawings: Drawings) -> tuple[Image.Image, list[bool]]:
    """One drawing for each colour (row) and shape (column), and what the judge says of each."""
    found = drawings([f"a large {colour} {shape}" for colour in COLOURS for shape in SHAPES])
    side = found[0]["picture"].height
    sheet = Image.new("RGB", (side * len(SHAPES), side * len(COLOURS)))
    for number, drawing in enumerate(found):
        at = (number % len(SHAPES) * side, number // len(SHAPES) * side)
        sheet.paste(drawing["picture"], at)
    return sheet, [drawing["aligned"] for drawing in found]


def page(aligned: list[bool]) -> str:
    """The page part that shows one pair: plain HTML, by keyboard too, without a kernel."""
    template = (Path(__file__).parent / "pairs_template.html").read_text(encoding="utf-8")
    data = {
        "colours": COLOURS,
        "shapes": SHAPES,
        "heldOut": [colour * len(SHAPES) + shape for colour, shape in HELD_OUT],
        "aligned": [int(value) for value in aligned],
    }
    return template.replace("/*DATA*/", json.dumps(data))


def main() -> int:
    """Write the three files and say how many drawings show what their captions state."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, help="a JSON file for what is drawn, to go on later")
    drawings = Drawings(parser.parse_args().keep)
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    STATIC.mkdir(parents=True, exist_ok=True)
    strip(drawings).save(STATIC / "strip.png", optimize=True)
    sheet, aligned = pairs(drawings)
    sheet.save(STATIC / "pairs.webp", quality=85, method=6)
    (STATIC / "pairs.html").write_text(page(aligned), encoding="utf-8", newline="\n")
    unseen = [aligned[colour * len(SHAPES) + shape] for colour, shape in HELD_OUT]
    print(f"pairs: {sum(aligned)} of {len(aligned)} as stated; never met in training: "
          f"{sum(unseen)} of {len(unseen)}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

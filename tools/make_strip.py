"""Draw the pictures that README and intro page show, with the weights that ship.

    python tools/make_strip.py

Nothing is picked by hand: seed 0, the best of sixteen drawings. The training reader chooses among
shapes, the prior itself among emoji; and of the twenty emoji captions on the Play page those six
are shown that the emoji judge reads best. Writes, under book/_static/: strip.png (emoji above,
shapes below), pairs.webp (every colour with every shape) and pairs.html (which shows one pair).
"""

import json
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import make_play
from t2ilearn.data.captions import COLOURS, SHAPES
from t2ilearn.data.grammar import read_caption
from t2ilearn.data.shapes import HELD_OUT
from t2ilearn.drawing import draw
from t2ilearn.judging import load_reader
from t2ilearn.judging.alignment import score

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


def strip() -> Image.Image:
    """Rows of drawings, each over its caption."""
    captions = (*best_read(), *CAPTIONS)
    pictures = [draw(caption, count=1, seed=0, best_of=BEST_OF).image() for caption in captions]
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


@torch.no_grad()
def best_read() -> list[str]:
    """The emoji captions of the Play page whose drawings the emoji judge reads best, by
    log p(concept, style | drawing)."""
    scores = {}
    for caption in make_play.CAPTIONS:
        read = read_caption(caption)
        if read.world.name == "emoji":
            drawing = draw(caption, count=1, seed=0, best_of=BEST_OF)
            judge = load_reader(read.world.judge)
            scores[caption] = score(judge, drawing.pictures, [read], read.world).item()
    return sorted(scores, key=scores.__getitem__, reverse=True)[:COLUMNS]


def pairs() -> tuple[Image.Image, list[bool]]:
    """One drawing for each colour (row) and shape (column), and what the judge says of each."""
    drawings = [
        draw(f"a large {c} {s}", count=1, seed=0, best_of=BEST_OF) for c in COLOURS for s in SHAPES
    ]
    side = drawings[0].image().height
    sheet = Image.new("RGB", (side * len(SHAPES), side * len(COLOURS)))
    for number, drawing in enumerate(drawings):
        at = (number % len(SHAPES) * side, number // len(SHAPES) * side)
        sheet.paste(drawing.image(), at)
    return sheet, [drawing.aligned[0] for drawing in drawings]


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
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    STATIC.mkdir(parents=True, exist_ok=True)
    strip().save(STATIC / "strip.png", optimize=True)
    sheet, aligned = pairs()
    sheet.save(STATIC / "pairs.webp", quality=85, method=6)
    (STATIC / "pairs.html").write_text(page(aligned), encoding="utf-8", newline="\n")
    unseen = [aligned[colour * len(SHAPES) + shape] for colour, shape in HELD_OUT]
    print(f"pairs: {sum(aligned)} of {len(aligned)} as stated; never met in training: "
          f"{sum(unseen)} of {len(unseen)}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

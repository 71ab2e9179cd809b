"""Draw what the page `book/play.md` shows: some forty captions, by every system, from four seeds.

    python tools/make_play.py      # writes book/_static/play.html

Nothing is picked: seeds 0 to 3, as `draw` samples by default. A later system adds a line to
`SYSTEMS` and gets a row of its own for every caption that it knows.
"""

import base64
import io
import json
import sys
from pathlib import Path

import torch
from PIL import Image

from t2ilearn.data import CaptionError, Emoji, TinyShapes, shapes
from t2ilearn.data.captions import COLOURS, SHAPES, Stated
from t2ilearn.data.emoji_captions import StatedEmoji, concept_numbers
from t2ilearn.data.emoji_files import STYLES
from t2ilearn.data.grammar import read_caption
from t2ilearn.drawing import Drawing, draw, load_system

PAGE = Path(__file__).resolve().parent.parent / "book" / "_static" / "play.html"
SYSTEMS = {
    "vqvae": "VQ-VAE and Transformer (book)",
    "vqgan": "VQGAN and Transformer (book)",
    "dalle": "DALL·E, on the VQGAN's codes (book)",
    "dalle-dvae": "DALL·E, on the dVAE's codes (book)",
    "vqvae-tiny": "VQ-VAE and Transformer (tiny)",
}
SEEDS = 4
CAPTIONS = (
    "a dodo, outline, on a sky background",
    "a fox, flat, on a white background",
    "a volcano, glossy, on a black background",
    "a red apple, soft, on a grey background",
    "a guitar, ink, on a white background",
    "an octopus, glossy, on a sky background",
    "a lion, soft, on a white background",
    "a rocket, flat, on a black background",
    "a sunflower, outline, on a sky background",
    "a ghost, glossy, on a black background",
    "a pizza, soft, on a white background",
    "an umbrella, flat, on a grey background",
    "a snail, outline, on a white background",
    "a castle, soft, on a sky background",
    "a mushroom, glossy, on a white background",
    "a cactus, ink, on a sky background",
    "a bee, outline, on a white background",
    "a grinning face, flat, on a sky background",
    "a crescent moon, flat, on a black background",
    "a sailboat, glossy, on a sky background",
    "a red star",
    "a large blue heart",
    "a small yellow circle on a black background",
    "a large green star on a sky background",
    "a small blue star on a white background",
    "a large red circle on a grey background",
    "a large yellow heart",
    "a large green heart on a black background",
    "a large striped brown triangle",
    "a large checkered purple diamond",
    "a small dotted pink cross on a black background",
    "a large solid red triangle",
    "a large dotted green ring on a sky background",
    "a small red star above a large striped blue ring",
    "a large checkered orange diamond left of a small pink circle",
    "a small solid yellow cross below a large purple square on a black background",
    "a small blue heart right of a large dotted red ring",
    "a large striped green square above a small brown star on a white background",
    "a large red circle left of a large blue circle",
    "a large blue circle left of a large red circle",
)


def never_met(stated: Stated | StatedEmoji, emoji: Emoji) -> bool:
    """Whether training held nothing that shows this colour on this shape, or concept and style."""
    if isinstance(stated, Stated):
        pairs = [(t.colour, t.shape) for t in stated.objects if t.colour is not None]
        return any((COLOURS.index(c), SHAPES.index(s)) in shapes.HELD_OUT for c, s in pairs)
    if stated.style is None:
        return False
    pair = torch.tensor([concept_numbers()[stated.concept], STYLES.index(stated.style)])
    drawn = (emoji.pairs == pair).all(1) & ~emoji.held_out
    return not drawn.any()


def drawings(system: str) -> dict[int, Drawing]:
    """A system's four drawings for each caption that it knows, by the caption's number."""
    found = {}
    for number, caption in enumerate(CAPTIONS):
        try:
            read_caption(caption, load_system(system).worlds)
        except CaptionError:
            continue
        if system == "vqvae-tiny" and not in_tiny_world(caption):
            continue
        singles = [draw(caption, system=system, seed=seed, count=1) for seed in range(SEEDS)]
        found[number] = Drawing(
            torch.cat([single.pictures for single in singles]),
            singles[0].request,
            singles[0].weights_id,
            [single.aligned[0] for single in singles],
        )
    return found


def in_tiny_world(caption: str) -> bool:
    """One solid object, in the colours and shapes that the tiny world has."""
    stated = read_caption(caption, ["shapes"])
    assert isinstance(stated, Stated)
    thing, world = stated.objects[0], TinyShapes
    colours = [None, *(COLOURS[number] for number in world.COLOURS)]
    known = thing.colour in colours and SHAPES.index(thing.shape) in world.SHAPES
    return len(stated.objects) == 1 and thing.pattern in (None, "solid") and known


def sheet(found: dict[int, Drawing]) -> str:
    """A row of four for each caption, as a data address, which a canvas may read and save."""
    images = [drawing.image() for drawing in found.values()]
    width, height = images[0].size
    whole = Image.new("RGB", (width, height * len(images)))
    for row, image in enumerate(images):
        whole.paste(image, (0, row * height))
    buffer = io.BytesIO()
    whole.save(buffer, format="WEBP", quality=85, method=6)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def page() -> str:
    """The page part: plain HTML, by keyboard too, without a kernel."""
    emoji = Emoji()
    unseen = [i for i, c in enumerate(CAPTIONS) if never_met(read_caption(c), emoji)]
    systems = {}
    for system, title in SYSTEMS.items():
        found = drawings(system)
        rows = {
            number: {"row": row, "judged": sum(drawing.aligned)}
            for row, (number, drawing) in enumerate(found.items())
        }
        side = next(iter(found.values())).pictures.shape[-1]
        systems[system] = {
            "title": title,
            "weights": load_system(system).weights_id,  # a test holds them to those that ship
            "side": side,
            "rows": rows,
            "sheet": sheet(found),
        }
    data = {"captions": CAPTIONS, "unseen": unseen, "systems": systems}
    template = (Path(__file__).parent / "play_template.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/", json.dumps(data))


def main() -> int:
    """Write the page part and say what the judge reads."""
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    text = page()
    PAGE.write_text(text, encoding="utf-8", newline="\n")
    print(f"{PAGE.name}: {len(text) / 2**20:.2f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

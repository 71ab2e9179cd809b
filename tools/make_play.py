"""Draw what the page `book/play.md` shows: some forty captions, by every system, from four seeds.

    python tools/make_play.py                    # writes book/_static/play.html
    python tools/make_play.py --keep play.json   # keeps each system's part there, to go on later

Nothing is picked: seeds 0 to 3, as `draw` samples by default. Every system that ships gets a row of
its own for each caption that its worlds cover.
"""

import argparse
import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from t2ilearn.data import CaptionError
from t2ilearn.data.grammar import WORLDS, read_caption
from t2ilearn.drawing import Drawing, draw
from t2ilearn.systems import registry
from t2ilearn.systems.evaluation import Kept

PAGE = Path(__file__).resolve().parent.parent / "book" / "_static" / "play.html"
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


def drawings(name: str, worlds: dict) -> dict[int, Drawing]:
    """A system's four drawings for each caption that its worlds cover, by the caption's number."""
    found = {}
    for number, caption in enumerate(tqdm(CAPTIONS, desc=name, unit="caption")):
        try:
            read = read_caption(caption, registry.load(name).worlds)
        except CaptionError:
            continue
        if not worlds[read.world.name].covers(read.stated):
            continue
        singles = [draw(caption, system=name, seed=seed, count=1) for seed in range(SEEDS)]
        found[number] = Drawing(
            torch.cat([single.pictures for single in singles]),
            singles[0].request,
            singles[0].weights_id,
            [single.aligned[0] for single in singles],
        )
    return found


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


def part(name: str, worlds: dict) -> dict[str, Any]:
    """What the page shows of one system."""
    found = drawings(name, worlds)
    return {
        "title": registry.title(name),
        "weights": registry.load(name).weights_id,  # a test holds them to those that ship
        "side": next(iter(found.values())).pictures.shape[-1],
        "rows": {
            str(number): {"row": row, "judged": sum(drawing.aligned)}
            for row, (number, drawing) in enumerate(found.items())
        },
        "sheet": sheet(found),
    }


def page(keep: Path | None = None) -> str:
    """The page part: plain HTML, by keyboard too, without a kernel.

    Raises:
        ValueError: if `keep` is a file of something else.
    """
    worlds = {name: world() for name, world in WORLDS.items()}
    read = [read_caption(caption) for caption in CAPTIONS]
    unseen = [i for i, each in enumerate(read) if worlds[each.world.name].unseen(each.stated)]
    kept = Kept(keep, {"captions": list(CAPTIONS), "seeds": SEEDS})
    systems = {}
    for name in registry.names():
        key = f"{name} {registry.load(name).weights_id}"
        kept.measure(key, part, name, worlds)
        systems[name] = kept.parts[key]
    data = {"captions": CAPTIONS, "unseen": unseen, "systems": systems}
    template = (Path(__file__).parent / "play_template.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/", json.dumps(data))


def main() -> int:
    """Write the page part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, help="a JSON file for what is drawn, to go on later")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    text = page(asked.keep)
    PAGE.write_text(text, encoding="utf-8", newline="\n")
    print(f"{PAGE.name}: {len(text) / 2**20:.2f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Choose how `draw` samples: alignment over a grid of guidance scales and truncations.

    python tests/benchmarks/sampling.py [SYSTEM]      # some minutes; writes sampling.json

The captions are of the training split, so that no test set decides the choice: the world is
so much larger than what a prior saw of it that most of these scenes are new to it as well. The
judge reads the pictures, as it does for every figure of the project.
"""

import json
import sys
from itertools import product
from pathlib import Path

import torch

from t2ilearn.data.grammar import WORLDS
from t2ilearn.judging import load_reader
from t2ilearn.judging.alignment import aligned
from t2ilearn.judging.report import share
from t2ilearn.systems import registry
from t2ilearn.systems.base import options_text
from t2ilearn.systems.evaluation import draw_each

N = 500  # one picture each: a 95 % interval of ± 4 points at most
SCALES, TOP_PS = (1.0, 1.5, 2.0, 3.0), (1.0, 0.95, 0.9, 0.8)
RESULTS = Path(__file__).with_name("sampling.json")


def main() -> None:
    """Print alignment for each pair of settings, and write all of it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "vqvae"
    system = registry.load(name)
    world = WORLDS[system.worlds[0]](system.resolution)
    judge, generator = load_reader(world.judge), torch.Generator().manual_seed(4000)
    scenes = world.scenes(N, "train", generator=generator)
    captions, rows = world.captions(scenes, said=1.0, generator=generator), []
    for scale, top_p in product(SCALES, TOP_PS):
        how = {"guidance_scale": scale, "top_p": top_p}
        pictures = draw_each(system, captions, system.make_options(**how))
        found = share(aligned(judge, pictures, captions))
        rows.append({**how, "alignment": found["value"], "half_width": found["half_width"]})
        print(f"guidance {scale:3}  top-p {top_p:4}  alignment {found['value']:6.1%}", flush=True)
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    stored[name] = {
        "captions": f"{N} of the training split, everything said",
        "weights": system.weights_id,
        "draw uses": options_text(system.Options()),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Learn the byte-pair tokens that captions of both worlds ship with.

    python tools/build_tokenizer.py     # writes t2ilearn/assets/tokenizer.json

One tokenizer serves every system that reads both worlds. It is learned once, from captions of the
training splits, and each card names its SHA-256: another one would turn a prior's words into
other words.
"""

import sys
from pathlib import Path

import torch

from t2ilearn.data import CaptionTokenizer, Emoji, Shapes
from t2ilearn.data.bpe import SHARED, SHARED_LENGTH

CAPTIONS = 20_000  # of each world
VOCABULARY = 1024


def learn() -> CaptionTokenizer:
    """The tokenizer, the same at every call."""
    captions: list[str] = []
    for world in (Emoji(), Shapes()):
        generator = torch.Generator().manual_seed(0)
        scenes = world.scenes(CAPTIONS, generator=generator)
        captions += world.mixed_captions(scenes, generator)
    return CaptionTokenizer.train(captions, VOCABULARY, SHARED_LENGTH)


def main(path: Path = SHARED) -> int:
    """Write the file and say what it is."""
    print(learn().save(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Copy finished runs into the package: weights, card and flight record.

    python tools/ship_weights.py runs judge vqvae-book prior-book

Weights are read back strictly first, and a card without metrics (a stopped run) is refused. Of some
runs the flight record and the card ship, and no weights: of ablations, at which chapter 4 looks,
and of chapter 5's small dVAE, which its lab trains anew.
"""

import hashlib
import shutil
import sys
from pathlib import Path

from t2ilearn import weights
from t2ilearn.data.bpe import SHARED
from t2ilearn.drawing import load_tokenizer
from t2ilearn.flight import read_record
from t2ilearn.recipes import ABLATIONS

RECORDS_ONLY = {*(f"{name}-tiny" for name in ABLATIONS), "dvae-tiny"}


def ship(runs: Path, name: str) -> None:
    """One run's files, from RUNS/NAME to the assets.

    Raises:
        WeightsError: if the weights do not match their card.
        ValueError: if the card has no metrics, or the tokenizer is not the one that ships.
    """
    source = runs / name / f"{name}.safetensors"
    card = weights.load(source).card
    if "metrics" not in card:
        raise ValueError(f"{source} was not measured: let its training end.")
    if "tokenizer" in card:
        load_tokenizer(source)  # the run's own is sound
        if hashlib.sha256(SHARED.read_bytes()).hexdigest() != card["tokenizer"]["sha256"]:
            raise ValueError(f"{source} learned its captions through another tokenizer.")
    record = weights.ASSETS / "flights" / name
    shutil.rmtree(record, ignore_errors=True)
    record.mkdir(parents=True)
    if name in RECORDS_ONLY:
        shutil.copyfile(source.with_suffix(".json"), record / "card.json")
    else:
        for path in (source, source.with_suffix(".json")):
            shutil.copyfile(path, weights.ASSETS / path.name)
    shutil.copyfile(runs / name / "flight.json", record / "flight.json")
    if read_record(runs / name).frames:
        shutil.copytree(runs / name / "frames", record / "frames")
    print(f"{name}: {source.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    for each in sys.argv[2:]:
        ship(Path(sys.argv[1]), each)

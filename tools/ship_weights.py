"""Copy finished runs into the package: weights, card and flight record.

    python tools/ship_weights.py runs judge vqvae-book prior-book

Weights are loaded strictly first. Refused are a card without metrics (a stopped run), another
tokenizer of captions than the one that ships, and parents that do not ship. Of some runs only the
flight record and the card ship, without weights: the ablations of chapter 4, and chapter 5's
small dVAE, which its lab trains anew.
"""

import hashlib
import shutil
import sys
from pathlib import Path

from t2ilearn import weights
from t2ilearn.data.bpe import SHARED
from t2ilearn.systems.tokens import load_text_tokenizer
from t2ilearn.systems.vqgan import ABLATIONS
from t2ilearn.training.flight import read_record
from t2ilearn.weights import Card

RECORDS_ONLY = {*(f"{name}-tiny" for name in ABLATIONS), "dvae-tiny"}


def check(source: Path, card: Card) -> None:
    """Raise `ValueError` unless a run is finished and belongs to what ships beside it."""
    if not card.metrics:
        raise ValueError(f"{source} was not measured: let its training end.")
    if card.tokenizer is not None:
        load_text_tokenizer(source, card)  # the run's own file is sound
        if hashlib.sha256(SHARED.read_bytes()).hexdigest() != card.tokenizer["sha256"]:
            raise ValueError(f"{source} was trained with another tokenizer of captions.")
    shipped = {
        weights.read_card(weights.ASSETS / f"{name}.json").sha256 for name in weights.available()
    }
    for role, digest in card.parents.items():
        if digest not in shipped:
            raise ValueError(
                f"{source} was trained on top of a {role} ({digest[:8]}) that does not ship. Ship "
                "that first."
            )


def ship(runs: Path, name: str) -> None:
    """One run's files, from RUNS/NAME to the assets.

    Raises:
        WeightsError: if the weights do not match their card.
        ValueError: if the card has no metrics, or its tokenizer or a parent does not ship.
    """
    source = runs / name / f"{name}.safetensors"
    check(source, weights.load(source).card)
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

"""Write the README's table of what works today from the cards of the shipped weights.

    python tools/readme_table.py           # rewrite the part between the markers
    python tools/readme_table.py --check   # change nothing; exit 1 if the README differs

No number of that table is typed by hand: each is read from a card, and a card is written by the
run that measured it.
"""

import json
import re
import sys
from pathlib import Path

from t2ilearn.weights import figure

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ASSETS = ROOT / "t2ilearn" / "assets"
START = "<!-- results: written by tools/readme_table.py from the cards, do not edit -->"
STOP = "<!-- end of results -->"


def cards() -> dict[str, dict]:
    """Each shipped card by the name of its weights."""
    return {
        path.stem: json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        for path in sorted(ASSETS.glob("*.safetensors"))
    }


def rewrite(readme: str) -> str:
    """The README with the table that the cards imply between the markers."""
    body = "\n".join(table(cards()))
    pattern = re.escape(START) + ".*?" + re.escape(STOP)
    return re.sub(pattern, lambda _: f"{START}\n\n{body}\n\n{STOP}", readme, flags=re.DOTALL)


# What the README shows of each kind of card; the cards have more.
SHOWN = {
    "judge": ("real", "jpeg 50", "floor (captions shuffled)"),
    "reader": ("real", "jpeg 50", "floor (captions shuffled)"),
    "emoji-judge": (
        "concept, real",
        "concept in the first five, real",
        "style, real",
        "concept, jpeg 50",
        "concept, floor (drawings shuffled)",
        "style, floor (drawings shuffled)",
    ),
    "vqvae": (
        "PSNR, dB",
        "codebook usage",
        "judge on reconstructions",
        "judge on real pictures",
        "Fréchet distance in reader features",
        "Fréchet distance in reader features, floor (real)",
        *(
            f"emoji, {what}, {name}"
            for name in ("seen", "held-out")
            for what in ("PSNR, dB", "concept on reconstructions", "style on reconstructions")
        ),
        "emoji, concept on real pictures, held-out",
    ),
    "prior": tuple(
        f"{name}, {manner}"
        for manner in ("as learned", "as drawn")
        for name in ("test-full", "test-partial", "composition")
    )
    + ("binding, as drawn", "ceiling: reconstructions", "floor: captions shuffled, as drawn")
    + tuple(
        f"emoji, {what}, as drawn"
        for name in ("seen", "held-out")
        for what in (
            f"concept in the first five, {name}",
            f"style, {name}",
            f"floor: captions shuffled, {name}",
            f"floor: style, captions shuffled, {name}",
        )
    ),
}
SHOWN["pixelcnn"] = SHOWN["vqgan-prior"] = SHOWN["prior"]
SHOWN["vqgan"] = SHOWN["dvae"] = SHOWN["vqvae"]
SHOWN["dalle"] = SHOWN["dalle-dvae"] = SHOWN["prior"] + tuple(
    f"test-full, best of {count} by the reader" for count in (1, 2, 4, 8)
)


def table(found: dict[str, dict]) -> list[str]:
    """The table's lines: one row for each of the shipped weights, then the bars they miss."""
    if not found:
        return ["No weights ship yet."]
    lines = [
        "| weights | parameters | trained on | measured, with 95 % intervals |",
        "|---|---|---|---|",
    ]
    missed = []
    for name, card in found.items():
        measured = card["metrics"]
        shown = {what: measured[what] for what in SHOWN[card["system"]] if what in measured}
        metrics = "<br>".join(f"{what}: {figure(v)}" for what, v in shown.items())
        precision = {"no": "fp32"}.get(card["precision"], card["precision"])
        trained = f"{card['device']}, {precision}, {card['minutes']:g} min"
        lines.append(f"| `{name}` | {card['parameters'] / 1e6:.2f} M | {trained} | {metrics} |")
        for what, bar in card.get("bars", {}).items():
            if not bar["met"]:
                missed.append(f"- `{name}`, {what}: {bar['measured']:g} of {bar['bar']:g}")
    if missed:
        lines += ["", "Short of what this project asks of them, for want of a GPU:", "", *missed]
    return lines


def main() -> int:
    """Rewrite the README (or with --check only compare)."""
    readme = README.read_text(encoding="utf-8")
    written = rewrite(readme)
    if "--check" not in sys.argv[1:]:
        README.write_text(written, encoding="utf-8", newline="\n")
        return 0
    if written != readme:
        print("README.md differs from the cards: run python tools/readme_table.py")
    return int(written != readme)


if __name__ == "__main__":
    sys.exit(main())

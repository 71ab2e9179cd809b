"""Write the README's table and the book's page of results from the cards of the shipped weights.

    python tools/results_tables.py           # rewrites README.md and book/results.md
    python tools/results_tables.py --check   # changes nothing; exit 1 if one of them differs

No number there is typed by hand: each is read from a card, which is written by the run that
measured it, or from the record of `make bench`.
"""

import json
import re
import sys
from pathlib import Path

from t2ilearn import weights
from t2ilearn.systems import registry
from t2ilearn.weights import Card, figure

ROOT = Path(__file__).resolve().parent.parent
README, PAGE = ROOT / "README.md", ROOT / "book" / "results.md"
BENCH = ROOT / "tests" / "benchmarks" / "results.json"
START = "<!-- results: written by tools/results_tables.py, do not edit -->"
STOP = "<!-- end of results -->"
SHAPES = "test-full, as drawn"
EMOJI = ("emoji, concept, seen, as drawn", "emoji, concept in the first five, seen, as drawn")


def readme_with_table(readme: str) -> str:
    """The README with the table that the cards imply between the markers."""
    body = "\n".join(systems_table())
    pattern = re.escape(START) + ".*?" + re.escape(STOP)
    return re.sub(pattern, lambda _: f"{START}\n\n{body}\n\n{STOP}", readme, flags=re.DOTALL)


def systems_table() -> list[str]:
    """One row for each system that can draw with what ships."""
    lines = [
        "| system | what it shows | shapes drawn as stated | emoji named rightly | four pictures |",
        "|---|---|---|---|---|",
    ]
    seconds = measured_seconds()
    for name in registry.names():
        metrics = card.metrics if (card := registry.card_of(name)) else {}
        emoji = next((what for what in EMOJI[::-1] if what in metrics), None)
        cells = [
            f"`{name}` {registry.title(name)}",
            registry.find(name).system.shows,
            figure(metrics[SHAPES]) if SHAPES in metrics else "–",
            figure(metrics[emoji]) if emoji else "–",
            f"{seconds[name]:.2f} s" if name in seconds else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measured_seconds() -> dict[str, float]:
    """Seconds for four pictures by system, as `make bench` recorded them."""
    rows = json.loads(BENCH.read_text(encoding="utf-8"))["rows"]
    found = {}
    for row in rows:
        if match := re.fullmatch(r"draw --with (\S+), four pictures", row["what"]):
            found[match[1]] = row["value"]
    return found


def page() -> str:
    """The book's page: every figure of every card."""
    lines = [
        "# Results: every figure of every card",
        "",
        "This page is written by `python tools/results_tables.py` from the cards of the weights",
        "that ship. A card is written by the run that made its weights, and its figures are",
        "measured on the weights as they come back from their file (stored in float16). Shares of",
        "pictures have the half-width of their 95 % interval; other figures have the ends of a",
        "bootstrap interval. *As drawn* is how `draw` samples by default; *as learned* is without",
        "guidance and truncation. A *floor* is what a model that ignores the caption reaches, a",
        "*ceiling* what real pictures reach.",
        "",
        "## Systems",
        "",
        *systems_table(),
        "",
        "*Shapes drawn as stated*: per cent of pictures in which the judge reads everything that",
        "the caption states. *Emoji named rightly*: per cent of pictures of pairs seen in training",
        "in which the concept is among the judge's five likeliest.",
        "",
    ]
    for name in weights.available():
        lines += section(weights.read_card(weights.find(name).with_suffix(".json")))
    return "\n".join(lines).rstrip() + "\n"


def section(card: Card) -> list[str]:
    """One card."""
    precision = {"no": "fp32"}.get(card.precision, card.precision)
    lines = [
        f"## {card.name}",
        "",
        f"{card.parameters / 1e6:.2f} M parameters; {card.steps:,} steps, {card.minutes:g} minutes",
        f"on {card.device}, {precision}. Command: `{card.command}`.",
        "",
    ]
    if card.note:
        lines += [card.note, ""]
    if card.metrics:
        lines += ["| figure | measured |", "|---|---|"]
        lines += [f"| {what} | {figure(value)} |" for what, value in card.metrics.items()]
        lines += [""]
    missed = {what: bar for what, bar in card.bars.items() if not bar["met"]}
    if missed:
        lines += ["Below what this project asks for:", ""]
        lines += [
            f"- {what}: {bar['measured']:g} of {bar['bar']:g}" for what, bar in missed.items()
        ]
        lines += [""]
    return lines


def written() -> dict[Path, str]:
    """Each file and what it should hold."""
    return {README: readme_with_table(README.read_text(encoding="utf-8")), PAGE: page()}


def main() -> int:
    """Rewrite both files (or with --check only compare)."""
    different = []
    for path, text in written().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            different.append(path.name)
            if "--check" not in sys.argv[1:]:
                path.write_text(text, encoding="utf-8", newline="\n")
    if "--check" not in sys.argv[1:]:
        return 0
    for name in different:
        print(f"{name} differs from the cards: run python tools/results_tables.py")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())

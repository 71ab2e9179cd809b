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

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ASSETS = ROOT / "t2ilearn" / "assets"
START = "<!-- results: written by tools/readme_table.py from the cards, do not edit -->"
STOP = "<!-- end of results -->"


def cards() -> dict[str, dict]:
    """Each shipped card by the name of its weights."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(ASSETS.glob("*.json"))
    }


def rewrite(readme: str) -> str:
    """The README with the table that the cards imply between the markers."""
    body = "\n".join(table(cards()))
    pattern = re.escape(START) + ".*?" + re.escape(STOP)
    return re.sub(pattern, lambda _: f"{START}\n\n{body}\n\n{STOP}", readme, flags=re.DOTALL)


def table(found: dict[str, dict]) -> list[str]:
    """The table's lines."""
    if not found:
        return ["No weights ship yet."]
    return []


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

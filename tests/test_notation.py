"""Every symbol of every numbered equation in the chapters is on the notation page."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))

GREEK = "alpha beta gamma delta epsilon varepsilon theta lambda mu nu pi rho sigma tau phi chi psi"
GREEK += " omega ell varnothing Sigma Gamma Delta Theta Lambda Phi Psi Omega"
# Functions and signs that school mathematics has, and the commands that only lay things out.
KNOWN = "log ln exp tanh sum prod min max sqrt frac tfrac dfrac partial cdot times infty dots ldots"
KNOWN += (
    " cdots mid leftarrow rightarrow le ge in approx sim ne quad qquad left right bigl bigr Bigl"
)
KNOWN += " Bigr biggl biggr underbrace lVert rVert lvert rvert Longrightarrow cup forall top"
NUMBERED = re.compile(r"\$\$(.*?)\$\$[ ]*(\([\w-]+\))?", re.DOTALL)


def equations(path: Path) -> list[str]:
    """The numbered equations of a notebook: those with a tag, or a label behind them."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return [body for body, label in NUMBERED.findall(text) if label or r"\tag{" in body]


def symbols(tex: str) -> set[str]:
    """The symbols in a formula: letters with their accents and script styles, and named operators.

    Indices count as symbols of their own, so that z_q holds z and q.
    """
    tex = re.sub(r"\\tag\{[^}]*\}", " ", tex)
    found = set()

    def take(pattern: str) -> str:
        found.update(" ".join(filter(None, m.groups())) for m in re.finditer(pattern, tex))
        return re.sub(pattern, " ", tex)

    tex = tex.replace(r"\,", " ")
    tex = take(r"\\operatorname\*?\{([^{}]+)\}")
    tex = take(r"\\(hat|bar|tilde|dot)(?:\s+|\{)([A-Za-z]|\\[a-z]+)\}?")
    tex = take(r"\\(mathcal|mathbb|mathbf)(?:\s+|\{)(\w)\}?")
    tex = re.sub(r"_(\{\\text\{[^}]*\}\}|\{\\mathrm\{[^}]*\}\})", " ", tex)  # a name, no symbol
    tex = take(r"\\(?:text|mathrm)\{([^}]*)\}")
    for command in re.findall(r"\\([A-Za-z]+)", tex):
        if command in GREEK.split():
            found.add(command)
        else:
            assert command in KNOWN.split(), (
                f"\\{command}: a symbol, or layout? Say so in this test"
            )
    tex = re.sub(r"\\[A-Za-z]+|\\.", " ", tex)
    return {" ".join(s.split()) for s in found | set(re.findall(r"[A-Za-z]", tex))}


# What \text{…} says in plain words.
WORDS = {"reconstruction", "codebook", "commitment", "is readable, and", "for all", "choose"}


def explained() -> set[str]:
    """The symbols in the first column of the page's tables, and the functions under them."""
    column = re.findall(r"^\| (?!letter|symbol|-)(.+?) \|", PAGE, re.MULTILINE)
    functions = PAGE.partition("\nFunctions: ")[2].replace("\n", " ")
    found = {"MSE"} if "MSE is" in functions else set()
    for cell in column:
        found |= {word.strip() for word in re.sub(r"\$[^$]*\$", "", cell).split(",")}
    for formula in re.findall(r"\$([^$]*)\$", "\n".join([*column, functions])):
        found |= symbols(formula)
    return found


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_symbol_of_every_numbered_equation_is_explained(path):
    found = equations(path)
    assert found or path.stem.endswith("_lab"), "the pattern finds no equation any more"
    known = explained()
    for tex in found:
        missing = symbols(tex) - known - WORDS
        assert not missing, f"{path.stem}: {sorted(missing)} of {tex.strip()!r} not in notation.md"


def test_symbols_are_found_in_a_formula():
    tex = r"\hat x = z_q + \operatorname{sg}[e - \bar z_k]^{1/2} \tag{9.9}"
    assert symbols(tex) == {"hat x", "z", "q", "k", "sg", "e", "bar z"}
    assert symbols(r"\mathcal L_{\text{VAE}} = \sigma_x^2 \operatorname*{arg\,min}_k") == {
        *("mathcal L", "sigma", "x", "arg min", "k"),
    }
    with pytest.raises(AssertionError, match="layout"):
        symbols(r"\heartsuit")


def test_no_symbol_of_the_whole_book_has_two_rows():
    before = PAGE.split("## On loan")[0]
    cells = re.findall(r"^\| (?!letter|symbol|-)(.+?) \|", before, re.MULTILINE)
    assert len(cells) == len(set(cells))

"""Carry the repository's address from pyproject.toml to every place that repeats it.

    python tools/sync_address.py           # rewrite what differs, and say what changed
    python tools/sync_address.py --check   # change nothing; exit 1 if something differs

Derived places: the README's clone line and badges, the book's repository button (_config.yml),
CITATION.cff, links in the pages and the Colab cells of the chapters.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DERIVED = ("README.md", "CONTRIBUTING.md", "_config.yml", "CITATION.cff")
DERIVED_IN_FOLDERS = ("book/*.md", "notebooks/*.ipynb")

# What stands before an address, the address, what stands after it.
END = r"(?=[\s\"'`)>\\@#]|$)"
WHOLE = (
    r"(git clone (?:-q |--quiet )?(?:--depth[ =]1 )?(?:-q |--quiet )?)(https?://[^\s\"'`)>\\@#]+)"
    + END,
    r"(git\+)(https?://[^\s\"'`)>\\@#]+)" + END,
    r"(repository-code: \")([^\"]+)" + END,
    r"(repository:\n\s+url: )(\S+)" + END,
    r"(\]\()(https://github\.com/[^/\s)]+/[^/\s)]+)(?=/(?:issues|blob|tree|releases)\b|\))",
)
SLUG = (r"(colab\.research\.google\.com/github/)([^/\s]+/[^/\s]+)(?=/)",)


def address() -> str:
    """The repository's address, as pyproject.toml states it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"]


def derive(text: str, url: str) -> str:
    """The text with every derived address replaced by the one that url implies."""
    for pattern in WHOLE:
        text = re.sub(pattern, lambda m: m[1] + url, text)
    slug = url.removeprefix("https://github.com/").removesuffix(".git")
    for pattern in SLUG:
        text = re.sub(pattern, lambda m: m[1] + slug, text)
    return text


def derived_files() -> list[Path]:
    """The files that may repeat the address."""
    files = [ROOT / name for name in DERIVED]
    for pattern in DERIVED_IN_FOLDERS:
        files += sorted(ROOT.glob(pattern))
    return files


def main() -> int:
    """Rewrite (or with --check only name) the files whose addresses differ."""
    check, url, wrong = "--check" in sys.argv[1:], address(), []
    for path in derived_files():
        text = path.read_text(encoding="utf-8")
        if (synced := derive(text, url)) != text:
            wrong.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(synced, encoding="utf-8", newline="\n")
    for name in wrong:
        print(f"{name}: {'differs from' if check else 'now carries'} {url}")
    return int(check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

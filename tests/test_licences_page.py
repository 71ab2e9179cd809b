"""The licence page says of every studio what the package says, and promises nothing it breaks."""

import re
from pathlib import Path

import pytest

from t2ilearn import weights
from t2ilearn.data import emoji_files as emoji
from t2ilearn.data.together import worlds_in

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "book" / "licences.md").read_text(encoding="utf-8")
LICENCES = emoji.licences()
TERMS = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "CC BY 4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC BY-SA 4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "MIT": "https://opensource.org/license/mit",
}


def rows() -> list[list[str]]:
    """The cells of the emoji table."""
    table = PAGE.split("(emoji-licences)=")[1]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_the_table_has_a_row_for_each_and_no_more():
    assert [row[0].strip("*") for row in rows()] == [licence.style for licence in LICENCES]


@pytest.mark.parametrize("place", range(len(LICENCES)), ids=[row.style for row in LICENCES])
def test_a_row_says_what_the_package_says(place):
    licence, index = LICENCES[place], emoji.read_index()
    sources = {shard["style"]: shard["package"] for shard in index["shards"]}
    package = sources.get(licence.style, index["words"]["package"])
    _, studio, source, terms, attribution = rows()[place]
    key = licence.style.split()[0]  # links in brackets alone: (…) would name our own repository
    assert studio == f"[{licence.studio}][{key}]" and f"\n[{key}]: {licence.link}\n" in PAGE
    assert source == f"`{package}`"
    assert terms == f"[{licence.licence}]({TERMS[licence.licence]})"
    assert attribution == licence.attribution


def test_a_licence_file_lies_beside_each_archive_and_names_package_and_version():
    for shard in emoji.read_index()["shards"]:
        text = (emoji.ASSETS / f"LICENCE-{shard['style']}.txt").read_text(encoding="utf-8")
        assert shard["package"].replace("@", "", 1).replace("@", " ") in text.replace("@", "")


def test_changes_and_share_alike_are_stated():
    text = " ".join(PAGE.split())
    assert f"rasterised to {emoji.DRAWN} × {emoji.DRAWN} pixels" in text
    alike = [row.style for row in LICENCES if "SA" in row.licence]
    assert len(alike) == 1 and f"*{alike[0]}* archive is CC BY-SA 4.0" in text
    slide = " ".join(re.findall(r"^> (.*)$", PAGE.split("(emoji-licences)=")[1], re.MULTILINE))
    for row in LICENCES[:-1]:
        assert row.studio.split()[0] in slide and row.licence in slide


def test_the_page_lists_all_weights_that_learned_from_emoji():
    learned = {
        name
        for name in weights.available()
        if "emoji" in worlds_in(weights.load(name).card.data["world"])
    }
    listed = re.search(r"emoji of the five studios below, too:\n(.*?)\.", PAGE, re.DOTALL)[1]
    assert set(re.findall(r"`([\w-]+)`", listed)) == learned
    number = {7: "seven", 8: "eight", 9: "nine", 10: "ten"}[len(learned)]
    assert f"{number} of them learned from emoji" in PAGE

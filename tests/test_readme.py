"""README.zh.md keeps step with README.md: the same sections, code, tables, pictures and places to go."""

import re

import pytest

from tests.launching import ROOT

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)]+)\)")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    return FENCE.sub("", text)


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ .*$", prose(text), re.MULTILINE)


def sections(text: str) -> list[str]:
    """The text under each heading."""
    return re.split(r"^#+ .*$", prose(text), flags=re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub makes it: lower case, without punctuation, hyphens for spaces."""
    words = heading.lstrip("#").strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


@pytest.fixture(scope="module")
def both() -> tuple[str, str]:
    return text_of("README.md"), text_of("README.zh.md")


def test_the_same_headings(both):
    english, chinese = (headings(text) for text in both)
    levels = [[len(one.split(" ")[0]) for one in found] for found in (english, chinese)]
    assert levels[0] == levels[1], "a section is missing, or at another level"
    assert not set(english) & set(chinese), "a heading is not translated"
    assert all(re.search("[\u4e00-\u9fff]", one) for one in chinese)


def test_the_same_code_blocks(both):
    english, chinese = (FENCE.findall(text) for text in both)
    assert english == chinese


def test_the_same_tables_section_by_section(both):
    for heading, *texts in zip(headings(both[0]), *(sections(text)[1:] for text in both), strict=True):
        rows = [re.findall(r"^\|.*\|$", text, re.MULTILINE) for text in texts]
        assert len(rows[0]) == len(rows[1]), heading
        for one, other in zip(*rows, strict=True):
            cells = [re.sub(r"\\\||`[^`]*`", "", row).count("|") for row in (one, other)]
            assert cells[0] == cells[1], f"{heading}: {one}"
            # Flags and names in the first column are the same.
            names = [re.findall(r"`--[^`]+`", row.split("|")[1]) for row in (one, other)]
            assert names[0] == names[1], heading


def test_the_same_flags_are_named_section_by_section(both):
    for heading, *texts in zip(headings(both[0]), *(sections(text)[1:] for text in both), strict=True):
        flags = [set(re.findall(r"--[a-z][a-z_]+", text)) for text in texts]
        assert flags[0] == flags[1], heading


def test_the_same_formulas_pictures_and_links(both):
    for pattern in (r"^\$\$.*\$\$$", r"!\[[^\]]*\]\(([^)]+)\)", r'<img src="([^"]+)"'):
        english, chinese = (re.findall(pattern, text, re.MULTILINE) for text in both)
        assert english == chinese
    outside = [
        sorted(one for one in LINK.findall(prose(text)) if not one.startswith(("#", "README")))
        for text in both
    ]
    assert outside[0] == outside[1]


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_every_link_leads_somewhere(name):
    text = text_of(name)
    anchors = {anchor(one) for one in headings(text)}
    for link in LINK.findall(prose(text)):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("http"):
            file, _, place = link.partition("#")
            assert (ROOT / file).exists(), link
            if place:
                assert place in {anchor(one) for one in headings(text_of(file))}, link

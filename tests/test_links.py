"""Every link between the pages of the repository leads to a file, and to a heading of that file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "csrc" / "README.md",
    ROOT / "benchmarks" / "LOG.md",
]
OURS = re.compile(r"https://github\.com/edgemoe/edgemoe/(?:blob|tree)/main/")


def text_of(page: Path) -> str:
    """Returns a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors_of(page: Path) -> set[str]:
    """Returns the names that links to places in a page have."""
    text = text_of(page)
    heads = (re.sub(r"[^\w\- ]", "", head.lower()) for head in re.findall(r"^#+ (.*)$", text, re.M))
    return {head.strip().replace(" ", "-") for head in heads} | set(
        re.findall(r'<a id="(\w+)"', text)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith("#edgemoe."):  # a place of the reference, which only the site has
            continue
        ours = OURS.sub("", link)
        if ours.startswith("http"):
            continue
        name, _, anchor = ours.partition("#")
        target = (ROOT if ours != link else page.parent) / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link

"""A source distribution holds what a build from it needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_a_source_distribution_holds_what_cmake_reads() -> None:
    # setuptools knows of no source of the extension, so that all of them must be named here.
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    included = {name for verb, *names in lines if verb == "include" for name in names}
    grafted = tuple(f"{name}/" for verb, *names in lines if verb == "graft" for name in names)
    cmake = (ROOT / "CMakeLists.txt").read_text()
    needed = {*re.findall(r"\b(?:csrc|tests)/[\w/.-]+\.cpp", cmake), "CMakeLists.txt"}
    needed |= {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")}
    assert len(needed) > 20
    missing = {n for n in needed if n not in included and not n.startswith(grafted)}
    assert not missing


@pytest.mark.parametrize("link", re.findall(r"\]\(([\w/.]+)\)", (ROOT / "README.md").read_text()))
def test_what_the_readme_links_to_exists(link: str) -> None:
    assert (ROOT / link).exists()

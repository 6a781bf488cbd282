"""A source distribution holds what a build from it needs."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import edgemoe

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


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
LINKS = [(p.name, x) for p in PAGES for x in re.findall(r"\]\(([\w/.-]+)\)", p.read_text())]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_what_a_text_links_to_exists(page: str, link: str) -> None:
    assert (ROOT / link).exists()


def test_the_version_is_said_in_one_place_and_has_its_notes() -> None:
    assert version("edgemoe") == edgemoe.__version__
    done = subprocess.run([ROOT / "scripts" / "release-notes", edgemoe.__version__],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "### Added" in done.stdout
    wrong = subprocess.run([ROOT / "scripts" / "release-notes", "99.0"], capture_output=True)
    assert wrong.returncode != 0

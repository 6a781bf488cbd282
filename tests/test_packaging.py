"""A source distribution contains everything that a build from it needs."""

from __future__ import annotations

import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import edgemoe
from edgemoe.cli.options import unknown_variables
from edgemoe.cli.values import ram_size

ROOT = Path(__file__).parent.parent


def test_a_source_distribution_holds_what_cmake_reads() -> None:
    # setuptools knows none of the extension's sources, so that MANIFEST.in must name all of them.
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    included = {name for verb, *names in lines if verb == "include" for name in names}
    grafted = tuple(f"{name}/" for verb, *names in lines if verb == "graft" for name in names)
    cmake = (ROOT / "CMakeLists.txt").read_text()
    needed = {*re.findall(r"\b(?:csrc|tests)/[\w/.-]+\.cpp", cmake), "CMakeLists.txt"}
    needed |= {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")}
    assert len(needed) > 20
    missing = {n for n in needed if n not in included and not n.startswith(grafted)}
    assert not missing


def test_users_get_the_types() -> None:
    assert (ROOT / "edgemoe" / "py.typed").is_file()


PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "csrc/README.md"]  # mkdocs checks docs/
LINKS = [
    (page, *link)
    for page in PAGES
    for link in re.findall(r"\]\(([\w/.-]+)(?:#([\w-]+))?\)", (ROOT / page).read_text())
]


@pytest.mark.parametrize(("page", "link", "anchor"), LINKS)
def test_what_a_text_links_to_exists(page: str, link: str, anchor: str) -> None:
    path = (ROOT / page).parent / link
    assert path.exists()
    if anchor:
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
        assert anchor in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


SCRIPTS = {
    (page.name, name)
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for name in re.findall(r"\b((?:benchmarks|scripts|examples)/[\w/.-]*\w)", page.read_text())
}


@pytest.mark.parametrize(("page", "name"), sorted(SCRIPTS))
def test_a_script_that_a_text_names_exists(page: str, name: str) -> None:
    assert (ROOT / name).exists()


def test_the_version_is_said_in_one_place_and_has_its_notes() -> None:
    assert version("edgemoe") == edgemoe.__version__
    done = subprocess.run([ROOT / "scripts" / "release-notes", edgemoe.__version__],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "### Added" in done.stdout
    wrong = subprocess.run([ROOT / "scripts" / "release-notes", "99.0"], capture_output=True)
    assert wrong.returncode != 0


UNIT = ROOT / "packaging" / "edgemoe.service"


def test_a_service_has_its_budget_from_the_kernel_too() -> None:
    unit = UNIT.read_text()
    (ram,) = re.findall(r"^Environment=EDGEMOE_RAM=(\S+)$", unit, re.M)
    (most,) = re.findall(r"^MemoryMax=(\d+)G$", unit, re.M)
    assert ram_size(ram) == int(most) << 30


@pytest.mark.parametrize("path", [UNIT, ROOT / "packaging" / "Dockerfile"], ids=lambda p: p.name)
def test_what_packages_set_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set(re.findall(r"\b(EDGEMOE_[A-Z_]+)=", path.read_text()))
    assert len(names) > 2
    for name in os.environ.keys() & names:
        monkeypatch.delenv(name)
    for name in names:
        monkeypatch.setenv(name, "8080" if name == "EDGEMOE_PORT" else "1GiB")
    assert unknown_variables() == []


def test_a_container_is_built_from_what_the_build_reads() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {line[1:] for line in lines if line.startswith("!")}
    setup = (ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text()
    assert copied >= {"pyproject.toml", "setup.py", "CMakeLists.txt", "csrc", "edgemoe"}
    assert copied >= set(re.findall(r"\b(README\.md|scripts/[\w-]+)", setup))
    assert all((ROOT / name).exists() for name in copied)

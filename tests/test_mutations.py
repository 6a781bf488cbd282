"""The mistakes of `scripts/mutate` can be made, and docs/mutations.md counts them."""

from __future__ import annotations

import re
from pathlib import Path

from mutations import MUTATIONS
from mutations_device import DEVICE
from mutations_rows import ROWS

ROOT = Path(__file__).parents[1]


def test_every_mistake_can_be_made() -> None:
    gone = [
        f"{m.area}: {m.name}" for m in MUTATIONS if (ROOT / m.file).read_text().count(m.old) != 1
    ]
    assert not gone


def test_the_page_counts_them() -> None:
    page = (ROOT / "docs/mutations.md").read_text()
    counts = [len(MUTATIONS), len(MUTATIONS) - len(ROWS) - len(DEVICE), len(ROWS), len(DEVICE)]
    assert [int(n) for n in re.findall(r"^(?:There are|-) (\d+) ", page, re.M)] == counts

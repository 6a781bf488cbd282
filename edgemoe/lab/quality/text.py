"""The text that quality is measured on when the user gives none."""

from __future__ import annotations

from importlib import resources

__all__ = ["default_text"]


def default_text() -> str:
    """Returns 66 KiB of Moby-Dick and State of the Union addresses; data/NOTICE.md says which parts."""
    return (resources.files("edgemoe.lab.quality") / "data" / "held_out.txt").read_text(
        encoding="utf-8"
    )

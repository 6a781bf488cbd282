"""The type of a planted mistake."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Mutation"]


@dataclass(frozen=True)
class Mutation:
    """A planted mistake: in `file`, the text `old`, which occurs exactly once, is replaced by `new`."""

    area: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """The tests that should notice it: files or tests of pytest, or test programs of the core."""
    survives: str = ""
    """Why no test can notice it; empty if one must."""

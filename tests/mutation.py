"""What a planted mistake is."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Mutation"]


@dataclass(frozen=True)
class Mutation:
    """Is one mistake: in `file`, `old`, which is there exactly once, becomes `new`."""

    area: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Files or tests of pytest, or one of the core's own programs."""
    survives: str = ""
    """Why no test can notice it; empty where one must."""

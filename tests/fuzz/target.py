"""The type of a fuzz target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from edgemoe.errors import FormatError

Case = dict[str, bytes]
"""Files of a folder, by their names."""


@dataclass(frozen=True, slots=True)
class Target:
    """A reader of foreign files, and how to test it."""

    name: str
    seeds: Callable[[], list[Case]]
    """Returns valid cases, from which others are made."""
    change: Callable[[Random, Case], Case]
    """Returns a changed case."""
    run: Callable[[Path], None]
    """Reads the folder's files as the program does."""
    documented: tuple[type[Exception], ...] = (FormatError, OSError)
    """The exceptions that `run` may raise."""
    seconds: float = 5.0
    """The CPU time after which a case counts as a hang."""
    memory: int = 256 << 20
    """The bytes of memory that a case may take."""

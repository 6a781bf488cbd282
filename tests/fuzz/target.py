"""What a fuzzer is made of."""

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
    """Is one reader of files that others write."""

    name: str
    seeds: Callable[[], list[Case]]
    """Makes sound cases, from which others come."""
    change: Callable[[Random, Case], Case]
    """Returns another case."""
    run: Callable[[Path], None]
    """Reads the folder's files as the program does."""
    documented: tuple[type[Exception], ...] = (FormatError, OSError)
    """What `run` may raise."""
    seconds: float = 5.0
    """A case that takes longer hangs."""
    memory: int = 256 << 20
    """A case that takes more is too much for what it is."""

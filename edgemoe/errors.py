"""The errors that a user can meet.

    EdgemoeError
    ├── FormatError(ValueError)      a file is not what it claims to be, or a checkpoint is not supported
    ├── OutOfBudget(MemoryError)     the memory budget is too small; says the smallest that works
    └── ReadError(OSError)           the disk failed while weights were read; says path and offset

Wrong arguments are plain `ValueError`.
"""

from __future__ import annotations

__all__ = ["EdgemoeError", "FormatError", "OutOfBudget", "ReadError"]


class EdgemoeError(Exception):
    """Is the base of every error that edgemoe defines."""


class FormatError(EdgemoeError, ValueError):
    """Says that a file or checkpoint is malformed or unsupported, and which part of it."""


class OutOfBudget(EdgemoeError, MemoryError):
    """Says that the memory budget is too small, and the smallest that works."""


class ReadError(EdgemoeError, OSError):
    """Says that reading weights failed, with path and offset."""

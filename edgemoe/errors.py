"""The errors that a user can meet.

    EdgemoeError
    ├── Cancelled                    a pass was broken off, because nobody waits for it any more
    ├── FormatError(ValueError)      a file is not what it claims to be, or a checkpoint is not supported
    ├── OutOfBudget(MemoryError)     the memory budget is too small; says the smallest that works
    ├── ReadError(OSError)           the disk failed while weights were read; says path and offset
    ├── DeviceError(RuntimeError)    a device failed or cannot be had; says which call, or why
    │   └── DeviceLost               it does nothing any more, and what was on it is gone: open the model again
    └── RangeError(ArithmeticError)  a number of the model does not fit where it is kept; says where, and what does

Wrong arguments are plain `ValueError`. What a file may hold is quoted by `quoted`, at most so much of it.
"""

from __future__ import annotations

import reprlib
from typing import Any

__all__ = [
    "Cancelled",
    "DeviceError",
    "DeviceLost",
    "EdgemoeError",
    "FormatError",
    "OutOfBudget",
    "RangeError",
    "ReadError",
    "quoted",
    "shortened",
    "size_text",
]

_LONGEST_VALUE, _LONGEST_MESSAGE = 120, 2000  # characters


class EdgemoeError(Exception):
    """Is the base of every error that edgemoe defines."""


class Cancelled(EdgemoeError):
    """Says that a pass was broken off, because nobody waits for it any more; sequences are as they were before."""


class FormatError(EdgemoeError, ValueError):
    """Says that a file or checkpoint is malformed or unsupported, and which part of it.

    The text is bounded, whatever names and values the file brought into it.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(
            *(shortened(a, _LONGEST_MESSAGE) if isinstance(a, str) else a for a in args)
        )


class OutOfBudget(EdgemoeError, MemoryError):
    """Says that the memory budget is too small, and the smallest that works."""

    _smallest, _parts, _note = 0, "", ""

    @classmethod
    def of(cls, ram: int, smallest: int, parts: str, note: str = "") -> OutOfBudget:
        """Returns the error of a division in bytes; `parts` is what takes them, `note` what else there is to say."""
        given = _mib(ram) if ram >= 1 << 20 else size_text(ram)
        error = cls(
            f"a budget of {given} is too small; the smallest that works is {_mib(smallest)}: {parts}{note}"
        )
        error._smallest, error._parts, error._note = smallest, parts, note
        return error

    def beside(self, size: int, what: str, *, ram: int) -> OutOfBudget:
        """Returns the same of a budget of `ram` bytes that is for something else too; others as they are."""
        if not self._parts:
            return self
        parts = f"{self._parts}, {_mib(size)} for {what}"
        return self.of(ram, self._smallest + size, parts, self._note)


class DeviceError(EdgemoeError, RuntimeError):
    """Says that a device failed, or why there is none."""


class DeviceLost(DeviceError):
    """Says that a device does nothing any more, and why: the model has to be opened again, by another process."""


class RangeError(EdgemoeError, ArithmeticError):
    """Says that a number which the model computed does not fit where it must be kept, and what would hold it."""


class ReadError(EdgemoeError, OSError):
    """Says that reading weights failed, with path and offset."""


def shortened(text: str, most: int = _LONGEST_VALUE) -> str:
    """Returns a text of at most `most` characters, of a longer one the beginning and the end."""
    if len(text) <= most:
        return text
    tail = most // 4
    return f"{text[: most - tail - 3]}...{text[len(text) - tail :]}"


def size_text(count: float) -> str:
    """Returns a number of bytes in three digits and the unit that suits it."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return (
                f"{count / scale:.0f} {unit}"
                if count >= 100 * scale
                else f"{count / scale:.3g} {unit}"
            )
    return f"{count:.0f} B"


def quoted(value: object) -> str:
    """Returns a value as an error quotes it: its `repr`, cut where it is long or deep, as a file's may be."""
    return shortened(_QUOTE.repr(value))


class _Quote(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 3, 2 * _LONGEST_VALUE, 40, 80
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 12


_QUOTE = _Quote()


def _mib(n: int) -> str:
    return f"{-(-n >> 20)} MiB"

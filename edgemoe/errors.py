"""The errors that a user can meet.

    EdgemoeError
    ├── Cancelled                    a pass was cancelled, because nobody waits for its result any more
    ├── FormatError(ValueError)      a file is not what it claims to be, or a checkpoint is not supported
    ├── OutOfBudget(MemoryError)     the memory budget is too small; says the smallest that works
    ├── ReadError(OSError)           the disk failed while weights were read; says path and offset
    ├── DeviceError(RuntimeError)    a device failed or cannot be had; says which call, or why
    │   └── DeviceLost               the device has stopped working and its memory is gone: open the model again
    └── RangeError(ArithmeticError)  a number of the model does not fit its type; says where, and what would hold it

Wrong arguments are plain `ValueError`. Values from files are quoted with `quoted`, which bounds their length.
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
    """The base class of every error that edgemoe defines."""


class Cancelled(EdgemoeError):
    """A pass was cancelled, because nobody waits for its result any more; its sequences are as they were before."""


class FormatError(EdgemoeError, ValueError):
    """A file or checkpoint is malformed or unsupported; the message names the part.

    The length of the message is bounded, whatever names and values of the file are in it.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(
            *(shortened(a, _LONGEST_MESSAGE) if isinstance(a, str) else a for a in args)
        )


class OutOfBudget(EdgemoeError, MemoryError):
    """The memory budget is too small; the message gives the smallest that works."""

    _smallest, _parts, _note = 0, "", ""

    @classmethod
    def of(cls, ram: int, smallest: int, parts: str, note: str = "") -> OutOfBudget:
        """Returns the error for a budget.

        Args:
            ram: the budget, in bytes.
            smallest: the smallest budget that works, in bytes.
            parts: what takes that memory, as text.
            note: text to append.
        """
        given = _mib(ram) if ram >= 1 << 20 else size_text(ram)
        error = cls(
            f"a budget of {given} is too small; the smallest that works is {_mib(smallest)}: {parts}{note}"
        )
        error._smallest, error._parts, error._note = smallest, parts, note
        return error

    def beside(self, size: int, what: str, *, ram: int) -> OutOfBudget:
        """Returns the same error for a budget that must hold something else too.

        An error that `of` has not made is returned as it is.

        Args:
            size: the bytes that the other thing takes.
            what: its name.
            ram: the whole budget, in bytes.
        """
        if not self._parts:
            return self
        parts = f"{self._parts}, {_mib(size)} for {what}"
        return self.of(ram, self._smallest + size, parts, self._note)


class DeviceError(EdgemoeError, RuntimeError):
    """A device failed, or cannot be had; the message says why."""


class DeviceLost(DeviceError):
    """A device has stopped working; the message says why. The model must be opened again, by another process."""


class RangeError(EdgemoeError, ArithmeticError):
    """A number that the model computed does not fit the type it is kept in; the message says what would hold it."""


class ReadError(EdgemoeError, OSError):
    """Reading weights failed; the message gives path and offset."""


def shortened(text: str, most: int = _LONGEST_VALUE) -> str:
    """Returns a text cut to at most `most` characters: of a longer one, the beginning and the end."""
    if len(text) <= most:
        return text
    tail = most // 4
    return f"{text[: most - tail - 3]}...{text[len(text) - tail :]}"


def size_text(count: float) -> str:
    """Returns a number of bytes as text, with three significant digits and a fitting unit."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return (
                f"{count / scale:.0f} {unit}"
                if count >= 100 * scale
                else f"{count / scale:.3g} {unit}"
            )
    return f"{count:.0f} B"


def quoted(value: object) -> str:
    """Returns a value as errors quote it: its `repr`, cut where it is long or deeply nested, as a file's may be."""
    return shortened(_QUOTE.repr(value))


class _Quote(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 3, 2 * _LONGEST_VALUE, 40, 80
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 12


_QUOTE = _Quote()


def _mib(n: int) -> str:
    return f"{-(-n >> 20)} MiB"

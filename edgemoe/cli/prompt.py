"""Reads the text of a prompt from a file."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from typing import BinaryIO

from edgemoe.cli.console import decode_text

__all__ = ["read_text"]

_LARGEST_PROMPT = 16 << 20  # bytes; no context holds as much


def read_text(file: BinaryIO, name: str, *, lend: Callable[[int], None]) -> str:
    """Reads a prompt, without the end of its last line.

    Args:
        file: the prompt.
        name: what errors call it.
        lend: makes room for so many bytes until it is called again; or raises OutOfBudget.
    """
    lend(2 * min(_size(file), _LARGEST_PROMPT))
    content = file.read(_LARGEST_PROMPT + 1)  # it may be a device without an end
    if len(content) > _LARGEST_PROMPT:
        raise ValueError(f"{name}: expected a prompt of at most 16 MiB")
    # As text, and again without what is around it; a character beyond the BMP makes all others as wide.
    most = max(content, default=0)
    lend(len(content) * (1 + 2 * (4 if most >= 0xF0 else 2 if most >= 0xC4 else 1)))
    return decode_text(content, name).removeprefix("\ufeff").rstrip("\r\n")


def _size(file: BinaryIO) -> int:
    """Returns a file's bytes; the most that is read for what has no size, such as a pipe."""
    try:
        known = os.fstat(file.fileno())
    except io.UnsupportedOperation:  # it is in memory
        return _LARGEST_PROMPT
    return known.st_size if stat.S_ISREG(known.st_mode) else _LARGEST_PROMPT

"""Reads the text of a prompt from a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

from edgemoe.cli.console import decode_text

__all__ = ["read_text"]

_LARGEST_PROMPT = 16 << 20  # bytes; no context holds as much
_PIECE = 1 << 20


def read_text(file: BinaryIO, name: str, *, lend: Callable[[int], None]) -> str:
    """Reads a prompt, without the end of its last line.

    Args:
        file: the prompt.
        name: what errors call it.
        lend: makes room for so many bytes until it is called again; or raises OutOfBudget.
    """
    content = bytearray()
    while piece := file.read(_PIECE):  # it may be a device without an end
        lend(2 * (len(content) + len(piece)))
        content += piece
        if len(content) > _LARGEST_PROMPT:
            raise ValueError(f"{name}: expected a prompt of at most 16 MiB")
    # As text, and again without what is around it; a character beyond the BMP makes all others as wide.
    most = max(content, default=0)
    lend(len(content) * (1 + 2 * (4 if most >= 0xF0 else 2 if most >= 0xC4 else 1)))
    return decode_text(content, name).removeprefix("\ufeff").rstrip("\r\n")

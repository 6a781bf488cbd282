"""Reads the text of a prompt from a file."""

from __future__ import annotations

from typing import BinaryIO

from edgemoe.cli.console import decode_text

__all__ = ["read_text"]

_LARGEST_PROMPT = 16 << 20  # bytes; no context holds as much


def read_text(file: BinaryIO, name: str) -> str:
    """Reads a prompt, without the end of its last line."""
    content = file.read(_LARGEST_PROMPT + 1)  # it may be a device without an end
    if len(content) > _LARGEST_PROMPT:
        raise ValueError(f"{name}: expected a prompt of at most 16 MiB")
    return decode_text(content, name).removeprefix("\ufeff").rstrip("\r\n")

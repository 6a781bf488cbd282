"""Opens a checkpoint in any supported format.

The readers are imported only when needed, because running a `.moe` file calls `is_gguf` too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.errors import FormatError
from edgemoe.file.format import MAGIC

if TYPE_CHECKING:
    from edgemoe.convert.checkpoint import StoredCheckpoint

__all__ = ["is_gguf", "open_checkpoint"]

_MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Returns whether a path is that of a GGUF file, by its name or its first bytes."""
    if path.suffix == ".gguf" and not path.is_dir():
        return True
    return path.is_file() and _start(path) == _MAGIC


def open_checkpoint(path: Path) -> StoredCheckpoint:
    """Opens a Hugging Face directory, a GGUF file, or the first part of a split GGUF file.

    Raises:
        FormatError: it is none of these, broken or not supported.
        ImportError: it is a GGUF file, and the package gguf is not installed.
    """
    if is_gguf(path):
        from edgemoe.convert.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if path.is_file():
        what = (
            "is a .moe file already"
            if _start(path) == MAGIC[: len(_MAGIC)]
            else "is not a directory"
        )
        raise FormatError(f"{path}: {what}; expected a checkpoint's directory or a GGUF file")
    from edgemoe.convert.hf import HFCheckpoint

    return HFCheckpoint(path)


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(_MAGIC))

"""What a converter reads: named float tensors, a config, and the tokenizer's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Checkpoint", "file_identity"]


class Checkpoint(Protocol):
    """A model as Hugging Face lays it out, whatever it is stored in. Tensors are read one at a time."""

    @property
    def name(self) -> str:
        """A short name for messages and provenance (a directory's or file's name)."""

    @property
    def identity(self) -> str:
        """Differs when the weights' files do: their names, sizes and times."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """Those that exist of tokenizer.json, tokenizer_config.json, chat_template.jinja,
        generation_config.json and LICENSE."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Reads one tensor as float32, C-contiguous. Raises FormatError when it is missing or broken."""


def file_identity(paths: Sequence[Path]) -> str:
    """Returns names, sizes and times of files as one text."""
    stats = [(p.name, p.stat()) for p in paths]
    return " ".join(f"{name}:{s.st_size}:{s.st_mtime_ns}" for name, s in stats)

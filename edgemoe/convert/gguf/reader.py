"""Opens GGUF files, single or split into parts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.convert.folder import require_file
from edgemoe.errors import FormatError, quoted

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

__all__ = ["BROKEN", "READ_AT_ONCE", "GGUFFile", "header_end", "open_gguf"]

BROKEN = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    NotImplementedError,
    RecursionError,
)
"""The exceptions that the gguf package raises on malformed input."""

READ_AT_ONCE = "rope_freqs.weight"
"""The only tensor whose values are needed to open a file."""

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_MOST_PARTS = 1000


class GGUFFile:
    """The metadata and tensors of a GGUF file. The other parts of a split file are found by its name. Immutable.

    Raises:
        FormatError: the file is not GGUF, truncated, or a part other than the first; or another part is missing.
        ImportError: the package gguf is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        reader = open_gguf(path)
        try:
            self.meta: dict[str, Any] = {
                name: field.contents() for name, field in reader.fields.items()
            }
        except BROKEN as error:
            raise FormatError(f"{self.name}: broken GGUF metadata: {error}") from error
        self.tensors: dict[str, ReaderTensor] = {}
        self.paths = [path]
        self.path_of: dict[str, Path] = {}
        """The path of the part that holds each tensor."""
        self._add(reader, path)
        count = self.meta.get("split.count", 0)
        if count not in (0, 1):
            for part in self._other_parts(path, count):
                self.paths.append(part)
                self._add(open_gguf(part), part)
            total = self.meta.get("split.tensors.count", len(self.tensors))
            if total != len(self.tensors):
                raise FormatError(
                    f"{self.name}: its parts hold {len(self.tensors)} tensors, expected {quoted(total)}"
                )

    def _add(self, reader: GGUFReader, path: Path) -> None:
        for tensor in reader.tensors:
            if tensor.name in self.tensors:
                raise FormatError(f"{self.name}: holds {quoted(tensor.name)} twice")
            if not len(tensor.shape):
                raise FormatError(f"{self.name}: {quoted(tensor.name)} has no dimensions")
            self.tensors[tensor.name] = tensor
            self.path_of[tensor.name] = path

    def _other_parts(self, path: Path, count: Any) -> list[Path]:
        number, match = self.meta.get("split.no"), _PART.fullmatch(path.name)
        if type(count) is not int or not 1 < count <= _MOST_PARTS:
            raise FormatError(
                f"{self.name}: split.count must be a number of parts: {quoted(count)}"
            )
        expected = f"NAME-00001-of-{count:05}.gguf"
        if number != 0:
            raise FormatError(
                f"{self.name}: is part {quoted(number)} of a split GGUF file, counted from 0; "
                f"expected the first, {expected}"
            )
        if match is None or int(match[2]) != 1 or int(match[3]) != count:
            raise FormatError(
                f"{self.name}: is the first of {count} parts of a split GGUF file; expected the name {expected}"
            )
        return [
            path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(2, count + 1)
        ]


class _NotThere(Exception):
    """Raised when a header extends beyond the bytes that are there; its argument is how many it needs at least."""


def header_end(path: Path, there: int) -> tuple[int, list[tuple[int, int]]]:
    """Returns the offset at which a file's header ends, and the byte ranges after it that opening the file reads.

    Args:
        there: how many bytes of the file have been downloaded. If the header extends beyond them, the number of bytes
            that it needs at least is returned, and no ranges.

    Raises:
        FormatError: it is not a readable GGUF file.
        ImportError: the package gguf is not installed.
    """
    try:
        reader = open_gguf(path, there=there)
    except _NotThere as error:
        return int(error.args[0]), []
    places = [(int(t.data_offset), int(t.data_offset + t.n_bytes)) for t in reader.tensors
              if t.name == READ_AT_ONCE]  # fmt: skip
    return int(reader.data_offset), places


def open_gguf(path: Path, *, there: int | None = None) -> GGUFReader:
    """Opens any GGUF file.

    Args:
        there: see `header_end`; None if the whole file is there.

    Raises:
        FormatError: there is no such file, or it is not a readable GGUF file.
        ImportError: the package gguf is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(
            f"{path.name}: reading GGUF needs the package gguf: pip install 'edgemoe[demo]'",
            name="gguf",
        ) from error

    class Bounded(GGUFReader):
        """Refuses to read past the end, where the package's own reader may loop for ever."""

        def _get(self, offset: int, dtype: Any, count: Any = 1, *rest: Any, **kw: Any) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if there is not None and end > there and not hasattr(self, "data_offset"):
                raise _NotThere(end)
            if end > len(self.data):
                raise ValueError(f"ends at byte {len(self.data)}, expected at least {end}")
            return super()._get(offset, dtype, count, *rest, **kw)

    require_file(path)
    try:
        with np.errstate(over="ignore"):  # sizes from a broken file may wrap; _get catches them
            reader = Bounded(path)
    except BROKEN as error:
        raise FormatError(f"{path.name}: not a readable GGUF file: {error}") from error
    if reader.byte_order == "S":  # the package swaps the metadata and not the weights
        raise FormatError(f"{path.name}: is a big-endian GGUF file; expected a little-endian one")
    return reader

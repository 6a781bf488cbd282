"""Safetensors files with a checksum for every row, so that each row can be read and verified by itself.

The last tensor is `checksums`, uint32 [n], CRC-32C: first of the header (its length and text); then of every other
tensor in file order, one for each index of the first axis, or one for a tensor of a single axis; last of the checksums
before it. They take 4 bytes a row. A file without that tensor can be read too; then only its form is checked, and that
its floats are finite.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.errors import FormatError, quoted
from edgemoe.file.parse import parse_object
from edgemoe.file.tensors import is_finite
from edgemoe.file.whole import whole_file

__all__ = ["BLOCK", "SummedFile", "header_of", "write_summed"]

_SUMS = "checksums"
_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "U32": np.dtype("<u4"),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_MOST_HEADER = 100_000_000  # bytes, the library's limit
BLOCK = 16 << 20
"""Bytes to read at a time."""


@dataclass(frozen=True, slots=True)
class _Place:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    sums: int
    """Index of the tensor's first checksum."""

    @property
    def num_rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize // max(self.num_rows, 1)


class SummedFile:
    """An open file. It keeps its descriptor, so what was checked is what is read. Immutable."""

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        """Opens a file; reads its header and checksums.

        Args:
            what: the kind of file, for error messages, such as "a calibration file".

        Raises:
            FormatError: the file does not exist, is of another kind, or is damaged.
            OSError: the file cannot be read.
        """
        self.path, self._what = Path(path), what
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FormatError(f"{path}: no such file") from None
        weakref.finalize(self, os.close, self._fd)
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            raise self._none("it is not a regular file")
        size = self._size = found.st_size
        head = self._bytes(0, min(8, size))
        if len(head) < 8 or not 0 < (length := struct.unpack("<Q", head)[0]) <= _MOST_HEADER:
            raise self._none("its header makes no sense")
        if 8 + length > size:
            raise self._none("truncated inside its header")
        text = self._bytes(8, length)
        try:
            header = parse_object(text, "header", most=_MOST_HEADER)
            self.meta: Mapping[str, str] = _meta(header)
            self._places = _places(header, 8 + length, size)
        except (FormatError, TypeError, KeyError, ValueError, OverflowError) as error:
            reason = str(error) if type(error) is FormatError else "its header makes no sense"
            raise self._none(reason) from None
        place = self._places.pop(_SUMS, None)
        self.is_summed: bool = place is not None
        """Whether the file has checksums."""
        self._sums: NDArray[np.uint32] = np.zeros(0, "<u4")
        if place is not None:
            self._take_sums(place, head + text)
        self.shapes: Mapping[str, tuple[int, ...]] = {n: p.shape for n, p in self._places.items()}
        self.dtypes: Mapping[str, np.dtype[Any]] = {n: p.dtype for n, p in self._places.items()}

    def num_bytes(self, name: str) -> int:
        """Returns the bytes of a tensor."""
        place = self._places[name]
        return place.num_rows * place.row_bytes

    def tensor(self, name: str) -> NDArray[Any]:
        """Reads a tensor.

        Raises:
            FormatError: it is damaged, or holds NaN or infinity.
        """
        place = self._places[name]
        return self._rows(name, 0, place.num_rows).reshape(place.shape)

    def row(self, name: str, index: int) -> NDArray[Any]:
        """Reads one index of the first axis of a tensor with two axes or more; errors as `tensor`."""
        return self._rows(name, index, 1).reshape(self._places[name].shape[1:])

    def rows(self, name: str) -> Iterator[NDArray[Any]]:
        """Reads a tensor in batches of rows of about `BLOCK` bytes; errors as `tensor`."""
        place = self._places[name]
        step = max(1, BLOCK // max(place.row_bytes, 1))
        for first in range(0, place.num_rows, step):
            yield self._rows(name, first, min(step, place.num_rows - first))

    def verify(self) -> None:
        """Reads all tensors, which checks them; errors as `tensor`."""
        for name in self.shapes:
            for _ in self.rows(name):
                pass

    def digest(self) -> str:
        """Returns a hexadecimal SHA-256 that identifies the content: of the checksums or, without any, of the file."""
        sha = hashlib.sha256(self._sums.tobytes())
        at, size = 0, 0 if self.is_summed else self._size
        while at < size:
            block = self._bytes(at, min(BLOCK, size - at))
            sha.update(block)
            at += len(block)
        return sha.hexdigest()

    def _rows(self, name: str, first: int, count: int) -> NDArray[Any]:
        place = self._places[name]
        data = self._bytes(place.offset + first * place.row_bytes, count * place.row_bytes)
        if self.is_summed:
            view, size = memoryview(data), place.row_bytes
            for i in range(count):
                crc = _core.crc32c(view[i * size : (i + 1) * size])
                if crc != self._sums[place.sums + first + i]:
                    raise self._damaged(name)
        array: NDArray[Any] = np.frombuffer(data, place.dtype)
        if len(place.shape) > 1:
            array = array.reshape(count, *place.shape[1:])
        if array.dtype.kind == "f" and not is_finite(array):
            raise FormatError(f"{self.path}: {name}: holds NaN or infinity")
        return array

    def _take_sums(self, place: _Place, head: bytearray) -> None:
        expected = 2 + sum(p.num_rows for p in self._places.values())
        if place.dtype != _TYPES["U32"] or place.shape != (expected,):
            raise self._none(f"{_SUMS} does not hold {expected} numbers")
        data = self._bytes(place.offset, place.row_bytes)
        self._sums = np.frombuffer(data, "<u4")
        if self._sums[-1] != _core.crc32c(data[:-4]) or self._sums[0] != _core.crc32c(head):
            raise self._damaged("the header")

    def _bytes(self, offset: int, count: int) -> bytearray:
        data = bytearray(count)
        view, at = memoryview(data), offset
        while view:
            got = os.preadv(self._fd, [view], at)
            if got == 0:
                raise FormatError(f"{self.path}: became shorter while it was read")
            view, at = view[got:], at + got
        return data

    def _none(self, reason: str) -> FormatError:
        return FormatError(f"{self.path}: not {self._what}: {reason}")

    def _damaged(self, name: str) -> FormatError:
        return FormatError(f"{self.path}: damaged: checksum of {name} does not match")


def write_summed(
    path: str | os.PathLike[str],
    tensors: Mapping[str, NDArray[Any]],
    meta: Mapping[str, str],
    *,
    is_private: bool = False,
    ours: bool = False,
) -> None:
    """Writes a file, one tensor at a time. The file gets its name only when it is complete.

    Args:
        tensors: float32, float64 or int64. Iterated once for their shapes and once for their content, in order, so
            the mapping may compute them on access.
        is_private: only its owner may read a new file.
        ours: the name is not the user's but made up by edgemoe; see `whole_file`.

    Raises:
        OSError: the file cannot be written.
    """
    head = header_of({name: (a.dtype, a.shape) for name, a in tensors.items()}, meta)
    sums = [_core.crc32c(head)]
    with whole_file(path, is_private=is_private, ours=ours) as file:
        file.write(head)
        for array in tensors.values():
            array = np.ascontiguousarray(array)
            file.write(array.data)
            sums += map(_core.crc32c, array if array.ndim > 1 else [array])
        numbers = np.array(sums, "<u4").tobytes()
        file.write(numbers + struct.pack("<I", _core.crc32c(numbers)))


def header_of(
    forms: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], meta: Mapping[str, str]
) -> bytes:
    """Returns the header of a file: its length and its JSON text.

    Args:
        forms: type and shape of each tensor, in order, without `checksums`.
        meta: the metadata.
    """
    header: dict[str, Any] = {"__metadata__": dict(meta)}
    rows = [shape[0] if len(shape) > 1 else 1 for _, shape in forms.values()]
    assert _SUMS not in forms
    at = 0
    for name, (dtype, shape) in {**forms, _SUMS: (_TYPES["U32"], (2 + sum(rows),))}.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _meta(header: dict[str, Any]) -> Mapping[str, str]:
    meta = header.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise ValueError
    return meta


def _places(header: Mapping[str, Any], start: int, size: int) -> dict[str, _Place]:
    """Returns the places of the tensors, in file order. They must fill the file without gaps.

    Raises:
        FormatError: a tensor has an unsupported type, is misplaced or is empty; or the file has another size.
        TypeError, KeyError, ValueError: an entry is malformed.
    """
    places, at, sums = {}, start, 1
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if entry["dtype"] not in _TYPES:
            raise FormatError(f"{quoted(name)} is of type {quoted(entry['dtype'])}")
        if not all(type(n) is int and n >= 0 for n in (first, end, *shape)) or len(shape) > 4:
            raise ValueError
        place = _Place(_TYPES[entry["dtype"]], shape, start + first, sums)
        taken = math.prod(shape) * place.dtype.itemsize
        if start + first != at or end - first != taken or at + taken > size or not shape:
            raise FormatError(f"{quoted(name)} claims bytes {first} to {end} of {size - start}")
        if math.prod(shape) == 0 and len(shape) > 1:
            raise FormatError(f"{quoted(name)} is empty")
        places[name] = place
        at, sums = at + taken, sums + place.num_rows
    if at != size:
        raise FormatError(f"expected {at} bytes, got {size}")
    return places

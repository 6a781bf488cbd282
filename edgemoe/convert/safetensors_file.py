"""Reads tensors from a safetensors file, one at a time; float tensors as float32.

The safetensors library validates the file. It cannot return bfloat16 without torch or another package that has the
type, so the bytes are read here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edgemoe.convert.checkpoint import Bytes
from edgemoe.convert.folder import require_file
from edgemoe.errors import FormatError, shortened
from edgemoe.file.parse import parse_object

__all__ = ["StoredTensor", "read_header", "require_floats"]

_MOST_HEADER = 100_000_000  # bytes, the library's limit
_FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_CODES = {"U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8", "F8_E4M3": "u1", "F8_E8M0": "u1"}
_DTYPES = {**_FLOATS, **_CODES}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's place in a file."""

    path: Path
    name: str
    dtype: str
    """A dtype name of safetensors: F32, F16 or BF16, or one used by quantised checkpoints."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    def part(self, index: int) -> StoredTensor:
        """Returns the tensor that an index of the first axis selects, named `name.index`."""
        _, *shape = self.shape
        at = self.offset + index * math.prod(shape) * np.dtype(_DTYPES[self.dtype]).itemsize
        return StoredTensor(self.path, f"{self.name}.{index}", self.dtype, tuple(shape), at)

    def places(self) -> Iterator[Bytes]:
        """Yields the range of its bytes."""
        size = math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize
        yield Bytes(self.path, self.offset, self.offset + size)

    def read(self) -> NDArray[np.float32]:
        """Reads a float tensor as float32, C-contiguous and owned by the caller.

        Raises:
            FormatError: the file has become shorter since it was opened.
            OSError: it cannot be read.
        """
        assert self.dtype in _FLOATS
        values: NDArray[np.float32] = self.raw()
        return values

    def raw(self) -> NDArray[Any]:
        """Reads the values: floats as float32; integers and the codes of other types unchanged.

        Raises:
            FormatError: the file has become shorter since it was opened.
            OSError: it cannot be read.
        """
        count = math.prod(self.shape)
        # Read, not mapped: a file that shrinks under a mapping kills the process.
        raw = np.fromfile(self.path, dtype=_DTYPES[self.dtype], count=count, offset=self.offset)
        if raw.size != count:
            raise FormatError(
                f"{self.path}: {self.name}: file is truncated; expected {count} values, "
                f"got {raw.size}"
            )
        if self.dtype == "BF16":  # the upper half of a float32
            wide = raw.astype("<u4")
            wide <<= 16
            return wide.view(np.float32).reshape(self.shape)
        if self.dtype in _CODES:
            return raw.reshape(self.shape)
        return raw.astype(np.float32, copy=False).reshape(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file by name, reading none of them.

    Raises:
        FormatError: the file is missing, truncated or not safetensors, or a tensor is empty or of an unsupported type.
    """
    require_file(path)
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = parse_object(file.read(size), "header", most=_MOST_HEADER)
    except OSError as error:  # the library's errors do not name the file
        raise FormatError(f"{path}: cannot be read: {error}") from None
    except (SafetensorError, ValueError, struct.error) as error:
        raise FormatError(f"{path}: truncated or not a safetensors file: {error}") from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if dtype not in _DTYPES:
            raise _not_floats(path, name, dtype)
        if math.prod(shape) == 0:
            raise FormatError(f"{path}: {shortened(name)}: is empty, shape {list(shape)}")
        offset = 8 + size + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path, name, dtype, shape, offset)
    return tensors


def require_floats(tensor: StoredTensor) -> None:
    """Checks that a tensor holds floats.

    Raises:
        FormatError: it has another type.
    """
    if tensor.dtype not in _FLOATS:
        raise _not_floats(tensor.path, tensor.name, tensor.dtype)


def _not_floats(path: Path, name: str, dtype: str) -> FormatError:
    return FormatError(
        f"{path}: {shortened(name)}: dtype {dtype} is not supported; supported: {', '.join(_FLOATS)}"
    )

"""Writes a file with checksums one tensor at a time, over hours; an interrupted writer can be resumed."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Mapping
from itertools import accumulate, chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.file.summed import BLOCK, header_of
from edgemoe.file.whole import is_at, locked, named, pwrite, rename

__all__ = ["SummedWriter"]

_BUSY = "another calibration is writing it"


class SummedWriter:
    """The locked file `path`.part, which is renamed to `path` when all tensors are written. Also a context manager.

    If the context is left before the first `add`, an empty partial file is removed.
    """

    def __init__(
        self,
        path: Path,
        forms: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
        meta: Mapping[str, str],
    ) -> None:
        """Opens the partial file. Its content is kept until the first `add`, and beyond that if `resume` accepted it.

        Args:
            forms: type and shape of each tensor, in order.
            meta: the metadata.

        Raises:
            BlockingIOError: another process is writing it.
            OSError: the file cannot be written.
        """
        self._path, self._part = path, path.with_name(path.name + ".part")
        self._forms = dict(forms)
        self._head = header_of(forms, meta)
        self._rows = [shape[0] if len(shape) > 1 else 1 for _, shape in forms.values()]
        sizes = (kind.itemsize * int(np.prod(shape)) for kind, shape in forms.values())
        self._ends = list(accumulate(chain([len(self._head)], sizes)))
        self.sums = np.array([_core.crc32c(self._head)], np.uint32)
        """Checksums of the header and of every row written so far."""
        self._count = 0  # tensors written so far
        self._file = locked(self._part, create=True, ours=True, busy=_BUSY)

    @property
    def total_bytes(self) -> int:
        """The size of the complete file."""
        return self._ends[-1] + 4 * (2 + sum(self._rows))

    @property
    def sums_bytes(self) -> int:
        """The part of `total_bytes` that are checksums, which stay in memory until the file is complete."""
        return self.total_bytes - self._ends[-1]

    @property
    def kept_bytes(self) -> int:
        """The disk space that the partial file takes."""
        return os.fstat(self._file.fileno()).st_blocks * 512

    def resume(self, sums: NDArray[np.integer]) -> bool:
        """Continues after the tensors for which an earlier writer of the same file had these `sums`.

        Returns whether it could: the sums must be those of whole tensors, of this header, and of what is on disk.
        """
        count, rows = 0, 1
        while rows < len(sums) and count < len(self._rows):
            rows += self._rows[count]
            count += 1
        if rows != len(sums) or sums[0] != self.sums[0]:
            return False
        found = self._read_sums(count)
        if found is None or not np.array_equal(found, sums):
            return False
        self.sums, self._count = found, count
        return True

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Writes the next tensor.

        Raises:
            OSError: the disk is full; the error names the partial file.
        """
        expected, (kind, shape) = list(self._forms.items())[self._count]
        assert (name, array.dtype, array.shape) == (expected, kind, shape)
        array = np.ascontiguousarray(array)
        with named(self._part):
            if self._count == 0:
                self._file.truncate(0)
                pwrite(self._file, self._head, 0)
            if array.size:
                pwrite(self._file, array.data.cast("B"), self._ends[self._count])
        rows = array if array.ndim > 1 else [array]
        more = np.fromiter(map(_core.crc32c, rows), np.uint32, len(rows))
        self.sums = np.concatenate([self.sums, more])
        self._count += 1

    def sync(self) -> None:
        """Syncs to disk what was added."""
        with named(self._part):
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Writes the checksums and renames the file to `path`, with the mode of the file that had the name."""
        assert self._count == len(self._rows)
        numbers = self.sums.astype("<u4", copy=False).tobytes()
        with named(self._part):
            pwrite(self._file, numbers + struct.pack("<I", _core.crc32c(numbers)), self._ends[-1])
            self._file.truncate(self.total_bytes)
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(self._file.fileno(), os.stat(self._path).st_mode & 0o777)
            self.sync()
            rename(self._part, self._path)
        self._file.close()

    def _read_sums(self, count: int) -> NDArray[np.uint32] | None:
        """Returns the checksums of the header and the first `count` tensors on disk; None if the file is too short."""
        fd, at = self._file.fileno(), 1
        out = np.empty(1 + sum(self._rows[:count]), np.uint32)
        out[0] = _core.crc32c(os.pread(fd, len(self._head), 0))
        for i in range(count):
            size = (self._ends[i + 1] - self._ends[i]) // max(self._rows[i], 1)
            for row in range(self._rows[i]):
                crc, left = 0, size
                for block in _blocks(fd, self._ends[i] + row * size, size):
                    crc, left = _core.crc32c(block, crc), left - len(block)
                if left:
                    return None
                out[at] = crc
                at += 1
        return out

    def __enter__(self) -> SummedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._discard()
        self._file.close()

    def _discard(self) -> None:
        """Removes the partial file if it is empty. It is still locked, so no other process is writing it."""
        file = self._file
        if not file.closed and os.fstat(file.fileno()).st_size == 0 and is_at(file, self._part):
            with contextlib.suppress(OSError):
                self._part.unlink()


def _blocks(fd: int, at: int, size: int) -> Iterator[bytes]:
    end = at + size
    while at < end and (block := os.pread(fd, min(BLOCK, end - at), at)):
        yield block
        at += len(block)

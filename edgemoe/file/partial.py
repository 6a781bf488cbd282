"""A file in the making: records at known places, under `X.part` until all are there, resumable by its log.

The order is what an interruption or a power cut is survived by. A record is in the log (`X.part.log`) only after it is
on the disk. The first 64 bytes stay zero until all else is on the disk, and the file gets its name after these are,
while it is still locked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.file.layout import Ending, Place
from edgemoe.file.whole import locked, named, pwrite, rename

__all__ = ["PartialFile"]

_SYNC_BYTES = 64 << 20  # what an interruption may cost
_BLOCK = 16 << 20
_BUSY = "another conversion is writing it"


class PartialFile:
    """Is `path`.part, locked: what an earlier process finished of the same thing is kept."""

    def __init__(
        self, path: Path, fingerprint: str, places: Mapping[str, Place], total_bytes: int
    ) -> None:
        """Opens or resumes it.

        Args:
            path: the name that the file gets at the end.
            fingerprint: of all that the content depends on; a partial file with another is started over.
            places: of records, by name.
            total_bytes: what the whole file takes.

        Raises:
            BlockingIOError: another process is writing it.
            FileExistsError: another process has just written `path`, or a name that is needed is no regular file.
            OSError: the disk is too small (ENOSPC) or not writable.
        """
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._log_path = path.with_name(path.name + ".part.log")
        self._places = places
        self._replaces = _identity(path)
        self._unlogged: list[str] = []
        self._unsynced = 0
        self.sums: dict[str, list[int]] = {}
        """The checksum of every rung of the records that are there."""
        self._require_room(total_bytes)
        with contextlib.ExitStack() as opened:
            self._file = opened.enter_context(
                locked(self._part, create=True, ours=True, busy=_BUSY)
            )
            self._log = opened.enter_context(
                locked(self._log_path, create=True, ours=True, busy=_BUSY)
            )
            self._require_unchanged()
            self._resume(fingerprint)
            opened.pop_all()

    @property
    def written_bytes(self) -> int:
        """The bytes of the records that are there."""
        return sum(self._places[name].padded_bytes for name in self.sums)

    def write(self, name: str, rungs: Sequence[NDArray[np.uint8]]) -> None:
        """Writes a record.

        Raises:
            OSError: the disk is full; the error names the partial file.
        """
        place = self._places[name]
        assert tuple(map(len, rungs)) == place.sizes
        at = place.offset
        with named(self._part):
            for rung in rungs:
                pwrite(self._file, rung.data, at)
                at += len(rung)
            self.sums[name] = [_core.crc32c(rung) for rung in rungs]
            self._unlogged.append(name)
            self._unsynced += sum(place.sizes)
            if self._unsynced >= _SYNC_BYTES:
                self.sync()

    def sync(self) -> None:
        """Brings the records to the disk, and then logs them."""
        os.fsync(self._file.fileno())
        lines = [f"{n} {' '.join(f'{crc:x}' for crc in self.sums[n])}\n" for n in self._unlogged]
        os.write(self._log.fileno(), "".join(lines).encode())
        self._unlogged.clear()
        self._unsynced = 0

    def finish(self, ending: Ending) -> None:
        """Writes what follows the records, makes the file valid and gives it its name.

        Raises:
            FileExistsError: another process has written `path` meanwhile; that stays, and so does the partial file.
            OSError: the disk is full.
        """
        with named(self._part):
            for at, data in ending.pieces:
                pwrite(self._file, data, at)
            self._file.truncate(ending.file_bytes)
            os.fsync(self._file.fileno())
            pwrite(self._file, ending.preamble, 0)
            os.fsync(self._file.fileno())
            self._require_unchanged()
            rename(
                self._part, self._path
            )  # still locked: who waits finds another file of that name
            self._unlogged.clear()
            self._log_path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Gives up the lock; what is there stays, and is logged if the disk lets it be."""
        if self._file.closed:
            return
        with contextlib.suppress(OSError):  # a full disk must not hide the first error
            if self._unlogged:
                self.sync()
        self._file.close()
        self._log.close()

    def _require_room(self, total_bytes: int) -> None:
        try:
            kept = os.lstat(self._part).st_blocks * 512  # gone on with, or freed
        except FileNotFoundError:
            kept = 0
        free = shutil.disk_usage(self._path.parent).free + kept
        wanted = total_bytes + (1 << 20)  # for index and log
        if free < wanted:
            raise OSError(
                errno.ENOSPC,
                f"the disk has {free / 1e6:.1f} MB free; the file takes {wanted / 1e6:.1f} MB",
                str(self._path),
            )

    def _require_unchanged(self) -> None:
        """Another conversion may have finished between our start and our lock: it wins."""
        if _identity(self._path) == self._replaces:
            return
        if not os.fstat(self._file.fileno()).st_size:
            self._part.unlink()
            self._log_path.unlink()
        raise FileExistsError(
            errno.EEXIST, "another process has written it meanwhile; it stays", str(self._path)
        )

    def _resume(self, fingerprint: str) -> None:
        for name, sums in self._logged(fingerprint).items():
            if self._is_there(self._places[name], sums):
                self.sums[name] = sums
        if not self.sums:
            self._file.truncate(0)
            self._log.truncate(0)
            os.write(self._log.fileno(), f"{fingerprint}\n".encode())

    def _logged(self, fingerprint: str) -> dict[str, list[int]]:
        """Returns what an interrupted conversion of the same thing says that it finished."""
        content = self._log.read()
        lines = content.decode(errors="replace").splitlines()
        done: dict[str, list[int]] = {}
        if lines[:1] != [fingerprint]:
            return done
        for line in lines[1:]:
            with contextlib.suppress(ValueError, KeyError):  # the last line may be half written
                name, *crcs = line.split(" ")
                if len(crcs) == len(self._places[name].sizes):
                    done[name] = [int(c, 16) for c in crcs]
        if not content.endswith(b"\n"):
            os.write(self._log.fileno(), b"\n")
        return done

    def _is_there(self, place: Place, sums: Sequence[int]) -> bool:
        """Says whether a record is what the log says it is, a block at a time."""
        at = place.offset
        for size, expected in zip(place.sizes, sums, strict=True):
            end, crc = at + size, 0
            while at < end and (block := os.pread(self._file.fileno(), min(_BLOCK, end - at), at)):
                crc = _core.crc32c(block, crc)
                at += len(block)
            if at < end or crc != expected:
                return False
        return True


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino

"""A file under construction: records at known offsets in `X.part`, with a log from which writing can be resumed.

The order of writes makes it survive an interruption or a power cut. A record is logged (in `X.part.log`) only after it
is on disk. The first 64 bytes, the preamble, stay zero until everything else is on disk. The file is renamed to `X`
only after the preamble is on disk too, while it is still locked.
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

_SYNC_BYTES = 64 << 20  # the most that an interruption may lose
_BLOCK = 16 << 20
_BUSY = "another conversion is writing it"


class PartialFile:
    """The locked file `path`.part. Records that an earlier process finished are kept if the fingerprint is the same."""

    def __init__(
        self, path: Path, fingerprint: str, places: Mapping[str, Place], total_bytes: int
    ) -> None:
        """Opens or resumes it.

        Args:
            path: the name of the complete file.
            fingerprint: a hash of all that the content depends on; a partial file with another one is started over.
            places: the places of the records, by name.
            total_bytes: the size of the complete file.

        Raises:
            BlockingIOError: another process is writing it.
            FileExistsError: another process has just written `path`, or something that is not a regular file has the
                name of the partial file or the log.
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
        """The checksum of every rung of the records written so far, by name."""
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
        """The bytes of the records written so far, with padding."""
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
        """Syncs the records to disk, and then logs them."""
        os.fsync(self._file.fileno())
        lines = [f"{n} {' '.join(f'{crc:x}' for crc in self.sums[n])}\n" for n in self._unlogged]
        self._append("".join(lines))
        self._unlogged.clear()
        self._unsynced = 0

    def finish(self, ending: Ending) -> None:
        """Writes the ending, makes the file valid and renames it to `path`.

        Raises:
            FileExistsError: another process has written `path` meanwhile; its file stays, and so does the partial file.
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
            )  # still locked: a process waiting for the lock finds another file under the name
            self._unlogged.clear()
            self._log_path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Releases the lock. The records stay, and are logged if the disk permits."""
        if self._file.closed:
            return
        with contextlib.suppress(OSError):  # a full disk must not hide the first error
            if self._unlogged:
                self.sync()
        self._file.close()
        self._log.close()

    def _require_room(self, total_bytes: int) -> None:
        try:
            kept = os.lstat(self._part).st_blocks * 512  # will be reused, or freed
        except FileNotFoundError:
            kept = 0
        free = shutil.disk_usage(self._path.parent).free + kept
        wanted = total_bytes + (1 << 20)  # 1 MiB for the index and the log
        if free < wanted:
            raise OSError(
                errno.ENOSPC,
                f"the disk has {free / 1e6:.1f} MB free; the file takes {wanted / 1e6:.1f} MB",
                str(self._path),
            )

    def _require_unchanged(self) -> None:
        """Raises if another conversion has written `path` since this one started: its file stays."""
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
            self._append(f"{fingerprint}\n")

    def _logged(self, fingerprint: str) -> dict[str, list[int]]:
        """Returns the checksums of the records that an interrupted conversion with this fingerprint logged, by name."""
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
            self._append("\n")
        return done

    def _append(self, lines: str) -> None:
        """Adds to the log where it ends now: its position in the file is that of an earlier read or write."""
        pwrite(self._log, lines.encode(), os.fstat(self._log.fileno()).st_size)

    def _is_there(self, place: Place, sums: Sequence[int]) -> bool:
        """Returns whether a record on disk has the checksums of the log, reading a block at a time."""
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

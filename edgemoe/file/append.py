"""Adds sections to a finished `.moe` file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path

from edgemoe import _core
from edgemoe.file.format import MAX_SECTIONS, PREAMBLE, align, open_moe, pack_preamble

__all__ = ["add_sections"]


def add_sections(path: str | os.PathLike[str], sections: Mapping[str, bytes]) -> None:
    """Appends sections to a complete file; one that has the name already is replaced.

    The sections and a new index go after the file's end and reach the disk before the preamble, in one write of 64
    bytes, makes them part of the file: whenever this is interrupted, the file is the old one. What they replace
    stays where it is, as waste, and engines that have the file open are not disturbed.

    Args:
        sections: content by name; "experts" is the format's own.

    Raises:
        ValueError: a section is empty or has a reserved name, or all together are too large.
        FormatError: the file is not a sound `.moe` file.
        OSError: the disk is full, the file cannot be written, or another process is adding to it.
    """
    path = Path(path)
    for name, data in sections.items():
        if not data or name == "experts":
            raise ValueError(f"section {name!r}: expected another name and at least one byte")
    try:
        # Unbuffered: what could not be written must not be tried again when the file is closed.
        with open(path, "r+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BlockingIOError(errno.EAGAIN, "another process is adding to it") from None
            _append(file.fileno(), path, sections)
    except OSError as e:
        if e.filename is None:  # of a write, which does not know the name
            raise OSError(e.errno, e.strerror, str(path)) from None
        raise


def _append(fd: int, path: Path, sections: Mapping[str, bytes]) -> None:
    moe = open_moe(path)
    kept = sum(len(data) for name, data in moe.sections.items() if name not in sections)
    total = kept + sum(map(len, sections.values()))
    if total > MAX_SECTIONS:
        raise ValueError(f"sections of {total} bytes; expected at most {MAX_SECTIONS} in a file")
    *_, end, offset, length, _ = PREAMBLE.unpack(os.pread(fd, PREAMBLE.size, 0))
    index = json.loads(os.pread(fd, length, offset))
    try:
        at = align(end)
        for name, data in sections.items():
            _pwrite(fd, data, at)
            index["sections"][name] = [at, len(data), _core.crc32c(data)]
            at = align(at + len(data))
        new = json.dumps(index).encode()
        _pwrite(fd, new, at)
        os.ftruncate(fd, at + len(new))  # an interrupted append may have left more
        os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, end)
        raise
    _pwrite(fd, pack_preamble(at + len(new), at, new), 0)
    os.fsync(fd)


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count

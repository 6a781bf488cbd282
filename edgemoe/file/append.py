"""Adds sections to a finished `.moe` file."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

from edgemoe import _core
from edgemoe.errors import quoted
from edgemoe.file.format import MAX_SECTIONS, PREAMBLE, MoeFile, align, pack_preamble
from edgemoe.file.reader import open_moe
from edgemoe.file.whole import is_at, locked, named, pwrite

__all__ = ["add_sections"]


def add_sections(path: str | os.PathLike[str], sections: Mapping[str, bytes]) -> None:
    """Appends sections to a complete file. A new section replaces an existing one of the same name.

    The sections and a new index are written after the end of the file and synced to disk. Only then does a single write
    of the 64-byte preamble make them part of the file, so an interruption leaves the old file intact. Replaced sections
    and the old index remain in the file as unused bytes. Engines that have the file open are not disturbed.

    Args:
        sections: content by name; "experts" is reserved by the format.

    Raises:
        ValueError: a section is empty or has the reserved name, or all sections together are too large.
        FormatError: the file is not a valid `.moe` file.
        OSError: the disk is full, the file cannot be written, another process is adding to it, or another process has
            replaced it. In the last case the file that now has the name is without the sections.
    """
    for name, data in sections.items():
        if not data or name == "experts":
            raise ValueError(f"section {quoted(name)}: expected another name and at least one byte")
    # Where the path is a link, the file that it leads to is changed.
    target = Path(os.path.realpath(path))
    with named(path, target), locked(path, busy="another process is adding to it") as file:
        moe = open_moe(path)
        if not os.path.sameopenfile(file.fileno(), moe.file.fileno()):
            raise _replaced(path, "nothing was added")
        _append(file, moe, sections)
        if not is_at(file, target):
            raise _replaced(path, "the sections went to the old file, not to this one")


def _replaced(path: str | os.PathLike[str], what: str) -> OSError:
    return OSError(errno.ESTALE, f"another process has replaced it; {what}", os.fspath(path))


def _append(file: io.FileIO, moe: MoeFile, sections: Mapping[str, bytes]) -> None:
    fd = file.fileno()
    kept = sum(len(data) for name, data in moe.sections.items() if name not in sections)
    total = kept + sum(map(len, sections.values()))
    if total > MAX_SECTIONS:
        raise ValueError(f"sections of {total} bytes; expected at most {MAX_SECTIONS} in a file")
    *_, end, offset, length, _ = PREAMBLE.unpack(os.pread(fd, PREAMBLE.size, 0))
    index = json.loads(os.pread(fd, length, offset))  # `open_moe` has validated it
    try:
        at = align(end)
        for name, data in sections.items():
            pwrite(file, data, at)
            index["sections"][name] = [at, len(data), _core.crc32c(data)]
            at = align(at + len(data))
        new = json.dumps(index).encode()
        pwrite(file, new, at)
        file.truncate(at + len(new))  # an interrupted append may have left bytes beyond
        os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise
    pwrite(file, pack_preamble(at + len(new), at, new), 0)
    os.fsync(fd)

"""The container of models and adapters: a preamble, an index and named sections, with checksums."""

from __future__ import annotations

import os
from collections.abc import Container
from pathlib import Path
from typing import Any

from edgemoe import _core
from edgemoe.errors import FormatError, ReadError, quoted
from edgemoe.file.format import ALIGNMENT, MAGIC, MAX_SECTIONS, PREAMBLE, VERSION
from edgemoe.file.parse import parse_json

__all__ = ["ContainerReader"]

_MAX_INDEX = 64 << 20
# `look_into` runs beside an engine, outside its memory budget, so its limits are lower:
_MOST_LOOKED_AT = (1 << 20, 2 << 20)  # bytes of the index, and of the sections that are read


class ContainerReader:
    """Reads and checks the container of a file. Every error message begins with the file's path."""

    def __init__(self, path: Path, wanted: Container[str] | None = None) -> None:
        """Takes the names of the sections to read, None for all; see `look_into`."""
        self.path, self._wanted = path, wanted
        limits = (_MAX_INDEX, MAX_SECTIONS) if wanted is None else _MOST_LOOKED_AT
        self._most_index, self._most_sections = limits
        self.used: list[tuple[int, int, str]] = []

    def fail(self, what: str) -> FormatError:
        """Returns the error for a fault of this file."""
        return FormatError(f"{self.path}: {what}")

    def need(self, ok: bool, what: str) -> None:
        """Raises FormatError unless `ok`."""
        if not ok:
            raise self.fail(what)

    def index(self) -> Any:
        """Opens the file and returns its index: a JSON value whose checksum matches, otherwise unchecked."""
        if self.path.is_dir():
            raise self.fail("is a directory; edgemoe convert makes a .moe file of a checkpoint")
        try:
            self.file = _core.File(os.fsencode(self.path))
        except ReadError as e:
            raise FormatError(str(e)) from None
        self.need(self.file.size > 0, "the file is empty")
        head = self.read("the preamble", 0, min(PREAMBLE.size, self.file.size))
        self.need(head[: len(MAGIC)] == MAGIC[: len(head)], "not a .moe file (bad magic at byte 0)")
        self.need(len(head) == PREAMBLE.size, "truncated inside the preamble")
        _, version, crc, self.file_bytes, offset, length, index_crc = PREAMBLE.unpack(head)
        self.need(
            version in (2, VERSION),
            f"format version {version}; this edgemoe reads versions 2 and {VERSION}"
            + (
                ": convert the checkpoint again"
                if version < VERSION
                else "; a newer edgemoe reads it"
            ),
        )
        self.need(_core.crc32c(head[16:]) == crc, "checksum of the preamble does not match")
        self.need(
            self.file.size >= self.file_bytes,
            f"truncated: expected {self.file_bytes} bytes, got {self.file.size}",
        )
        self.need(
            length <= self._most_index,
            f"the index claims {length} bytes; {self._most_index} are read here at most",
        )
        data = self.bytes_at("the index", offset, length, index_crc)
        return parse_json(data, f"{self.path}: the index", most=_MAX_INDEX)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Reads a range of bytes, all of which must be there."""
        try:
            data = os.pread(self.file.fileno(), length, offset)
        except OSError as e:
            raise self.fail(f"{name} at offset {offset} cannot be read: {e.strerror}") from None
        self.need(len(data) == length, f"{name} is truncated")
        return data

    def claim(self, name: str, offset: int, length: int) -> None:
        """Checks that a range is aligned and within the file, and records it for `check_overlaps`."""
        self.need(
            type(offset) is int and type(length) is int and offset >= ALIGNMENT and length > 0
            and offset % ALIGNMENT == 0 and offset + length <= self.file_bytes,
            f"{name} claims bytes {offset} to {offset}+{length} of {self.file_bytes}",
        )  # fmt: skip
        self.used.append((offset, offset + length, name))

    def bytes_at(self, name: str, offset: int, length: int, crc: int) -> bytes:
        """Claims and reads a range of bytes, and checks its CRC-32C."""
        self.claim(name, offset, length)
        data = self.read(name, offset, length)
        self.need(_core.crc32c(data) == crc, f"checksum of {name} does not match")
        return data

    def sections(self, value: Any) -> dict[str, bytes]:
        """Returns the content of the wanted sections and of `experts`, by name."""
        self.need(isinstance(value, dict), "sections must be an object")
        sections, room = {}, self._most_sections
        for name, entry in value.items():
            self.need(
                isinstance(entry, list) and len(entry) == 3 and all(type(v) is int for v in entry)
                and 0 < entry[1] <= MAX_SECTIONS,
                f"section {quoted(name)} is malformed",
            )  # fmt: skip
            if self._wanted is not None and name != "experts" and name not in self._wanted:
                self.claim(f"section {quoted(name)}", entry[0], entry[1])
                continue
            room -= entry[1]
            self.need(room >= 0, f"sections of more than {self._most_sections} bytes")
            sections[name] = self.bytes_at(f"section {quoted(name)}", *entry)
        return sections

    def check_overlaps(self) -> None:
        """Checks that no two claimed ranges overlap."""
        self.used.sort()
        for (_, end, first), (start, _, second) in zip(self.used, self.used[1:], strict=False):
            self.need(end <= start, f"{first} and {second} overlap")

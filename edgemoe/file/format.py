"""The `.moe` file, version 3 (specified in docs/format.md): the index as objects, the reader, and record sizes."""

from __future__ import annotations

import os
import struct
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import MATRICES, ModelConfig, dense_tensors
from edgemoe.errors import FormatError, ReadError, quoted
from edgemoe.file.parse import parse_json
from edgemoe.quant import SCHEMES, Scheme
from edgemoe.quant.correction import basis_bytes, is_rank, kind_of, unpack_basis
from edgemoe.specs import TensorSpec

__all__ = [
    "ALIGNMENT", "MAGIC", "MAX_SECTIONS", "PREAMBLE", "VERSION", "ExpertTable", "MoeFile", "Outline", "Reader",
    "Tensor", "align", "expert_rung_bytes", "look_into", "open_moe", "pack_preamble", "tensor_bytes",
]  # fmt: skip

MAGIC = b"\x89MOE\r\n\x1a\n"
VERSION = 3
"""The version written. Version 2, whose config describes attention differently (`edgemoe.specs.flat`), is read too."""
ALIGNMENT = 4096
PREAMBLE = struct.Struct("<8sIIQQQI20x")
_MAX_INDEX = 64 << 20
MAX_SECTIONS = 256 << 20  # bytes, of all sections together; they are read into memory
# `look_into` runs beside an engine, outside its memory budget, so its limits are lower:
_MOST_LOOKED_AT = (1 << 20, 2 << 20)  # bytes of the index, and of the sections that are read
_MOST_APART = 1 << 14  # contiguous runs of expert records


def align(n: int) -> int:
    """Rounds up to the next record boundary."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def pack_preamble(file_bytes: int, index_offset: int, index: bytes) -> bytes:
    """Returns the 64 bytes that make a file valid; they are written last."""
    tail = PREAMBLE.pack(
        MAGIC, VERSION, 0, file_bytes, index_offset, len(index), _core.crc32c(index)
    )[16:]
    return struct.pack("<8sII", MAGIC, VERSION, _core.crc32c(tail)) + tail


def expert_rung_bytes(
    config: ModelConfig, scheme: Scheme, ladder: Sequence[Sequence[int]]
) -> list[int]:
    """Returns the bytes of each rung of an expert's record."""
    columns = list(zip(*ladder, strict=True))
    sizes = [
        scheme.rung_bytes(rows, cols, bits, f"experts.{part}")
        for part, (rows, cols), bits in zip(MATRICES, config.expert_shapes, columns, strict=True)
    ]
    return [sum(rung) for rung in zip(*sizes, strict=True)]


@dataclass(frozen=True, slots=True)
class Tensor:
    """The place of one dense tensor in the file: the rungs of a nested matrix, or one run of bytes of float32."""

    name: str
    spec: TensorSpec
    offset: int
    lengths: tuple[int, ...]
    crcs: tuple[int, ...]
    most: int | None = None
    """The most rungs that any level uses, if an allocation limits them; None for no limit."""

    def rungs(self, level: int) -> int:
        """Returns how many rungs are used at a level."""
        return min(level, len(self.lengths) if self.most is None else self.most)

    def size(self, level: int) -> int:
        """Returns the bytes of the rungs used at a level."""
        return sum(self.lengths[: self.rungs(level)])


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """The location of every expert: row layer_index * places + place. A layer has one place per expert.

    With adapters loaded, every layer has the same number of further places after these, for the adapters' experts.
    """

    offsets: NDArray[np.uint64]
    """[n]: start of the record."""
    ends: tuple[int, ...]
    """[rungs]: end of each rung in bytes from the start of its record, the same for all experts that have the rung."""
    crcs: NDArray[np.uint32]
    """[n, rungs]: checksum of each rung."""
    rungs: NDArray[np.uint8]
    """[n]: how many of the ladder's rungs each expert has; 0 for an unused place, see `edgemoe.file.adapter`."""
    others: tuple[_core.File, ...] = ()
    """The adapters' files."""
    file_of: NDArray[np.uint8] | None = None
    """[n]: the file that each record lies in, 0 for the model's, then `others` from 1; None without adapters."""
    names: NDArray[np.int32] | None = None
    """[n]: the number of each expert in its layer, -1 for an unused place; None where it equals the place."""

    def sizes(self, level: int) -> NDArray[np.int64]:
        """Returns the bytes of each expert up to a level, [n]."""
        sizes: NDArray[np.int64] = np.array((0, *self.ends))[np.minimum(self.rungs, level)]
        return sizes


@dataclass(frozen=True, slots=True)
class MoeFile:
    """An opened, validated `.moe` file: everything but the weights."""

    path: Path
    file: _core.File
    """The descriptor that the weights are read from: that of the validated file, even if the path is replaced later."""
    config: ModelConfig
    scheme: Scheme
    """How weights are encoded: one of `edgemoe.quant.SCHEMES`, with this file's row scales and corrections."""
    ladder: tuple[tuple[int, int, int], ...]
    dense_ladder: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    sections: Mapping[str, bytes]
    experts: ExpertTable
    source: Mapping[str, Any]
    file_bytes: int
    bases: NDArray[np.int8] | None = None
    """[layers with experts, rank, D padded to 64]: V of each layer's gates and ups; None if these have no corrections,
    and after `look_into`."""

    @property
    def basis_bytes(self) -> int:
        """The bytes that `bases` takes, whether it was read or not."""
        rank, layers = self.scheme.shared_rank, len(self.config.moe_layers)
        return layers * basis_bytes(self.config.hidden_size, rank) if rank else 0

    @property
    def expert_bits(self) -> NDArray[np.int8]:
        """The highest bits of each expert, [layers with experts, places]; for an unused place, the file's highest."""
        rungs = self.experts.rungs.astype(np.intp) - 1
        bits = np.array([rung[0] for rung in self.ladder], np.int8)[rungs]
        return bits.reshape(len(self.config.moe_layers), -1)

    @property
    def places(self) -> int:
        """The number of expert places in a layer: E, plus those of adapters' experts."""
        return len(self.experts.offsets) // len(self.config.moe_layers)

    def expert_at(self, row: int) -> tuple[int, int]:
        """Returns the model layer and the number of the expert in a row of the table; -1 for an unused place."""
        layer, place = divmod(row, self.places)
        names = self.experts.names
        return self.config.moe_layers[layer], place if names is None else int(names[row])

    def level(self, bits: int | None) -> int:
        """Returns how many rungs of an expert make up `bits`; all of the ladder for None.

        Raises:
            ValueError: the file has no such level.
        """
        return _level([rung[0] for rung in self.ladder], bits, "bits")

    def dense_level(self, bits: int | None) -> int:
        """Returns how many rungs of a dense matrix make up `bits`; see `level`."""
        return _level(self.dense_ladder, bits, "dense_bits")

    def dense_level_beside(self, bits: int | None) -> int:
        """Returns how many rungs of dense matrices go with a level of the experts: as many, or all for the highest."""
        level, most = self.level(bits), len(self.dense_ladder)
        return most if level == len(self.ladder) else min(level, most)


def _level(ladder: Sequence[int], bits: int | None, name: str) -> int:
    if bits is None:
        return len(ladder)
    if bits not in ladder:
        raise ValueError(
            f"{name}: expected one of {', '.join(map(str, ladder))} (what the file holds), got {bits}"
        )
    return list(ladder).index(bits) + 1


@dataclass(frozen=True, slots=True)
class Outline:
    """The fields of an index that are read first: which tensors a file can have, and how its rungs are decoded."""

    config: ModelConfig
    specs: Mapping[str, TensorSpec]
    scheme: Scheme
    ladder: tuple[tuple[int, int, int], ...]
    dense_ladder: tuple[int, ...]


class Reader:
    """A reader that validates a file. Every error message begins with the file's path."""

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

    def open(self) -> MoeFile:
        """Opens a model; see `open_moe`."""
        index = self.index()
        self.need(
            not isinstance(index, dict) or "base" not in index,
            "is an adapter; expected the model that it is for, beside which --adapter takes it",
        )
        return self.parse(index)

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

    def outline(self, index: Any, *more: str) -> Outline:
        """Validates the fields that are read first. The index must have the fields of a model's index, and `more`."""
        keys = {"config", "ladder", "dense_ladder", "group", "tensors", "sections", "source", *more}
        self.need(
            isinstance(index, dict) and set(index) - {"scheme", "row_scales", "correction"} == keys,
            "the index has other fields",
        )
        try:
            config = ModelConfig.from_json(index["config"])
            specs = dense_tensors(config)
        except FormatError as e:
            raise self.fail(str(e)) from None
        name = index.get("scheme", "nested")
        self.need(isinstance(name, str) and name in SCHEMES, f"scheme {quoted(name)} is not known")
        scheme = replace(SCHEMES[name], row_scales=self.row_scales(index, name))
        self.need(
            index["group"] == scheme.group,
            f"groups of {quoted(index['group'])}; expected {scheme.group}",
        )
        ladder = self.ladder(index["ladder"], scheme)
        dense_ladder = tuple(
            r[0]
            for r in self.ladder([[b] * 3 for b in _list(index["dense_ladder"])], scheme.of(""))
        )
        scheme = replace(
            scheme,
            correction=self.correction(
                index.get("correction", {}), name, config, specs, len(ladder), len(dense_ladder)
            ),
        )
        self.need(isinstance(index["source"], dict), "source must be an object")
        return Outline(config, specs, scheme, ladder, dense_ladder)

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

    def parse(self, index: Any) -> MoeFile:
        """Validates the index of a model, and reads its sections."""
        of = self.outline(index)
        config, scheme = of.config, of.scheme
        tensors = self.tensors(index["tensors"], of.specs, scheme, of.dense_ladder)
        sections = self.sections(index["sections"])
        bases = None
        if self._wanted is None:
            bases = self.bases(sections.get("basis"), config, scheme)
        self.need("experts" in sections, "the section experts is missing")
        count = len(config.moe_layers) * config.num_experts
        experts = self.experts(sections.pop("experts"), count, config, scheme, of.ladder)
        self.check_overlaps()
        return MoeFile(
            self.path, self.file, config, scheme, of.ladder, of.dense_ladder,
            tensors, sections, experts, index["source"], self.file_bytes, bases,
        )  # fmt: skip

    def check_overlaps(self) -> None:
        """Checks that no two claimed ranges overlap."""
        self.used.sort()
        for (_, end, first), (start, _, second) in zip(self.used, self.used[1:], strict=False):
            self.need(end <= start, f"{first} and {second} overlap")

    def row_scales(self, index: dict[str, Any], scheme: str) -> tuple[int, ...]:
        """Returns for each rung whether it begins with row scales, 1 or 0; without the field only the first does."""
        value = index.get("row_scales", [1])
        most = max(len(_list(index["ladder"])), len(_list(index["dense_ladder"])))
        self.need(
            isinstance(value, list) and all(type(v) is int and v in (0, 1) for v in value)
            and value[:1] == [1] and len(value) <= most and (scheme == "nested" or value == [1]),
            f"row_scales {quoted(value)}; expected 1, and then 1 or 0 for each rung of nested codes",
        )  # fmt: skip
        return tuple(value)

    def correction(
        self,
        value: Any,
        scheme: str,
        config: ModelConfig,
        specs: Mapping[str, TensorSpec],
        rungs: int,
        dense_rungs: int,
    ) -> dict[str, tuple[int, ...]]:
        """Returns the rank of each rung's correction, by kind of matrix."""
        self.need(isinstance(value, dict), "correction must be an object")
        self.need(
            not value or scheme == "nested", f"correction: matrices of scheme {scheme} have none"
        )
        narrowest: dict[str, int] = {}
        for name, spec in specs.items():
            if spec.kind == "nested":
                kind = kind_of(name)
                narrowest[kind] = min(narrowest.get(kind, spec.shape[1]), *spec.shape)
        for part, shape in zip(MATRICES, config.expert_shapes, strict=True):
            if shape[0]:
                narrowest[f"experts.{part}"] = min(shape)
        for kind, ranks in value.items():
            self.need(
                kind in narrowest, f"correction: the model has no matrices of kind {quoted(kind)}"
            )
            count = rungs if kind.startswith("experts.") else dense_rungs
            self.need(
                isinstance(ranks, list) and len(ranks) == count and all(map(is_rank, ranks))
                and any(ranks),
                f"correction of {kind}: ranks {quoted(ranks)}; expected one for each of {count} rungs, "
                "0, 8, 16, 24 or 32 and not all 0",
            )  # fmt: skip
            self.need(
                max(ranks) <= narrowest[kind],
                f"correction of {kind}: rank {max(ranks)} of a matrix with {narrowest[kind]} rows or columns",
            )
        return {kind: tuple(ranks) for kind, ranks in value.items()}

    def bases(
        self, data: bytes | None, config: ModelConfig, scheme: Scheme
    ) -> NDArray[np.int8] | None:
        """Returns the bases V that the gates and ups of each layer's experts share, as in `MoeFile.bases`."""
        rank = scheme.shared_rank
        if not rank:
            self.need(data is None, "section basis: the index has no correction that it is for")
            return None
        if data is None:
            raise self.fail("the section basis is missing; experts have corrections")
        try:
            return unpack_basis(data, len(config.moe_layers), rank, config.hidden_size)
        except ValueError as e:
            raise self.fail(f"section basis is of another model: {e}") from None

    def ladder(self, value: Any, scheme: Scheme) -> tuple[tuple[int, int, int], ...]:
        """Returns the bits of w_gate, w_up and w_down after each rung; they must be a ladder of the scheme."""
        rungs = _list(value)
        self.need(0 < len(rungs) <= 8, "a ladder has 1 to 8 rungs")
        last = (0, 0, 0)
        out = []
        for rung in rungs:
            self.need(
                isinstance(rung, list) and len(rung) == 3 and all(type(b) is int for b in rung)
                and all(a < b <= 8 for a, b in zip(last, rung, strict=True)),
                f"ladder {quoted(value)} does not climb from 1 to at most 8 bits",
            )  # fmt: skip
            last = (rung[0], rung[1], rung[2])
            out.append(last)
        self.need(
            all(scheme.is_ladder(bits) for bits in zip(*out, strict=True)),
            f"ladder {quoted(value)} is not one of scheme {scheme.name}",
        )
        return tuple(out)

    def tensors(
        self, value: Any, specs: Mapping[str, TensorSpec], scheme: Scheme, ladder: Sequence[int]
    ) -> dict[str, Tensor]:
        """Returns the dense tensors by name; they must be those of `specs`, and sized as the ladder says."""
        self.need(isinstance(value, dict), "tensors must be an object")
        missing, extra = sorted(set(specs) - set(value)), sorted(set(value) - set(specs))
        self.need(not missing, f"tensor {missing[0] if missing else ''} is missing")
        self.need(not extra, f"tensor {quoted(extra[0] if extra else '')} is not part of the model")
        out = {}
        for name, spec in specs.items():
            entry = value[name]
            self.need(isinstance(entry, list) and len(entry) == 4, f"tensor {name} is malformed")
            kind, shape, offset, rungs = entry
            self.need(
                kind == spec.kind and shape == list(spec.shape),
                f"tensor {name} is {kind} {shape}; expected {spec.kind} {list(spec.shape)}",
            )
            expected = tensor_bytes(spec, scheme, ladder, name)
            self.need(
                isinstance(rungs, list)
                and all(isinstance(r, list) and len(r) == 2 and type(r[0]) is int
                        and type(r[1]) is int and 0 <= r[1] < 1 << 32 for r in rungs)
                and [r[0] for r in rungs] == expected,
                f"tensor {name} has rungs {rungs}; expected {expected} bytes",
            )  # fmt: skip
            self.claim(f"tensor {name}", offset, sum(expected))
            out[name] = Tensor(name, spec, offset, tuple(expected), tuple(r[1] for r in rungs))
        return out

    def experts(
        self,
        data: bytes,
        n: int,
        config: ModelConfig,
        scheme: Scheme,
        ladder: Sequence[Sequence[int]],
    ) -> ExpertTable:
        """Returns the table of `n` experts in the section `experts`, after checking rungs, places and overlaps."""
        row = np.dtype(
            [("offset", "<u8"), ("rungs", [("end", "<u4"), ("crc", "<u4")], len(ladder))]
        )
        self.need(len(data) == n * row.itemsize, f"section experts does not hold {n} records")
        table = np.frombuffer(data, row)
        ends = np.cumsum(expert_rung_bytes(config, scheme, ladder))
        offsets = table["offset"].astype(np.uint64)
        self.need(int(ends[-1]) < 1 << 32, "an expert is larger than 4 GiB")
        rungs = np.maximum((table["rungs"]["end"] == ends).cumprod(1).sum(1), 1)
        kept = np.minimum(np.arange(len(ends)), rungs[:, None] - 1)  # where absent: the last one
        lacks = np.arange(len(ends)) >= rungs[:, None]
        bad = np.flatnonzero(
            (table["rungs"]["end"] != ends[kept]).any(1)
            | (lacks & (table["rungs"]["crc"] != 0)).any(1)
        )
        self.need(bad.size == 0, f"expert record {bad[:1]} has rungs of another size")
        sizes = ends[rungs - 1].astype(np.uint64)
        bad = np.flatnonzero(
            (offsets % ALIGNMENT != 0) | (offsets < ALIGNMENT)
            | (sizes > self.file_bytes) | (offsets > self.file_bytes - np.minimum(sizes, self.file_bytes))
        )  # fmt: skip
        self.need(bad.size == 0, f"expert record {bad[:1]} lies outside the file")
        order = np.argsort(offsets)
        starts, stops = offsets[order], offsets[order] + sizes[order]
        room = -(-stops[:-1].astype(np.int64) // ALIGNMENT) * ALIGNMENT
        gaps = starts[1:].astype(np.int64) - room
        self.need(bool((gaps >= 0).all()), "expert records overlap")
        # Records may lie anywhere. Adjacent ones are claimed as one range: all of them, in files that edgemoe writes.
        apart = np.flatnonzero(gaps)
        self.need(
            self._wanted is None or len(apart) < _MOST_APART,
            f"expert records lie in {len(apart) + 1} runs; {_MOST_APART} are looked through here at most",
        )
        starts, stops = starts[np.append(0, apart + 1)], stops[np.append(apart, -1)]
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            self.claim("the experts" if not apart.size else "expert records", start, stop - start)
        return ExpertTable(
            offsets,
            tuple(int(e) for e in ends),
            np.ascontiguousarray(table["rungs"]["crc"], np.uint32),
            rungs.astype(np.uint8),
        )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def tensor_bytes(spec: TensorSpec, scheme: Scheme, ladder: Sequence[int], name: str) -> list[int]:
    """Returns the bytes of each rung of a dense tensor; float32 tensors have one."""
    if spec.kind == "f32":
        return [4 * int(np.prod(spec.shape))]
    return scheme.rung_bytes(spec.shape[0], spec.shape[1], ladder, name)


def open_moe(path: str | os.PathLike[str]) -> MoeFile:
    """Opens a `.moe` file, validates its index and checks the checksum of every section.

    Raises:
        FormatError: the file is missing, truncated, of another version or inconsistent; the message is one line that
            says where.
    """
    return Reader(Path(path)).open()


def look_into(path: str | os.PathLike[str], sections: Container[str] = ()) -> MoeFile:
    """Opens a file as `open_moe` does, but skips the bases and all sections but a few, so that it takes a few MiB.

    A hostile file can make it take about 30 MiB: an index of 1 MiB whose JSON values are as small as possible.

    Args:
        sections: names of the sections to read and check; `experts` always is.

    Raises:
        FormatError: as `open_moe`; or the index or these sections exceed the limits, which are lower here.
    """
    return Reader(Path(path), sections).open()

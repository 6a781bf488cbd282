"""The `.moe` file, version 3 (specified in docs/format.md): its constants, record sizes, and the index as objects."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import MATRICES, ModelConfig
from edgemoe.quant import Scheme
from edgemoe.quant.correction import basis_bytes
from edgemoe.specs import TensorSpec

__all__ = [
    "ALIGNMENT", "MAGIC", "MAX_SECTIONS", "PREAMBLE", "VERSION", "ExpertTable", "MoeFile", "Outline", "Tensor",
    "align", "expert_rung_bytes", "pack_preamble", "tensor_bytes",
]  # fmt: skip

MAGIC = b"\x89MOE\r\n\x1a\n"
VERSION = 3
"""The version written. Version 2, whose config describes attention differently (`edgemoe.specs.flat`), is read too."""
ALIGNMENT = 4096
PREAMBLE = struct.Struct("<8sIIQQQI20x")
MAX_SECTIONS = 256 << 20  # bytes, of all sections together; they are read into memory


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


def tensor_bytes(spec: TensorSpec, scheme: Scheme, ladder: Sequence[int], name: str) -> list[int]:
    """Returns the bytes of each rung of a dense tensor; float32 tensors have one."""
    if spec.kind == "f32":
        return [4 * int(np.prod(spec.shape))]
    return scheme.rung_bytes(spec.shape[0], spec.shape[1], ladder, name)


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

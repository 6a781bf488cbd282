"""The layout of a `.moe` file, computed before its first byte is written, and its ending. Does no I/O."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any

from edgemoe import _core
from edgemoe.config import ModelConfig, dense_tensors
from edgemoe.file.format import ALIGNMENT, align, expert_rung_bytes, pack_preamble, tensor_bytes
from edgemoe.quant import Scheme

__all__ = ["Ending", "Layout", "Place", "Sums", "expert_ladder"]

Sums = Mapping[str, Sequence[int]]
"""The checksum of every rung, by the name of its record."""


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a record: a dense tensor or an expert."""

    offset: int
    sizes: tuple[int, ...]
    """Bytes of each rung; rungs are contiguous."""

    @property
    def padded_bytes(self) -> int:
        """The bytes up to the next record."""
        return align(sum(self.sizes))


@dataclass(frozen=True, slots=True)
class Ending:
    """Everything that follows the records, and the preamble, which makes the file valid."""

    pieces: tuple[tuple[int, bytes], ...]
    """Offset and content: sections, then the index."""
    file_bytes: int
    preamble: bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """The offsets of tensors and experts, for a model, a scheme and the number of rungs of each expert."""

    config: ModelConfig
    scheme: Scheme
    ladder: tuple[int, ...]
    """Bits of dense matrices after each rung."""
    expert_ladder: tuple[tuple[int, int, int], ...]
    """Bits of w_gate, w_up and w_down after each rung."""
    rungs: tuple[int, ...]
    """The number of rungs of each expert, layer by layer."""
    places: Mapping[str, Place] = field(init=False)
    """By record name: the tensors of `dense_tensors`, then "experts.LAYER.INDEX"."""
    tail: int = field(init=False)
    """Offset in bytes at which the sections start."""

    def __post_init__(self) -> None:
        cut = self.scheme.cut(len(self.ladder), len(self.expert_ladder))
        object.__setattr__(self, "scheme", cut)
        places, at = {}, ALIGNMENT
        sizes = {
            name: tensor_bytes(spec, self.scheme, self.ladder, name)
            for name, spec in dense_tensors(self.config).items()
        }
        whole = expert_rung_bytes(self.config, self.scheme, self.expert_ladder)
        for name, count in zip(self.expert_names(), self.rungs, strict=True):
            sizes[name] = whole[:count]
        for name, rungs in sizes.items():
            places[name] = place = Place(at, tuple(rungs))
            at += place.padded_bytes
        object.__setattr__(self, "places", places)
        object.__setattr__(self, "tail", at)

    def expert_names(self) -> list[str]:
        """Returns the names of the expert records, in file order."""
        count = self.config.num_experts
        return [f"experts.{layer}.{i}" for layer in self.config.moe_layers for i in range(count)]

    @property
    def _row_scales(self) -> list[int]:
        return list(self.scheme.row_scales[: max(len(self.ladder), len(self.expert_ladder))])

    @property
    def _table_bytes(self) -> int:
        return len(self.rungs) * (8 + 8 * len(self.expert_ladder))

    def section_bytes(self, sections: Mapping[str, bytes]) -> int:
        """Returns the bytes of these sections and of the section `experts`, without padding."""
        return sum(map(len, sections.values())) + self._table_bytes

    def total_bytes(self, sections: Mapping[str, bytes]) -> int:
        """Returns the approximate size in bytes of a file with these sections; the index is not counted."""
        return self.tail + sum(align(len(v)) for v in sections.values()) + align(self._table_bytes)

    def ending(
        self, sums: Sums, sections: Mapping[str, bytes], source: Mapping[str, Any]
    ) -> Ending:
        """Returns the ending of a file whose records have these checksums."""
        pieces, entries, at = [], {}, self.tail
        for name, data in [*sections.items(), ("experts", self._expert_table(sums))]:
            pieces.append((at, data))
            entries[name] = [at, len(data), _core.crc32c(data)]
            at = align(at + len(data))
        index = json.dumps(
            {
                "config": self.config.to_json(),
                "ladder": self.expert_ladder,
                "dense_ladder": self.ladder,
                "group": self.scheme.group,
                "tensors": self._tensors(sums),
                "sections": entries,
                "source": source,
                # An absent field means what held before the field existed.
                **({} if self.scheme.name == "nested" else {"scheme": self.scheme.name}),
                **({"row_scales": scales} if any((scales := self._row_scales)[1:]) else {}),
                **({"correction": self.scheme.correction} if self.scheme.correction else {}),
            }
        ).encode()
        end = at + len(index)
        return Ending((*pieces, (at, index)), end, pack_preamble(end, at, index))

    def _tensors(self, sums: Sums) -> dict[str, list[Any]]:
        out = {}
        for name, spec in dense_tensors(self.config).items():
            place = self.places[name]
            rungs = list(zip(place.sizes, sums[name], strict=True))
            out[name] = [spec.kind, list(spec.shape), place.offset, rungs]
        return out

    def _expert_table(self, sums: Sums) -> bytes:
        entry = struct.Struct(f"<Q{2 * len(self.expert_ladder)}I")
        out = bytearray()
        for name in self.expert_names():
            place = self.places[name]
            pairs = list(zip(accumulate(place.sizes), sums[name], strict=True))
            pairs += [(sum(place.sizes), 0)] * (len(self.expert_ladder) - len(pairs))
            out += entry.pack(place.offset, *chain.from_iterable(pairs))
        return bytes(out)


def expert_ladder(
    scheme: Scheme, ladder: Sequence[int], down_bits: Sequence[int] | None
) -> list[tuple[int, int, int]]:
    """Returns the bits of w_gate, w_up and w_down after each rung.

    Args:
        ladder: bits of w_gate and w_up after each rung.
        down_bits: bits of w_down after each rung; None for those of `ladder`.

    Raises:
        ValueError: `down_bits` has another length, does not ascend, or is not a ladder of the scheme.
    """
    down = tuple(ladder if down_bits is None else down_bits)
    climbs = all(a < b <= 8 for a, b in pairwise((0, *down)))
    if len(down) != len(ladder) or not climbs or not scheme.is_ladder(down):
        raise ValueError(f"down bits: expected {len(ladder)} that climb to at most 8, got {down}")
    return list(zip(ladder, ladder, down, strict=True))

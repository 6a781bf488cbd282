"""Keys and values of one layer and sequence: floats, or codes of 8 bits or fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgemoe.model.state import SNAPSHOTS
from edgemoe.ops import KvLayer, Ops, kv_bytes, kv_parts, kv_ring
from edgemoe.specs import AttentionSpec

__all__ = ["KV_BITS", "KV_TYPES", "KvState", "KvTypes"]

KV_BITS = {"f16": 16, "f32": 32, "q8_0": 8, "q4_0": 4, "q3_0": 3, "q2_0": 2}
"""Bits of a key's or value's number: float16, float32, or codes with a float16 scale per 32 values of a head.

The names are llama.cpp's, or what they would be. Codes of 4 bits mean what its own do, and have better scales."""

KV_TYPES = tuple(KV_BITS)
"""What keys and values may be."""

_WORTH = 0.75
"""Of the memory of all positions, what a ring may take at most."""


@dataclass(frozen=True, slots=True)
class KvTypes:
    """Says how keys and values are stored, each one of `KV_TYPES`, or "auto": as `layers` has it.

    Raises:
        ValueError: another type.
    """

    keys: str = "f16"
    values: str = "f16"
    layers: tuple[tuple[str, str] | None, ...] = ()
    """Each layer's own keys and values, None for a layer that has neither; empty for the same in all."""

    def __post_init__(self) -> None:
        for name, given in (("cache_type_k", self.keys), ("cache_type_v", self.values)):
            if given not in KV_TYPES and not (given == "auto" and self.layers):
                raise ValueError(
                    f"{name}: expected {', '.join(KV_TYPES[:-1])} or {KV_TYPES[-1]}, got {given}"
                )

    def of(self, layer: int) -> KvTypes:
        """Returns those of a layer."""
        if "auto" not in (self.keys, self.values):
            return KvTypes(self.keys, self.values) if self.layers else self
        keys, values = self.layers[layer] or ("f16", "f16")
        return KvTypes(
            keys if self.keys == "auto" else self.keys,
            values if self.values == "auto" else self.values,
        )


class KvState:
    """Is the state of an attention layer.

    Without a window any prefix of what is there is a state. Where a window is short against the context, the layer is a
    ring of the positions that the next pass may see: older ones are written over. So it can go back as far as the
    window of that length is there, or to a snapshot, whose window is copied before it is written over.
    """

    can_look_back = True

    def __init__(
        self, ops: Ops, spec: AttentionSpec, capacity: int, types: KvTypes, chunk: int
    ) -> None:
        """Args as those of `bytes`."""
        self._held, kept = _positions(spec, capacity, types, chunk)

        def layer(positions: int) -> KvLayer:
            return ops.kv_layer(spec, types.keys, types.values, positions, resident=kept > 0)

        self.layer = layer(self._held)
        self._ops, self._spec, self._types, self._window = ops, spec, types, spec.window
        self.can_rewind_anywhere = kept == 0
        self._free = [] if kept == 0 else [layer(kept) for _ in range(SNAPSHOTS)]
        self._first = 0  # the oldest position that is still there
        self._kept: list[int] = []  # lengths to come back to
        self._saved: dict[int, KvLayer] = {}  # what those need that the ring no longer has

    @staticmethod
    def bytes(spec: AttentionSpec, capacity: int, types: KvTypes, chunk: int) -> int:
        """Returns the memory of a layer for `capacity` positions.

        Without a ring it grows by 32 of them; a ring and its snapshots are all there from the start.

        Args:
            chunk: tokens of the longest pass.
        """
        held, kept = _positions(spec, capacity, types, chunk)
        snapshots = SNAPSHOTS * _bytes(spec, kept, types) if kept else 0
        return _bytes(spec, held, types) + snapshots

    def step(self, pos: int, count: int) -> KvLayer:
        """Returns the layer for a pass over `count` tokens from `pos`; what is kept for longer lengths is void."""
        if not self.can_rewind_anywhere:
            self._make_way(pos, pos + count)
        return self.layer

    def _make_way(self, pos: int, end: int) -> None:
        """Saves what snapshots need and positions up to `end` take the place of."""
        if pos == 0:
            self._first = 0
        self._keep([n for n in self._kept if n <= pos])
        first = end - self._held
        for length in self._kept:
            if length not in self._saved and self._seen(length) < first:
                saved = self._free.pop()
                self._ops.copy_kv(self.layer, saved, self._seen(length), length)
                self._saved[length] = saved
        self._first = max(self._first, first)

    def reaches(self, length: int) -> int:
        """See `State.reaches`."""
        if self._first <= self._seen(length):
            return length
        return max((n for n in self._saved if n <= length), default=0)

    def rewind(self, length: int) -> None:
        """See `State.rewind`: what lies behind `length` is written over."""
        self._keep([n for n in self._kept if n <= length])
        if length and self._first > self._seen(length):
            self._first = self._seen(length)
            self._ops.copy_kv(self._saved[length], self.layer, self._first, length)

    def snapshot(self, length: int) -> None:
        """See `State.snapshot`: the last few are kept; of a layer that has all positions none need be."""
        if not self.can_rewind_anywhere and length and length not in self._kept:
            self._keep([*self._kept, length][-SNAPSHOTS:])

    def parts(self, length: int) -> tuple[Any, ...] | None:
        """See `State.parts`: keys and values, uint8 [heads, bytes], in whole blocks of positions; a full ring whole."""
        spec, kinds = self._spec, (self._types.keys, self._types.values)
        return kv_parts(self.layer, kinds, spec.num_kv_heads, spec.head_dim, self._held, length)

    def make_parts(self, length: int) -> tuple[Any, ...]:
        """See `State.make_parts`."""
        if not self.can_rewind_anywhere:
            self._keep([])
            self._first = self._seen(length)  # of a ring that is brought back no more is certain
        parts = self.parts(length)
        assert parts is not None
        return parts

    def _keep(self, lengths: list[int]) -> None:
        """These are the lengths to come back to, and no others."""
        self._kept = lengths
        self._free += [self._saved.pop(n) for n in set(self._saved).difference(lengths)]

    def _seen(self, length: int) -> int:
        """Returns the first position that a token after `length` others sees."""
        return max(length + 1 - self._window, 0)


def _bytes(spec: AttentionSpec, positions: int, types: KvTypes) -> int:
    return sum(
        kv_bytes(kind, spec.num_kv_heads, positions, spec.head_dim)
        for kind in (types.keys, types.values)
    )


def _positions(spec: AttentionSpec, capacity: int, types: KvTypes, chunk: int) -> tuple[int, int]:
    """Returns how many positions a layer has room for, and each of its snapshots: 0 where all positions stay."""
    if spec.window == 0:
        return capacity, 0
    ring = kv_ring(spec.window, chunk)
    kept = (
        (spec.window + 61) // 32 * 32
    )  # all but one of the window, in whole tiles wherever they begin
    size = _bytes(spec, ring, types) + SNAPSHOTS * _bytes(spec, kept, types)
    # For a little memory nobody should have to compute again what he goes back to.
    return (ring, kept) if size <= _WORTH * _bytes(spec, capacity, types) else (capacity, 0)

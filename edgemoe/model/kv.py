"""The keys and values of one layer and sequence, as floats or quantised to 8 bits or fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgemoe.model.state import SNAPSHOTS
from edgemoe.ops import KvLayer, Ops, kv_bytes, kv_parts, kv_ring
from edgemoe.specs import AttentionSpec

__all__ = ["KV_BITS", "KV_TYPES", "KvState", "KvTypes"]

KV_BITS = {"f16": 16, "f32": 32, "q8_0": 8, "q4_0": 4, "q3_0": 3, "q2_0": 2}
"""Bits per element of keys and values: float16, float32, or codes with a float16 scale per 32 elements of a head.

The names are llama.cpp's, or, where it has no such type, what they would be there. Codes of q4_0 mean the same as in
llama.cpp; their scales are chosen better."""

KV_TYPES = tuple(KV_BITS)
"""The types that keys and values may have."""

_WORTH = 0.75
"""A ring, with its snapshots, is used if it takes at most this fraction of the memory of all positions."""


@dataclass(frozen=True, slots=True)
class KvTypes:
    """The types in which keys and values are stored: one of `KV_TYPES`, or "auto" for each layer's own in `layers`.

    Raises:
        ValueError: an unknown type, or "auto" without `layers`.
    """

    keys: str = "f16"
    values: str = "f16"
    layers: tuple[tuple[str, str] | None, ...] = ()
    """For each layer the types of its keys and values, or None if it has neither; empty for the same in all layers."""

    def __post_init__(self) -> None:
        for name, given in (("cache_type_k", self.keys), ("cache_type_v", self.values)):
            if given not in KV_TYPES and not (given == "auto" and self.layers):
                raise ValueError(
                    f"{name}: expected {', '.join(KV_TYPES[:-1])} or {KV_TYPES[-1]}, got {given}"
                )

    def of(self, layer: int) -> KvTypes:
        """Returns the types of one layer, with "auto" resolved."""
        if "auto" not in (self.keys, self.values):
            return KvTypes(self.keys, self.values) if self.layers else self
        keys, values = self.layers[layer] or ("f16", "f16")
        return KvTypes(
            keys if self.keys == "auto" else self.keys,
            values if self.values == "auto" else self.values,
        )


class KvState:
    """The state of an attention layer: its keys and values. Implements `State`.

    Without a window all positions are kept, and the sequence can be cut back to any length. Where the window is short
    compared with the context, the layer is a ring buffer of the positions that the next pass may see, and older ones
    are overwritten. It can then go back to a length only if the window of that length is still in the ring, or if there
    is a snapshot of it. The window of a snapshot is copied before the ring overwrites it.
    """

    can_look_back = True

    def __init__(
        self, ops: Ops, spec: AttentionSpec, capacity: int, types: KvTypes, chunk: int
    ) -> None:
        """Takes the arguments of `bytes`, and the operations that allocate."""
        self._held, kept = _positions(spec, capacity, types, chunk)

        def layer(positions: int) -> KvLayer:
            return ops.kv_layer(spec, types.keys, types.values, positions, resident=kept > 0)

        self.layer = layer(self._held)
        self._ops, self._spec, self._types, self._window = ops, spec, types, spec.window
        self.can_rewind_anywhere = kept == 0
        self._free = [] if kept == 0 else [layer(kept) for _ in range(SNAPSHOTS)]
        self._first = 0  # the oldest position that is still in the ring
        self._kept: list[int] = []  # lengths that have a snapshot
        self._saved: dict[int, KvLayer] = {}  # their windows, once the ring overwrote them

    @staticmethod
    def bytes(spec: AttentionSpec, capacity: int, types: KvTypes, chunk: int) -> int:
        """Returns the bytes of a layer for `capacity` positions.

        Without a ring, memory is touched in steps of 32 positions. A ring and its snapshots are resident from the
        start.

        Args:
            capacity: the most positions of a sequence.
            types: how keys and values are stored.
            chunk: the most tokens of a pass.
        """
        held, kept = _positions(spec, capacity, types, chunk)
        snapshots = SNAPSHOTS * _bytes(spec, kept, types) if kept else 0
        return _bytes(spec, held, types) + snapshots

    def step(self, pos: int, count: int) -> KvLayer:
        """Returns the layer for a pass over `count` tokens from position `pos`. Drops snapshots of longer lengths."""
        if not self.can_rewind_anywhere:
            self._make_way(pos, pos + count)
        return self.layer

    def _make_way(self, pos: int, end: int) -> None:
        """Copies windows of snapshots that the ring will overwrite when it holds the positions before `end`."""
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
        """See `State.rewind`: positions from `length` on will be overwritten."""
        self._keep([n for n in self._kept if n <= length])
        if length and self._first > self._seen(length):
            self._first = self._seen(length)
            self._ops.copy_kv(self._saved[length], self.layer, self._first, length)

    def snapshot(self, length: int) -> None:
        """See `State.snapshot`: keeps the last `SNAPSHOTS`. A layer that has all positions needs none."""
        if not self.can_rewind_anywhere and length and length not in self._kept:
            self._keep([*self._kept, length][-SNAPSHOTS:])

    def parts(self, length: int) -> tuple[Any, ...] | None:
        """See `State.parts`: keys and values, uint8 [heads, bytes], in whole blocks of 32 positions.

        Once a ring has been filled, all of it is returned.
        """
        spec, kinds = self._spec, (self._types.keys, self._types.values)
        return kv_parts(self.layer, kinds, spec.num_kv_heads, spec.head_dim, self._held, length)

    def make_parts(self, length: int) -> tuple[Any, ...]:
        """See `State.make_parts`."""
        if not self.can_rewind_anywhere:
            self._keep([])
            # A restored ring is only sure to hold the window of this length.
            self._first = self._seen(length)
        parts = self.parts(length)
        assert parts is not None
        return parts

    def _keep(self, lengths: list[int]) -> None:
        """Keeps the snapshots of these lengths, and drops all others."""
        self._kept = lengths
        self._free += [self._saved.pop(n) for n in set(self._saved).difference(lengths)]

    def _seen(self, length: int) -> int:
        """Returns the first position that the token after `length` others sees."""
        return max(length + 1 - self._window, 0)


def _bytes(spec: AttentionSpec, positions: int, types: KvTypes) -> int:
    return sum(
        kv_bytes(kind, spec.num_kv_heads, positions, spec.head_dim)
        for kind in (types.keys, types.values)
    )


def _positions(spec: AttentionSpec, capacity: int, types: KvTypes, chunk: int) -> tuple[int, int]:
    """Returns how many positions a layer and each of its snapshots have room for.

    Where the layer keeps all positions, it needs no snapshots: the second number is 0.
    """
    if spec.window == 0:
        return capacity, 0
    ring = kv_ring(spec.window, chunk)
    # The next token is the last position of its window, so the other window - 1 are kept, in whole tiles of 32 wherever
    # in a tile they begin.
    kept = (spec.window + 61) // 32 * 32
    size = _bytes(spec, ring, types) + SNAPSHOTS * _bytes(spec, kept, types)
    # A ring that saves little memory is not worth having to recompute positions after a rewind.
    return (ring, kept) if size <= _WORTH * _bytes(spec, capacity, types) else (capacity, 0)

"""Keys and values of one layer and sequence, in float16, float32 or 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgemoe.ops import KvLayer, Ops, kv_bytes, kv_parts
from edgemoe.specs import AttentionSpec

__all__ = ["KV_TYPES", "KvState", "KvTypes"]

KV_TYPES = ("f16", "f32", "q8_0")
"""What keys and values may be: float16, float32, or 8 bits with a float16 scale per 32 values of a head.

The names are llama.cpp's."""


@dataclass(frozen=True, slots=True)
class KvTypes:
    """Says how keys and values are stored, each one of `KV_TYPES`.

    Raises:
        ValueError: another type.
    """

    keys: str = "f16"
    values: str = "f16"

    def __post_init__(self) -> None:
        for name, given in (("cache_type_k", self.keys), ("cache_type_v", self.values)):
            if given not in KV_TYPES:
                raise ValueError(
                    f"{name}: expected {', '.join(KV_TYPES[:-1])} or {KV_TYPES[-1]}, got {given}"
                )


class KvState:
    """Is the state of an attention layer. Memory is touched as the sequence grows; any prefix of it is a state."""

    can_rewind_anywhere = True

    def __init__(self, ops: Ops, spec: AttentionSpec, capacity: int, types: KvTypes) -> None:
        self.layer: KvLayer = ops.kv_layer(spec, types.keys, types.values, capacity)
        self._spec, self._types, self._capacity = spec, types, capacity

    @staticmethod
    def bytes(spec: AttentionSpec, capacity: int, types: KvTypes) -> int:
        """Returns the memory that `capacity` positions take; it grows by 32 of them."""
        return sum(
            kv_bytes(kind, spec.num_kv_heads, capacity, spec.head_dim)
            for kind in (types.keys, types.values)
        )

    def rewind(self, length: int) -> int:
        """See `State.rewind`: what lies behind `length` is written over."""
        return length

    def snapshot(self, length: int) -> None:
        """See `State.snapshot`."""

    def parts(self, length: int) -> tuple[Any, ...] | None:
        """See `State.parts`: keys and values, uint8 [heads, bytes], in whole blocks of positions."""
        types, spec = self._types, self._spec
        return kv_parts(
            self.layer,
            (types.keys, types.values),
            spec.num_kv_heads,
            spec.head_dim,
            self._capacity,
            length,
        )

    def make_parts(self, length: int) -> tuple[Any, ...]:
        """See `State.make_parts`."""
        parts = self.parts(length)
        assert parts is not None
        return parts

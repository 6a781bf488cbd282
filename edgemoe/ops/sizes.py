"""What keys, values and tables of rotations take, the same on every device, and where they lie."""

from __future__ import annotations

from typing import Any

from edgemoe import _core
from edgemoe.ops.values import KvLayer

__all__ = ["kv_bytes", "kv_parts", "kv_ring", "rope_bytes"]


def kv_bytes(kind: str, num_heads: int, capacity: int, head_dim: int) -> int:
    """Returns the memory of one layer's keys or values, stored as `kind`; the same on every device."""
    return _core.KvLayer.bytes(kind, num_heads, capacity, head_dim)


def kv_ring(window: int, tokens: int) -> int:
    """Returns the capacity of a layer that keeps a window only, for passes of at most `tokens`; likewise."""
    return _core.KvLayer.ring(window, tokens)


def kv_parts(
    layer: KvLayer, kinds: tuple[str, ...], heads: int, head_dim: int, capacity: int, length: int
) -> tuple[Any, ...]:
    """Returns where the first positions lie in a layer, a view [heads, bytes] for each of its kinds."""

    def of_head(kind: str, positions: int) -> int:
        return kv_bytes(kind, 64, positions, head_dim) // 64  # what is rounded is all of them

    views, at, blocks = [], 0, -(-length // 32) * 32
    for kind in kinds:
        whole = of_head(kind, capacity)
        found = layer.content[at : at + heads * whole].reshape(heads, whole)
        views.append(found[:, : min(of_head(kind, blocks), whole)])
        at += kv_bytes(kind, heads, capacity, head_dim)
    return tuple(views)


def rope_bytes(rope_dim: int, kept: int) -> int:
    """Returns the memory of a `RopeTable` that keeps so many positions once all were seen; the same on every device."""
    return _core.Rope.bytes(rope_dim // 2, kept)

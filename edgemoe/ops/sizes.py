"""The sizes of keys, values and RoPE tables, which are the same on every device, and where positions lie in them."""

from __future__ import annotations

from typing import Any

from edgemoe import _core
from edgemoe.ops.values import KvLayer

__all__ = ["kv_bytes", "kv_parts", "kv_ring", "rope_bytes"]


def kv_bytes(kind: str, num_heads: int, capacity: int, head_dim: int) -> int:
    """Returns the bytes of one layer's keys or values for `capacity` positions, stored as the type `kind`."""
    return _core.KvLayer.bytes(kind, num_heads, capacity, head_dim)


def kv_ring(window: int, tokens: int) -> int:
    """Returns the capacity of a layer that keeps only a window, a ring, for passes of at most `tokens`.

    It holds what the first token of a pass sees, and all tokens of the pass, in whole blocks of positions.
    """
    return _core.KvLayer.ring(window, tokens)


def kv_parts(
    layer: KvLayer, kinds: tuple[str, ...], heads: int, head_dim: int, capacity: int, length: int
) -> tuple[Any, ...]:
    """Returns views of the first `length` positions in a layer's memory, rounded up to whole blocks of 32.

    Args:
        kinds: the types of keys and values, or that of latents alone.
        capacity: of the layer, in positions; a view has at most all of them.

    Returns:
        uint8 [heads, bytes] for each of `kinds`.
    """

    def of_head(kind: str, positions: int) -> int:
        # `kv_bytes` rounds the sum over all heads up to a cache line of 64 bytes: with 64 heads it rounds nothing.
        return kv_bytes(kind, 64, positions, head_dim) // 64

    views, at, blocks = [], 0, -(-length // 32) * 32
    for kind in kinds:
        whole = of_head(kind, capacity)
        found = layer.content[at : at + heads * whole].reshape(heads, whole)
        views.append(found[:, : min(of_head(kind, blocks), whole)])
        at += kv_bytes(kind, heads, capacity, head_dim)
    return tuple(views)


def rope_bytes(rope_dim: int, kept: int) -> int:
    """Returns the bytes of a `RopeTable` that keeps the rotations of `kept` positions, once all have been used."""
    return _core.Rope.bytes(rope_dim // 2, kept)

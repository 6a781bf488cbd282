"""Keys and values of one sequence, in float16, float32 or 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

from edgemoe.config import ModelConfig
from edgemoe.ops import Ops, kv_bytes

__all__ = ["KV_TYPES", "KvCache", "KvTypes"]

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


class KvCache:
    """Holds up to `capacity` positions; memory is touched as the sequence grows."""

    def __init__(self, config: ModelConfig, ops: Ops, capacity: int, types: KvTypes) -> None:
        self.capacity = capacity
        self.length = 0
        """Positions in use."""
        self.layers = [
            ops.kv_layer(mixer, types.keys, types.values, capacity) for mixer in config.mixers
        ]

    @staticmethod
    def bytes(config: ModelConfig, capacity: int, types: KvTypes) -> int:
        """Returns the memory that `capacity` positions take; it grows by 32 of them."""
        return sum(
            kv_bytes(kind, mixer.num_kv_heads, capacity, mixer.head_dim)
            for mixer in config.mixers
            for kind in (types.keys, types.values)
        )

    @staticmethod
    def read_bytes(config: ModelConfig, length: int, types: KvTypes) -> int:
        """Returns what attention to `length` positions reads; layers with a window see the last ones only."""
        per_32 = KvCache.bytes(config, 32, types) // config.num_layers
        windows = (config.window(i) or length for i in range(config.num_layers))
        return sum(per_32 * min(length, window) // 32 for window in windows)

"""Keys and values of one sequence, float16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig

__all__ = ["KvCache"]


class KvCache:
    """Holds up to `capacity` positions; memory is touched as the sequence grows."""

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        """Positions in use."""
        shape = (2, config.num_kv_heads, capacity, head_stride(config))
        self.layers: list[NDArray[np.uint16]] = [
            np.zeros(shape, np.uint16) for _ in range(config.num_layers)
        ]

    @staticmethod
    def bytes_per_token(config: ModelConfig) -> int:
        """Returns the memory that one position takes."""
        return 2 * 2 * config.num_layers * config.num_kv_heads * head_stride(config)


def head_stride(config: ModelConfig) -> int:
    """Returns head_dim rounded up to the kernels' 16 lanes."""
    return -(-config.head_dim // 16) * 16

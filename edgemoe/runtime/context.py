"""How long contexts and the chunks of prompts are, where nobody says so."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

__all__ = ["CHUNKS", "DEFAULT_CONTEXT", "KV_STEP", "SMALLEST_CONTEXT", "longest_context"]

DEFAULT_CONTEXT, SMALLEST_CONTEXT = 4096, 256
CHUNKS = (512, 256, 128, 64, 32, 16)
KV_STEP = 32
"""Positions that a layer of keys and values grows by."""


def longest_context(least: int, most: int, room: int, taken: Callable[[int], int]) -> int:
    """Returns for how many positions, from `least` to `most`, a sequence's state takes at most `room` bytes.

    Args:
        taken: says that for so many positions.
    """
    if most <= least or taken(most) <= room:
        return max(least, most)
    # In steps of what the cache grows by, so that rounding takes no more than its share.
    steps = range(least, most, KV_STEP)
    return steps[max(bisect_right(steps, room, key=taken) - 1, 0)]

"""Default lengths of contexts and of the chunks in which prompts are computed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

__all__ = ["CHUNKS", "DEFAULT_CONTEXT", "KV_STEP", "SMALLEST_CONTEXT", "longest_context"]

DEFAULT_CONTEXT, SMALLEST_CONTEXT = 4096, 256
CHUNKS = (512, 256, 128, 64, 32, 16)
KV_STEP = 32
"""Positions by which a layer's keys and values grow."""


def longest_context(least: int, most: int, room: int, taken: Callable[[int], int]) -> int:
    """Returns the longest context, from `least` to `most` positions, whose state takes at most `room` bytes.

    Args:
        taken: returns the bytes of a sequence's state for a number of positions.

    Returns:
        `least` if not even that fits.
    """
    if most <= least or taken(most) <= room:
        return max(least, most)
    # In steps of KV_STEP, by which the state grows: no memory goes to positions that the context does not have.
    steps = range(least, most, KV_STEP)
    return steps[max(bisect_right(steps, room, key=taken) - 1, 0)]

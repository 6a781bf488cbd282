"""Quantises float matrices to nested planes; the layout is specified in `edgemoe.format`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core

__all__ = ["DEFAULT_LADDER", "GROUP", "LEVEL_WEIGHTS", "plane_widths", "quantize", "rung_bytes"]

DEFAULT_LADDER = (2, 3, 4, 6, 8)
"""Bits in use after each rung."""

GROUP = 64
"""Columns that share a scale."""
_ROWS = 16
_SCALE_BYTES = 64

# How much the squared error at 1 to 8 bits counts when a group's range is clipped: fourfold per bit, as the
# error itself falls. Counting low bits more helped 2 bits by 1% and cost 8 bits threefold: benchmarks/LOG.md.
LEVEL_WEIGHTS = np.array([0, 1, 4, 16, 0, 256, 0, 4096], dtype=np.float32)


def plane_widths(ladder: Sequence[int]) -> list[int]:
    """Returns the bits that each rung of a ladder adds: (2, 3, 4, 6, 8) → [2, 1, 1, 2, 2]."""
    return [b - a for a, b in zip([0, *ladder[:-1]], ladder, strict=True)]


def rung_bytes(rows: int, cols: int, ladder: Sequence[int]) -> list[int]:
    """Returns the bytes of each rung of a matrix [rows, cols], padding and scales included."""
    tiles = -(-rows // _ROWS) * -(-cols // GROUP)
    return [
        tiles * (128 * width + (_SCALE_BYTES if i == 0 else 0))
        for i, width in enumerate(plane_widths(ladder))
    ]


def quantize(
    w: NDArray[np.float32], ladder: Sequence[int] = DEFAULT_LADDER, *, threads: int = 2
) -> list[NDArray[np.uint8]]:
    """Quantises a matrix and returns its rungs as the file stores them.

    Each group of 64 columns gets one asymmetric 8-bit code whose range is the best of ten clipped ones,
    judged at all levels at once. Fewer bits in the ladder store a prefix of the same code.

    Args:
        w: [rows, cols], contiguous.

    Raises:
        ValueError: a weight is not finite or beyond float16.
    """
    return _core.quantize(w, plane_widths(ladder), LEVEL_WEIGHTS, threads)

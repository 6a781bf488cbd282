"""Quantisation of float matrices to nested planes; docs/format.md specifies the layout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.file.tensors import is_finite
from edgemoe.quant.lowrank import Directions, aligned

__all__ = [
    "DEFAULT_LADDER",
    "FAVOUR",
    "GROUP",
    "LEVEL_WEIGHTS",
    "ROUNDING_WEIGHTS",
    "ROW_SCALES",
    "plane_widths",
    "quantize",
    "rung_bytes",
]

DEFAULT_LADDER = (2, 3, 4, 6, 8)
"""Bits in use after each rung."""

ROW_SCALES = (1, 1, 0, 0, 0)
"""Which rungs begin with scales of rows: 2 bits have their own, and all levels from 3 bits share theirs."""

GROUP = 16
"""Columns that share a scale and a middle."""
_ROWS = 16
_COLS = 64
_SCALE_BYTES = 64

# How much the squared error at 1 to 8 bits counts. The error falls about fourfold per bit, so weights rise about
# fourfold. 2 bits count more than that, because otherwise they lose most to the other levels (benchmarks/LOG.md).
LEVEL_WEIGHTS = np.array([0, 20, 16, 28, 0, 512, 0, 8192], dtype=np.float32)
# The same without products of the inputs. Then no error is compensated, and 8 bits must stay near the checkpoint.
ROUNDING_WEIGHTS = np.array([0, 20, 16, 28, 0, 512, 0, 32768], dtype=np.float32)
FAVOUR = 100.0
"""How many times as much a favoured level counts; benchmarks/LOG.md has what that costs the others."""
_SWEEPS = 3  # of coordinate descent
_DAMPING = 0.02  # of the mean square, so that an input that calibration never saw still counts


def plane_widths(ladder: Sequence[int]) -> list[int]:
    """Returns the bits that each rung of a ladder adds: (2, 3, 4, 6, 8) → [2, 1, 1, 2, 2]."""
    return [b - a for a, b in zip([0, *ladder[:-1]], ladder, strict=True)]


def rung_bytes(
    rows: int, cols: int, ladder: Sequence[int], row_scales: Sequence[int] = (1,)
) -> list[int]:
    """Returns the bytes of each rung of a matrix [rows, cols], padding and scales included.

    Args:
        row_scales: which rungs begin with scales of rows; those beyond its end do not.
    """
    tiles = -(-rows // _ROWS) * -(-cols // _COLS)
    sizes = [tiles * 128 * width for width in plane_widths(ladder)]
    sizes[0] += tiles * _SCALE_BYTES
    for rung, has in zip(range(len(sizes)), row_scales, strict=False):
        sizes[rung] += has * -(-rows // (2 * _ROWS)) * 64
    return sizes


def _level_weights(
    ladder: Sequence[int], favour: int | None, *, is_compensated: bool
) -> NDArray[np.float32]:
    """Returns how much the error at each of 1 to 8 bits counts, [8]; levels without a known weight are interpolated.

    If no level is favoured, levels above the ladder's last count too. Without them the last level, at which such a file
    is mostly run, gets worse in favour of the others (benchmarks/LOG.md).
    """
    known = LEVEL_WEIGHTS if is_compensated else ROUNDING_WEIGHTS
    used = np.flatnonzero(known)
    out = np.zeros(8, np.float32)
    if favour is None:
        out[ladder[-1] :] = known[ladder[-1] :]
    for level, bits in enumerate(ladder, start=1):
        weight = known[bits - 1] or np.exp(np.interp(bits - 1, used, np.log(known[used])))
        out[bits - 1] = weight if favour in (None, level) else weight / FAVOUR
    return out


def quantize(
    w: NDArray[np.float32],
    ladder: Sequence[int] = DEFAULT_LADDER,
    *,
    second_moments: NDArray[np.float32] | None = None,
    favour: int | None = None,
    row_scales: Sequence[int] = (1,),
    directions: Directions | None = None,
    thorough: bool = False,
    threads: int = 2,
) -> list[NDArray[np.uint8]]:
    """Quantises a matrix and returns its rungs as the file stores them.

    Scale and middle of each group of 16 columns are chosen among the eight candidates that win most often, for the best
    of three scales of the row, by the error at all levels together. A shorter ladder stores a prefix of the same code,
    unless a level is favoured.

    With the full matrix of second moments the codes are then refined by coordinate descent on the squared error of the
    output, again summed over the levels. This is GPTQ's objective (arXiv 2210.17323) for all levels of one code: an
    error of one level is compensated where that costs the others least. If levels have row scales of their own, these
    are fitted by least squares, and the codes are refined again. Without products all levels keep the same row scales.

    Args:
        w: [rows, cols], contiguous.
        ladder: bits in use after each rung, ascending.
        second_moments: of the matrix's inputs, [cols] mean squares or [cols, cols] mean products; any scale.
            None counts every input alike.
        favour: the level, 1 for the first rung, whose error matters much more than that of the others; None for none.
        row_scales: which rungs begin with scales of rows, for themselves and the rungs after them. It may be longer
            than the ladder; then the codes are those of a longer ladder.
        directions: V of the levels' corrections, which are appended to their rungs; None for no corrections. Needs
            mean products.
        thorough: tries all of some 25 scales and middles, for five scales of each row. It takes three to four times as
            long and leaves 0.4% less error (benchmarks/LOG.md). With a full matrix of second moments, that is done
            anyway.
        threads: how many the core uses.

    Raises:
        ValueError: a weight is not finite or beyond float16, the moments are not finite or have another shape, or
            `directions` is given without mean products.
    """
    cols = w.shape[1]
    squares, moments = np.ones(cols, np.float32), None
    if second_moments is not None:
        if second_moments.shape not in ((cols,), (cols, cols)):
            raise ValueError(
                f"second_moments: expected [{cols}] or [{cols}, {cols}], got {list(second_moments.shape)}"
            )
        is_full = second_moments.ndim == 2
        diagonal = np.diagonal(second_moments) if is_full else second_moments
        mean = float(diagonal.mean())
        if not (is_finite(second_moments) and np.isfinite(mean) and diagonal.min() >= 0):
            raise ValueError("second_moments: expected mean squares, finite and not negative")
        if directions is not None:
            mean = mean or 1.0  # if all inputs were zeros
        if mean > 0:
            squares = np.asarray(diagonal / mean + _DAMPING, np.float32)
            if is_full:
                moments = np.divide(second_moments, mean, out=aligned(second_moments.shape))
                np.fill_diagonal(moments, squares)
    level_weights = _level_weights(ladder, favour, is_compensated=moments is not None)
    rest, corrected = None, 0
    if directions is not None:
        if moments is None:
            raise ValueError("directions: expected second moments [cols, cols] with them")
        whole = (*ladder, *DEFAULT_LADDER[len(ladder) :])
        is_longer = whole == DEFAULT_LADDER and favour is None
        rest, corrected = (
            directions.rest(moments),
            directions.corrected(whole if is_longer else ladder),
        )
    rungs = _core.quantize(
        w, plane_widths(ladder), row_scales, level_weights, squares, moments, _SWEEPS, thorough,
        threads, rest, corrected,
    )  # fmt: skip
    if directions is None or moments is None:
        return rungs
    return directions.correct(w, rungs, ladder, row_scales, moments)

"""The choice of ranks for corrections: which rank is worth its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.quant.correction import basis_bytes, correction_bytes
from edgemoe.quant.lowrank import Directions, directions
from edgemoe.quant.nested import DEFAULT_LADDER, ROW_SCALES, plane_widths, quantize

__all__ = ["CORRECTED", "best_ranks", "gains", "output_errors", "same_rank"]

Array = NDArray[np.float32]

CORRECTED = 3
"""How many rungs may have corrections: those of 2, 3 and 4 bits. At more bits the error lies in no few directions."""

_RANKS = (8, 16)
_ROWS = 64  # how many rows of a matrix it is judged by
_LEVELS = len(DEFAULT_LADDER)


def same_rank(rank: int, begin: int = 0, end: int = CORRECTED) -> tuple[int, ...]:
    """Returns the ranks of the default ladder's rungs: `rank` for rungs in [begin, end), 0 elsewhere."""
    return (0,) * begin + (rank,) * (end - begin) + (0,) * (_LEVELS - end)


def candidates(favour: int | None = None) -> list[tuple[int, ...]]:
    """Returns the ranks to try: on the first rungs, or only on the rung of the favoured level, counted from 1."""
    if favour is not None:
        rungs = [(favour - 1, favour)] if favour <= CORRECTED else []
    else:
        rungs = [(0, end) for end in range(1, CORRECTED + 1)]
    return [same_rank(rank, begin, end) for rank in _RANKS for begin, end in rungs]


def gains(
    w: Array, moments: Array, shared: Array | None, favour: int | None = None
) -> NDArray[np.float64]:
    """Returns the net gain of each candidate at each level, in bits per weight, [candidates, levels].

    One bit per weight more or less changes the error about fourfold. So a correction is worth its bytes if the
    logarithm of the error to base 4 falls by more than the bits per weight that the correction takes. Those of a level
    include the corrections of the levels below it. A rank that the matrix cannot have gains minus infinity.

    Args:
        w: [rows, cols]; some rows are sampled.
        moments: [cols, cols], the mean products of its inputs.
        shared: the mean products that a shared basis, stored elsewhere, is made from; None if the matrix has a basis of
            its own.
        favour: the level, from 1, that is favoured; None for none.
    """
    sample = np.ascontiguousarray(w[:: max(len(w) // _ROWS, 1)][:_ROWS], np.float32)
    tried = candidates(favour)
    out = np.full((len(tried), _LEVELS), -np.inf)
    plain = output_errors(sample, moments, None, favour)
    bases = cache(lambda rank: directions(moments if shared is None else shared, rank))
    for i, ranks in enumerate(tried):
        if max(ranks) > min(w.shape):
            continue
        v = Directions(bases(max(ranks)), ranks, stored=max(ranks))
        saved = np.log(plain / output_errors(sample, moments, v, favour)) / np.log(4)
        taken = np.cumsum([correction_bytes(len(w), r) for r in ranks]).astype(np.float64)
        if shared is None:
            taken += basis_bytes(w.shape[1], max(ranks))
        out[i] = saved - 8 * taken / w.size
    return out


def best_ranks(
    found: NDArray[np.float64], uses: Sequence[float], favour: int | None = None
) -> tuple[int, ...]:
    """Returns the ranks that gain most; () if every candidate loses.

    Args:
        found: [candidates, levels], from `gains`.
        uses: how much each level counts; levels beyond its end do not count.
        favour: as for `gains`.
    """
    worth: dict[tuple[int, ...], float] = {(): 0.0}
    for ranks, row in zip(candidates(favour), found, strict=True):
        if np.isfinite(row).all():
            worth[ranks] = float(row[: len(uses)] @ np.asarray(uses))
    return max(worth, key=lambda ranks: worth[ranks])


def output_errors(
    w: Array, moments: Array, v: Directions | None, favour: int | None
) -> NDArray[np.float64]:
    """Returns the squared output error at each level of the default ladder, [levels], with weights decoded from rungs.

    The error is the sum of e M e^T over the rows of w, where e is the error of a row and M are the moments.
    """
    rungs = quantize(w, second_moments=moments, favour=favour, row_scales=ROW_SCALES, directions=v)
    widths, rows = plane_widths(DEFAULT_LADDER), np.arange(len(w), dtype=np.int32)
    out, decoded = np.zeros(_LEVELS), np.zeros_like(w)
    for level in range(1, _LEVELS + 1):
        matrix = _core.Nested.from_rungs(
            rungs[:level],
            len(w),
            w.shape[1],
            widths[:level],
            "nested",
            ROW_SCALES,
            v.ranks if v else [],
        )
        matrix.decode_rows(rows, decoded)
        error = decoded - w
        out[level - 1] = max(float(((error @ moments) * error).sum()), 1e-30)
    return out

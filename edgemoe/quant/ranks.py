"""Which rank of a correction is worth its bytes."""

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
"""Rungs that may have corrections: 2, 3 and 4 bits. What more bits lack lies in no few directions."""

_RANKS = (8, 16)
_ROWS = 64  # of a matrix, by which it is judged
_LEVELS = len(DEFAULT_LADDER)


def same_rank(rank: int, begin: int = 0, end: int = CORRECTED) -> tuple[int, ...]:
    """Returns ranks of the default ladder's rungs: one from `begin` to before `end`, none elsewhere."""
    return (0,) * begin + (rank,) * (end - begin) + (0,) * (_LEVELS - end)


def candidates(favour: int | None = None) -> list[tuple[int, ...]]:
    """Returns the ranks that are tried: of the first rungs, or where a level is favoured, from 1, of its rung alone."""
    if favour is not None:
        rungs = [(favour - 1, favour)] if favour <= CORRECTED else []
    else:
        rungs = [(0, end) for end in range(1, CORRECTED + 1)]
    return [same_rank(rank, begin, end) for rank in _RANKS for begin, end in rungs]


def gains(
    w: Array, moments: Array, shared: Array | None, favour: int | None = None
) -> NDArray[np.float64]:
    """Returns what each candidate gains at each level, in bits per weight, less what it takes: [candidates, levels].

    A bit more or less for each weight makes about four times more or less error. So a correction is worth its bytes
    where the logarithm of the error to base 4 falls by more than the bits that it takes; a level has those of the
    levels before it too. A rank that the matrix cannot have gains minus infinity.

    Args:
        w: [rows, cols], of which some rows are looked at.
        moments: the mean products of its inputs.
        shared: those that the basis is of, where it lies elsewhere; None for a basis of the matrix's own.
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
    """Returns the ranks that gain most, of what `gains` found; () where all lose.

    Args:
        uses: how much each level counts; those beyond its end do not.
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
    """Returns the error of the output at each level of the default ladder, as it comes out of the file."""
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

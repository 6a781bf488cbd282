"""Fits corrections of low rank: the principal directions of a matrix's inputs, and what each level lacks in them.

Let M be the products (second moments) of the inputs x. With V x known, an error E of the codes costs E M' E^T, where M'
are the products of the part of x that V x does not determine; the best factor A makes up for the rest. So the codes of
corrected levels are refined on M'. Then A is fitted to what they still lack: A = (W - Wb) M V^T (V M V^T)^-1, with V as
it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.quant.correction import basis_codes, factor_codes, with_correction

__all__ = ["Directions", "aligned", "directions"]

Array = NDArray[np.float32]

_LINE = 16  # numbers of a cache line
_MORE = 8  # extra vectors in the subspace iteration, which make the last wanted ones accurate
_ROUNDS = 4  # of subspace iteration
_SOME = 32  # rows of products at a time, so that they stay in the cache as float64
_BLOCK = 256  # rows that are decoded at a time
_DAMPING = 1e-4  # of the mean square, so that errors in the directions of V still cost something


@dataclass(frozen=True, slots=True)
class Directions:
    """The V of a matrix's corrections, and the rank of the correction at each rung."""

    basis: NDArray[np.int8]
    """[R, cols], as stored."""
    ranks: tuple[int, ...]
    """The rank at each rung, at most R; 0 for no correction. It may be longer than the ladder, as row scales may."""
    stored: int
    """How many rows of V are stored after the first rung; 0 if V is stored elsewhere."""

    def corrected(self, ladder: Sequence[int]) -> int:
        """Returns a mask of the levels with a correction of their own: bit b - 1 stands for the level of b bits.

        Levels between two rungs belong to the upper one.
        """
        mask = 0
        for (low, high), rank in zip(pairwise((0, *ladder)), self.ranks, strict=False):
            mask |= sum(1 << b for b in range(low, high)) if rank else 0
        return mask

    def rest(self, moments: Array) -> Array:
        """Returns M', the products of the part of the inputs that V x does not determine (see the module).

        Only the first rows of V count that all corrections use.

        Args:
            moments: M [cols, cols], with a mean of 1 on the diagonal.
        """
        v = self.basis[: min(rank for rank in self.ranks if rank)].astype(np.float64)
        seen = _dot(v, moments)
        values, turn = np.linalg.eigh(_dot(seen, v))
        held = values > 1e-9 * max(values[-1], 1e-30)
        told = np.einsum("jr,jc->rc", turn[:, held] / np.sqrt(values[held]), seen)
        out = aligned(moments.shape)
        for first in range(0, len(out), _SOME):
            rows = slice(first, first + _SOME)
            out[rows] = moments[rows] - np.einsum("ra,rb->ab", told[:, rows], told)
        np.fill_diagonal(out, np.maximum(out.diagonal(), 0) + np.float32(_DAMPING))
        return out

    def correct(
        self,
        w: Array,
        rungs: Sequence[NDArray[np.uint8]],
        ladder: Sequence[int],
        row_scales: Sequence[int],
        moments: Array,
    ) -> list[NDArray[np.uint8]]:
        """Returns the rungs with the correction of each level appended.

        Args:
            w: [rows, cols], the weights.
            rungs: their codes, without corrections.
            ladder: bits in use after each rung.
            row_scales: which rungs begin with scales of rows.
            moments: M [cols, cols].
        """
        v = self.basis.astype(np.float64)
        seen = _dot(v, moments)
        inner = _dot(seen, v)
        widths = np.diff([0, *ladder]).tolist()
        factors: dict[int, tuple[NDArray[np.float16], NDArray[np.uint8]]] = {}
        units = np.zeros(0)
        for level, (bits, rank) in enumerate(zip(ladder, self.ranks, strict=False), 1):
            if level <= len(row_scales) and row_scales[level - 1]:
                units = rungs[level - 1][: 2 * len(w)].view("<f2").astype(np.float64) / 4096
            if not rank:
                continue
            matrix = _core.Nested.from_rungs(
                rungs[:level], len(w), w.shape[1], widths[:level], row_scales=row_scales
            )
            a = np.zeros((len(w), rank))
            for first in range(0, len(w), _BLOCK):  # an embedding has many rows
                rows = np.arange(first, min(first + _BLOCK, len(w)), dtype=np.int32)
                coded = np.zeros((len(rows), w.shape[1]), np.float32)
                matrix.decode_rows(rows, coded)
                a[rows] = _dot(w[rows] - coded, seen[:rank])
            a = a @ np.linalg.pinv(inner[:rank, :rank], hermitian=True)
            factors[level - 1] = factor_codes(a, units * 2.0 ** (8 - bits))
        return with_correction(rungs, factors, self.basis[: self.stored] if self.stored else None)


def aligned(shape: tuple[int, ...]) -> Array:
    """Returns an uninitialised array that begins at a cache line, where products of its rows are twice as fast."""
    room = np.empty(math.prod(shape) + _LINE - 1, np.float32)
    first = -(room.ctypes.data // room.itemsize) % _LINE
    return room[first : first + math.prod(shape)].reshape(shape)


def directions(moments: Array, rank: int) -> NDArray[np.int8]:
    """Returns V [rank, n] for mean products [n, n], as it is stored.

    Its rows approximate the first eigenvectors, by subspace iteration from a fixed start.
    """
    n = len(moments)
    vectors = np.random.default_rng(0).standard_normal((min(rank + _MORE, n), n), np.float32)
    for _ in range(_ROUNDS):
        vectors = np.ascontiguousarray(np.linalg.qr(_dot(moments, vectors))[0].T)
    values, turn = np.linalg.eigh(_dot(vectors, _dot(vectors, moments)))
    first = np.argsort(-values)[:rank]
    return basis_codes(np.einsum("jr,jc->rc", turn[:, first], vectors))


def _dot(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    """Returns a b^T. Not by BLAS, whose threads would wait for each other longer than so few rows take."""
    kind = np.result_type(a, b)
    a = a.astype(kind, copy=False)
    parts = (
        b[first : first + _BLOCK].astype(kind, copy=False) for first in range(0, len(b), _BLOCK)
    )
    return np.concatenate([np.einsum("ik,jk->ij", a, part) for part in parts], axis=1)

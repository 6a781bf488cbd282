"""The low-rank correction of a level: W_b + A_b V, with A in 4 bits and V in 8; docs/format.md specifies the layout.

V [R, cols] holds the few directions in which most of a matrix's input lies. A_b [rows, r] holds what the weights W_b of
level b lack in these directions. So y = W_b x + A_b (V x) costs r more columns per row, whatever the matrix's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MOST_RANK", "RANK_STEP", "SHARED", "Correction", "basis_bytes", "basis_codes", "correction_bytes", "factor",
    "factor_codes", "is_rank", "kind_of", "pack_basis", "pack_factor", "unpack_basis", "with_correction",
]  # fmt: skip

Correction = Mapping[str, tuple[int, ...]]
"""The rank of the correction at each rung, by the kind of matrix (`kind_of`)."""

RANK_STEP = 8
"""Ranks are multiples of this: 8 columns of 16 rows, at 4 bits, are 64 bytes."""
MOST_RANK = 32

SHARED = ("experts.gate", "experts.up")
"""Matrices without a V of their own: all experts of a layer share one, in the section `basis`."""

_ROWS, _COLS = 16, 64
_LINE = 64
_STEP = 0.335
"""The step of 16 evenly spaced values that have the least mean square error for a standard normal distribution."""


def kind_of(name: str) -> str:
    """Returns the kind of a matrix, its name without layer and expert: "q", "shared.up", "embed", "experts.down"."""
    parts = name.split(".")
    if parts[0] == "layers":
        return ".".join(parts[2:])
    return f"experts.{parts[-1]}" if parts[0] == "experts" else name


def is_rank(rank: object) -> bool:
    """Returns whether a correction may have this rank; 0 means no correction."""
    return type(rank) is int and 0 <= rank <= MOST_RANK and rank % RANK_STEP == 0


def correction_bytes(rows: int, rank: int) -> int:
    """Returns the bytes of one rung's A [rows, rank]."""
    return _LINE + -(-rows // _ROWS) * 8 * rank if rank else 0


def basis_bytes(cols: int, rank: int) -> int:
    """Returns the bytes of V [rank, cols]."""
    return rank * -(-cols // _COLS) * _COLS


def basis_codes(v: NDArray[np.floating]) -> NDArray[np.int8]:
    """Returns V [R, cols] as it is stored: each row is scaled to 8-bit codes, and A takes up the factor.

    A is to be fitted to these codes, so that their rounding costs nothing.
    """
    most = np.abs(v).max(axis=1, keepdims=True)
    codes = np.rint(v * (127 / np.where(most > 0, most, 1)))
    return np.ascontiguousarray(codes, np.int8)


def factor_codes(
    a: NDArray[np.floating], units: NDArray[np.floating]
) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """Rounds A [rows, r] to 4 bits and returns the scale of each column, [r], and the codes [rows, r].

    Args:
        units: [rows], the step of the level's code in a group of relative scale 1: R / 4096 * 2^(8 - b), where R is the
            row's scale and b the level's bits.

    Raises:
        ValueError: a number is not finite, or beyond float16 in these units.
    """
    wide = np.asarray(units, np.float64)[:, None]
    relative = np.divide(a, wide, out=np.zeros(a.shape), where=wide > 0)
    scales = _STEP * np.sqrt(np.square(relative).mean(axis=0))
    if not (scales < 65504).all():  # this is false for NaN too
        raise ValueError("correction: a factor is not finite, or too large for float16 scales")
    u = scales.astype(np.float16)
    steps = u.astype(np.float64)
    at = np.divide(relative, steps, out=np.zeros(a.shape), where=steps > 0)
    return u, np.clip(np.rint(at + 7.5), 0, 15).astype(np.uint8)


def factor(
    u: NDArray[np.float16], codes: NDArray[np.uint8], units: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Returns A [rows, r] as the stored codes mean it; see `factor_codes`."""
    out: NDArray[np.float64] = (
        np.asarray(units, np.float64)[:, None] * u.astype(np.float64) * (codes - 7.5)
    )
    return out


def pack_factor(u: NDArray[np.float16], codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the bytes of A: 32 scales, then 64 bytes for each 16 rows and 8 columns, with two codes in each byte.

    Raises:
        ValueError: the rank is not one of those that `is_rank` allows above 0.
    """
    rows, rank = codes.shape
    if rank % RANK_STEP or not 0 < rank <= MOST_RANK or u.shape != (rank,):
        raise ValueError(
            f"correction: expected a rank that is a multiple of 8 up to 32, got {rank}"
        )
    scales = np.zeros(MOST_RANK, "<f2")
    scales[:rank] = u
    padded = np.full((-(-rows // _ROWS) * _ROWS, rank), 8, np.uint8)
    padded[:rows] = codes
    # [row block, 8 columns, half, row, 4 columns]
    steps = padded.reshape(-1, _ROWS, rank // 8, 2, 4).transpose(0, 2, 3, 1, 4)
    both = steps[:, :, 0] | steps[:, :, 1] << 4
    return np.concatenate([scales.view(np.uint8), both.reshape(-1)])


def _padded(basis: NDArray[np.int8]) -> NDArray[np.uint8]:
    rank, cols = basis.shape
    out = np.zeros((rank, -(-cols // _COLS) * _COLS), np.int8)
    out[:, :cols] = basis
    return out.reshape(-1).view(np.uint8)


def with_correction(
    rungs: Sequence[NDArray[np.uint8]],
    factors: Mapping[int, tuple[NDArray[np.float16], NDArray[np.uint8]]],
    basis: NDArray[np.int8] | None,
) -> list[NDArray[np.uint8]]:
    """Returns the rungs of a matrix with the correction of each appended to it.

    Args:
        rungs: from `quantize`.
        factors: from `factor_codes`, by the number of the rung, from 0.
        basis: V [R, cols] from `basis_codes`; each rung uses its first rows. None if it is stored elsewhere.

    Raises:
        ValueError: a rank is not allowed, or exceeds that of the basis.
    """
    out = [np.asarray(rung, np.uint8) for rung in rungs]
    for at, (u, codes) in factors.items():
        if basis is not None and len(u) > len(basis):
            raise ValueError(f"correction: rank {len(u)} of a basis of {len(basis)}")
        out[at] = np.concatenate([out[at], pack_factor(u, codes)])
    if basis is not None:
        out[0] = np.concatenate([out[0], _padded(basis)])
    return out


def pack_basis(layers: Sequence[NDArray[np.int8]]) -> bytes:
    """Returns the section `basis`: V [R, D] of the experts' gates and ups, for each layer that has experts."""
    return b"".join(_padded(basis).tobytes() for basis in layers)


def unpack_basis(data: bytes, layers: int, rank: int, cols: int) -> NDArray[np.int8]:
    """Returns the bases from `pack_basis`, int8 [layers, R, cols padded to a multiple of 64]; a view.

    Raises:
        ValueError: `data` has another length.
    """
    expected = layers * basis_bytes(cols, rank)
    if len(data) != expected:
        raise ValueError(
            f"expected {expected} bytes ({layers} layers, rank {rank}, {cols} columns), got {len(data)}"
        )
    return np.frombuffer(data, np.int8).reshape(layers, rank, -1)

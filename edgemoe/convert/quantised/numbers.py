"""Small number formats, and arithmetic that several methods share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["E2M1", "E4M3", "E8M0", "affine", "fours", "scaled", "unpacked"]

Array = NDArray[np.float32]


def _e4m3() -> Array:
    """Returns the values of the 256 codes s eeee mmm of e4m3fn: bias 7, no infinity, NaN if all of e and m are 1."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent > 0, normal, np.ldexp(mantissa.astype(np.float64), -9))
    values[codes & 127 == 127] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


E4M3: Array = _e4m3()
E2M1: Array = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)

E8M0: Array = np.array([*(2.0 ** (code - 127) for code in range(255)), np.nan], np.float32)
"""The values of the 256 codes: powers of two, 2^(code - 127), and NaN for 255."""


def fours(packed: NDArray[np.uint8]) -> Array:
    """Returns the values [R, 2 N] of 4-bit floats packed in bytes [R, N], the low half of a byte first."""
    out = np.zeros((packed.shape[0], 2 * packed.shape[1]), np.float32)
    out[:, 0::2] = E2M1[packed & 15]
    out[:, 1::2] = E2M1[packed >> 4]
    return out


def unpacked(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Returns the codes [R, N * 32 / bits] of words [R, N], the low bits first.

    Args:
        bits: 2, 4 or 8.
    """
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return octets
    per = 8 // bits
    out = np.zeros((octets.shape[0], octets.shape[1] * per), np.uint8)
    for i in range(per):
        out[:, i::per] = octets >> bits * i & (1 << bits) - 1
    return out


def scaled(values: Array, scale: Array, rows: int, columns: int) -> Array:
    """Multiplies blocks of a matrix [R, C] by their scales [ceil(R / rows), ceil(C / columns)], in place."""
    if rows > 1:
        scale = np.repeat(scale, rows, axis=0)[: len(values)]
    whole = values.shape[1] // columns
    # Splitting an axis makes a view, so this writes to `values`.
    blocks = values[:, : whole * columns].reshape(len(values), whole, columns)
    blocks *= scale[:, :whole, None]
    values[:, whole * columns :] *= scale[:, whole:]
    return values


def affine(
    codes: NDArray[Any],
    scale: Array,
    zero: NDArray[Any] | int,
    groups: NDArray[np.int32] | None = None,
) -> Array:
    """Returns (codes - zero) * scale.

    Args:
        codes: integers [R, C].
        scale: [R, G], for groups of C / G adjacent columns.
        zero: the zero points, [R, G], or one for all.
        groups: [C], the group of each column, if groups are not of adjacent columns.

    Raises:
        ValueError: `groups` names a group that does not exist.
    """
    out = codes.astype(np.float32)
    if groups is not None:
        if groups.min() < 0 or groups.max() >= scale.shape[1]:
            raise ValueError(
                f"is in groups from {groups.min()} to {groups.max()}; there are {scale.shape[1]}"
            )
        out -= zero if isinstance(zero, int) else zero[:, groups].astype(np.float32)
        out *= scale[:, groups]
        return out
    grouped = out.reshape(len(out), scale.shape[1], -1)
    grouped -= zero if isinstance(zero, int) else zero[:, :, None].astype(np.float32)
    grouped *= scale[:, :, None]
    return out

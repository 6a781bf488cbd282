"""The 4-bit floats (E2M1) in which some models are released, stored unchanged; docs/format.md has the layout.

MXFP4 (OCP Microscaling Formats 1.0) has a power of two as the scale of each 32 columns of a row, in E8M0. NVFP4 has an
E4M3 scale for each 16 columns, and a float32 scale for the matrix. Nothing is rounded here: weights that the format
cannot represent are refused.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe.file.tensors import is_finite, need_weights

__all__ = ["LADDER", "mxfp4", "nvfp4", "rung_bytes"]

Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]

LADDER = (4,)
"""There is only one level."""

_ROWS = 16
_COLS = 64
_SCALE_BYTES = 64
_CHUNK = 64  # rows that are coded together, few enough for the processor's caches
_HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12])  # twice the values of codes 0 to 7; 8 to 15: negative
_NO_CODE = 255
_CODES = np.full(13, _NO_CODE, np.uint8)
_CODES[_HALVES] = np.arange(8)
_SIGNED = np.full(27, _NO_CODE, np.uint8)  # codes of -13 to 13 halves
_SIGNED[13 - _HALVES] = 8 + np.arange(8)
_SIGNED[13 + _HALVES] = np.arange(8)
_NO_MXFP4 = "not numbers of MXFP4: 4-bit floats with a power of two for each 32 columns"
_SLACK = 2.0**-22  # relative, for products whose last bit depends on the order of their factors


def rung_bytes(rows: int, cols: int, group: int) -> int:
    """Returns the bytes of a matrix [rows, cols] with a scale for each `group` columns: 32 (MXFP4) or 16 (NVFP4)."""
    tiles = -(-cols // _COLS)
    scales = -(-cols // (4 * group)) * _SCALE_BYTES
    header = 4 * _ROWS if group == 16 else 0
    return -(-rows // _ROWS) * (header + scales + tiles * 512)


def mxfp4(w: Array) -> Bytes:
    """Returns the one rung of a matrix in MXFP4.

    Args:
        w: [rows, cols].

    Raises:
        ValueError: w is not exactly representable in MXFP4.
    """
    need_weights(w)
    if not is_finite(w):
        raise ValueError(_NO_MXFP4)
    return np.concatenate([_mxfp4(w[i : i + _CHUNK]) for i in range(0, len(w), _CHUNK)])


def _mxfp4(w: Array) -> Bytes:
    groups = _grouped(w, 32)
    top = np.maximum(groups.max(-1), -groups.min(-1))
    # The scale makes the largest 4 or 6. Then all others are multiples of half the scale, if they fit any scale.
    exponents = np.where(top > 0, np.frexp(top)[1] - 3, 0)
    scales = np.clip(exponents + 127, 0, 254).astype(np.uint8)
    halves = groups / np.ldexp(np.float32(0.5), scales.astype(np.int32) - 127)[..., None]
    whole = np.clip(halves, -13, 13).astype(np.int8)
    codes = _SIGNED.take(whole + 13)
    if (whole != halves).any() or (codes == _NO_CODE).any():
        raise ValueError(_NO_MXFP4)
    return _packed(codes, scales, 32, None, *w.shape)


def nvfp4(w: Array) -> Bytes:
    """Returns the one rung of a matrix in NVFP4.

    Args:
        w: [rows, cols].

    Raises:
        ValueError: w is not representable in NVFP4, up to the rounding of products in float32.
    """
    need_weights(w)
    groups = _grouped(w, 16)
    top = np.maximum(groups.max(-1), -groups.min(-1)).astype(np.float64)
    for whole in _factors(top) if is_finite(w) else ():
        parts = []
        for at in (slice(i, i + _CHUNK) for i in range(0, len(w), _CHUNK)):
            part = _nvfp4(groups[at], top[at], whole, w.shape[1])
            if part is None:
                break
            parts.append(part)
        else:
            return np.concatenate(parts)
    raise ValueError(
        "not numbers of NVFP4: 4-bit floats with an E4M3 for each 16 columns, and a scale of all"
    )


def _nvfp4(groups: Array, top: NDArray[np.float64], whole: np.float32, cols: int) -> Bytes | None:
    """Returns some rows' bytes, given the scale `whole` of the matrix; None if the rows do not fit that scale."""
    scales, codes = np.zeros(top.shape, np.uint8), np.full(groups.shape, _NO_CODE, np.uint8)
    codes[top == 0] = 0
    # The largest of a group is a code times the group's scale: try each code for which that scale is an E4M3.
    for halves in _HALVES[:0:-1]:
        left = codes[..., 0] == _NO_CODE
        bits, values = _e4m3(np.where(left, 2 * top / (halves * np.float64(whole)), 0))
        found = left & (bits > 0)
        tried = _codes(groups[found], values[found] * whole / 2)
        fits = (tried != _NO_CODE).all(-1)
        at = np.flatnonzero(found)[fits]
        codes.reshape(-1, 16)[at] = tried[fits]
        scales.reshape(-1)[at] = bits[found][fits]
    if (codes == _NO_CODE).any():
        return None
    return _packed(codes, scales, 16, whole, len(groups), cols)


def _grouped(w: Array, size: int) -> Array:
    """Returns w [rows, cols] as [rows, groups, size], with zeros beyond the last column."""
    rows, cols = w.shape
    padded = np.zeros((rows, -(-cols // size) * size), np.float32)
    padded[:, :cols] = w
    return padded.reshape(rows, -1, size)


def _codes(groups: Array, steps: NDArray[np.float64]) -> Bytes:
    """Returns the codes of weights, where half a unit is `steps`, up to rounding; `_NO_CODE` for those without one."""
    halves = groups / steps[..., None]
    whole = np.rint(np.abs(halves))
    codes = _CODES[np.minimum(whole, 12).astype(np.int64)]
    off = np.abs(np.abs(halves) - whole) > _SLACK * whole
    codes[off | (whole > 12)] = _NO_CODE
    return np.where((codes != _NO_CODE) & (halves < 0), codes | 8, codes)


def _e4m3(x: NDArray[np.float64]) -> tuple[Bytes, NDArray[np.float64]]:
    """Returns the bits and values of positive numbers that are E4M3 up to rounding in float32; 0 for others."""
    exponent = np.clip(np.frexp(x * (1 + _SLACK))[1] - 1, -6, 8)
    mantissa = np.rint(np.ldexp(x, 3 - exponent))  # 8 to 15, or less if subnormal
    is_one = (np.abs(np.ldexp(x, 3 - exponent) - mantissa) <= _SLACK * mantissa) & (mantissa > 0)
    is_one &= (mantissa < 16) & ~((exponent == 8) & (mantissa == 15))
    bits = np.where(mantissa < 8, mantissa, (exponent + 7) * 8 + mantissa - 8)
    values = np.ldexp(mantissa, exponent - 3)
    return np.where(is_one, bits, 0).astype(np.uint8), np.where(is_one, values, 0)


def _factors(top: NDArray[np.float64]) -> list[np.float32]:
    """Returns the candidates for the matrix's own scale, which is a factor of the largest number of every group.

    Such a largest number is that factor times a code (1 or 3 times a power of two) times an E4M3 scale (8 to 15 times a
    power of two).
    """
    largest = float(top.max(initial=0))
    if largest == 0:
        return [np.float32(1)]
    odd = sorted({a * b for a in (1, 3) for b in range(1, 16, 2)})
    known = np.unique(np.frexp(top[top > 0])[0])
    found = []
    of_odd = np.log2(np.array(odd, np.float64))
    for p in odd:
        whole = largest / p
        off = np.log2(known / whole)[:, None] - of_odd
        off -= np.rint(off)
        nearest = off[np.arange(len(known)), np.abs(off).argmin(1)]
        if (np.abs(nearest) <= 4 * _SLACK).all():
            whole *= 2 ** float(np.median(nearest))  # since `largest` itself is rounded
            # Put the largest group scale near the top of E4M3, so that small ones are not subnormal.
            exponent = int(np.frexp(largest / 6 / whole)[1])
            found += [np.float32(np.ldexp(whole, exponent - e)) for e in range(9, 4, -1)]
    return found


def _packed(
    codes: Bytes, scales: Bytes, group: int, whole: np.float32 | None, rows: int, cols: int
) -> Bytes:
    """Returns codes [rows, groups, group] and scales [rows, groups] in the order of the file."""
    blocks, tiles, runs = -(-rows // _ROWS), -(-cols // _COLS), -(-cols // (4 * group))
    padded = np.zeros((blocks * _ROWS, tiles * _COLS), np.uint8)
    padded[:rows, : codes.shape[1] * group] = codes.reshape(rows, -1)
    pairs = padded.reshape(blocks, _ROWS, tiles, 8, 2, 4)
    both = np.ascontiguousarray(pairs[..., 0, :] | pairs[..., 1, :] << 4)
    # [block, tile, pair of steps, row, 4 columns]
    planes = both.view("<u4")[..., 0].transpose(0, 2, 3, 1).reshape(blocks, tiles, -1)
    planes = planes.view(np.uint8)
    of_groups = np.zeros((blocks * _ROWS, runs * 4), np.uint8)
    of_groups[:rows, : scales.shape[1]] = scales
    of_runs = (
        of_groups.reshape(blocks, _ROWS, runs, 4).transpose(0, 2, 3, 1).reshape(blocks, runs, 64)
    )
    parts = []
    if whole is not None:
        of_rows = np.full((blocks, _ROWS), whole, "<f4")
        parts.append(of_rows.view(np.uint8).reshape(blocks, -1))
    per_run = 4 * group // _COLS
    for run in range(runs):
        parts.append(of_runs[:, run])
        parts += [planes[:, tile] for tile in range(run * per_run, min(tiles, (run + 1) * per_run))]
    return np.ascontiguousarray(np.concatenate(parts, axis=1).reshape(-1))

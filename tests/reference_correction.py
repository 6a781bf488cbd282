"""Low-rank corrections in plain numpy: the slow, obvious version that the kernels must agree with."""

from __future__ import annotations

import numpy as np
import reference_nested


def correction_bytes(rows, rank):
    return 64 + -(-rows // 16) * 8 * rank if rank else 0


def basis_bytes(cols, rank):
    return rank * -(-cols // 64) * 64


def read_basis(data, rank, cols):
    """Returns V [rank, cols], integers as floats."""
    padded = -(-cols // 64) * 64
    codes = np.frombuffer(bytes(data[: rank * padded]), np.int8)
    return codes.reshape(rank, padded)[:, :cols].astype(float)


def read_factor(data, rows, rank, units):
    """Returns A [rows, rank]; units [rows] are the steps of a code at the level."""
    u = np.frombuffer(bytes(data[:64]), "<f2").astype(float)
    out = np.zeros((rows, rank))
    row = np.arange(rows)
    for j in range(rank):
        both = data[64 + row // 16 * 8 * rank + j // 8 * 64 + 4 * (row % 16) + j % 4]
        code = both & 15 if j % 8 < 4 else both >> 4
        out[:, j] = units * u[j] * (code - 7.5)
    return out


def decode_rungs(rungs, widths, rows, cols, ranks, row_scales=(1,), basis=None, *, is_whole=True):
    """Returns W + A V from a prefix of rungs, float64 [rows, cols]; W alone unless `is_whole`.

    Args:
        ranks: those of the whole ladder.
        basis: the bytes of V, if they are not in the first rung.
    """
    rungs = [np.asarray(rung, np.uint8) for rung in rungs]
    most, last = max(ranks), len(widths) - 1
    if basis is None:
        own = basis_bytes(cols, most)
        basis, rungs[0] = rungs[0][len(rungs[0]) - own :], rungs[0][: len(rungs[0]) - own]
    plain, behind = [], []
    for rung, rank in zip(rungs, ranks, strict=False):
        at = len(rung) - correction_bytes(rows, rank)
        plain.append(rung[:at])
        behind.append(rung[at:])
    w = reference_nested.decode_rungs(plain, widths, rows, cols, row_scales)
    if not (ranks[last] and is_whole):
        return w
    units = units_of(plain, widths, rows, row_scales)
    a = read_factor(behind[last], rows, ranks[last], units)
    return w + a @ read_basis(basis, ranks[last], cols)


def units_of(plain, widths, rows, row_scales):
    """Returns the step of a level's code in a group of relative scale 1, [rows].

    It comes from the row scales of the last rung that has some.
    """
    last = max(r for r, has in enumerate(row_scales[: len(plain)]) if has)
    return plain[last][: 2 * rows].view("<f2").astype(float) / 4096 * 2.0 ** (8 - sum(widths))

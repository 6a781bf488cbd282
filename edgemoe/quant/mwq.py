"""Matryoshka quantisation (MWQ) of D2MoE (arXiv 2504.15299, section 3.3); docs/format.md has the layout.

It has a base of 2 or 5 bits, with a scale and a zero for each row and group of columns, and one plane of signs for each
further bit, with scales of its own. It is here so that it can be compared with nested codes in the same runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.file.tensors import is_finite, need_weights

__all__ = ["GROUP", "LADDERS", "Matryoshka", "fit", "is_ladder", "quantize", "rung_bytes"]

Array = NDArray[np.float32]
Half = NDArray[np.float16]
Codes = NDArray[np.uint8]

GROUP = 128
"""Columns that share a scale, as published."""
LADDERS = ((2, 3, 4), (5, 6, 7, 8))
"""Versions 1 and 2 of the paper."""

_ROWS = 16
_COLS = 64
_SHRINKS = np.linspace(1.0, 0.5, 21).tolist()  # of a group's range, tried for the base
_DAMPING = 0.01  # of the mean square, as in GPTQ
_CHUNK = 256  # rows that are fitted together, few enough for the processor's caches


def is_ladder(ladder: Sequence[int]) -> bool:
    """Returns whether a file may have these levels: one of `LADDERS`, or a prefix of one."""
    return any(tuple(ladder) == full[: len(ladder)] for full in LADDERS)


def rung_bytes(rows: int, cols: int, ladder: Sequence[int]) -> list[int]:
    """Returns the bytes of each rung of a matrix [rows, cols], padding and scales included."""
    blocks, tiles = -(-rows // _ROWS), -(-cols // _COLS)
    base = -(-cols // GROUP) * 64 + 128 * tiles * ladder[0]
    plane = -(-cols // (2 * GROUP)) * 64 + 128 * tiles
    return [blocks * base, *[blocks * plane] * (len(ladder) - 1)]


@dataclass(frozen=True, slots=True)
class Matryoshka:
    """A matrix [rows, cols] as codes and scales."""

    codes: tuple[Codes, ...]
    """Per rung, [rows, cols]: the codes of the base; for a plane, 1 and 0 for plus and minus."""
    scales: tuple[Half, ...]
    """Per rung, [rows, groups]."""
    lowest: Half
    """[rows, groups]: the value of code 0 of the base, which is -zero * scale in the paper."""

    @classmethod
    def empty(cls, rows: int, cols: int, rungs: int) -> Matryoshka:
        groups = -(-cols // GROUP)
        return cls(
            tuple(np.zeros((rows, cols), np.uint8) for _ in range(rungs)),
            tuple(np.zeros((rows, groups), np.float16) for _ in range(rungs)),
            np.zeros((rows, groups), np.float16),
        )

    def rows(self, at: slice) -> Matryoshka:
        """Returns a view of some rows."""
        return Matryoshka(
            tuple(c[at] for c in self.codes), tuple(s[at] for s in self.scales), self.lowest[at]
        )

    def addend(self, rung: int, g: slice) -> Array:
        """Returns what a rung adds to a group's weights [rows, g]."""
        group = g.start // GROUP
        scale = self.scales[rung][:, group, None].astype(np.float32)
        codes = self.codes[rung][:, g]
        if rung == 0:
            return scale * codes + self.lowest[:, group, None].astype(np.float32)
        return np.where(codes, scale, -scale)

    def decode(self, rungs: int) -> Array:
        """Returns the weights [rows, cols] that the first `rungs` rungs stand for."""
        rows, cols = self.codes[0].shape
        out = np.zeros((rows, cols), np.float32)
        for rung in range(rungs):
            for g in _groups(cols):
                out[:, g] += self.addend(rung, g)
        return out


def quantize(
    w: Array,
    ladder: Sequence[int] = LADDERS[0],
    *,
    second_moments: Array | None = None,
    compensated: int | None = None,
) -> list[Codes]:
    """Quantises a matrix and returns its rungs as the file stores them; see `fit`.

    Args:
        w: [rows, cols].
        ladder: bits in use after each rung, one of `LADDERS` or a prefix of one.
        second_moments: of the matrix's inputs, [cols] mean squares or [cols, cols] mean products; any scale.
        compensated: as in `fit`.

    Raises:
        ValueError: as in `fit`.
    """
    m = fit(w, ladder, second_moments, compensated=compensated)
    base = _pack(m.codes[0], ladder[0], np.stack([m.scales[0], m.lowest], -1))
    odd = m.lowest.shape[1] % 2
    pairs = [np.pad(s, ((0, 0), (0, odd))).reshape(len(w), -1, 2) for s in m.scales[1:]]
    return [base, *(_pack(c, 1, s) for c, s in zip(m.codes[1:], pairs, strict=True))]


def fit(
    w: Array,
    ladder: Sequence[int],
    second_moments: Array | None = None,
    *,
    compensated: int | None = None,
) -> Matryoshka:
    """Chooses codes and scales.

    Without moments, the base spans its group's range, and a plane's scale is the mean magnitude of the residual. With
    moments, every scale minimises the output error of its group alone, and the error of a group is compensated in later
    columns (algorithm 1).

    Args:
        second_moments: as in `quantize`.
        compensated: None is the published order: rung after rung over the whole matrix, each compensating for its own
            error. A number is an index into the ladder: every group gets all its rungs before the next group, and only
            the error of this level is compensated. The last index is better at that level and worse at lower ones
            (benchmarks/LOG.md).

    Raises:
        ValueError: a weight is not finite or beyond float16, or the moments are not finite or of another shape.
    """
    rows, cols = w.shape
    need_weights(w)
    if not bool((np.abs(w) < 65504).all()):
        raise ValueError("quantize: a weight is not finite, or too large for float16 scales")
    moments = None if second_moments is None else _moments(second_moments, cols)
    pushes = None if moments is None else _pushes(moments)
    out = Matryoshka.empty(rows, cols, len(ladder))
    for first in range(0, rows, _CHUNK):
        at = slice(first, first + _CHUNK)
        part = w[at].astype(np.float32)
        if compensated is None:
            _rung_by_rung(part, ladder[0], moments, pushes, out.rows(at))
        else:
            _group_by_group(part, ladder[0], moments, pushes, out.rows(at), compensated)
    return out


def _moments(given: Array, cols: int) -> Array | None:
    """Returns mean products [cols, cols] scaled to a mean of 1 on the diagonal; None if all are 0."""
    if given.shape not in ((cols,), (cols, cols)):
        raise ValueError(
            f"second_moments: expected [{cols}] or [{cols}, {cols}], got {list(given.shape)}"
        )
    products = np.diag(given) if given.ndim == 1 else given
    diagonal = np.diagonal(products)
    mean = float(diagonal.mean())
    if not (is_finite(given) and np.isfinite(mean) and diagonal.min() >= 0):
        raise ValueError("second_moments: expected mean squares, finite and not negative")
    return np.asarray(products / mean, np.float32) if mean > 0 else None


def _pushes(moments: Array) -> list[Array]:
    """Returns a matrix per group. The group's error [rows, g] times it is subtracted from the columns after the group.

    It is H[g, g]^-1 H[g, after], where H is the upper Cholesky factor of the inverse of the damped moments.
    """
    cols = len(moments)
    damped = moments.astype(np.float64) + _DAMPING * np.eye(cols)
    try:
        factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    except np.linalg.LinAlgError:
        raise ValueError("second_moments: expected products of inputs with each other") from None
    return [
        np.linalg.solve(factor[g, g], factor[g, g.stop :]).astype(np.float32) for g in _groups(cols)
    ]


def _group_by_group(
    w: Array,
    bits: int,
    moments: Array | None,
    pushes: list[Array] | None,
    out: Matryoshka,
    compensated: int,
) -> None:
    """Fits all rungs of a group before the next group. `w` is overwritten."""
    rungs = range(len(out.codes))
    for i, g in enumerate(_groups(w.shape[1])):
        rest = w[:, g].copy()
        for rung in rungs:
            _put(out, rung, g, rest, bits, None if moments is None else moments[g, g])
            rest -= out.addend(rung, g)
            if pushes is not None and rung == rungs[compensated]:
                w[:, g.stop :] -= rest @ pushes[i]


def _rung_by_rung(
    w: Array, bits: int, moments: Array | None, pushes: list[Array] | None, out: Matryoshka
) -> None:
    """Quantises the whole matrix to the base, then the residual to each next rung."""
    for rung in range(len(out.codes)):
        target = w - out.decode(rung)
        for i, g in enumerate(_groups(w.shape[1])):
            _put(out, rung, g, target[:, g], bits, None if moments is None else moments[g, g])
            if pushes is not None:
                target[:, g.stop :] -= (target[:, g] - out.addend(rung, g)) @ pushes[i]


def _put(
    out: Matryoshka, rung: int, g: slice, target: Array, bits: int, moments: Array | None
) -> None:
    """Chooses a rung's codes and scales for a group's target [rows, g], with moments [g, g]."""
    group = g.start // GROUP
    if rung == 0:
        codes, out.scales[0][:, group], out.lowest[:, group] = _base(target, bits, moments)
    else:
        codes, out.scales[rung][:, group] = _plane(target, moments)
    out.codes[rung][:, g] = codes


def _base(target: Array, bits: int, moments: Array | None) -> tuple[Codes, Half, Half]:
    """Returns codes [rows, g], scales [rows] and the values of code 0 [rows].

    Codes span the range of the target; with moments, the range or a narrower one, whichever has the least error.
    """
    low, high, top = target.min(1), target.max(1), 2**bits - 1
    best: tuple[NDArray[Any], ...] | None = None
    least = np.zeros(len(target), np.float32)
    for shrink in _SHRINKS if moments is not None else [1.0]:
        scale = _half((high - low) * np.float32(shrink / top))
        step = scale.astype(np.float32)[:, None]
        lowest = _half((low + high) / 2 - step[:, 0] * np.float32(top / 2))
        start = lowest.astype(np.float32)[:, None]
        codes = np.rint((target - start) / np.where(step > 0, step, 1)).clip(0, top)
        if moments is None:
            return codes.astype(np.uint8), scale, lowest
        rest = target - (step * codes + start)
        error = ((rest @ moments) * rest).sum(1)
        if best is None:
            best, least = (codes, scale, lowest), error
        better = error < least
        for kept, tried in zip(best, (codes, scale, lowest), strict=True):
            kept[better] = tried[better]
        least = np.where(better, error, least)
    assert best is not None
    return best[0].astype(np.uint8), best[1], best[2]


def _plane(target: Array, moments: Array | None) -> tuple[Codes, Half]:
    """Returns signs as 0 and 1 [rows, g], and the scales [rows] of least error."""
    is_plus = target >= 0
    if moments is None:
        return is_plus.astype(np.uint8), _half(np.abs(target).mean(1))
    sign = np.where(is_plus, np.float32(1), np.float32(-1))
    seen = sign @ moments
    scale = (seen * target).sum(1) / np.maximum((seen * sign).sum(1), np.float32(1e-12))
    return is_plus.astype(np.uint8), _half(scale)


def _half(x: Array) -> Half:
    return np.clip(x, -65504, 65504).astype(np.float16)


def _groups(cols: int) -> Iterator[slice]:
    for first in range(0, cols, GROUP):
        yield slice(first, min(first + GROUP, cols))


def _pack(codes: Codes, width: int, scales: Half) -> Codes:
    """Returns a rung's bytes: for each strip of columns, two float16 for each row, then the strip's tiles.

    Args:
        codes: [rows, cols].
        scales: [rows, strips, 2].
    """
    strips = scales.shape[1]
    padded = np.pad(scales, ((0, -len(codes) % _ROWS), (0, 0), (0, 0)))
    heads = np.ascontiguousarray(padded.reshape(-1, _ROWS, strips, 2).transpose(0, 2, 3, 1))
    tiles = _tiles(codes, width)
    blocks, each = len(tiles), GROUP // _COLS * (1 if width > 1 else 2)
    parts = []
    for i in range(strips):
        parts.append(heads[:, i].reshape(blocks, -1).view(np.uint8))
        parts.append(tiles[:, i * each : (i + 1) * each].reshape(blocks, -1))
    return np.concatenate(parts, axis=1).reshape(-1)


def _tiles(codes: Codes, width: int) -> Codes:
    """Returns codes [rows, cols] as [row blocks, tiles, bytes]: the planes of each tile, widest first."""
    rows, cols = codes.shape
    padded = np.pad(codes, ((0, -rows % _ROWS), (0, -cols % _COLS)))
    tiles = padded.reshape(-(-rows // _ROWS), _ROWS, -(-cols // _COLS), 16, 4)
    steps = tiles.transpose(0, 2, 3, 1, 4).reshape(-1, 16, 64)
    planes = []
    for w in (4, 2, 1):
        if not width & w:
            continue
        width -= w
        field = (steps >> width & (1 << w) - 1).reshape(-1, 2 * w, 8 // w, 64)
        shifts = np.arange(0, 8, w, dtype=np.uint8)[:, None]
        planes.append(np.bitwise_or.reduce(field << shifts, axis=2))
    return np.concatenate(planes, axis=1).reshape(*tiles.shape[0:3:2], -1)

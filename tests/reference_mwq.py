"""MWQ in plain numpy: the slow, obvious version of codes, layout and quantiser."""

from __future__ import annotations

import numpy as np
from reference_nested import COLS, ROWS

GROUP = 128


def strip(rung):
    """Returns how many columns share 64 bytes of scales."""
    return GROUP if rung == 0 else 2 * GROUP


def rung_bytes(rows, cols, width, rung, row_scales=(1,)):
    return -(-rows // ROWS) * (-(-cols // strip(rung)) * 64 + -(-cols // COLS) * 128 * width)


def decode_rungs(rungs, widths, rows, cols, row_scales=(1,)):
    """Decodes a prefix of rungs to float64 [rows, cols], weight by weight."""
    out = np.zeros((rows, cols))
    for i, (rung, width) in enumerate(zip(rungs, widths, strict=True)):
        assert len(rung) == rung_bytes(rows, cols, width, i)
        blocks = np.asarray(rung, np.uint8).reshape(-(-rows // ROWS), -1)
        of_tile, wide = 128 * width, strip(i)
        for r in range(rows):
            block, lane = blocks[r // ROWS], r % ROWS
            for c in range(cols):
                at = c // wide * (64 + wide // COLS * of_tile)
                scales = block[at : at + 64].view(np.float16).astype(float)
                step, byte = c % COLS // 4, 4 * lane + c % 4
                code, start = 0, at + 64 + c % wide // COLS * of_tile
                for w in (4, 2, 1):
                    if width & w:
                        packed = int(block[start + step // (8 // w) * 64 + byte])
                        code = code << w | packed >> step % (8 // w) * w & (1 << w) - 1
                        start += 128 * w
                if i == 0:
                    out[r, c] = scales[lane] * code + scales[ROWS + lane]
                else:
                    out[r, c] += scales[c % wide // GROUP * ROWS + lane] * (2 * code - 1)
    return out


def half(x):
    return float(np.float16(x))


def base(w, bits, moments):
    """Quantises a row's group at the base: with the best of 21 ranges around its middle."""
    top, best, least = 2**bits - 1, None, np.inf
    for shrink in np.linspace(1, 0.5, 21) if moments is not None else [1.0]:
        s = half((w.max() - w.min()) * shrink / top)
        low = half((w.max() + w.min()) / 2 - s * top / 2)
        value = np.array([low + s * min(max(round((x - low) / s), 0), top) for x in w])
        error = 0 if moments is None else (w - value) @ moments @ (w - value)
        if error < least:
            best, least = value, error
    return best


def plane(rest, moments):
    """Quantises a row's group in a further rung: signs times their least-squares scale."""
    sign = np.where(rest >= 0, 1.0, -1.0)
    m = np.eye(len(rest)) if moments is None else moments
    return sign * half((sign @ m @ rest) / (sign @ m @ sign))


def levels(w, ladder, moments=None, compensated=-1):
    """Returns the weights at each level [levels, rows, cols].

    The error of a group is compensated in the columns after it, by least squares without any factorisation.
    """
    w, cols = np.asarray(w, np.float64), w.shape[1]
    damped = None if moments is None else moments + 0.01 * np.diag(moments).mean() * np.eye(cols)
    groups = [np.arange(a, min(a + GROUP, cols)) for a in range(0, cols, GROUP)]

    def rung(target, k, g):
        h = None if moments is None else moments[np.ix_(g, g)]
        return np.array([base(t, ladder[0], h) if k == 0 else plane(t, h) for t in target])

    def make_up(target, lost, g):
        after = np.arange(g[-1] + 1, cols)
        if moments is not None and len(after):
            across, rest = damped[np.ix_(g, after)], damped[np.ix_(after, after)]
            target[:, after] += lost @ across @ np.linalg.inv(rest)

    out = np.zeros((len(ladder), *w.shape))
    if compensated is None:  # as the paper prints it
        for k in range(len(ladder)):
            target = w - out[k - 1] if k else w.copy()
            for g in groups:
                added = rung(target[:, g], k, g)
                make_up(target, target[:, g] - added, g)
                out[k][:, g] = added + (out[k - 1][:, g] if k else 0)
    else:
        target = w.copy()
        for g in groups:
            done = np.zeros((len(w), len(g)))
            for k in range(len(ladder)):
                done = done + rung(target[:, g] - done, k, g)
                out[k][:, g] = done
            make_up(target, target[:, g] - out[compensated][:, g], g)
    return out

"""Nested codes in plain numpy: the slow, obvious version that the kernels must agree with."""

from __future__ import annotations

import numpy as np

ROWS, COLS, GROUP = 16, 64, 16


def has_row_scales(row_scales, rung):
    return rung < len(row_scales) and row_scales[rung] == 1


def rung_bytes(rows, cols, width, rung, row_scales=(1,)):
    tiles = -(-rows // ROWS) * -(-cols // COLS)
    header = -(-rows // 32) * 64 if has_row_scales(row_scales, rung) else 0
    return header + tiles * 128 * width + (0 if rung else tiles * 64)


def unpack(rungs, widths, rows, cols, row_scales=(1,)):
    """Returns codes [rows, cols] of sum(widths) bits, and float64 steps and middles [rows, groups of 16 columns].

    At 8 bits, w = step * (code + 0.5 + middle).
    """
    rb, cb = -(-rows // ROWS), -(-cols // COLS)
    codes = np.zeros((rb, cb, 16, 64), np.uint8)  # [row block, column block, step, row * 4 + j]
    for r, (rung, width) in enumerate(zip(rungs, widths, strict=True)):
        rung = np.asarray(rung, np.uint8)
        if has_row_scales(row_scales, r):
            header = -(-rows // 32) * 64
            of_rows = rung[:header].view(np.float16)[:rows].astype(np.float64)
            rung = rung[header:]
        if r == 0:
            tiles = rung.reshape(rb, cb, -1)
            both = tiles[:, :, :64].reshape(rb, cb, 4, ROWS).transpose(0, 3, 1, 2)
            both = both.reshape(rb * ROWS, cb * 4)[:rows, : -(-cols // GROUP)].astype(int)
            low, high = both % 16, both // 16
            relative = (4 + low % 4) * 2.0 ** (low // 4)
            middles = 12.0 * (high - 8) - 128
            tiles = tiles[:, :, 64:]
        else:
            tiles = rung.reshape(rb, cb, -1)
        at = 0
        for w in (8, 4, 2, 1):
            if not width & w:
                continue
            plane = tiles[:, :, at : at + 128 * w].reshape(rb, cb, 2 * w, 64)
            at += 128 * w
            for step in range(16):
                field = (plane[:, :, step // (8 // w)] >> (step % (8 // w) * w)) & ((1 << w) - 1)
                codes[:, :, step] = (codes[:, :, step].astype(np.uint16) << w).astype(
                    np.uint8
                ) | field
    codes = codes.reshape(rb, cb, 16, ROWS, 4).transpose(0, 3, 1, 2, 4)
    return (
        codes.reshape(rb * ROWS, cb * COLS)[:rows, :cols],
        of_rows[:, None] / 4096 * relative,
        middles,
    )


def decode(codes, steps, middles, bits):
    """Returns w = step * ((code + 0.5) * 2^(8 - bits) + middle), in float64."""
    cols = codes.shape[1]
    u = (codes.astype(np.float64) + 0.5) * 2.0 ** (8 - bits)
    return (u + np.repeat(middles, GROUP, axis=1)[:, :cols]) * np.repeat(steps, GROUP, axis=1)[
        :, :cols
    ]


def decode_rungs(rungs, widths, rows, cols, row_scales=(1,)):
    """Decodes a prefix of rungs to float64 [rows, cols]."""
    return decode(*unpack(rungs, widths, rows, cols, row_scales), sum(widths))


def quantize_rows(x):
    """Quantises activations to 8 bits, with a scale per row and 32 columns; returns them decoded to float64."""
    x = np.asarray(x, np.float32)
    pad = -x.shape[1] % COLS
    groups = np.pad(x, ((0, 0), (0, pad))).reshape(x.shape[0], -1, 32)
    top = np.abs(groups).max(-1, keepdims=True)
    scale = (top / np.float32(127)).astype(np.float32)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    q = np.rint(groups * inverse)
    return (q.astype(np.float64) * scale).reshape(x.shape[0], -1)[:, : x.shape[1]]

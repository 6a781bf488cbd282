"""Nested codes in plain numpy: the slow, obvious version that the kernels must agree with."""

from __future__ import annotations

import numpy as np

ROWS, COLS = 16, 64


def unpack(rungs, widths, rows, cols):
    """Returns codes [rows, cols] of sum(widths) bits, scales and middles [rows, groups] as float32."""
    rb, cb = -(-rows // ROWS), -(-cols // COLS)
    codes = np.zeros((rb, cb, 16, 64), np.uint8)  # [row block, column block, step, row * 4 + j]
    for r, (rung, width) in enumerate(zip(rungs, widths, strict=True)):
        tiles = np.asarray(rung, np.uint8).reshape(rb, cb, -1)
        if r == 0:
            halves = tiles[:, :, :64].copy().view(np.float16).astype(np.float32)
            scales = halves[:, :, :16].transpose(0, 2, 1).reshape(rb * ROWS, cb)[:rows]
            middles = halves[:, :, 16:].transpose(0, 2, 1).reshape(rb * ROWS, cb)[:rows]
            tiles = tiles[:, :, 64:]
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
    return codes.reshape(rb * ROWS, cb * COLS)[:rows, :cols], scales, middles


def decode(codes, scales, middles, bits):
    """w = scale * ((code + 0.5) * 2^(8 - bits) - 128) + middle, in float64."""
    u = (codes.astype(np.float64) + 0.5) * 2.0 ** (8 - bits) - 128
    spread = np.repeat(scales.astype(np.float64), COLS, axis=1)[:, : codes.shape[1]]
    middle = np.repeat(middles.astype(np.float64), COLS, axis=1)[:, : codes.shape[1]]
    return u * spread + middle


def decode_rungs(rungs, widths, rows, cols):
    """Decodes a prefix of rungs to float64 [rows, cols]."""
    return decode(*unpack(rungs, widths, rows, cols), sum(widths))


def quantize_rows(x):
    """8-bit activations per row and 64 columns, decoded to float64."""
    x = np.asarray(x, np.float32)
    pad = -x.shape[1] % COLS
    groups = np.pad(x, ((0, 0), (0, pad))).reshape(x.shape[0], -1, COLS)
    top = np.abs(groups).max(-1, keepdims=True)
    scale = (top / np.float32(127)).astype(np.float32)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    q = np.rint(groups * inverse)
    return (q.astype(np.float64) * scale).reshape(x.shape[0], -1)[:, : x.shape[1]]

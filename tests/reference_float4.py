"""4-bit floats in plain Python: the slow, obvious version of codes and layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from reference_nested import COLS, ROWS

HALVES = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]


def e8m0(byte):
    return 2.0 ** (int(byte) - 127)


def e4m3(byte):
    exponent, mantissa = int(byte) >> 3 & 15, int(byte) & 7
    if exponent == 0:
        return mantissa * 2.0**-9
    return (8 + mantissa) * 2.0 ** (exponent - 10)


@dataclass(frozen=True)
class Reference:
    group: int

    @property
    def header(self):
        return 64 if self.group == 16 else 0

    def rung_bytes(self, rows, cols):
        runs, tiles = -(-cols // (4 * self.group)), -(-cols // COLS)
        return -(-rows // ROWS) * (self.header + 64 * runs + 512 * tiles)

    def decode_rungs(self, rungs, widths, rows, cols, row_scales=(1,)):
        """Decodes to float64 [rows, cols], weight by weight."""
        (rung,), run = rungs, 4 * self.group
        assert widths == [4]
        assert len(rung) == self.rung_bytes(rows, cols)
        blocks = np.asarray(rung, np.uint8).reshape(-(-rows // ROWS), -1)
        of_run = 64 + run // COLS * 512
        scale_of = e8m0 if self.group == 32 else e4m3
        out = np.zeros((rows, cols))
        for r in range(rows):
            block, lane = blocks[r // ROWS], r % ROWS
            whole = float(block[:64].view("<f4")[lane]) if self.header else 1.0
            for c in range(cols):
                start = self.header + c // run * of_run
                scale = scale_of(block[start + c % run // self.group * ROWS + lane])
                at = start + 64 + c % run // COLS * 512
                step = c % COLS // 4
                byte = block[at + step // 2 * 64 + 4 * lane + c % 4]
                code = byte >> 4 if step % 2 else byte & 15
                out[r, c] = whole * (scale * HALVES[code] / 2)
        return out


MXFP4, NVFP4 = Reference(32), Reference(16)

"""MXFP4, in which gpt-oss is released: experts in 4-bit floats, with a power of two as scale for every 32.

A stack of experts `X` with 32 N inputs is stored as `X_blocks` [E, outputs, N, 16] and `X_scales` [E, outputs, N]. It
is presented as transformers has it in memory, [E, inputs, outputs].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.quantised.numbers import fours, scaled
from edgemoe.convert.quantised.tensors import Method, Pieces, Values, expect, expect_dtype
from edgemoe.convert.settings import Settings
from edgemoe.errors import FormatError, shortened

__all__ = ["METHOD"]

_BLOCK = 32


def _read(pieces: Pieces, settings: Settings) -> None:
    for name in pieces.ending("_blocks"):
        found = pieces.claim(name, codes="_blocks", scale="_scales")
        codes = found["codes"]
        expect_dtype(codes, "U8")
        expect_dtype(found["scale"], "U8", "F8_E8M0")
        if len(codes.shape) != 4 or codes.shape[3] != _BLOCK // 2:
            raise FormatError(
                f"{codes.path}: {shortened(codes.name)}: expected shape [experts, rows, blocks, 16], "
                f"got {list(codes.shape)}"
            )
        expect(found["scale"], codes.shape[:3])
        experts, outputs, blocks, _ = codes.shape
        pieces.add(name, (experts, blocks * _BLOCK, outputs), found, _decoded)


def _decoded(values: Values) -> NDArray[np.float32]:
    codes = values["codes"]
    out = scaled(fours(codes.reshape(len(codes), -1)), values["scale"], 1, _BLOCK)
    return np.ascontiguousarray(out.T)


METHOD = Method("MXFP4 (experts of gpt-oss)", _read)

"""AWQ: 4-bit integers with a scale and a zero point for each group of inputs.

Stored with inputs first, for C inputs, R outputs and G groups: `qweight` [C, R / 8], `qzeros` [G, R / 8], `scales`
[G, R]. A 32-bit word holds eight outputs, in the order of `_PLACES`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.quantised.numbers import affine, unpacked
from edgemoe.convert.quantised.tensors import Method, Pieces, Values, expect, expect_dtype
from edgemoe.convert.settings import Settings
from edgemoe.errors import FormatError, quoted, shortened

__all__ = ["METHOD"]

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the 4-bit field of word w that holds output 8 w + i


def _read(pieces: Pieces, settings: Settings) -> None:
    bits = settings.integer("bits", 4)
    if bits != 4:
        raise settings.error("bits", f"{bits} is not supported; supported: 4")
    version = settings.text("version", "gemm").lower()
    if version != "gemm":
        raise settings.error("version", f"{quoted(version)} is not supported; supported: gemm")
    for name in pieces.ending(".qweight"):
        found = pieces.claim(name, codes=".qweight", zeros=".qzeros", scale=".scales")
        codes, scale = found["codes"], found["scale"]
        for role in ("codes", "zeros"):
            expect_dtype(found[role], "I32")
        if len(codes.shape) != 2:
            raise FormatError(
                f"{codes.path}: {shortened(codes.name)}: expected a matrix, got {list(codes.shape)}"
            )
        inputs, words = codes.shape
        groups = scale.shape[0] if scale.shape else 0
        expect(scale, (groups, 8 * words))
        expect(found["zeros"], (groups, words))
        if not groups or inputs % groups:
            raise FormatError(
                f"{scale.path}: {shortened(scale.name)}: {inputs} inputs are not in {groups} groups"
            )
        pieces.add(f"{name}.weight", (8 * words, inputs), found, _decoded)


def _decoded(values: Values) -> NDArray[np.float32]:
    codes, zeros = (_outputs_first(values[role]) for role in ("codes", "zeros"))
    return affine(codes, np.ascontiguousarray(values["scale"].T), zeros)


def _outputs_first(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Returns the codes [8 N, R] of words [R, N]."""
    codes = unpacked(words, 4).reshape(len(words), -1, 8)[:, :, _PLACES]
    return np.ascontiguousarray(codes.reshape(len(words), -1).T)


METHOD = Method("AWQ of 4 bits", _read)

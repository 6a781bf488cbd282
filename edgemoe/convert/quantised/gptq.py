"""GPTQ: integers of 2, 4 or 8 bits, with a scale and a zero point for each group of inputs.

Stored with inputs first, for C inputs, R outputs and G groups: `qweight` [C * bits / 32, R], `qzeros`
[G, R * bits / 32], `scales` [G, R], and `g_idx` [C], the group of each input.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.quantised.numbers import affine, unpacked
from edgemoe.convert.quantised.tensors import Method, Pieces, Values, expect, expect_dtype
from edgemoe.convert.safetensors_file import StoredTensor
from edgemoe.convert.settings import Settings
from edgemoe.errors import FormatError, quoted, shortened

__all__ = ["METHOD"]

_BITS = (2, 4, 8)
_FORMATS = {"gptq": 1, "gptq_v2": 0}  # how much is added to the stored zero points


def _read(pieces: Pieces, settings: Settings) -> None:
    bits = settings.integer("bits")
    if bits not in _BITS:
        raise settings.error("bits", f"{bits} is not supported; supported: 2, 4, 8")
    layout = settings.text("checkpoint_format", "gptq")
    if layout not in _FORMATS:
        raise settings.error(
            "checkpoint_format",
            f"{quoted(layout)} is not supported; supported: {', '.join(_FORMATS)}",
        )
    if settings.get("dynamic"):
        raise settings.error("dynamic", "bits that differ by module are not supported")
    for name in pieces.ending(".qweight"):
        found = pieces.claim(
            name, optional=("groups",), codes=".qweight", zeros=".qzeros", scale=".scales", groups=".g_idx"
        )  # fmt: skip
        inputs, outputs = _checked(found, bits)
        pieces.add(
            f"{name}.weight", (outputs, inputs), found, partial(_decoded, bits=bits, less=_FORMATS[layout])
        )  # fmt: skip


def _checked(found: dict[str, StoredTensor], bits: int) -> tuple[int, int]:
    """Checks types and shapes; returns the numbers of inputs and outputs."""
    codes, scale = found["codes"], found["scale"]
    for role in found.keys() - {"scale"}:
        expect_dtype(found[role], "I32")
    if len(codes.shape) != 2:
        raise FormatError(
            f"{codes.path}: {shortened(codes.name)}: expected a matrix, got {list(codes.shape)}"
        )
    inputs, outputs = codes.shape[0] * 32 // bits, codes.shape[1]
    groups = scale.shape[0] if scale.shape else 0
    expect(scale, (groups, outputs))
    expect(found["zeros"], (groups, outputs * bits // 32))
    if "groups" in found:
        expect(found["groups"], (inputs,))
    elif not groups or inputs % groups:
        raise FormatError(
            f"{scale.path}: {shortened(scale.name)}: {inputs} inputs are not in {groups} groups"
        )
    return inputs, outputs


def _decoded(values: Values, *, bits: int, less: int) -> NDArray[np.float32]:
    codes = unpacked(values["codes"].T, bits)
    zeros = unpacked(values["zeros"], bits).T.astype(np.int16) + less
    return affine(codes, np.ascontiguousarray(values["scale"].T), zeros, values.get("groups"))


METHOD = Method("GPTQ of 2, 4 and 8 bits", _read)

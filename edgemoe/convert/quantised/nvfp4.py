"""NVFP4: 4-bit floats, with an e4m3 scale for every 16 of them and one scale for the whole tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.quantised.numbers import fours, scaled
from edgemoe.convert.quantised.tensors import Pieces, Values, expect, expect_dtype
from edgemoe.convert.safetensors_file import StoredTensor
from edgemoe.errors import FormatError, shortened

__all__ = ["claim_fours", "claim_nvfp4"]

Array = NDArray[np.float32]

_GROUP = 16


def claim_nvfp4(pieces: Pieces, name: str, *, codes: str, tensor_scale: str, divides: bool) -> None:
    """Adds `name.weight` [R, C], decoded from packed codes [R, C / 2] and scales [R, C / 16].

    Args:
        codes: the suffix of the codes' name.
        tensor_scale: the suffix of the name of the tensor's scale.
        divides: whether values are divided by the tensor's scale, rather than multiplied.

    Raises:
        FormatError: a scale is missing or has another shape.
    """
    found = pieces.claim(name, codes=codes, scale=".weight_scale", whole=tensor_scale)
    expect(found["whole"], (), (1,))
    expect_dtype(found["scale"], "F8_E4M3")
    claim_fours(pieces, name, found, _GROUP, _divided if divides else _multiplied)


def claim_fours(
    pieces: Pieces,
    name: str,
    found: dict[str, StoredTensor],
    group: int,
    decode: Callable[[Values], Array],
) -> None:
    """Adds `name.weight`, decoded from 4-bit floats and a scale for each group of `group` columns.

    Raises:
        FormatError: a shape or type does not fit.
    """
    codes = found["codes"]
    expect_dtype(codes, "U8")
    if len(codes.shape) != 2 or codes.shape[1] * 2 % group:
        raise FormatError(
            f"{codes.path}: {shortened(codes.name)}: expected shape [rows, a multiple of {group // 2}], "
            f"got {list(codes.shape)}"
        )
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    expect(found["scale"], (rows, columns // group))
    pieces.add(f"{name}.weight", (rows, columns), found, decode)


def _multiplied(values: Values) -> Array:
    scale: Array = values["scale"] * values["whole"].reshape(())
    return scaled(fours(values["codes"]), scale, 1, _GROUP)


def _divided(values: Values) -> Array:
    whole = values["whole"].reshape(())
    scale = np.divide(values["scale"], whole, dtype=np.float32)
    return scaled(fours(values["codes"]), scale, 1, _GROUP)

"""FP8 (e4m3) with a scale for each block (such as 128 x 128), each row or the whole tensor.

`X` is stored as codes of one byte, next to `X_scale_inv` or `X_scale`. Codes are multiplied by either, in spite of the
first one's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.quantised.numbers import E4M3, scaled
from edgemoe.convert.quantised.tensors import Method, Pieces, Values
from edgemoe.convert.safetensors_file import StoredTensor
from edgemoe.convert.settings import Settings
from edgemoe.errors import FormatError, quoted, shortened

__all__ = ["METHOD", "PER_CHANNEL", "claim_scaled"]

Array = NDArray[np.float32]

_DTYPE = "F8_E4M3"


def _read(pieces: Pieces, settings: Settings) -> None:
    kind = settings.text("fmt", "e4m3")
    if kind != "e4m3":
        raise settings.error("fmt", f"{quoted(kind)} is not supported; supported: e4m3")
    block = settings.integers("weight_block_size")
    if block and (len(block) != 2 or min(block) < 1):
        raise settings.error("weight_block_size", f"expected two sizes, got {quoted(list(block))}")
    _claim_all(pieces, block or None)


def _read_per_channel(pieces: Pieces, settings: Settings) -> None:
    _claim_all(pieces, None)


def _claim_all(pieces: Pieces, block: tuple[int, ...] | None) -> None:
    for name in pieces.ending("", _DTYPE):
        claim_scaled(pieces, name, block, lambda codes: E4M3[codes])


def claim_scaled(
    pieces: Pieces, name: str, block: tuple[int, ...] | None, floats: Callable[[NDArray[np.uint8]], Array]
) -> None:  # fmt: skip
    """Adds a tensor of codes as a decoded one of the same name: the values of the codes times their scales.

    Args:
        block: rows and columns of a block, if config.json gives them.
        floats: returns the values of codes.

    Raises:
        FormatError: scales are missing, or do not fit the blocks.
    """
    found = pieces.claim(
        name, optional=("inverse", "scale"), codes="", inverse="_scale_inv", scale="_scale"
    )
    codes = found["codes"]
    scales = [found[role] for role in ("inverse", "scale") if role in found]
    if len(scales) != 1:
        what = "no" if not scales else "both"
        raise FormatError(
            f"{codes.path}: {shortened(name)}: is quantised, and there is {what} {shortened(name)}_scale_inv "
            f"{'or' if not scales else 'and'} _scale"
        )
    (scale,) = scales
    if len(codes.shape) not in (2, 3):
        raise FormatError(
            f"{codes.path}: {shortened(name)}: expected a matrix or a stack of them, got shape {list(codes.shape)}"
        )
    steps = _steps(codes, scale, block)
    pieces.add(
        name, codes.shape, {"codes": codes, "scale": scale}, partial(_decoded, steps=steps, floats=floats)
    )  # fmt: skip


def _decoded(
    values: Values, *, steps: tuple[int, int], floats: Callable[[NDArray[np.uint8]], Array]
) -> Array:
    out, scale = floats(values["codes"]), values["scale"]
    if scale.ndim < 2:
        scale = scale.reshape(-1, 1)
    return scaled(out, scale, *steps)


def _steps(
    codes: StoredTensor, scale: StoredTensor, block: tuple[int, ...] | None
) -> tuple[int, int]:
    """Returns the rows and columns that share a scale."""
    sizes, shape = codes.shape[-2:], scale.shape
    if len(codes.shape) == 3 and shape[:1] == codes.shape[:1]:
        shape = shape[1:]
    shape = (*shape, 1, 1)[:2] if len(shape) < 2 else shape
    steps = [
        _step(size, count, block[axis] if block else None)
        for axis, (size, count) in enumerate(zip(sizes, shape, strict=False))
    ]
    if len(shape) != 2 or 0 in steps:
        expected = f"blocks of {block[0]} x {block[1]}" if block else "its rows or the whole of it"
        raise FormatError(
            f"{scale.path}: {shortened(scale.name)}: expected scales for {expected} of {list(codes.shape)}, "
            f"got shape {list(scale.shape)}"
        )
    return steps[0], steps[1]


def _step(size: int, count: int, block: int | None) -> int:
    """Returns how many of `size` share one of `count` scales; 0 if they do not fit."""
    if count == 1:
        return size
    if block:
        return block if math.ceil(size / block) == count else 0
    return size // count if size % count == 0 else 0


METHOD = Method("FP8, scales for blocks or tensors (DeepSeek, Qwen, MiniMax, Mistral)", _read)
PER_CHANNEL = Method("FP8, a scale for each row (Llama 4)", _read_per_channel)

"""Reads safetensors from memory, such as a section of a file, without copying; the library's `load` copies them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import FormatError, quoted
from edgemoe.file.parse import parse_object

__all__ = ["is_finite", "need_weights", "no_form", "read_form", "view"]

_MOST_HEADER = 100_000_000  # bytes, the library's limit
_TYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


def view(content: bytes) -> tuple[dict[str, NDArray[np.floating]], Mapping[str, str]]:
    """Returns the float16 and float32 tensors by name, as read-only views of `content`, and the metadata.

    Tensors of other types are left out. A tensor that is not aligned in memory is copied.

    Raises:
        ValueError: `content` is not safetensors.
    """
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        header = parse_object(content[8:start], "safetensors", most=_MOST_HEADER)
        meta = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            if entry["dtype"] not in _TYPES:
                continue
            shape, kind = tuple(map(int, entry["shape"])), _TYPES[entry["dtype"]]
            first, end = map(int, entry["data_offsets"])
            is_sound = (
                min(shape, default=0) >= 0 and 0 <= first <= end <= len(content) - start
                and math.prod(shape) * kind.itemsize == end - first
            )  # fmt: skip
            if not is_sound:
                raise ValueError
            tensor: NDArray[np.floating] = np.ndarray(shape, kind, content, start + first)
            tensors[name] = tensor if tensor.flags.aligned else tensor.copy()
        if not isinstance(meta, dict):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise ValueError("not safetensors") from None
    return tensors, meta


def read_form(
    content: bytes, where: str, what: str, field: str, names: Sequence[str]
) -> tuple[list[NDArray[np.floating]], Mapping[str, str], dict[str, Any]]:
    """Reads a safetensors-based format of edgemoe's own: its tensors, all float32 and finite, metadata and settings.

    Args:
        where: the name of the content in error messages.
        what: what the content should be, for error messages.
        field: the metadata field that holds the version, which must be "1".
        names: the tensors to return, in order.

    Returns:
        The tensors, the metadata, and the JSON object in its field `settings`, which says how they were made.

    Raises:
        FormatError: the content is not of this format, or of another version.
    """
    try:
        tensors, meta = view(content)
        if (version := meta[field]) != "1":
            raise FormatError(f"{where}: {what} of version {quoted(version)}; expected 1")
        own = [tensors[name] for name in names]
        if not all(a.dtype == np.float32 and is_finite(a) for a in own):
            raise no_form(where, what)
        return own, meta, parse_object(meta["settings"], where)
    except FormatError:
        raise
    except (ValueError, TypeError, KeyError):
        raise no_form(where, what) from None


def no_form(where: str, what: str) -> FormatError:
    """Returns the error for content that is not what it should be."""
    return FormatError(f"{where}: not {what} of edgemoe")


def is_finite(tensor: NDArray[np.floating]) -> bool:
    """Returns whether all values are finite, by checking the minimum and the maximum: this takes no temporary array."""
    return bool(tensor.size == 0 or (np.isfinite(tensor.min()) and np.isfinite(tensor.max())))


def need_weights(matrix: NDArray[np.floating]) -> None:
    """Raises a ValueError for a matrix without rows or columns."""
    if not matrix.size:
        raise ValueError(f"expected a matrix of weights, got {list(matrix.shape)}")

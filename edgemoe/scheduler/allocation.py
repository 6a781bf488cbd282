"""Bits per expert, fixed offline: the section `allocation` of a file."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import FormatError
from edgemoe.scheduler.base import Setting

__all__ = ["allocated_bits"]


def allocated_bits(setting: Setting) -> NDArray[np.int8] | None:
    """Returns the bits of every expert, int8 [num_layers, num_experts], at most `setting.bits`; None without a section.

    The section is JSON with `bits`, a list per layer of one number per expert, each one of the file's levels.

    Raises:
        FormatError: the section is not that.
    """
    section = setting.sections.get("allocation")
    if section is None:
        return None
    try:
        bits = np.array(json.loads(section)["bits"])
        is_sound = (
            bits.shape == (setting.num_layers, setting.num_experts) and bits.dtype.kind == "i"
        )
    except (ValueError, KeyError, TypeError):
        is_sound = False
    if not is_sound:
        raise FormatError(
            "allocation: expected JSON with whole numbers `bits` "
            f"[{setting.num_layers}][{setting.num_experts}]"
        )
    out: NDArray[np.int8] = np.minimum(bits, setting.bits).astype(np.int8)
    wrong = out[~np.isin(out, setting.level_bits)]
    if wrong.size:
        raise FormatError(f"allocation: {int(wrong[0])} bits are not one of the file's levels")
    return out

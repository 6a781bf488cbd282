"""Bits per expert, fixed offline: the section `allocation` of a `.moe` file."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import FormatError
from edgemoe.quant import Allocation
from edgemoe.scheduler.base import Setting

__all__ = ["allocated_bits"]


def allocated_bits(setting: Setting) -> NDArray[np.int8] | None:
    """Returns the bits of every expert [num_layers, num_experts], at most `setting.bits`; None without a section.

    Raises:
        FormatError: the section is not an `Allocation` for this model.
    """
    section = setting.sections.get("allocation")
    if section is None:
        return None
    found = Allocation.from_json(section, "section allocation").bits
    if found.shape != (setting.num_layers, setting.num_experts):
        raise FormatError(
            f"section allocation: is for {found.shape[0]} layers of {found.shape[1]} experts; "
            f"the model has {setting.num_layers} of {setting.num_experts}"
        )
    bits: NDArray[np.int8] = np.minimum(found, np.int8(setting.bits))
    wrong = bits[~np.isin(bits, setting.level_bits)]
    if wrong.size:
        raise FormatError(
            f"section allocation: {int(wrong[0])} bits are not one of the file's levels"
        )
    return bits

"""Nested codes: one 8-bit code per weight of which every prefix is a model."""

from edgemoe.quant.allocation import Allocation
from edgemoe.quant.calibration import MIN_TOKENS, Calibration, write_calibration
from edgemoe.quant.nested import (
    DEFAULT_LADDER,
    GROUP,
    LEVEL_WEIGHTS,
    ROUNDING_WEIGHTS,
    plane_widths,
    quantize,
    rung_bytes,
)

__all__ = [
    "DEFAULT_LADDER", "GROUP", "LEVEL_WEIGHTS", "MIN_TOKENS", "ROUNDING_WEIGHTS", "Allocation", "Calibration",
    "plane_widths", "quantize", "rung_bytes", "write_calibration",
]  # fmt: skip

"""Codes whose every prefix is a model: one 8-bit code per weight, or a base and planes of signs (MWQ)."""

from edgemoe.quant.allocation import Allocation
from edgemoe.quant.bit_routers import BitRouters
from edgemoe.quant.calibration import MIN_TOKENS, Calibration, write_calibration
from edgemoe.quant.nested import (
    DEFAULT_LADDER,
    GROUP,
    LEVEL_WEIGHTS,
    ROUNDING_WEIGHTS,
    ROW_SCALES,
    plane_widths,
    quantize,
    rung_bytes,
)
from edgemoe.quant.scheme import SCHEMES, Scheme
from edgemoe.quant.stand_ins import StandIns

__all__ = [
    "DEFAULT_LADDER", "GROUP", "LEVEL_WEIGHTS", "MIN_TOKENS", "ROUNDING_WEIGHTS", "ROW_SCALES",
    "SCHEMES",
    "Allocation", "BitRouters", "Calibration", "Scheme", "StandIns", "plane_widths", "quantize", "rung_bytes",
    "write_calibration",
]  # fmt: skip

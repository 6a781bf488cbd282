"""The formats of NVIDIA's ModelOpt: NVFP4, and FP8 with one scale for the tensor."""

from __future__ import annotations

from edgemoe.convert.quantised.fp8 import claim_scaled
from edgemoe.convert.quantised.numbers import E4M3
from edgemoe.convert.quantised.nvfp4 import claim_nvfp4
from edgemoe.convert.quantised.tensors import Method, Pieces
from edgemoe.convert.settings import Settings
from edgemoe.errors import quoted

__all__ = ["METHOD"]

_ALGORITHMS = ("NVFP4", "FP8", "MIXED_PRECISION")


def _read(pieces: Pieces, settings: Settings) -> None:
    algorithm = settings.text("quant_algo")
    if algorithm not in _ALGORITHMS:
        raise settings.error(
            "quant_algo",
            f"{quoted(algorithm)} is not supported; supported: {', '.join(_ALGORITHMS)}",
        )
    # Told apart by the types of the tensors, as one model may have both.
    for name in pieces.ending(".weight", "U8"):
        claim_nvfp4(
            pieces, name, codes=".weight", tensor_scale=".weight_scale_2", divides=False
        )  # fmt: skip
    for name in pieces.ending(".weight", "F8_E4M3"):
        claim_scaled(pieces, f"{name}.weight", None, lambda codes: E4M3[codes])


METHOD = Method("NVFP4 and FP8 of ModelOpt", _read)

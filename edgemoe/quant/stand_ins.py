"""Stand-ins: small affine maps that run in place of experts that are left out, and their form as bytes.

    S_e(x) = (up_e x + bias_e) down_e,   up [r, D], bias [r], down [r, D]

S_e is the affine map of rank r whose outputs are nearest to those of expert e on a calibration text; `edgemoe
stand-ins` fits it. The bytes are a safetensors file, the section "stand-ins" of a `.moe` file:

    up        float32 [L, E, r, D]
    bias      float32 [L, E, r]
    down      float32 [L, E, r, D]
    metadata  edgemoe_stand_ins 1; settings, JSON of how they were fitted

They are resident and used in place, like bit routers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from edgemoe.errors import FormatError
from edgemoe.file.tensors import no_form, read_form

__all__ = ["StandIns"]

_FIELD, _WHAT = "edgemoe_stand_ins", "stand-ins"


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIns:
    """An affine map of low rank for every routed expert."""

    up: NDArray[np.float32]
    """[L, E, r, D]"""
    bias: NDArray[np.float32]
    """[L, E, r]"""
    down: NDArray[np.float32]
    """[L, E, r, D]"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How they were fitted."""

    def to_bytes(self) -> bytes:
        """Returns the form as bytes."""
        meta = {_FIELD: "1", "settings": json.dumps(dict(self.settings))}
        return save(self.tensors, meta)

    @property
    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The tensors, by name."""
        return {"up": self.up, "bias": self.bias, "down": self.down}

    def check(self, num_layers: int, num_experts: int, where: str, hidden: int = 0) -> None:
        """Checks that they are for this model.

        Args:
            num_layers: how many layers have routed experts.
            num_experts: per layer.
            where: what errors call it.
            hidden: D; 0 if it is not known.

        Raises:
            FormatError: they are for another model.
        """
        L, E, _, D = self.up.shape
        if (num_layers, num_experts) != (L, E):
            raise FormatError(
                f"{where}: is for {L} layers of {E} experts; the model has {num_layers} of {num_experts}"
            )
        if hidden and hidden != D:
            raise FormatError(f"{where}: is for {D} inputs; the model has {hidden}")

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> StandIns:
        """Reads the form as bytes. The result refers to `content`.

        Args:
            where: what errors call it.

        Raises:
            FormatError: these are no stand-ins, or their parts contradict each other.
        """
        own, _, settings = read_form(content, where, _WHAT, _FIELD, ("up", "bias", "down"))
        up, bias, down = own
        if up.ndim != 4 or up.shape[2] == 0 or bias.shape != up.shape[:3] or down.shape != up.shape:
            raise no_form(where, _WHAT)
        return cls(up=up, bias=bias, down=down, settings=settings)

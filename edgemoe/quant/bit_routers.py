"""D2MoE's trained bit routers, which choose an expert's precision for each token, and their form as bytes.

The bytes are a safetensors file, which is a file of its own or the section "bit-routers" of a `.moe` file:

    weight       float32 [L, E, B, D]: one linear layer per routed expert, from the layer's normed input to B logits
    gate_weight  float32 [L, E, B]: the same linear layer's weight for the slot's gate
    bias         float32 [L, E, B]
    metadata     edgemoe_bit_routers 1; levels, the bits that the B logits stand for, ascending ("2 3 4"); settings,
                 JSON of how they were trained

Weights are float32 because they are used in place: float16 would have to be widened into memory of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from edgemoe.file.tensors import no_form, read_form

__all__ = ["BitRouters"]

_FIELD, _WHAT = "edgemoe_bit_routers", "bit routers"


@dataclass(frozen=True, slots=True, kw_only=True)
class BitRouters:
    """One linear layer per routed expert. The precision with the largest logit is the one to run a token at."""

    levels: tuple[int, ...]
    """Bits, ascending. 0 leaves the expert out; it is never taken for the best expert of a token."""
    weight: NDArray[np.float32]
    """[L, E, B, D]"""
    gate_weight: NDArray[np.float32]
    """[L, E, B]"""
    bias: NDArray[np.float32]
    """[L, E, B]"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How they were trained."""

    def to_bytes(self, more: Mapping[str, NDArray[Any]] | None = None) -> bytes:
        """Returns the form as bytes.

        Args:
            more: further tensors, which readers ignore.
        """
        meta = {
            _FIELD: "1", "levels": " ".join(map(str, self.levels)),
            "settings": json.dumps(dict(self.settings)),
        }  # fmt: skip
        return save({**self.tensors, **(more or {})}, meta)

    @property
    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The tensors, by name."""
        return {"weight": self.weight, "gate_weight": self.gate_weight, "bias": self.bias}

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> BitRouters:
        """Reads the form as bytes. The result refers to `content`.

        Args:
            where: what errors call it.

        Raises:
            FormatError: these are no bit routers, or their parts contradict each other.
        """
        names = ("weight", "gate_weight", "bias")
        (weight, *rest), meta, settings = read_form(content, where, _WHAT, _FIELD, names)
        try:
            levels = tuple(map(int, meta["levels"].split()))
        except (ValueError, KeyError, AttributeError):
            raise no_form(where, _WHAT) from None
        is_sound = (
            weight.ndim == 4 and all(a.shape == weight.shape[:3] for a in rest)
            and 0 < len(levels) == weight.shape[2] and list(levels) == sorted(set(levels))
            and levels[0] >= 0 < levels[-1]
        )  # fmt: skip
        if not is_sound:
            raise no_form(where, _WHAT)
        gate_weight, bias = rest
        return cls(
            levels=levels, weight=weight, gate_weight=gate_weight, bias=bias, settings=settings
        )

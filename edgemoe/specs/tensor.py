"""How a resident tensor is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Says how a resident tensor is stored: float32 as it is, or nested codes of a [rows, cols] matrix."""

    kind: Literal["f32", "nested"]
    shape: tuple[int, ...]

    @classmethod
    def f32(cls, *shape: int) -> TensorSpec:
        """Returns that of a float32 tensor."""
        return cls("f32", shape)

    @classmethod
    def nested(cls, rows: int, cols: int) -> TensorSpec:
        """Returns that of a matrix."""
        return cls("nested", (rows, cols))

"""How a resident tensor is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The shape and storage of a resident tensor: plain float32, or the nested codes of a [rows, cols] matrix.

    Nested: the leading bits of each code are a code of fewer bits.
    """

    kind: Literal["f32", "nested"]
    shape: tuple[int, ...]

    @classmethod
    def f32(cls, *shape: int) -> TensorSpec:
        """Returns the spec of a float32 tensor."""
        return cls("f32", shape)

    @classmethod
    def nested(cls, rows: int, cols: int) -> TensorSpec:
        """Returns the spec of a quantised matrix."""
        return cls("nested", (rows, cols))

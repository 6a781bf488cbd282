"""The vocabulary of deciding: what a scheduler is told, and what it answers. Values only.

A plan is a few flat arrays, not an object per expert: a token passes here once per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Plan", "Routing"]


@dataclass(frozen=True, slots=True)
class Routing:
    """Says what the router of one layer chose for T tokens."""

    layer: int
    """Position among the layers with routed experts."""
    experts: NDArray[np.int32]
    """[T, K], best first."""
    gates: NDArray[np.float32]
    """[T, K]"""


@dataclass(frozen=True, slots=True)
class Plan:
    """Says which experts of one layer run, at how many bits, on which tokens, and in which order they are read.

    Row r of the layer's parts is expert i on token tokens[r], for offsets[i] <= r < offsets[i + 1].
    """

    layer: int
    """As in `Routing`."""
    experts: NDArray[np.int32]
    """[n], each once, in the order of reading."""
    bits: NDArray[np.int8]
    """[n]: precision of use."""
    offsets: NDArray[np.int32]
    """[n + 1]"""
    tokens: NDArray[np.int32]
    """[m], grouped by expert."""
    rows: NDArray[np.int32]
    """[T, K]: the part of a token's k-th expert, or -1 when it is skipped. Parts are added in this order."""
    gates: NDArray[np.float32]
    """[T, K]"""

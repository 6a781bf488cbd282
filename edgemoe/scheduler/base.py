"""The contract between a scheduler and the runtime."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Routing

__all__ = ["Scheduler"]


class Scheduler(Protocol):
    """Decides; does nothing. Holds no weights, so that a recorded trace replays it without a model."""

    def __init__(self, *, num_experts: int, bits: int) -> None:
        """Args:
        num_experts: routed experts per layer.
        bits: the precision that the user asked for.
        """

    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """Plans one layer.

        Args:
            routing: what the router chose.
            residency: [E], rungs of each expert of this layer now in memory, 0 = absent; a live view, read only.
        """

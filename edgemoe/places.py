"""Places: one numbering, per layer, of the experts of a model and of its adapters.

A router knows only its E experts. The numbers that it chooses for a token are replaced by places, according to the
token's adapter. From there on, schedulers, store and kernels deal with places only. So tokens of several adapters run
in one pass, and an expert that adapters share with the model is there once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Routing

__all__ = ["Places"]


@dataclass(frozen=True, slots=True)
class Places:
    """The mapping between experts and places."""

    tables: NDArray[np.int32]
    """[adapters + 1, layers, E]: the place of each expert in its layer; row 0 is for the model without an adapter."""
    names: NDArray[np.int32]
    """[layers, places]: the expert (0 to E - 1) that each place holds a version of; -1 for an empty place."""
    owner: NDArray[np.int32]
    """[layers, places - E]: the adapter, counted from 1, of each place after the first E; 0 for an empty place."""

    def put(self, routing: Routing, rows: Sequence[tuple[slice, int]]) -> None:
        """Replaces the experts of a routing by their places, in the same arrays; its scores, which are by expert, go.

        Args:
            routing: the routing to change.
            rows: for each sequence that has an adapter, its rows and the adapter's number, from 1.
        """
        routing.scores = None
        for mine, adapter in rows:
            tables, experts = self.tables[adapter], routing.experts[mine]
            experts[...] = tables[routing.layer].take(experts)
            if routing.ahead_experts is not None:
                for layer, later in enumerate(routing.ahead_experts, start=routing.layer + 1):
                    later[mine] = tables[layer].take(later[mine])

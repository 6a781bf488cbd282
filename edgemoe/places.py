"""Where the experts of a model and of its adapters are in one table: each layer has a place for each of them.

A router knows only its E experts. What it has chosen for a token is called by its place for that token's adapter; from
there on, schedulers, store and kernels know places alone, so that tokens of several adapters run in one pass, and what
adapters share is one expert.
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
    """Says which expert is where."""

    tables: NDArray[np.int32]
    """[adapters + 1, layers, E]: the place in its layer of each expert; first those of the model alone."""
    names: NDArray[np.int32]
    """[layers, places]: which expert each place is of; -1 for none."""
    owner: NDArray[np.int32]
    """[layers, places - E]: whose the further ones are, adapters counted from 1; 0 for nobody's."""

    def put(self, routing: Routing, rows: Sequence[tuple[slice, int]]) -> None:
        """Calls the experts of a routing by their places, in place; its scores are of no use any more, and left out.

        Args:
            rows: of each sequence that has an adapter, and its number.
        """
        routing.scores = None
        for mine, adapter in rows:
            tables, experts = self.tables[adapter], routing.experts[mine]
            experts[...] = tables[routing.layer].take(experts)
            if routing.ahead_experts is not None:
                for layer, later in enumerate(routing.ahead_experts, start=routing.layer + 1):
                    later[mine] = tables[layer].take(later[mine])

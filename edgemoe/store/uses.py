"""Counts of how much each expert is used, which decide what a device drops and what it gets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Priorities

__all__ = ["Uses"]

_HALF_LIFE = 64  # tokens after which a use counts half
_LARGEST = 1e100  # from this `unit` on, all counts are scaled down


class Uses:
    """Exponentially decaying counts of uses, with a half-life in tokens.

    Instead of making all counts decay, it counts a new use as `unit`, which doubles every half-life. The order of
    experts is the same, and it is cheaper.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        """Args:
        num_experts: of all layers together.
        """
        self.order = Priorities.zeros(num_layers, num_experts // num_layers)
        """The counts as live priorities, by which a cache drops experts."""
        self.scores: NDArray[np.float64] = self.order.scores.reshape(-1)
        """[num_experts], live. Whoever adds `unit` to some of them must then call `advance`."""
        self.unit = 1.0
        """What a use counts now."""
        self._layer_share = 1.0 / num_layers

    def count(self, experts: NDArray[np.int32], counts: NDArray[np.int32], tokens: int) -> None:
        """Counts uses in one layer.

        Args:
            experts: [n], of one layer, as layer * E + expert.
            counts: [n], how many tokens each of them ran.
            tokens: how many tokens have passed the layer.
        """
        if not tokens or len(experts) == 0:
            return
        self.scores[experts] += counts * self.unit
        self.advance(experts[0], tokens)

    def advance(self, experts: Any, tokens: int) -> None:
        """Lets time pass after scores have changed.

        Args:
            experts: one expert, or one of each layer whose scores have changed.
            tokens: passes of a token through one layer.
        """
        self.order.version[experts // self.order.scores.shape[1]] += 1
        # A token passes every layer once, so passing a single layer is 1 / num_layers of a token's time.
        self.unit *= 2.0 ** (tokens / _HALF_LIFE * self._layer_share)
        if self.unit > _LARGEST:
            self.scores /= self.unit
            self._all_have_changed()

    def take(self, scores: NDArray[np.float64]) -> None:
        """Replaces all counts, by scores [num_experts] in which a use now counts 1."""
        self.scores[:] = scores
        self._all_have_changed()

    def _all_have_changed(self) -> None:
        self.order.version[:] += np.uint32(1)
        self.unit = 1.0

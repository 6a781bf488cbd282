"""How much each expert of a model is used: what a device drops by, and what it gets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Priorities

__all__ = ["Uses"]

_HALF_LIFE = 64  # tokens after which a use counts half
_LARGEST = 1e100


class Uses:
    """Uses so far, a use of now weighing `unit`, which doubles every half-life: as good as forgetting, and cheaper."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        """Args:
        num_experts: of all layers.
        """
        self.order = Priorities.zeros(num_layers, num_experts // num_layers)
        """Live, for a cache to drop by."""
        self.scores: NDArray[np.float64] = self.order.scores.reshape(-1)
        """[num_experts], live: who adds `unit` to some says `advance`."""
        self.unit = 1.0
        self._layer_share = 1.0 / num_layers

    def count(self, experts: NDArray[np.int32], counts: NDArray[np.int32], tokens: int) -> None:
        """Counts those of one layer, which tokens have passed; a use of an earlier layer counts as much."""
        if not tokens or len(experts) == 0:
            return
        self.scores[experts] += counts * self.unit
        self.advance(experts[0], tokens)

    def advance(self, experts: Any, tokens: int) -> None:
        """Uses have changed in the layers of some experts, which tokens have passed."""
        self.order.version[experts // self.order.scores.shape[1]] += 1
        # Each layer comes once for a token, so that a layer's share of the time is its share of the experts.
        self.unit *= 2.0 ** (tokens / _HALF_LIFE * self._layer_share)
        if self.unit > _LARGEST:
            self.scores /= self.unit
            self._all_have_changed()

    def take(self, scores: NDArray[np.float64]) -> None:
        """Takes uses from elsewhere, of which one of now weighs 1."""
        self.scores[:] = scores
        self._all_have_changed()

    def _all_have_changed(self) -> None:
        self.order.version[:] += np.uint32(1)
        self.unit = 1.0

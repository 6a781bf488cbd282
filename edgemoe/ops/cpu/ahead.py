"""Layers that run without Python in between, as all of their experts are in memory. See `Ops.ahead`."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core

__all__ = ["Ahead"]


class Ahead:
    """The layers that are ahead, and the experts chosen in them for one token. One caller at a time."""

    def __init__(self) -> None:
        self._wish: tuple[Any, Any, Any] = (None, None, None)
        self._residency = np.empty(0, np.int8)
        self._all = self._layers = frozenset[int]()
        self.scores = np.empty((1, 0), np.float32)
        """[1, E], scratch."""
        self.experts = np.empty((0, 0), np.int32)
        """[layers, K], the experts last chosen in each layer."""
        self.gates = np.empty((0, 0), np.float32)
        """[layers, K], their gates."""

    @property
    def slots(self) -> _core.Cache:
        """The cache that holds the experts."""
        slots: _core.Cache = self._wish[0]
        return slots

    @property
    def levels(self) -> NDArray[np.int8]:
        """[layers * E], the level that each expert runs at."""
        levels: NDArray[np.int8] = self._wish[1]
        return levels

    def is_other(self, slots: _core.Cache, levels: NDArray[np.int8], rule: _core.RouteRule) -> bool:
        """Returns whether these differ from what `take` was given; recorded work is then no longer valid."""
        return any(map(operator.is_not, (slots, levels, rule), self._wish))

    def take(self, slots: _core.Cache, levels: NDArray[np.int8], rule: _core.RouteRule) -> None:
        """Takes the arguments of `Ops.ahead`, and allocates the arrays for choices."""
        layers = len(levels) // rule.num_experts
        self._residency = slots.residency
        self._all = frozenset(range(layers))
        self.scores = np.empty((1, rule.num_experts), np.float32)
        self.experts = np.empty((layers, rule.top_k), np.int32)
        self.gates = np.empty((layers, rule.top_k), np.float32)
        self._wish = slots, levels, rule  # last: Ctrl-C may come at any moment

    def layers(self, *, is_start: bool) -> frozenset[int]:
        """See `Ops.ahead`."""
        is_there = self._residency >= self.levels
        if is_there.all():
            whole = self._all
        else:
            by_layer = is_there.reshape(len(self._all), -1).all(1)
            whole = frozenset(by_layer.nonzero()[0].tolist())
        self._layers = whole if is_start else self._layers & whole
        return self._layers

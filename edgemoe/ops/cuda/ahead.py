"""Layers that run without the host: the device has all of their experts, and chooses. See `edgemoe.ops.cuda`."""

from __future__ import annotations

import operator
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.ops import Ids, RouterWeights
from edgemoe.specs import Activation

__all__ = ["Ahead"]

_NONE: frozenset[int] = frozenset()


class Ahead:
    """Chooses experts of one token, layer by layer, and notes which. One caller at a time."""

    def __init__(
        self, device: _core.Device, ws: _core.DeviceWorkspace, config: ModelConfig
    ) -> None:
        self._device, self._ws = device, ws
        self._num_layers = len(config.moe_layers)
        self.change(config.experts_per_token)
        self._tables: list[_core.DeviceTable] = []
        self._wish: tuple[Any, Any] = (None, None)
        self._where: Any = None  # experts were when a pass asked last
        self._is_known = False
        self._layers = _NONE

    @staticmethod
    def bytes(config: ModelConfig) -> int:
        """Returns what it takes of a device."""
        layers, k = len(config.moe_layers), config.experts_per_token
        tables = layers * _core.DeviceTable.bytes(config.num_experts)
        return 2 * _core.Device.taken(4 * layers * k) + tables

    def change(self, k: int) -> None:
        """Chooses so many of each layer from now on, at most as many as at first."""
        shape = self._num_layers, k
        self._experts, self._gates = (_core.DeviceArray(self._device, shape) for _ in range(2))
        self._here = np.empty(shape, np.float32)  # int32 that are moved as floats are

    def layers(
        self, cache: _core.Cache, levels: NDArray[np.int8], rule: _core.RouteRule, is_start: bool
    ) -> frozenset[int]:
        """See `Ops.ahead`: none while experts move, as a table of where they lie is much to fill for one token."""
        wish, where = (levels, rule), (cache.progress[0], cache.residency.tobytes())
        if where != self._where or any(map(operator.is_not, wish, self._wish)):
            self._wish, self._where = wish, where
            self._is_known, self._layers = False, _NONE
        elif is_start and not self._is_known:
            self._is_known = True
            if _core.device_can_choose(rule):
                self._layers = self._fill(cache, levels)
        return self._layers

    def _fill(self, cache: _core.Cache, levels: NDArray[np.int8]) -> frozenset[int]:
        """Fills the tables of layers of which all experts are there, and returns these layers."""
        if not self._tables:
            self._tables = [_core.DeviceTable(self._device, cache) for _ in range(self._num_layers)]
        is_there = (cache.residency >= levels).reshape(self._num_layers, -1)
        whole = is_there.all(1).nonzero()[0].tolist()
        for layer in whole:
            self._tables[layer].fill(cache, layer, levels.reshape(is_there.shape)[layer])
        return frozenset(whole)

    def choose(
        self, layer: int, logits: _core.DeviceArray, router: RouterWeights, rule: _core.RouteRule
    ) -> None:
        """Chooses by logits [1, E]; see `Ops.choose`."""
        bias, choice_bias = (
            None if b is None else cast(Any, b).device for b in (router.bias, router.choice_bias)
        )
        at = slice(layer, layer + 1)
        _core.device_choose(
            self._ws, rule, logits, bias, choice_bias, self._experts[at], self._gates[at]
        )

    def run(
        self, layer: int, x: _core.DeviceArray, activation: Activation, biases: list[Any],
        parts: _core.DeviceArray, out: _core.DeviceArray,
    ) -> None:  # fmt: skip
        """See `Ops.run_chosen`.

        Args:
            biases: of the experts; empty for none.
        """
        at = slice(layer, layer + 1)
        _core.device_chosen_ffn(
            self._ws, x, self._tables[layer], self._experts[at], self._gates[at], parts, out, activation, biases,
        )  # fmt: skip

    def chosen(self) -> Ids:
        """See `Ops.chosen`."""
        _core.device_download(self._ws, [self._experts], [self._here])
        return self._here.view(np.int32)

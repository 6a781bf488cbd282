"""Layers that run without the host, as the device has all of their experts and chooses itself. See `Ops.ahead`."""

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
    """The layers that are ahead on a device, and the experts it chooses in them for one token. One caller at a time."""

    def __init__(
        self, device: _core.Device, ws: _core.DeviceWorkspace, config: ModelConfig
    ) -> None:
        self._device, self._ws = device, ws
        self._num_layers = len(config.moe_layers)
        self.change(config.experts_per_token)
        self._tables: list[_core.DeviceTable] = []
        self._wish: tuple[Any, Any] = (None, None)
        self._where: Any = None  # where experts were when a pass last asked
        self._is_known = False
        self._layers = _NONE

    @staticmethod
    def bytes(config: ModelConfig) -> int:
        """Returns the bytes that it takes of a device's memory."""
        layers, k = len(config.moe_layers), config.experts_per_token
        tables = layers * _core.DeviceTable.bytes(config.num_experts)
        return 2 * _core.Device.taken(4 * layers * k) + tables

    def change(self, k: int) -> None:
        """From now on chooses `k` experts in each layer; at most as many as at first, for which memory was counted."""
        shape = self._num_layers, k
        self._experts, self._gates = (_core.DeviceArray(self._device, shape) for _ in range(2))
        self._here = np.empty(shape, np.float32)  # int32, copied as if they were float32

    def layers(
        self, cache: _core.Cache, levels: NDArray[np.int8], rule: _core.RouteRule, is_start: bool
    ) -> frozenset[int]:
        """See `Ops.ahead`. Returns none while experts move, as filling tables of where they lie takes too long."""
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
        """Fills the tables of the layers whose experts are all on the device, and returns those layers."""
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
        """Chooses experts by logits [1, E]; see `Ops.choose`."""
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
            biases: those of the experts; empty for none.
        """
        at = slice(layer, layer + 1)
        _core.device_chosen_ffn(
            self._ws, x, self._tables[layer], self._experts[at], self._gates[at], parts, out, activation, biases,
        )  # fmt: skip

    def chosen(self) -> Ids:
        """See `Ops.chosen`."""
        _core.device_download(self._ws, [self._experts], [self._here])
        return self._here.view(np.int32)

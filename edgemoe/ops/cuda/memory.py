"""A device's arrays, copies from and to it, and the scratch of its verbs."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.ops.cpu import CpuOps
from edgemoe.ops.cuda.ahead import Ahead
from edgemoe.ops.cuda.placement import MOST_HEAD_DIM, lacks
from edgemoe.ops.notes import DeviceNotes
from edgemoe.ops.values import ExpertLayer, OpsShape
from edgemoe.specs import MixerSpec

__all__ = ["Array", "CudaMemory", "HostArray"]

Array = _core.DeviceArray
HostArray = NDArray[np.float32]

_LOGIT_ROWS = 16  # of which logits are made at once


class CudaMemory:
    """Is what the parts of `CudaOps` share. See `Ops` for the verbs."""

    repeats = True
    """Work is noted and repeated; without that what comes is the same, later."""
    runs_ahead = True
    """Layers of which it has all experts need no host; likewise."""

    def __init__(
        self,
        shape: OpsShape,
        device: _core.Device,
        config: ModelConfig,
        *,
        hosts: bool,
        corrected: bool,
        shares: bool = False,
    ) -> None:
        """Args:
        hosts: the host runs some mixers.
        corrected: matrices may have corrections.
        shares: experts in the host's memory are lent to the device, which runs all of them.
        """
        self._device = device
        self._ws = _core.DeviceWorkspace(device, *_workspace(shape, config, corrected))
        self._x_of: Array | None = None
        """What the host has a copy of."""
        self._cpu = CpuOps(_host_shape(shape, hosts))
        d, e, k = config.hidden_size, config.num_experts, config.experts_per_token
        self._logits = self.empty(min(shape.max_tokens, _LOGIT_ROWS), config.vocab_size)
        self._scores = self.empty(shape.max_tokens, max(e, 1))
        self._unturned = self.empty(shape.max_tokens, 0)
        self._is_posted = False
        """Logits are on their way to the host, and the rows that they are of if these are few."""
        self._notes = DeviceNotes(self._ws)
        self._ahead = Ahead(device, self._ws, config) if _may_run_ahead(config, corrected) else None
        self._x = np.empty((shape.max_tokens, d), np.float32)
        self._parts = np.empty((shape.max_tokens * max(k, 1), d), np.float32)
        self._shares = shares
        self._layers: dict[int, tuple[ExpertLayer, tuple[ExpertLayer, list[Any], Any]]] = {}
        """By its identity, a layer, and what its experts have: on the host; biases and basis on the device."""

    @staticmethod
    def scratch_bytes(shape: OpsShape, config: ModelConfig, *, corrected: bool) -> int:
        """Returns what the operations' own scratch takes of a device."""
        rows = min(shape.max_tokens, _LOGIT_ROWS)
        floats = (rows * config.vocab_size, shape.max_tokens * max(config.num_experts, 1), 0)
        own = sum(_core.Device.taken(4 * n) for n in floats)
        if _may_run_ahead(config, corrected):
            own += Ahead.bytes(config)
        return own + _core.DeviceWorkspace.bytes(*_workspace(shape, config, corrected))

    @staticmethod
    def host_bytes(shape: OpsShape, config: ModelConfig, *, hosts: bool) -> int:
        """Returns the host's memory of the operations' scratch."""
        rows = shape.max_tokens * (1 + config.experts_per_token)
        return CpuOps.scratch_bytes(_host_shape(shape, hosts)) + 4 * rows * config.hidden_size

    def empty(self, *shape: int) -> Array:
        """See `Ops.empty`."""
        return _core.DeviceArray(self._device, shape)

    def beside(self, spec: MixerSpec, keys: str, values: str) -> CpuOps | None:
        """See `Ops.beside`."""
        return self._cpu if lacks(spec, keys, values) else None

    def download(self, x: Array, out: HostArray) -> None:
        """See `Ops.download`."""
        _core.device_download(self._ws, [x], [out])

    def upload(self, x: HostArray, out: Array) -> None:
        """See `Ops.upload`."""
        self._x_of = None
        out.upload(x)

    def settle(self) -> None:
        """See `Ops.settle`; waits."""
        _core.device_download(self._ws, [], [])

    def host(self, *shape: int, dtype: str) -> NDArray[Any]:
        """See `Ops.host`."""
        return self._cpu.host(*shape, dtype=dtype)

    def _copy(self, x: Array) -> HostArray:
        """Returns the host's copy of what was routed last."""
        out = self._x[: len(x)]
        if self._x_of is not x:
            _core.device_download(self._ws, [x], [out])
            self._x_of = x
        return out


def _may_run_ahead(config: ModelConfig, corrected: bool) -> bool:
    """Returns whether the device could choose experts by itself: where these take what the router gives them."""
    return bool(config.moe_layers) and not corrected and not config.gate_input


def _workspace(s: OpsShape, config: ModelConfig, corrected: bool) -> tuple[Any, ...]:
    """Returns the last arguments of a `DeviceWorkspace`."""
    # Wider heads are the host's.
    _, *shape = astuple(replace(s, head_dim=min(s.head_dim, MOST_HEAD_DIM)))
    routed = s.max_tokens * max(config.experts_per_token, 1)
    return (*shape, routed, corrected)


def _host_shape(shape: OpsShape, hosts: bool) -> OpsShape:
    """Returns the same for the host, which only attends where it runs mixers."""
    return shape if hosts else replace(shape, max_context=1)

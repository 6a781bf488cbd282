"""A device's arrays, copies to and from it, and the scratch of its verbs."""

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

_LOGIT_ROWS = 16  # rows whose logits are computed at once


class CudaMemory:
    """The common base of the parts of `CudaOps`. See `Ops` for the verbs."""

    repeats = True
    """Whether work is recorded and repeated. Results are the same without, and come later."""
    runs_ahead = True
    """Whether layers whose experts are all on the device run without the host. Results are the same without."""

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
        hosts: whether the host runs some mixers.
        corrected: whether matrices may have low-rank corrections.
        shares: whether the device runs all experts straight from the host's memory.
        """
        self._device = device
        self._ws = _core.DeviceWorkspace(device, *_workspace(shape, config, corrected))
        self._x_of: Array | None = None
        """The array that `_x` is a copy of; None if of nothing valid."""
        self._cpu = CpuOps(_host_shape(shape, hosts))
        d, e, k = config.hidden_size, config.num_experts, config.experts_per_token
        self._logits = self.empty(min(shape.max_tokens, _LOGIT_ROWS), config.vocab_size)
        self._scores = self.empty(shape.max_tokens, max(e, 1))
        self._unturned = self.empty(shape.max_tokens, 0)
        self._is_posted = False
        """Whether logits are on their way to the host, with the rows they were computed from if these are few."""
        self._notes = DeviceNotes(self._ws)
        self._ahead = Ahead(device, self._ws, config) if _may_run_ahead(config, corrected) else None
        self._x = np.empty((shape.max_tokens, d), np.float32)
        self._parts = np.empty((shape.max_tokens * max(k, 1), d), np.float32)
        self._shares = shares
        self._layers: dict[int, tuple[ExpertLayer, tuple[ExpertLayer, list[Any], Any]]] = {}
        """By the `id` of a layer: the layer, and what `_layer` returns for it."""

    @staticmethod
    def scratch_bytes(shape: OpsShape, config: ModelConfig, *, corrected: bool) -> int:
        """Returns the bytes of the operations' own scratch in a device's memory."""
        rows = min(shape.max_tokens, _LOGIT_ROWS)
        floats = (rows * config.vocab_size, shape.max_tokens * max(config.num_experts, 1), 0)
        own = sum(_core.Device.taken(4 * n) for n in floats)
        if _may_run_ahead(config, corrected):
            own += Ahead.bytes(config)
        return own + _core.DeviceWorkspace.bytes(*_workspace(shape, config, corrected))

    @staticmethod
    def host_bytes(shape: OpsShape, config: ModelConfig, *, hosts: bool) -> int:
        """Returns the bytes of the operations' scratch in the host's memory."""
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
        """Returns a copy of x in the host's memory; x is downloaded unless the host has it already."""
        out = self._x[: len(x)]
        if self._x_of is not x:
            _core.device_download(self._ws, [x], [out])
            self._x_of = x
        return out


def _may_run_ahead(config: ModelConfig, corrected: bool) -> bool:
    """Returns whether the device could run layers without the host.

    It cannot with corrections, nor where gates multiply the experts' inputs.
    """
    return bool(config.moe_layers) and not corrected and not config.gate_input


def _workspace(s: OpsShape, config: ModelConfig, corrected: bool) -> tuple[Any, ...]:
    """Returns the arguments of a `DeviceWorkspace` after the device."""
    # Mixers with wider heads run on the host.
    _, *shape = astuple(replace(s, head_dim=min(s.head_dim, MOST_HEAD_DIM)))
    routed = s.max_tokens * max(config.experts_per_token, 1)
    return (*shape, routed, corrected)


def _host_shape(shape: OpsShape, hosts: bool) -> OpsShape:
    """Returns the sizes that the host's operations need; they attend only if the host runs mixers."""
    return shape if hosts else replace(shape, max_context=1)

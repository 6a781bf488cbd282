"""Verbs of rows on a device; see `edgemoe.ops.rows`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from edgemoe import _core
from edgemoe.ops.cuda.memory import Array, CudaMemory, HostArray
from edgemoe.ops.cuda.placement import Both
from edgemoe.ops.values import Ids, RowTable
from edgemoe.specs import Activation

__all__ = ["CudaRows"]


class CudaRows(CudaMemory):
    """The row verbs of a device; see `CudaOps`."""

    def embed(self, table: RowTable | Both, ids: Ids, scale: float, out: Array) -> None:
        """See `Ops.embed`."""
        self._x_of = None
        rows = self._x[: len(ids)]
        self._cpu.embed(table.host if isinstance(table, Both) else table, ids, scale, rows)
        out.upload(rows)

    def norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """See `Ops.norm`."""
        self._x_of = None
        _core.device_add_norm(self._ws, None, 0.0, x, weight, eps, out)

    def linear(
        self,
        x: Array,
        weights: Sequence[_core.DeviceMatrix | Both],
        outs: Sequence[Array | HostArray],
    ) -> None:
        """See `Ops.linear`. There may be a single `out` of numpy, for logits: it is downloaded and waited for."""
        matrices = [w.device if isinstance(w, Both) else w for w in weights]
        if not isinstance(outs[0], np.ndarray):
            _core.device_linear(self._ws, x, matrices, cast("list[Array]", outs))
            return
        out = outs[0]
        for first in range(0, len(x), len(self._logits)):
            part = self._logits[: min(len(self._logits), len(x) - first)]
            _core.device_linear(self._ws, x[first : first + len(part)], matrices, [part])
            _core.device_download(self._ws, [part], [out[first : first + len(part)]])

    def linear_f32(self, x: Array, weights: Sequence[Array], outs: Sequence[Array]) -> None:
        """See `Ops.linear_f32`."""
        for weight, out in zip(weights, outs, strict=True):
            _core.device_matmul(self._ws, x, weight, out)

    def linear_heads(self, x: Array, weight: _core.DeviceMatrix, heads: int, out: Array) -> None:
        """See `Ops.linear_heads`."""
        _core.device_linear_heads(self._ws, x, weight, heads, out)

    def ffn(
        self,
        x: Array,
        gate: _core.DeviceMatrix | None,
        up: _core.DeviceMatrix,
        down: _core.DeviceMatrix,
        out: Array,
        *,
        activation: Activation,
    ) -> None:
        """See `Ops.ffn`."""
        _core.device_ffn(self._ws, x, gate, up, down, out, activation)

    def add(
        self,
        x: Array,
        scale: float,
        out: Array,
        *,
        gate_weight: Array | None = None,
        gate_input: Array | None = None,
    ) -> None:
        """See `Ops.add`."""
        _core.device_add_rows(self._ws, x, scale, gate_weight, gate_input, out)

    def add_norm(
        self, added: Array, scale: float, x: Array, weight: Array, eps: float, out: Array
    ) -> None:
        """See `Ops.add_norm`."""
        self._x_of = None
        _core.device_add_norm(self._ws, added, scale, x, weight, eps, out)

    def add_bias(self, bias: Array | HostArray, out: Array | HostArray) -> None:
        """See `Ops.add_bias`."""
        if isinstance(out, np.ndarray):
            self._cpu.add_bias(cast(HostArray, bias), out)
        else:
            _core.device_add_bias(self._ws, cast(Array, bias), out)

    def scale(self, factor: float, out: Array | HostArray) -> None:
        """See `Ops.scale`."""
        if isinstance(out, np.ndarray):
            self._cpu.scale(factor, out)
        else:
            _core.device_scale(self._ws, factor, out)

    def multiply(self, factors: Array, out: Array) -> None:
        """See `Ops.multiply`."""
        self._x_of = None
        _core.device_multiply(self._ws, factors, out)

    def weigh(self, x: Array, gates: HostArray, out: Array) -> None:
        """See `Ops.weigh`."""
        self._x_of = None
        _core.device_weigh(self._ws, x, gates, out)

    def soft_cap(self, cap: float, out: HostArray) -> None:
        """See `Ops.soft_cap`; it is for logits, which are an array of the host."""
        self._cpu.soft_cap(cap, out)

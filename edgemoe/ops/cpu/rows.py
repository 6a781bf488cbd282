"""Verbs of rows on a CPU; see `edgemoe.ops.rows`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgemoe import _core
from edgemoe.ops.cpu.memory import CpuMemory
from edgemoe.ops.values import Array, Ids, Matrix, RowTable
from edgemoe.specs import Activation

__all__ = ["CpuRows"]


class CpuRows(CpuMemory):
    """The row verbs of a CPU; see `CpuOps`."""

    def embed(self, table: RowTable, ids: Ids, scale: float, out: Array) -> None:
        """See `Ops.embed`."""
        table.decode_rows(ids, out, scale)

    def norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """See `Ops.norm`."""
        _core.rms_norm(self._ws, x, weight, eps, out)

    def linear(self, x: Array, weights: Sequence[Matrix], outs: Sequence[Array]) -> None:
        """See `Ops.linear`."""
        _core.linear(self._ws, x, weights, outs)

    def linear_f32(self, x: Array, weights: Sequence[Array], outs: Sequence[Array]) -> None:
        """See `Ops.linear_f32`."""
        for weight, out in zip(weights, outs, strict=True):
            _core.linear_f32(self._ws, x, weight, out)

    def linear_heads(self, x: Array, weight: Matrix, heads: int, out: Array) -> None:
        """See `Ops.linear_heads`."""
        _core.linear_heads(self._ws, x, weight, heads, out)

    def ffn(
        self,
        x: Array,
        gate: Matrix | None,
        up: Matrix,
        down: Matrix,
        out: Array,
        *,
        activation: Activation,
        hidden: Array | None = None,
    ) -> None:
        """See `Ops.ffn`; hidden [T, H], if given, gets the input of down."""
        _core.ffn(self._ws, x, gate, up, down, out, hidden, activation)

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
        _core.add_rows(self._ws, x, scale, gate_weight, gate_input, out)

    def add_norm(
        self, added: Array, scale: float, x: Array, weight: Array, eps: float, out: Array
    ) -> None:
        """See `Ops.add_norm`."""
        _core.add_norm(self._ws, added, scale, x, weight, eps, out)

    def add_bias(self, bias: Array, out: Array) -> None:
        """See `Ops.add_bias`."""
        _core.add_bias(self._ws, bias, out)

    def scale(self, factor: float, out: Array) -> None:
        """See `Ops.scale`."""
        out *= np.float32(factor)

    def multiply(self, factors: Array, out: Array) -> None:
        """See `Ops.multiply`."""
        _core.multiply(self._ws, factors, out)

    def weigh(self, x: Array, gates: Array, out: Array) -> None:
        """See `Ops.weigh`."""
        np.multiply(x, gates, out=out)

    def soft_cap(self, cap: float, out: Array) -> None:
        """See `Ops.soft_cap`."""
        _core.soft_cap(self._ws, cap, out)

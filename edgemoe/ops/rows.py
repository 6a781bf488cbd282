"""Verbs of rows: products with matrices, and what is done to a token's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgemoe.ops.values import Array, Ids, Matrix, RowTable
from edgemoe.specs import Activation

__all__ = ["RowVerbs"]


class RowVerbs(Protocol):
    """Are a device's; see `Ops`."""

    def embed(self, table: RowTable, ids: Ids, scale: float, out: Array) -> None:
        """out [T, D] = scale * table[ids]."""

    def norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """out [T, D] = RMS norm of x; out may be x."""

    def linear(self, x: Array, weights: Sequence[Matrix], outs: Sequence[Array]) -> None:
        """outs[i] [T, rows] = x [T, cols] times weights[i] transposed."""

    def linear_f32(self, x: Array, weights: Sequence[Array], outs: Sequence[Array]) -> None:
        """The same of float32 matrices, few rows that decide much; x is not rounded."""

    def linear_heads(self, x: Array, weight: Matrix, heads: int, out: Array) -> None:
        """out [T, heads * n], of each head the first columns = its rows of `weight` times its first columns of x.

        weight [heads * rows, cols], rows a multiple of 16; x [T, heads * m]. What is beside them stays.
        """

    def ffn(
        self,
        x: Array,
        gate: Matrix | None,
        up: Matrix,
        down: Matrix,
        out: Array,
        *,
        activation: Activation,
    ) -> None:
        """out [T, D] = down(activation(gate x, up x)); without a gate where the activation needs none."""

    def add(
        self,
        x: Array,
        scale: float,
        out: Array,
        *,
        gate_weight: Array | None = None,
        gate_input: Array | None = None,
    ) -> None:
        """out [T, D] += scale * x, each row times sigmoid(gate_weight · gate_input) if given."""

    def add_norm(
        self, added: Array, scale: float, x: Array, weight: Array, eps: float, out: Array
    ) -> None:
        """x [T, D] += scale * added, and out [T, D] = RMS norm of x: what stands between two halves of a layer."""

    def add_bias(self, bias: Array, out: Array) -> None:
        """out [T, D] += bias [D]."""

    def scale(self, factor: float, out: Array) -> None:
        """out *= factor."""

    def multiply(self, factors: Array, out: Array) -> None:
        """out [T, D] *= factors, [T, D], [D] or [1]."""

    def weigh(self, x: Array, gates: Array, out: Array) -> None:
        """out [T, D] = x * gates [T, 1], which are the host's."""

    def soft_cap(self, cap: float, out: Array) -> None:
        """out = cap * tanh(out / cap)."""

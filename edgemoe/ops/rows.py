"""Verbs that treat each row by itself: products with matrices, norms and element-wise operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgemoe.ops.values import Array, Ids, Matrix, RowTable
from edgemoe.specs import Activation

__all__ = ["RowVerbs"]


class RowVerbs(Protocol):
    """The row verbs of a device; see `Ops`."""

    def embed(self, table: RowTable, ids: Ids, scale: float, out: Array) -> None:
        """out [T, D] = scale * table[ids]."""

    def norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """out [T, D] = the RMS norm of x [T, D] times weight [D]; out may be x."""

    def linear(self, x: Array, weights: Sequence[Matrix], outs: Sequence[Array]) -> None:
        """outs[i] [T, rows] = x [T, cols] times the transpose of weights[i] [rows, cols]."""

    def linear_f32(self, x: Array, weights: Sequence[Array], outs: Sequence[Array]) -> None:
        """`linear` for float32 matrices, whose few rows decide much, as those of routers. x is not rounded."""

    def linear_heads(self, x: Array, weight: Matrix, heads: int, out: Array) -> None:
        """Applies a matrix of its own to each head: out[t, h, :rows] = weight[h] x[t, h, :cols].

        weight [heads * rows, cols] has the heads' matrices one after the other; rows is a multiple of 16. x [T, heads *
        m] with m >= cols, out [T, heads * n] with n >= rows. The other columns of out are left as they are.
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
        """out [T, D] = down(activation(gate x, up x)); gate is None for an activation without a gate."""

    def add(
        self,
        x: Array,
        scale: float,
        out: Array,
        *,
        gate_weight: Array | None = None,
        gate_input: Array | None = None,
    ) -> None:
        """out [T, D] += scale * x [T, D], with each row times sigmoid(gate_weight · gate_input) if these are given.

        gate_weight [D], gate_input [T, D].
        """

    def add_norm(
        self, added: Array, scale: float, x: Array, weight: Array, eps: float, out: Array
    ) -> None:
        """x [T, D] += scale * added, then out [T, D] = the RMS norm of x: the step between two halves of a layer."""

    def add_bias(self, bias: Array, out: Array) -> None:
        """out [T, D] += bias [D]."""

    def scale(self, factor: float, out: Array) -> None:
        """out *= factor."""

    def multiply(self, factors: Array, out: Array) -> None:
        """out [T, D] *= factors of the shape [T, D], [D] or [1]."""

    def weigh(self, x: Array, gates: Array, out: Array) -> None:
        """out [T, D] = x [T, D] * gates [T, 1], which are an array of the host."""

    def soft_cap(self, cap: float, out: Array) -> None:
        """out = cap * tanh(out / cap)."""

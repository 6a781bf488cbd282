"""CPU operations that show the inputs of every matrix to an observer, for calibration; results are unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from edgemoe.ops import (
    Array,
    ExpertLayer,
    Matrix,
    OpsShape,
    attend_in_steps,
    attend_latents_in_steps,
    run_experts_in_steps,
)  # fmt: skip
from edgemoe.ops.cpu import CpuOps
from edgemoe.plan import Plan
from edgemoe.specs import Activation
from edgemoe.store import Request

__all__ = ["Tap", "TapOps"]


class Tap(Protocol):
    """An observer of activations. All arrays are valid only during the call."""

    def begin(self, first: int) -> None:
        """A batch begins; its first token is number `first` of all tokens."""

    def dense(self, name: str, x: Array) -> None:
        """The matrix `name` was applied to x [T, cols]. Matrices that share their input are reported once."""

    def experts(
        self,
        plan: Plan,
        group: Sequence[int],
        x: Array,
        hidden: Array,
        parts: Array,
        at_level: Callable[[int], Array],
    ) -> None:
        """The experts at positions `group` of a plan were run.

        Args:
            x: [T, D], inputs of w_gate and w_up.
            hidden: [m, H], inputs of w_down by row of the plan; rows of other positions are undefined.
            parts: [m, D], outputs by row of the plan; likewise.
            at_level: runs the group again at a lower level and returns its parts; scratch, valid until the next call.
        """


class TapOps(CpuOps):
    """CPU operations that report activations to a `Tap`."""

    repeats = False

    tap: Tap
    """The observer; may be replaced."""

    def __init__(
        self, shape: OpsShape, names: Mapping[int, str], *, max_parts: int, hidden: int
    ) -> None:
        """Args:
        names: of the dense matrices, by the `id` of each.
        max_parts: the most rows of parts in a layer.
        hidden: H, the width of routed experts.
        """
        super().__init__(shape)
        self._names = names
        self._max_hidden = shape.max_hidden
        self._hidden = np.empty((max_parts, hidden), np.float32)
        self._again: Array | None = None

    def linear(self, x: Array, weights: Sequence[Matrix], outs: Sequence[Array]) -> None:
        """See `CpuOps.linear`."""
        super().linear(x, weights, outs)
        self.tap.dense(self._names[id(weights[0])], x)

    # In steps, so that the tap sees each matrix.
    attend, attend_latents = attend_in_steps, attend_latents_in_steps

    def linear_heads(self, x: Array, weight: Matrix, heads: int, out: Array) -> None:
        """See `CpuOps.linear_heads`; the tap sees one row for each token and head."""
        super().linear_heads(x, weight, heads, out)
        rows = x.reshape(len(x) * heads, -1)[:, : weight.cols]
        self.tap.dense(self._names[id(weight)], rows)

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
        """See `CpuOps.ffn`."""
        if hidden is None:
            hidden = np.empty((len(x), up.rows), np.float32)
        super().ffn(x, gate, up, down, out, activation=activation, hidden=hidden)
        self.tap.dense(self._names[id(up if gate is None else gate)], x)
        self.tap.dense(self._names[id(down)], hidden)

    run_experts = run_experts_in_steps

    def expert_ffn(
        self,
        x: Array,
        layer: ExpertLayer,
        request: Request,
        plan: Plan,
        group: Sequence[int],
        parts: Array,
        *,
        hidden: Array | None = None,
    ) -> None:
        """See `CpuOps.expert_ffn`."""
        inner = self._hidden if hidden is None else hidden
        run = super().expert_ffn
        run(x, layer, request, plan, group, parts, hidden=inner[: len(parts)])

        def at_level(level: int) -> Array:
            if self._again is None:
                self._again = np.empty_like(parts)
            fewer = replace(request, levels=np.full_like(request.levels, level))
            run(x, layer, fewer, plan, group, self._again)
            return self._again

        self.tap.experts(plan, group, x, inner, parts, at_level)

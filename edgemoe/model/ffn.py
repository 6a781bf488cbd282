"""The part of a layer after its mixer: a dense FFN, routed experts, or both.

The dense FFN beside routed experts, which every token takes, is called shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

from edgemoe.config import MATRICES, ModelConfig
from edgemoe.experts import Experts
from edgemoe.model.batch import Batch
from edgemoe.model.router import Routers
from edgemoe.model.scratch import Rows
from edgemoe.ops import Array, Basis, Beside, ExpertLayer, Matrix, Ops
from edgemoe.specs import Activation
from edgemoe.store import Weight

__all__ = ["BranchedFfn", "ClosedFfn", "DenseFfn", "Ffn", "RoutedFfn"]


class Ffn(Protocol):
    """The FFN of one layer, split into parts because the host may have to choose experts in between.

    A layer runs `begin`, `run_experts` and `end`, or `run` and `end`. Each takes the residual x, the normed residual
    and out, all [T, D], and continues where the part before stopped.
    """

    def begin(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """Runs what comes before `run_experts` and does not need the host."""

    def run_experts(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """Chooses experts, lets the host's scheduler plan them, and runs them."""

    def run(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """Replaces `begin` and `run_experts` where the host decides nothing.

        That is so in a layer without experts, and in one that is ahead (see `Ops.ahead`).
        """

    def end(self, x: Array, normed: Array, out: Array) -> None:
        """Runs the rest: out = what the layer adds to the residual. May scale x itself."""


class DenseFfn:
    """An FFN without experts: the same for every token."""

    def __init__(self, ops: Ops, weights: Mapping[str, Weight], activation: Activation) -> None:
        """Args:
        weights: the layer's tensors, by their names within the layer.
        """
        self._ops, self._matrices, self._activation = ops, _shared(weights), activation

    def begin(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.begin`; never called, as there are no experts to choose."""

    def run_experts(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.run_experts`; never called."""

    def run(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.run`."""
        self._ops.ffn(normed, *self._matrices, out, activation=self._activation)

    def end(self, x: Array, normed: Array, out: Array) -> None:
        """See `Ffn.end`."""


class RoutedFfn:
    """Routed experts, and a shared FFN beside them if the layer has one."""

    def __init__(
        self,
        index: int,
        ops: Ops,
        routers: Routers,
        experts: Experts,
        weights: Mapping[str, Weight],
        config: ModelConfig,
        scratch: Rows,
    ) -> None:
        """Args:
        index: the layer's position among the layers with experts.
        weights: the layer's tensors, by their names within the layer.
        scratch: [max tokens, D].
        """
        self._index, self._ops, self._routers, self._experts = index, ops, routers, experts
        self._layer = _expert_layer(config, weights)
        self._shared = _shared(weights) if "shared.up" in weights else None
        self._sigmoid = cast("Array | None", weights.get("shared.sigmoid"))
        self._scratch, self._gates_input = scratch, config.gate_input
        self._has_shared = False  # whether the shared FFN ran together with the experts

    def begin(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.begin`."""
        self._routers.begin(self._index, normed, batch)

    def run_experts(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.run_experts`."""
        routing, inner = self._routers.route(self._index, x, normed, batch), normed
        if self._gates_input:
            (inner,) = self._scratch.first(len(x))
            self._ops.weigh(normed, routing.gates, inner)
            routing.gates[...] = 1
        beside = self._beside(x) if inner is normed else None
        self._has_shared = self._experts(routing, self._layer, inner, out, beside)

    def run(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.run`."""
        self._routers.choose(self._index, normed, batch)
        self._has_shared = self._experts.run_chosen(
            self._index, self._layer, normed, out, self._beside(x)
        )

    def _beside(self, x: Array) -> Beside | None:
        """Returns the shared FFN and its output, if there is one."""
        return None if self._shared is None else Beside(self._shared, *self._scratch.first(len(x)))

    def end(self, x: Array, normed: Array, out: Array) -> None:
        """See `Ffn.end`."""
        if self._shared is None:
            return
        (shared,) = self._scratch.first(len(x))
        ops, sigmoid = self._ops, self._sigmoid
        if not self._has_shared:
            ops.ffn(normed, *self._shared, shared, activation=self._layer.activation)
        ops.add(
            shared, 1.0, out, gate_weight=sigmoid, gate_input=None if sigmoid is None else normed
        )


class BranchedFfn:
    """Routed experts and a shared FFN, each with a norm before and after it.

    The norm before the shared FFN is the layer's `ffn_norm`, whose result the caller gives as `normed`.
    """

    def __init__(
        self,
        index: int,
        ops: Ops,
        routers: Routers,
        experts: Experts,
        weights: Mapping[str, Weight],
        config: ModelConfig,
        scratch: Rows,
    ) -> None:
        """Args:
        index: the layer's position among the layers with experts.
        weights: the layer's tensors, by their names within the layer.
        scratch: [max tokens, D].
        """
        self._index, self._ops, self._routers, self._experts = index, ops, routers, experts
        self._layer = _expert_layer(config, weights)
        self._shared, self._scratch, self._eps = _shared(weights), scratch, config.norm_eps
        self._norms = [
            cast(Array, weights[name])
            for name in ("router_norm", "experts_norm", "experts_out_norm", "shared.out_norm")
        ]

    def begin(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.begin`."""
        (inner,) = self._scratch.first(len(x))
        self._ops.norm(x, self._norms[0], self._eps, inner)
        self._routers.begin(self._index, inner, batch)

    def run_experts(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.run_experts`."""
        (inner,) = self._scratch.first(len(x))
        routing = self._routers.route(self._index, x, inner, batch)
        self._ops.norm(x, self._norms[1], self._eps, inner)
        self._experts(routing, self._layer, inner, out)

    def run(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.run`."""
        ops, eps = self._ops, self._eps
        (inner,) = self._scratch.first(len(x))
        ops.norm(x, self._norms[0], eps, inner)
        self._routers.choose(self._index, inner, batch)
        ops.norm(x, self._norms[1], eps, inner)
        self._experts.run_chosen(self._index, self._layer, inner, out)

    def end(self, x: Array, normed: Array, out: Array) -> None:
        """See `Ffn.end`."""
        ops, eps, (_, _, after, after_shared) = self._ops, self._eps, self._norms
        (inner,) = self._scratch.first(len(x))
        ops.norm(out, after, eps, out)
        ops.ffn(normed, *self._shared, inner, activation=self._layer.activation)
        ops.norm(inner, after_shared, eps, inner)
        ops.add(inner, 1.0, out)


class ClosedFfn:
    """An FFN whose output is normed before it is added. The residual may then be scaled."""

    def __init__(self, ffn: Ffn, ops: Ops, weights: Mapping[str, Weight], eps: float) -> None:
        """Args:
        weights: the layer's tensors, by their names within the layer.
        """
        self._ffn, self._ops, self._eps = ffn, ops, eps
        self._norm = cast(Array, weights["ffn_out_norm"])
        self._scale = cast("Array | None", weights.get("layer_scale"))

    def begin(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.begin`."""
        self._ffn.begin(x, normed, batch, out)

    def run_experts(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.run_experts`."""
        self._ffn.run_experts(x, normed, batch, out)

    def run(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.run`."""
        self._ffn.run(x, normed, batch, out)

    def end(self, x: Array, normed: Array, out: Array) -> None:
        """See `Ffn.end`. Scales x by the layer's scale; the weight of the output norm already contains that scale."""
        self._ffn.end(x, normed, out)
        self._ops.norm(out, self._norm, self._eps, out)
        if self._scale is not None:
            self._ops.multiply(self._scale, x)


def _shared(weights: Mapping[str, Weight]) -> tuple[Matrix | None, Matrix, Matrix]:
    """Returns gate, up and down of the dense or shared FFN."""
    gate, up, down = (cast("Matrix | None", weights.get(f"shared.{name}")) for name in MATRICES)
    return gate, cast(Matrix, up), cast(Matrix, down)


def _expert_layer(config: ModelConfig, weights: Mapping[str, Weight]) -> ExpertLayer:
    """Returns what a layer's experts have besides their matrices."""
    return ExpertLayer(
        activation=config.activation, biases=_biases(weights),
        basis=cast("Basis | None", weights.get("experts.basis")),
    )  # fmt: skip


def _biases(weights: Mapping[str, Weight]) -> tuple[Array, Array, Array] | None:
    """Returns the biases of a layer's experts, for gate, up and down, if they have any."""
    if "expert_bias.down" not in weights:
        return None
    gate, up, down = (cast(Array, weights[f"expert_bias.{name}"]) for name in MATRICES)
    return gate, up, down

"""What follows the mixer in a layer: an FFN that every token takes, routed experts, or both."""

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
    """Is the FFN of one layer, in parts: between the first and the last the host may have to choose experts.

    All take the residual x, normed and out, each [T, D]; a part goes on where the one before left off.
    """

    def begin(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """Runs what comes before `run_experts`."""

    def run_experts(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """Chooses experts, as planned by the host, and runs them."""

    def run(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """Does in place of both what needs no host: of a token whose experts are ahead, or of one without experts."""

    def end(self, x: Array, normed: Array, out: Array) -> None:
        """Runs the rest: out = what the layer adds to the residual, which it may scale."""


class DenseFfn:
    """Is one FFN for every token."""

    def __init__(self, ops: Ops, weights: Mapping[str, Weight], activation: Activation) -> None:
        """Args:
        weights: the layer's tensors, by their names within it.
        """
        self._ops, self._matrices, self._activation = ops, _shared(weights), activation

    def begin(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.begin`: never called."""

    def run_experts(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.run_experts`: likewise."""

    def run(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.run`."""
        self._ops.ffn(normed, *self._matrices, out, activation=self._activation)

    def end(self, x: Array, normed: Array, out: Array) -> None:
        """See `Ffn.end`."""


class RoutedFfn:
    """Is experts that a router chooses, and an FFN for every token beside them if there is one."""

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
        index: the layer's, among those with experts.
        weights: the layer's tensors, by their names within it.
        scratch: [max tokens, D].
        """
        self._index, self._ops, self._routers, self._experts = index, ops, routers, experts
        self._layer = _expert_layer(config, weights)
        self._shared = _shared(weights) if "shared.up" in weights else None
        self._sigmoid = cast("Array | None", weights.get("shared.sigmoid"))
        self._scratch, self._gates_input = scratch, config.gate_input
        self._has_shared = False  # what `run_experts` may have run too

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
        """Returns the FFN that every token takes, if there is one."""
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
    """Is experts and an FFN beside them, each between norms of its own; the FFN's first one is the layer's."""

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
        index: the layer's, among those with experts.
        weights: the layer's tensors, by their names within it.
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
    """Is an FFN whose output is normed, and after which the residual may be scaled."""

    def __init__(self, ffn: Ffn, ops: Ops, weights: Mapping[str, Weight], eps: float) -> None:
        """Args:
        weights: the layer's tensors, by their names within it.
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
        """See `Ffn.end`; x is scaled, and the norm's weight has the layer's scale in it."""
        self._ffn.end(x, normed, out)
        self._ops.norm(out, self._norm, self._eps, out)
        if self._scale is not None:
            self._ops.multiply(self._scale, x)


def _shared(weights: Mapping[str, Weight]) -> tuple[Matrix | None, Matrix, Matrix]:
    """Returns the matrices of the FFN that every token takes."""
    gate, up, down = (cast("Matrix | None", weights.get(f"shared.{name}")) for name in MATRICES)
    return gate, cast(Matrix, up), cast(Matrix, down)


def _expert_layer(config: ModelConfig, weights: Mapping[str, Weight]) -> ExpertLayer:
    """Returns what a layer's experts have beside their matrices."""
    return ExpertLayer(
        activation=config.activation, biases=_biases(weights),
        basis=cast("Basis | None", weights.get("experts.basis")),
    )  # fmt: skip


def _biases(weights: Mapping[str, Weight]) -> tuple[Array, Array, Array] | None:
    """Returns those of a layer's experts, if they have some."""
    if "expert_bias.down" not in weights:
        return None
    gate, up, down = (cast(Array, weights[f"expert_bias.{name}"]) for name in MATRICES)
    return gate, up, down

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
    """Is the FFN of one layer."""

    def forward(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """out [T, D] = what the layer adds to the residual x [T, D], which it may scale, for normed [T, D]."""


class DenseFfn:
    """Is one FFN for every token."""

    def __init__(self, ops: Ops, weights: Mapping[str, Weight], activation: Activation) -> None:
        """Args:
        weights: the layer's tensors, by their names within it.
        """
        self._ops, self._matrices, self._activation = ops, _shared(weights), activation

    def forward(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.forward`."""
        self._ops.ffn(normed, *self._matrices, out, activation=self._activation)


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

    def forward(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.forward`."""
        routing, inner = self._routers.route(self._index, x, normed, batch), normed
        if self._gates_input:
            (inner,) = self._scratch.first(len(x))
            self._ops.weigh(normed, routing.gates, inner)
            routing.gates[...] = 1
        if self._shared is None:
            self._experts(routing, self._layer, inner, out)
            return
        (shared,) = self._scratch.first(len(x))
        beside = Beside(self._shared, shared) if inner is normed else None
        ops, sigmoid = self._ops, self._sigmoid
        if not self._experts(routing, self._layer, inner, out, beside):
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

    def forward(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.forward`."""
        ops, eps = self._ops, self._eps
        before_router, before, after, after_shared = self._norms
        (inner,) = self._scratch.first(len(x))
        ops.norm(x, before_router, eps, inner)
        routing = self._routers.route(self._index, x, inner, batch)
        ops.norm(x, before, eps, inner)
        self._experts(routing, self._layer, inner, out)
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

    def forward(self, x: Array, normed: Array, batch: Batch, out: Array) -> None:
        """See `Ffn.forward`; x is scaled, and the norm's weight has the layer's scale in it."""
        self._ffn.forward(x, normed, batch, out)
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

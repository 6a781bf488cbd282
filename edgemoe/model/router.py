"""The routers of all layers: they choose a layer's experts, and predict those of the layers after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from edgemoe.config import ModelConfig
from edgemoe.errors import FormatError, RangeError
from edgemoe.experts import Experts
from edgemoe.model.batch import Batch
from edgemoe.model.scratch import Rows
from edgemoe.ops import Array, Ops, RouterWeights
from edgemoe.places import Places
from edgemoe.plan import Routing
from edgemoe.store import Weight

__all__ = ["MOST_AHEAD", "Routers"]

MOST_AHEAD = 4
"""The most layers to predict experts for; predictions for layers further ahead are guesswork."""


class Routers:
    """The routers of all layers with experts, for each set of weights."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        experts: Experts,
        sets: Sequence[Sequence[Mapping[str, Weight]]],
        *,
        max_tokens: int,
        places: Places | None = None,
    ) -> None:
        """Args:
        sets: for each set of weights, the tensors of each layer with experts, by their names within the layer.
        places: maps an expert's number to its place in the layer's table, which is what schedulers, store and kernels
            call it by. None without adapters, where the two are the same.
        """
        self._ops, self._experts, self._max_tokens = ops, experts, max_tokens
        self._sets = [[_weights(layer) for layer in layers] for layers in sets]
        self._places = places
        self.change(config)

    def change(self, config: ModelConfig) -> None:
        """Switches to the config's number of experts per token, and prepares what the present scheduler asks for.

        Raises:
            FormatError: the scheduler's bit routers, or its stand-ins, are for another model.
        """
        ops, experts, max_tokens = self._ops, self._experts, self._max_tokens
        E, K = config.num_experts, config.experts_per_token
        self._config = config
        self._rule = ops.route_rule(config.router)
        self._chosen = Rows(
            ops.host(max_tokens, E, dtype="float32"),
            ops.host(max_tokens, K, dtype="int32"),
            ops.host(max_tokens, K, dtype="float32"),
        )
        self._ahead: tuple[Any, ...] = ()
        self._ahead_rows = 0
        self._bit_routers: list[tuple[Array, Array, Array]] | None = None
        if (stand_ins := experts.scheduler.stand_ins) is not None:
            stand_ins.check(len(self._sets[0]), E, "section stand-ins", config.hidden_size)
        if (bits := experts.scheduler.bit_routers) is not None:
            if bits.weight.shape[3] != config.hidden_size:
                raise FormatError(
                    f"section bit-routers: is for {bits.weight.shape[3]} inputs; "
                    f"the model has {config.hidden_size}"
                )
            # Views by layer.
            self._bit_routers = list(zip(bits.weight, bits.gate_weight, bits.bias, strict=True))
            # Some KiB, or 100 KiB per thousand tokens of a batch: the margin of the budget covers it.
            self._bit_logits = ops.host(max_tokens, K, len(bits.levels), dtype="float32")

    @staticmethod
    def scratch_bytes(config: ModelConfig, max_tokens: int, max_sequences: int) -> int:
        """Returns the bytes of scores, choices and predictions, without those of adapters."""
        E, K = config.num_experts, config.experts_per_token
        ahead = MOST_AHEAD * (config.hidden_size + E + 2 * K) * max_sequences
        return 4 * ((E + 2 * K) * max_tokens + ahead)

    def begin(self, index: int, normed: Array, batch: Batch) -> None:
        """Starts the part of `route` that does not need the host. The next call must be `route`, for the same layer."""
        self._ops.begin_route(normed, self._sets[batch.variant][index])

    def ahead(self, *, is_start: bool) -> frozenset[int]:
        """Returns the layers for which `choose` may replace `begin` and `route`; see `Experts.ahead`."""
        if self._places is not None or self._config.gate_input:
            return frozenset()
        return self._experts.ahead(self._rule, is_start=is_start)

    def choose(self, index: int, normed: Array, batch: Batch) -> None:
        """Chooses the experts of a layer that is ahead, for normed [1, D], without telling the host."""
        self._ops.choose(index, normed, self._sets[batch.variant][index], self._rule)

    def route(self, index: int, x: Array, normed: Array, batch: Batch) -> Routing:
        """Returns what the router chooses; its arrays are scratch, valid until the next call.

        Args:
            index: the layer's position among the layers with experts.
            x: [T, D], the residual, from which the choices of the next layers are predicted.
            normed: [T, D], the input of the router.

        Raises:
            RangeError: a router's logit is not a finite number, as with damaged weights.
        """
        ops = self._ops
        scores, experts, gates = self._chosen.first(len(normed))
        routers = self._sets[batch.variant]
        ops.route(
            normed, routers[index], self._rule,
            scores=scores, experts=experts, gates=gates,
        )  # fmt: skip
        if not math.isfinite(gates.sum()):
            layer = self._config.moe_layers[index]
            raise RangeError(
                f"layer {layer}: a logit of the router is not a finite number: "
                "the model's weights are damaged, or its numbers left the range of float32"
            )
        routing = Routing(index, experts, gates, None, None, scores, None, len(batch.slices))
        if self._bit_routers is not None:
            logits = routing.bit_logits = self._bit_logits[: len(normed)]
            ops.slot_scores(normed, self._bit_routers[index], experts, gates, logits)
        if batch.is_decoding and self._experts.scheduler.look_ahead:
            self._look_ahead(routing, x, routers)
        if self._places is not None:
            self._places.put(routing, batch.adapted)
        return routing

    def _look_ahead(self, routing: Routing, x: Array, routers: Sequence[RouterWeights]) -> None:
        """Adds the choices predicted for the next layers from x [T, D], as many as the scheduler asks for.

        See `Routing.ahead_experts`.
        """
        first = routing.layer + 1
        p = min(self._experts.scheduler.look_ahead, MOST_AHEAD, len(routers) - first)
        if p <= 0:
            return
        config, ops, T = self._config, self._ops, len(x)
        if self._ahead_rows != T:
            E, K = config.num_experts, config.experts_per_token
            self._ahead = (
                ops.empty(MOST_AHEAD, T, config.hidden_size), ops.empty(MOST_AHEAD, T, E),
                ops.host(MOST_AHEAD, T, K, dtype="int32"), ops.host(MOST_AHEAD, T, K, dtype="float32"),
            )  # fmt: skip
            self._ahead_rows = T
        normed, scores, experts, gates = (array[:p] for array in self._ahead)
        ops.look_ahead(
            x, routers[first : first + p], self._rule,
            config.norm_eps, normed=normed, scores=scores, experts=experts, gates=gates,
        )  # fmt: skip
        routing.ahead_experts, routing.ahead_gates = experts, gates


def _weights(layer: Mapping[str, Weight]) -> RouterWeights:
    """Returns the router of a layer, from the layer's tensors."""
    optional = cast(Mapping[str, Array], layer).get
    return RouterWeights(
        norm=cast(Array, layer.get("router_norm", layer["ffn_norm"])), weight=cast(Array, layer["router"]),
        bias=optional("router_bias"), choice_bias=optional("choice_bias"),
    )  # fmt: skip

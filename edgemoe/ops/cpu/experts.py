"""Verbs of experts on a CPU; see `edgemoe.ops.experts`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.ops.cpu.memory import CpuMemory
from edgemoe.ops.values import Array, Beside, ExpertLayer, Ids, RouteRule, RouterWeights
from edgemoe.plan import Plan
from edgemoe.quant.correction import MOST_RANK
from edgemoe.specs import RouterSpec
from edgemoe.store.request import Request

__all__ = ["CpuExperts"]

_FEW_TOKENS = 4  # up to which each group of experts computes its corrections' projections itself


class CpuExperts(CpuMemory):
    """The expert verbs of a CPU; see `CpuOps`."""

    def route_rule(self, spec: RouterSpec) -> RouteRule:
        """See `Ops.route_rule`."""
        return _core.RouteRule(
            num_experts=spec.num_experts, top_k=spec.top_k, scoring=spec.scoring,
            renormalise=spec.renormalise, gate_scale=spec.gate_scale, groups=spec.groups,
            used_groups=spec.used_groups, group_by_two=spec.group_score == "top2",
        )  # fmt: skip

    def begin_route(self, x: Array, router: RouterWeights) -> None:
        """See `Ops.begin_route`; does nothing, as `route` runs on the host."""

    def route(
        self,
        x: Array,
        router: RouterWeights,
        rule: RouteRule,
        *,
        scores: Array,
        experts: Ids,
        gates: Array,
    ) -> None:
        """See `Ops.route`."""
        _core.route(
            self._ws,
            x,
            router.weight,
            router.bias,
            router.choice_bias,
            rule,
            scores,
            experts,
            gates,
        )

    def choose_by(
        self,
        bias: Array | None,
        choice_bias: Array | None,
        rule: RouteRule,
        scores: Array,
        experts: Ids,
        gates: Array,
    ) -> None:
        """Does the second half of `Ops.route`: scores [T, E] hold the products with the router's weight on entry."""
        _core.choose(self._ws, bias, choice_bias, rule, scores, experts, gates)

    def slot_scores(
        self,
        x: Array,
        layers: tuple[Array, Array, Array],
        experts: Ids,
        gates: Array,
        scores: Array,
    ) -> None:
        """See `Ops.slot_scores`."""
        _core.slot_scores(self._ws, x, *layers, experts, gates, scores)

    def look_ahead(
        self,
        x: Array,
        routers: Sequence[RouterWeights],
        rule: RouteRule,
        eps: float,
        *,
        normed: Array,
        scores: Array,
        experts: Ids,
        gates: Array,
    ) -> None:
        """See `Ops.look_ahead`."""
        _core.look_ahead(
            self._ws, x, [r.norm for r in routers], [r.weight for r in routers],
            [r.bias for r in routers], [r.choice_bias for r in routers], eps, rule, normed, scores,
            experts, gates,
        )  # fmt: skip

    def expect(
        self, slots: _core.Cache, first: int, experts: NDArray[np.int32], beside: Beside | None
    ) -> None:
        """See `Ops.expect`: waiting threads prefetch the first weights while the scheduler decides."""
        width = 0 if beside is None else beside.matrices[1].rows
        _core.expect_experts(self._ws, slots, first, experts, width)

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
        """See `Ops.expert_ffn`; hidden [m, H], if given, gets the inputs of each w_down."""
        self._project(x, layer, request)
        _core.expert_ffn(
            self._ws, x, _cache(request), request.experts, request.levels, plan.offsets, plan.tokens,
            group, parts, hidden, layer.activation, layer.biases, layer.basis, request.projected,
        )  # fmt: skip

    def _project(self, x: Array, layer: ExpertLayer, request: Request) -> None:
        """Projects x [T, D] onto the layer's basis, for the corrections of all groups at once.

        With few tokens it does nothing: each group then computes the projection itself.
        """
        if layer.basis is not None and request.projected is None and len(x) > _FEW_TOKENS:
            request.projected = np.empty((len(x), MOST_RANK), np.float32)
            _core.project(self._ws, x, layer.basis, request.projected)

    def run_hits(
        self,
        x: Array,
        layer: ExpertLayer,
        slots: Any,
        first: int,
        chosen: Ids,
        gates: Array,
        levels: NDArray[np.int8],
        parts: Array,
        out: Array,
    ) -> bool:
        """See `Ops.run_hits`; never runs anything, as the cost of a plan is small beside the CPU's computing."""
        return False

    def run_experts(
        self,
        x: Array,
        layer: ExpertLayer,
        request: Request,
        groups: Iterator[list[int]],
        plan: Plan,
        parts: Array,
        out: Array,
        beside: Beside | None,
    ) -> bool:
        """See `Ops.run_experts`; the core asks the cache for groups itself, instead of `groups`."""
        self._project(x, layer, request)
        matrices, to = (None, None) if beside is None else beside
        _core.run_experts(
            self._ws, x, _cache(request), request.experts, request.levels, plan.offsets, plan.tokens,
            plan.rows, plan.gates, parts, out, layer.activation, layer.biases, layer.basis, request.projected,
            matrices, to,
        )  # fmt: skip
        return beside is not None

    def combine(self, parts: Array, plan: Plan, out: Array) -> None:
        """See `Ops.combine`."""
        _core.combine(self._ws, parts, plan.rows, plan.gates, out)

    def stand_in(
        self, x: Array, maps: tuple[Array, Array, Array], experts: Ids, plan: Plan, out: Array
    ) -> None:
        """See `Ops.stand_in`."""
        up, bias, down = maps
        tokens, slots = (plan.rows < 0).nonzero()
        chosen, gates = experts[tokens, slots], plan.gates[tokens, slots]
        for e in sorted(set(chosen.tolist())):
            at = chosen == e
            rows = tokens[at]
            inner = np.empty((len(rows), len(bias[e])), np.float32)
            _core.linear_f32(self._ws, x[rows], up[e], inner)
            inner += bias[e]
            inner *= gates[at, None]
            added = inner[:, :1] * down[e, 0]
            # One after the other, so that the order of additions is the same everywhere.
            for i in range(1, len(bias[e])):
                added += inner[:, i : i + 1] * down[e, i]
            out[rows] += added


def _cache(request: Request) -> _core.Cache:
    """Returns where a request's experts lie; a device's operations give the host's part of `Tiers` alone."""
    assert isinstance(request.slots, _core.Cache)
    return request.slots

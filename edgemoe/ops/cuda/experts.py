"""Verbs of experts on a device; experts that are not in its memory run on the host. See `edgemoe.ops.experts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.ops.cuda.memory import Array, CudaMemory, HostArray
from edgemoe.ops.steps import run_experts_in_steps
from edgemoe.ops.values import ExpertLayer, Ids, RouterWeights
from edgemoe.plan import Plan
from edgemoe.specs import RouterSpec
from edgemoe.store.request import Request
from edgemoe.store.tiers import Tiers

__all__ = ["CudaExperts"]

# With up to so many tokens, activations are copied to the host together with the logits of the router: the host will
# probably compute some of the experts.
_FEW_TOKENS = 4


class CudaExperts(CudaMemory):
    """The expert verbs of a device; see `CudaOps`."""

    def route_rule(self, spec: RouterSpec) -> _core.RouteRule:
        """See `Ops.route_rule`."""
        if self._ahead is not None:
            self._ahead.change(spec.top_k)
        return self._cpu.route_rule(spec)

    def begin_route(self, x: Array, router: RouterWeights) -> None:
        """See `Ops.begin_route`: computes the logits on the device and starts to send them to the host.

        With few tokens, x is sent too.
        """
        logits = self._scores[: len(x)]
        _core.device_matmul(self._ws, x, cast(Any, router.weight), logits)
        there = [logits, x] if len(x) <= _FEW_TOKENS else [logits]
        self._is_posted = _core.device_post(self._ws, there)

    def route(
        self,
        x: Array,
        router: RouterWeights,
        rule: _core.RouteRule,
        *,
        scores: HostArray,
        experts: Ids,
        gates: HostArray,
    ) -> None:
        """See `Ops.route`; the host makes the choice from the logits, as its scheduler plans with it."""
        is_few = len(x) <= _FEW_TOKENS
        outs = [scores, self._x[: len(x)]] if is_few else [scores]
        if self._is_posted:
            _core.device_collect(self._ws, outs)
        else:
            _core.device_download(self._ws, [self._scores[: len(x)], x][: len(outs)], outs)
        self._x_of = x if is_few else None
        self._cpu.choose_by(*_biases(router), rule, scores, experts, gates)

    def slot_scores(
        self,
        x: Array,
        layers: tuple[HostArray, HostArray, HostArray],
        experts: Ids,
        gates: HostArray,
        scores: HostArray,
    ) -> None:
        """See `Ops.slot_scores`; computed on the host, where the small layers are."""
        self._cpu.slot_scores(self._copy(x), layers, experts, gates, scores)

    def look_ahead(
        self,
        x: Array,
        routers: Sequence[RouterWeights],
        rule: _core.RouteRule,
        eps: float,
        *,
        normed: Array,
        scores: Array,
        experts: Ids,
        gates: HostArray,
    ) -> None:
        """See `Ops.look_ahead`."""
        for i, router in enumerate(routers):
            norm, weight = cast(Any, router.norm), cast(Any, router.weight)
            _core.device_add_norm(self._ws, None, 0.0, x, norm, eps, normed.item(i))
            _core.device_matmul(self._ws, normed.item(i), weight, scores.item(i))
        logits = np.empty(scores.shape, np.float32)
        _core.device_download(self._ws, [scores], [logits])
        for i, router in enumerate(routers):
            self._cpu.choose_by(*_biases(router), rule, logits[i], experts[i], gates[i])

    def expect(self, slots: Any, first: int, experts: NDArray[np.int32], beside: Any) -> None:
        """See `Ops.expect`; does nothing, as the hint is of no use to a device."""

    def expert_ffn(
        self,
        x: Array,
        layer: ExpertLayer,
        request: Request,
        plan: Plan,
        group: Sequence[int],
        parts: Array,
    ) -> None:
        """See `Ops.expert_ffn`. The experts of a group are all on the device, or all on the host.

        Some of the host's may still be computed by the device, which they then pass through; see `Tiers.passing`.
        """
        slots: Any = request.slots
        layer, biases, basis = self._layer(layer)

        def run_there(cache: Any, positions: Sequence[int], stream: Any = None) -> None:
            _core.device_expert_ffn(
                self._ws, x, cache, request.experts, request.levels, plan.offsets, plan.tokens,
                positions, parts, layer.activation, biases, basis, stream,
            )  # fmt: skip

        if self._shares:
            return run_there(slots, group)
        rates = None
        if isinstance(slots, Tiers):
            if slots.is_there:
                return run_there(slots.device, group)
            passing, group = slots.passing(
                request.experts, request.levels, plan.offsets, list(group)
            )
            if passing:
                if group:  # the CPU runs these meanwhile: copy x first, so that it need not wait for the others
                    self._copy(x)
                run_there(slots.host, passing, slots.stream)
            rates, sizes = slots.rates, slots.sizes
            request = replace(request, slots=slots.host)
        if not group:
            return None
        rows, x_here = self._parts[: len(plan.tokens)], self._copy(x)
        start = perf_counter()
        self._cpu.expert_ffn(x_here, layer, request, plan, group, rows)
        if rates is not None:
            tokens = sum(int(plan.offsets[i + 1] - plan.offsets[i]) for i in group)
            size = int(sizes[request.levels[list(group)]].sum())
            rates.note(size, tokens, len(group), perf_counter() - start)
        for i in group:
            first, end = int(plan.offsets[i]), int(plan.offsets[i + 1])
            parts[first:end].upload(rows[first:end])
        return None

    def run_hits(
        self,
        x: Array,
        layer: ExpertLayer,
        slots: Any,
        first: int,
        chosen: Ids,
        gates: HostArray,
        levels: NDArray[np.int8],
        parts: Array,
        out: Array,
    ) -> bool:
        """See `Ops.run_hits`: runs experts that are all on the device, unless a copy to it is under way."""
        if not self.repeats or not isinstance(slots, Tiers) or not slots.is_settled:
            return False
        _, biases, basis = self._layer(layer)
        has_all = _core.device_run_hits(
            self._ws, x, slots.device, first, chosen, gates, levels, slots.used.scores, slots.used.unit, parts,
            out, layer.activation, biases, basis,
        )  # fmt: skip
        if has_all:
            slots.used.advance(first, 1)
        return has_all

    run_experts = run_experts_in_steps

    def combine(self, parts: Array, plan: Plan, out: Array) -> None:
        """See `Ops.combine`."""
        _core.device_combine(self._ws, parts, plan.rows, plan.gates, out)

    def stand_in(
        self,
        x: Array,
        maps: tuple[HostArray, HostArray, HostArray],
        experts: Ids,
        plan: Plan,
        out: Array,
    ) -> None:
        """See `Ops.stand_in`; computed on the host, where the small maps are."""
        sums = np.empty((len(x), maps[0].shape[2]), np.float32)
        _core.device_download(self._ws, [cast(Any, out)], [sums])
        self._cpu.stand_in(self._copy(x), maps, experts, plan, sums)
        out.upload(sums)

    def _layer(self, layer: ExpertLayer) -> tuple[ExpertLayer, list[Any], Any]:
        """Returns what a layer's experts have besides matrices: for the host; and the device's biases and basis."""
        if id(layer) not in self._layers:
            biases, basis = cast(Any, layer.biases), cast(Any, layer.basis)
            host = replace(
                layer, biases=None if biases is None else tuple(b.host for b in biases),
                basis=None if basis is None else basis.host,
            )  # fmt: skip
            there = [] if biases is None else [b.device for b in biases]
            own = host, there, None if basis is None else basis.device
            self._layers[id(layer)] = layer, own  # holds the layer, so that no other gets its id
        return self._layers[id(layer)][1]


def _biases(router: RouterWeights) -> tuple[HostArray | None, HostArray | None]:
    """Returns the host's copies of a router's bias and choice bias."""
    bias, choice_bias = (
        None if b is None else cast(Any, b).host for b in (router.bias, router.choice_bias)
    )
    return bias, choice_bias

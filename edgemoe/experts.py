"""The heart: the scheduler decides, the store loads, the kernels compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgemoe.ops import Array, Beside, ExpertLayer, Ops, RouteRule
from edgemoe.plan import Plan, Routing
from edgemoe.scheduler import Scheduler
from edgemoe.store import ExpertStore

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgemoe.model.batch import Batch

__all__ = ["Experts", "Observer"]


class Observer:
    """Is told what happens in each layer; the base does nothing."""

    def begin(self, batch: Batch) -> None:
        """A batch starts, whose tokens do not count yet."""

    def planned(self, routing: Routing, plan: Plan, residency: NDArray[np.int8]) -> None:
        """A plan was made and nothing loaded yet; `residency` [layers, E] is a live view."""

    def done(self, bytes_read: int, wait_s: float) -> None:
        """The layer's experts have run; both are totals since the store was opened."""

    def end(self) -> None:
        """The batch's logits are there, if they were wanted."""

    def close(self) -> None:
        """Nothing more will happen.

        Raises:
            OSError: what was told cannot be kept.
        """


class Experts:
    """Runs one layer's routed experts for a chunk of tokens."""

    def __init__(
        self,
        scheduler: Scheduler,
        store: ExpertStore,
        ops: Ops,
        *,
        parts: Array,
        observer: Observer | None = None,
    ) -> None:
        """Args:
        parts: scratch [max tokens * K, D] for the experts' outputs.
        """
        self.scheduler = scheduler
        self.store = store
        self.observer = observer
        self.routed = self.skipped = 0
        """Pairs of a token and an expert that routers chose, and those of them that no plan ran; of layers that are
        ahead the decoder counts."""
        self._ops = ops
        self._parts = parts
        self._bits: NDArray[np.int8] | None = None
        self._levels: NDArray[np.int8] | None = None  # for these bits

    def __call__(
        self,
        routing: Routing,
        layer: ExpertLayer,
        x: Array,
        out: Array,
        beside: Beside | None = None,
    ) -> bool:
        """out [T, D] = the gated sum of the outputs of a layer's experts on x [T, D].

        Parts are added in plan order, so the order in which experts arrive does not matter.

        Args:
            beside: what may be run with them.

        Returns:
            Whether it was.
        """
        store, ops = self.store, self._ops
        residency = store.residency
        if len(routing.experts) == 1:
            if self._run_hits(routing, layer, x, out):
                return False
            ops.expect(store.cache, routing.layer * residency.shape[1], routing.experts[0], beside)
        plan = self.scheduler.plan(routing, residency)
        if self.observer is not None:
            self.observer.planned(routing, plan, residency)
        self.routed += plan.rows.size
        self.skipped += plan.rows.size - len(plan.tokens)
        request = store.request(plan)
        is_beside_done = ops.run_experts(
            x, layer, request, store.ready_groups(), plan, self._parts, out, beside
        )
        stand_ins = self.scheduler.stand_ins
        if stand_ins is not None and len(plan.tokens) < plan.rows.size:
            at = plan.layer
            maps = stand_ins.up[at], stand_ins.bias[at], stand_ins.down[at]
            ops.stand_in(x, maps, routing.experts, plan, out)
        if self.observer is not None:
            self.observer.done(*store.progress)
        return is_beside_done

    def ahead(self, rule: RouteRule, *, is_start: bool) -> frozenset[int]:
        """Returns the layers whose experts operations choose and run without a plan in a pass of one token.

        See `Ops.ahead`: nobody must want to see a plan, and there is nothing to read that one would begin with.
        """
        scheduler, store = self.scheduler, self.store
        if (levels := self._levels_of_routed()) is None:
            return frozenset()
        layers = self._ops.ahead(store.cache, levels, rule, is_start=is_start)
        is_part = len(layers) < len(store.residency)
        return frozenset() if scheduler.look_ahead and is_part else layers

    def _run_hits(self, routing: Routing, layer: ExpertLayer, x: Array, out: Array) -> bool:
        """Runs a token's experts without a plan, where none need be read now nor ahead; returns whether."""
        levels = self._levels_of_routed() if routing.ahead_experts is None else None
        if levels is None:
            return False
        chosen, slots = routing.experts, self.store.cache
        first, parts = routing.layer * self.store.residency.shape[1], self._parts
        if not self._ops.run_hits(
            x, layer, slots, first, chosen, routing.gates, levels, parts, out
        ):
            return False
        self.routed += chosen.size
        return True

    def _levels_of_routed(self) -> NDArray[np.int8] | None:
        """Returns what experts run at, [layers * E], where routers alone decide and nobody looks; None elsewhere."""
        scheduler = self.scheduler
        if self.observer is not None or not scheduler.is_routed or scheduler.fixed_bits is None:
            return None
        if self._bits is not scheduler.fixed_bits:
            self._bits = scheduler.fixed_bits
            self._levels = self.store.levels(self._bits.reshape(-1))
        return self._levels

    def look_again(self) -> None:
        """Is told when a scheduler's `fixed_bits` have changed in place."""
        self._bits = None

    def run_chosen(
        self,
        layer: int,
        weights: ExpertLayer,
        x: Array,
        out: Array,
        beside: Beside | None = None,
    ) -> bool:
        """Does for x [1, D] what a call does in a layer that is ahead, once its experts were chosen."""
        return self._ops.run_chosen(layer, x, weights, self._parts, out, beside)

    def count(self, layers: Sequence[int]) -> None:
        """Counts uses of what was chosen in layers that were ahead, as far as operations have not; waits for these.

        Of a token that fails half-way a device's are not counted, as it may have nothing to say any more.
        """
        experts = self._ops.chosen()[layers]
        if self._levels is not None and not self._ops.counts_chosen:
            self.store.count(layers, experts, self._levels)

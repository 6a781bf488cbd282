"""The execution of routed experts: the scheduler decides, the store loads, the kernels compute."""

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
    """An observer of what happens in each layer, such as a trace; this base class does nothing."""

    def begin(self, batch: Batch) -> None:
        """Is called when a batch starts; its sequences do not count its tokens yet."""

    def planned(self, routing: Routing, plan: Plan, residency: NDArray[np.int8]) -> None:
        """Is called after a plan was made, before anything is loaded; `residency` [layers, E] is a live view."""

    def done(self, bytes_read: int, wait_s: float) -> None:
        """Is called after the layer's experts have run; both numbers are totals since the store was opened."""

    def end(self) -> None:
        """Is called when the batch's logits have been computed, if they were wanted."""

    def close(self) -> None:
        """Is called when nothing more will happen.

        Raises:
            OSError: what was observed cannot be written.
        """


class Experts:
    """The routed experts of all layers, which a call runs for one layer and a chunk of tokens."""

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
        """The number of pairs of token and expert that routers chose, and of those that no plan ran. For layers of
        `ahead` the decoder counts the pairs."""
        self._ops = ops
        self._parts = parts
        self._bits: NDArray[np.int8] | None = None
        self._levels: NDArray[np.int8] | None = None  # those of self._bits

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
            routing: the experts and gates that the router chose.
            layer: what the layer's experts have besides their matrices.
            x: [T, D], the input.
            out: [T, D], the output.
            beside: the layer's shared FFN, which may be run together with the experts; None for none.

        Returns:
            Whether `beside` was run.
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
        """Returns the layers whose experts the operations may choose and run without a plan, in a pass of one token.

        See `Ops.ahead`. There are such layers only if neither an observer nor the scheduler needs to see plans, and if
        no plan would have to read anything.
        """
        scheduler, store = self.scheduler, self.store
        if (levels := self._levels_of_routed()) is None:
            return frozenset()
        layers = self._ops.ahead(store.cache, levels, rule, is_start=is_start)
        is_part = len(layers) < len(store.residency)
        return frozenset() if scheduler.look_ahead and is_part else layers

    def _run_hits(self, routing: Routing, layer: ExpertLayer, x: Array, out: Array) -> bool:
        """Runs one token's experts without a plan if none must be read, now or ahead; returns whether it did."""
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
        """Returns the levels at which experts run, [layers * E], if routers alone decide and nothing observes; else
        None."""
        scheduler = self.scheduler
        if self.observer is not None or not scheduler.is_routed or scheduler.fixed_bits is None:
            return None
        if self._bits is not scheduler.fixed_bits:
            self._bits = scheduler.fixed_bits
            self._levels = self.store.levels(self._bits.reshape(-1))
        return self._levels

    def look_again(self) -> None:
        """Reads the scheduler's `fixed_bits` anew; to be called after they were changed in place."""
        self._bits = None

    def run_chosen(
        self,
        layer: int,
        weights: ExpertLayer,
        x: Array,
        out: Array,
        beside: Beside | None = None,
    ) -> bool:
        """Does for x [1, D] what a call does, in a layer of `ahead` whose experts have been chosen."""
        return self._ops.run_chosen(layer, x, weights, self._parts, out, beside)

    def count(self, layers: Sequence[int]) -> None:
        """Counts the uses of experts in layers of `ahead`, unless the operations count them; waits for the choices.

        If a token fails half-way on a device, its uses are not counted: the device may not answer any more.
        """
        experts = self._ops.chosen()[layers]
        if self._levels is not None and not self._ops.counts_chosen:
            self.store.count(layers, experts, self._levels)

"""The heart: the scheduler decides, the store loads, the kernels compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.ops import Array, Beside, ExpertLayer, Ops
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
        """Pairs of a token and an expert that routers chose, and those of them that no plan ran."""
        self._ops = ops
        self._parts = parts

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

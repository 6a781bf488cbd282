"""Verbs of experts: who is chosen, and what they make of a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemoe.ops.values import Array, Beside, ExpertLayer, Ids, RouteRule, RouterWeights
from edgemoe.plan import Plan
from edgemoe.specs import RouterSpec
from edgemoe.store.request import Request

__all__ = ["ExpertVerbs"]


class ExpertVerbs(Protocol):
    """Are a device's; see `Ops`."""

    def route_rule(self, spec: RouterSpec) -> RouteRule:
        """Returns what `route` and `look_ahead` need to know of a model's routers."""

    def begin_route(self, x: Array, router: RouterWeights) -> None:
        """Begins the next `route`, which is for the same: all of it that a device does without the host."""

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
        """Writes each token's experts and gates [T, K], best first, and the scores of all, scores [T, E].

        The three are the host's, which waits for them.
        """

    def slot_scores(
        self,
        x: Array,
        layers: tuple[Array, Array, Array],
        experts: Ids,
        gates: Array,
        scores: Array,
    ) -> None:
        """scores [T, K, B] = for each of a token's experts [T, K], its own linear layer on x [T, D] and its gate.

        layers: weight [E, B, D], gate_weight [E, B], bias [E, B]; gates [T, K]. `scores` is the host's.
        """

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
        """Writes what p later layers' routers choose for x [T, D] after their own norms: experts, gates [p, T, K].

        normed [p, T, D] and scores [p, T, E] are scratch; experts and gates are the host's.
        """

    def expect(
        self, slots: Any, first: int, experts: NDArray[np.int32], beside: Beside | None
    ) -> None:
        """Says that experts `first` + experts [K], as the file numbers them, will probably run next: a hint, no more.

        slots: where they lie, as in `Request`; beside: what may run with them.
        """

    def expert_ffn(
        self,
        x: Array,
        layer: ExpertLayer,
        request: Request,
        plan: Plan,
        group: Sequence[int],
        parts: Array,
    ) -> None:
        """Runs the experts at positions `group` of a plan that was requested; writes their rows of `parts` [m, D]."""

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
        """Runs what a router chose for x [1, D], as `run_experts` would if it were planned, where none has to come.

        Args:
            first: the layer's first expert, as the file numbers them.
            chosen: [1, K], with gates [1, K].
            levels: [layers * E], what experts run at.

        Returns:
            Whether it did; else it is to be planned.
        """

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
        """`expert_ffn` for each group of a request as it arrives, and `combine` to out [T, D].

        Computing one group hides the reads of the next. The request is over then, also where it fails.

        Args:
            groups: what the store gives of it, for who does not ask the slots themselves.
            parts: scratch [m, D].
            beside: an FFN on the same x with the same activation.

        Returns:
            Whether that was run too; else it is left to `ffn`.
        """

    def combine(self, parts: Array, plan: Plan, out: Array) -> None:
        """out [T, D]: each token's parts times their gates, added in the order of plan.rows."""

    def stand_in(
        self, x: Array, maps: tuple[Array, Array, Array], experts: Ids, plan: Plan, out: Array
    ) -> None:
        """Adds to out [T, D] what maps give of x [T, D] in place of the experts that a plan leaves out.

        Args:
            maps: of the layer, the host's; see `edgemoe.quant.StandIns`.
            experts: [T, K], what the plan's slots are of. A token's are added in their order in the file.
        """

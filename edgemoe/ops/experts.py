"""Verbs of experts: choosing them, and running them."""

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
    """The expert verbs of a device; see `Ops`."""

    def route_rule(self, spec: RouterSpec) -> RouteRule:
        """Returns what `route` and `look_ahead` need to know of a model's routers."""

    def begin_route(self, x: Array, router: RouterWeights) -> None:
        """Starts the part of `route` that does not need the host. The next `route` must have the same x and router."""

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
        """Chooses experts for x [T, D]: experts and gates [T, K], best first, and scores [T, E] of all experts.

        The three results are arrays of the host; the call waits for them.
        """

    def slot_scores(
        self,
        x: Array,
        layers: tuple[Array, Array, Array],
        experts: Ids,
        gates: Array,
        scores: Array,
    ) -> None:
        """scores [T, K, B] = a linear layer on x [T, D] and the gate, which each expert has of its own.

        Args:
            layers: weight [E, B, D], gate_weight [E, B] and bias [E, B] of each expert's linear layer.
            experts: [T, K], each token's experts, with gates [T, K].
            scores: an array of the host.
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
        """Predicts the choices of the next p layers: applies each one's norm and router to this layer's x [T, D].

        The results are experts and gates [p, T, K], arrays of the host. normed [p, T, D] and scores [p, T, E] are
        scratch.
        """

    def expect(
        self, slots: Any, first: int, experts: NDArray[np.int32], beside: Beside | None
    ) -> None:
        """Tells that experts `first` + experts [K], as the file numbers them, will probably run next.

        It is only a hint, so that idle threads can prefetch their weights.

        Args:
            slots: where the experts lie, as in `Request`.
            beside: the FFN that may run together with them.
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
        """Runs the experts at positions `group` of a requested plan on x [T, D]; writes their rows of parts [m, D]."""

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
        """Runs the chosen experts on x [1, D] without a plan, if none of them has to be read or copied first.

        The result is that of `run_experts` for a plan of all chosen experts.

        Args:
            slots: where the experts lie, as in `Request`.
            first: the layer's first expert, as the file numbers them.
            chosen: [1, K], the experts that the router chose, with gates [1, K].
            levels: [layers * E], the level that each expert runs at.
            parts: scratch [K or more, D].

        Returns:
            Whether it ran them; if not, the caller makes a plan.
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
        """Runs `expert_ffn` for each group of a request as it arrives, then `combine` to out [T, D].

        So the reads of the next group go on while one is computed. The request is closed afterwards, also on an error.

        Args:
            groups: the positions of the plan whose experts have arrived, group by group, from the store. An
                implementation may ask the cache itself instead.
            parts: scratch [m, D].
            beside: an FFN on the same x with the same activation, such as the layer's shared FFN.

        Returns:
            Whether `beside` was run too; if not, the caller runs it with `ffn`.
        """

    def combine(self, parts: Array, plan: Plan, out: Array) -> None:
        """out [T, D] = for each token, the sum of its parts times their gates, added in the order of plan.rows."""

    def stand_in(
        self, x: Array, maps: tuple[Array, Array, Array], experts: Ids, plan: Plan, out: Array
    ) -> None:
        """Adds to out [T, D] the outputs of stand-ins on x [T, D], for the experts that a plan leaves out.

        A stand-in is an affine map of low rank, times the gate of the expert that it replaces.

        Args:
            maps: the layer's stand-ins, arrays of the host; see `edgemoe.quant.StandIns`.
            experts: [T, K], each token's chosen experts, in the order of plan.rows. A token's stand-ins are added in
                ascending order of the experts' numbers.
        """

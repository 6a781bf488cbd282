"""Verbs of work that is recorded once and then repeated, including layers where the device chooses the experts."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemoe.ops.values import Array, Beside, ExpertLayer, Ids, RouteRule, RouterWeights
from edgemoe.specs import AttentionSpec, MlaSpec

__all__ = ["RepeatVerbs"]


class RepeatVerbs(Protocol):
    """The verbs of a device for repeating work; see `Ops`, and `edgemoe.ops.notes` for how work is recorded."""

    def place(self, spec: AttentionSpec | MlaSpec, pos: int) -> Hashable | None:
        """Sets the position of a pass of one token. Work that is repeated from now on is for that position.

        Returns:
            A key that is equal for passes whose attention is the same work; None if it cannot be repeated.
        """

    def repeat(self, key: Hashable | None, run: Callable[[], None]) -> None:
        """Does the work of `run`, by calling it or by repeating what was recorded of it.

        Args:
            key: equal for calls of `run` that do the same work; None for work that is never the same.
        """

    def forget_work(self) -> None:
        """Forgets what was recorded: the same keys mean other work from now on."""

    def ahead(
        self, slots: Any, levels: NDArray[np.int8], rule: RouteRule, *, is_start: bool
    ) -> frozenset[int]:
        """Returns the layers that are "ahead": in a pass of one token they need no plan of the host.

        All experts of such a layer are in memory, so `choose` and `run_chosen` may be called for it. Layers are counted
        among those with experts.

        Args:
            slots: where the experts lie, as in `Request`.
            levels: [layers * E], the level that each expert runs at.
            rule: how routers choose.
            is_start: whether a pass begins. During a pass layers may drop out, but none are added.
        """

    def choose(self, layer: int, x: Array, router: RouterWeights, rule: RouteRule) -> None:
        """Chooses a layer's experts for x [1, D] as `route` does, but keeps the choice to itself; see `chosen`.

        Args:
            layer: its position among the layers with experts.
        """

    def run_chosen(
        self,
        layer: int,
        x: Array,
        weights: ExpertLayer,
        parts: Array,
        out: Array,
        beside: Beside | None,
    ) -> bool:
        """out [1, D] = the gated sum of the outputs on x [1, D] of the experts last chosen for a layer.

        Args:
            parts: scratch [K or more, D].
            beside: an FFN that may be run together with them.

        Returns:
            Whether `beside` was run too. It is the same in every call.
        """

    counts_chosen: bool
    """Whether `run_chosen` counts uses in the cache, as a request does. If not, the caller must count them."""

    def chosen(self) -> Ids:
        """Returns the experts that `choose` last chose for each layer, [layers, K], in an array of the host; waits."""

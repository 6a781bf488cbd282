"""Verbs of work that is told once and repeated, also where experts have to be chosen."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemoe.ops.values import Array, Beside, ExpertLayer, Ids, RouteRule, RouterWeights
from edgemoe.specs import AttentionSpec, MlaSpec

__all__ = ["RepeatVerbs"]


class RepeatVerbs(Protocol):
    """Are a device's; see `Ops`."""

    def place(self, spec: AttentionSpec | MlaSpec, pos: int) -> Hashable | None:
        """Says that a pass of one token is at `pos`, where others may come to be.

        Returns:
            What tells apart passes whose attention is not the same work; None where none is repeated.
        """

    def repeat(self, key: Hashable | None, run: Callable[[], None]) -> None:
        """Calls `run`, which does the same work whenever the key is the same, or does that work without it.

        Args:
            key: None for work that is never the same.
        """

    def forget_work(self) -> None:
        """Says that the same keys mean other work from now on."""

    def ahead(
        self, slots: Any, levels: NDArray[np.int8], rule: RouteRule, *, is_start: bool
    ) -> frozenset[int]:
        """Returns the layers with experts for which `choose` and `run_chosen` may be called, in a pass of one token.

        Args:
            slots: where experts lie, as in `Request`.
            levels: [layers * E], what experts run at.
            is_start: a pass begins. In the middle of one layers may leave, and none come.
        """

    def choose(self, layer: int, x: Array, router: RouterWeights, rule: RouteRule) -> None:
        """Chooses a layer's experts for x [1, D], as `route` does, where the host does not look.

        Args:
            layer: its place among those with experts.
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
        """out [1, D] = the gated sum of what the experts that were chosen last for a layer make of x [1, D].

        Args:
            parts: scratch [K or more, D].
            beside: what may be run with them.

        Returns:
            Whether it was: always the same.
        """

    counts_chosen: bool
    """Whether `run_chosen` counts uses where experts lie, as a request does; else who called it is to."""

    def chosen(self) -> Ids:
        """Returns the experts that `choose` chose last for each layer, [layers, K]: the host's; waits."""

"""Work on a CPU that is recorded and repeated without Python in between; see `edgemoe.ops.repeats`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.ops.cpu.experts import CpuExperts
from edgemoe.ops.values import Array, Beside, ExpertLayer, Ids, RouteRule, RouterWeights
from edgemoe.specs import AttentionSpec, MlaSpec

__all__ = ["CpuRepeats"]


class CpuRepeats(CpuExperts):
    """The verbs of a CPU for repeating work; see `CpuOps`."""

    repeats = True
    """Whether work is recorded and repeated. Results are the same without, and come later."""
    runs_ahead = True
    """Whether layers whose experts are all in memory are part of repeated work. Results are the same without."""
    counts_chosen = True

    def place(self, spec: AttentionSpec | MlaSpec, pos: int) -> Hashable | None:
        """See `Ops.place`: attention is the same work at every position."""
        if not self.repeats:
            return None
        self._ws.place(pos)
        return True

    def repeat(self, key: Hashable | None, run: Callable[[], None]) -> None:
        """See `Ops.repeat`."""
        if key is None or not self.repeats or (note := self._notes.of(key, run)) is None:
            run()
        else:
            self._ws.repeat(note)

    def forget_work(self) -> None:
        """See `Ops.forget_work`."""
        self._notes.forget()

    def ahead(
        self, slots: Any, levels: NDArray[np.int8], rule: RouteRule, *, is_start: bool
    ) -> frozenset[int]:
        """See `Ops.ahead`."""
        if not (self.repeats and self.runs_ahead):
            return frozenset()
        if self._ahead.is_other(slots, levels, rule):
            self.forget_work()
            self._ahead.take(slots, levels, rule)
        if is_start:
            slots.close()  # what Ctrl-C may have left open
        return self._ahead.layers(is_start=is_start)

    def choose(self, layer: int, x: Array, router: RouterWeights, rule: RouteRule) -> None:
        """See `Ops.choose`."""
        ahead, at = self._ahead, slice(layer, layer + 1)
        self.route(
            x, router, rule, scores=ahead.scores, experts=ahead.experts[at], gates=ahead.gates[at]
        )

    def run_chosen(
        self,
        layer: int,
        x: Array,
        weights: ExpertLayer,
        parts: Array,
        out: Array,
        beside: Beside | None,
    ) -> bool:
        """See `Ops.run_chosen`."""
        ahead, at = self._ahead, slice(layer, layer + 1)
        matrices, to = (None, None) if beside is None else beside
        _core.run_chosen(
            self._ws, x, ahead.slots, layer, ahead.experts[at], ahead.gates[at], ahead.levels, parts, out,
            weights.activation, weights.biases, weights.basis, matrices, to,
        )  # fmt: skip
        return beside is not None

    def chosen(self) -> Ids:
        """See `Ops.chosen`."""
        return self._ahead.experts

"""Work on a device that is recorded and repeated without Python in between; see `edgemoe.ops.repeats`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.ops.cuda.ahead import Ahead
from edgemoe.ops.cuda.experts import CudaExperts
from edgemoe.ops.cuda.memory import Array
from edgemoe.ops.values import ExpertLayer, Ids, RouterWeights
from edgemoe.specs import AttentionSpec, MlaSpec
from edgemoe.store.tiers import Tiers

__all__ = ["CudaRepeats"]


class CudaRepeats(CudaExperts):
    """The verbs of a device for repeating work; see `CudaOps`."""

    counts_chosen = False

    def place(self, spec: AttentionSpec | MlaSpec, pos: int) -> Hashable | None:
        """See `Ops.place`."""
        return self._notes.place(spec, pos) if self.repeats else None

    def repeat(self, key: Hashable | None, run: Callable[[], None]) -> None:
        """See `Ops.repeat`."""
        if key is None or not self.repeats or (note := self._notes.of(key, run)) is None:
            run()
        else:
            self._is_posted, self._x_of = self._ws.repeat(note), None

    def forget_work(self) -> None:
        """See `Ops.forget_work`."""
        self._notes.forget()

    def ahead(
        self, slots: Any, levels: NDArray[np.int8], rule: _core.RouteRule, *, is_start: bool
    ) -> frozenset[int]:
        """See `Ops.ahead`: layers whose experts are all on the device."""
        if self._ahead is None or not self.runs_ahead or not isinstance(slots, Tiers):
            return frozenset()
        return self._ahead.layers(slots.device, levels, rule, is_start)

    def choose(self, layer: int, x: Array, router: RouterWeights, rule: _core.RouteRule) -> None:
        """See `Ops.choose`."""
        _core.device_matmul(self._ws, x, cast(Any, router.weight), self._scores[:1])
        cast(Ahead, self._ahead).choose(layer, self._scores[:1], router, rule)

    def run_chosen(
        self, layer: int, x: Array, weights: ExpertLayer, parts: Array, out: Array, beside: Any
    ) -> bool:
        """See `Ops.run_chosen`; leaves `beside` to the caller."""
        _, biases, _ = self._layer(weights)
        cast(Ahead, self._ahead).run(layer, x, weights.activation, biases, parts, out)
        return False

    def chosen(self) -> Ids:
        """See `Ops.chosen`."""
        return cast(Ahead, self._ahead).chosen()

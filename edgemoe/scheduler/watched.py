"""A wrapper that asks for more look-ahead than its scheduler needs, so that a trace can record it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Routing
from edgemoe.scheduler.base import Scheduler

__all__ = ["Watched", "seen"]


class Watched(Scheduler):
    """A scheduler that plans as another one does but asks for more look-ahead, which only the trace sees."""

    def __init__(self, scheduler: Scheduler, look_ahead: int) -> None:
        self._inner = scheduler
        self.look_ahead = max(look_ahead, scheduler.look_ahead)
        self.reads_ahead = scheduler.reads_ahead
        self.policy, self.keep_level = scheduler.policy, scheduler.keep_level
        self.bit_routers = scheduler.bit_routers
        self.leaves_out, self.stand_ins = scheduler.leaves_out, scheduler.stand_ins
        self.notes = scheduler.notes

    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """See `Scheduler.plan`."""
        plan = self._inner.plan(seen(routing, self._inner.look_ahead), residency)
        self.substituted = self._inner.substituted
        return plan

    def begin(self) -> None:
        """See `Scheduler.begin`."""
        self._inner.begin()

    def tokens(self, ids: NDArray[np.int32], sequences: int = 1) -> None:
        """See `Scheduler.tokens`."""
        self._inner.tokens(ids, sequences)

    def passed(self, tokens: int, seconds: float, sequences: int = 1) -> None:
        """See `Scheduler.passed`."""
        self._inner.passed(tokens, seconds, sequences)

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        return self._inner.state()

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        self._inner.restore(state)

    def report(self) -> str:
        """See `Scheduler.report`."""
        return self._inner.report()


def seen(routing: Routing, look_ahead: int) -> Routing:
    """Returns the routing with at most `look_ahead` layers of look-ahead."""
    if routing.ahead_experts is None or routing.ahead_gates is None:
        return routing
    if look_ahead <= 0:
        return Routing(
            routing.layer, routing.experts, routing.gates,
            scores=routing.scores, bit_logits=routing.bit_logits, sequences=routing.sequences,
        )  # fmt: skip
    return Routing(
        routing.layer, routing.experts, routing.gates,
        routing.ahead_experts[:look_ahead], routing.ahead_gates[:look_ahead], routing.scores,
        routing.bit_logits, routing.sequences,
    )  # fmt: skip

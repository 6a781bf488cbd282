"""Schedulers that know the future of a trace: reference lines for policies that do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Priorities, Routing
from edgemoe.scheduler import OnDemand, Scheduler, Setting

__all__ = ["ORACLES", "Oracle"]

ORACLES = ("sch", "belady")

_LATER = float(1 << 32)


class Oracle(Scheduler):
    """A scheduler that loads on demand, and evicts by what the future will use.

    "belady" evicts the expert whose next use is last. No policy that loads everything it is asked for can do better.
    "sch" evicts the expert that is used least often in the next 16 passes, and of equals the least recently used;
    arXiv 2505.16056 calls it a fair practical ideal. A prompt's chunk is one pass.
    """

    def __init__(
        self,
        setting: Setting,
        requests: Sequence[NDArray[np.integer[Any]]],
        rule: str,
        *,
        window: int = 16,
    ) -> None:
        """Args:
        requests: the experts of each coming call of `plan`, layer after layer, pass after pass.
        rule: "belady" or "sch".
        window: of "sch", in passes.
        """
        self.policy = self.priorities = Priorities.zeros(setting.num_layers, setting.num_experts)
        self._scores = self.priorities.scores.reshape(-1)
        self._on_demand = OnDemand(setting, look_ahead=False)
        self._setting = setting
        self._rule = rule
        self._reach = window * setting.num_layers
        self._at = 0
        self._requests = [
            np.unique(experts).astype(np.int64) + i % setting.num_layers * setting.num_experts
            for i, experts in enumerate(requests)
        ]
        if rule == "belady":
            self._next = self._next_requests()
        else:
            for ids in self._requests[: self._reach]:
                self._scores[ids] += _LATER

    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """See `Scheduler.plan`.

        Raises:
            ValueError: this layer was not the next one in `requests`.
        """
        at, scores = self._at, self._scores
        if at >= len(self._requests) or at % self._setting.num_layers != routing.layer:
            raise ValueError("oracle: the future is not what was foretold")
        ids = self._requests[at]
        if self._rule == "belady":
            scores[ids] = -self._next[at]
        else:
            scores[ids] = (scores[ids] // _LATER - 1) * _LATER + at
            if at + self._reach < len(self._requests):
                scores[self._requests[at + self._reach]] += _LATER  # the same layer's
        self.priorities.version[routing.layer] += 1
        self._at += 1
        return self._on_demand.plan(routing, residency)

    def _next_requests(self) -> list[NDArray[np.float64]]:
        never = float(len(self._requests))
        coming = np.full(self._setting.num_layers * self._setting.num_experts, never)
        out = []
        for at in range(len(self._requests) - 1, -1, -1):
            ids = self._requests[at]
            out.append(coming[ids])
            coming[ids] = at
        return out[::-1]

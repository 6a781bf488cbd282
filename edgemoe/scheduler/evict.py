"""Eviction policies, which any scheduler can be combined with. All are exact.

Each keeps a live score of every expert. The cache evicts the expert with the lowest score among those not in use
(`Scheduler.policy`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.plan import Plan, Priorities, Routing
from edgemoe.scheduler.base import Setting
from edgemoe.scheduler.options import check
from edgemoe.scheduler.paths import PathUse
from edgemoe.scheduler.predict import Frequency, NextUse

__all__ = ["CACHE_OWN", "EVICTIONS", "Eviction", "HobbitWeights", "SoonestUse", "make_eviction"]

CACHE_OWN = ("lfu", "lru")
"""The policies that the cache implements itself."""
EVICTIONS = (*CACHE_OWN, "next-use", "next-path", "frequency-distance", "hobbit")
"""What each evicts first. lfu: the least frequently used, where a use counts half after 64 tokens. lru: the least
recently used. next-use: the expert whose next use is expected last. next-path: the same, predicted with the file's
trained path predictor too. frequency-distance: EdgeMoE's rule. hobbit: HOBBIT's four terms."""


class Eviction(ABC):
    """The base class of policies that score experts by what runs. Each object serves one engine."""

    def __init__(self, setting: Setting) -> None:
        self.num_layers, self.num_experts = setting.num_layers, setting.num_experts
        self.priorities = Priorities.zeros(self.num_layers, self.num_experts)
        """Always the same object; the cache reads it."""

    @abstractmethod
    def planned(self, routing: Routing, plan: Plan) -> None:
        """Called when a layer has been planned and nothing of it is loaded yet."""

    def begin(self) -> None:  # noqa: B027 (there may be nothing to do)
        """See `Scheduler.begin`."""

    def tokens(self, ids: NDArray[np.int32], sequences: int = 1) -> None:  # noqa: B027 (likewise)
        """See `Scheduler.tokens`."""

    def passed(self) -> None:  # noqa: B027 (likewise)
        """Called after all layers have run."""

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        return {}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:  # noqa: B027
        """See `Scheduler.restore`."""


def make_eviction(name: str, setting: Setting, weights: HobbitWeights) -> Eviction | None:
    """Returns the policy of a name in `EVICTIONS`; None for those that the cache implements itself.

    Raises:
        ValueError: the file has no path predictor and `name` is "next-path".
        FormatError: the file's path predictor is damaged, or belongs to another model.
    """
    if name == "next-use":
        return SoonestUse(setting)
    if name == "next-path":
        return SoonestUse(setting, PathUse(setting))
    if name == "frequency-distance":
        return _FrequencyDistance(setting)
    if name == "hobbit":
        return _HobbitMix(setting, weights)
    return None


class SoonestUse(Eviction):
    """The eviction of the expert whose next use is expected last, after Belady's optimum.

    Let a model have L layers with experts, and let an expert be used with probability p whenever its layer runs. If
    uses are independent, its next use is expected L / p layers after its layer last ran. This moment does not move
    until the layer runs again, so each layer changes only its own row of scores. An expert that was just used may be
    evicted at once.
    """

    def __init__(self, setting: Setting, predictor: NextUse | None = None) -> None:
        super().__init__(setting)
        L, E, K = self.num_layers, self.num_experts, setting.experts_per_token
        self.predictor = NextUse(L, E, K) if predictor is None else predictor
        self._rows, self._version = list(self.priorities.scores), self.priorities.version
        self._step = 0.0
        self._expect()

    def _expect(self) -> None:
        """Scores all experts by their frequencies alone."""
        L = self.num_layers
        first = L / np.maximum(self.predictor.frequency, 1e-9)
        self.priorities.scores[:] = -(np.arange(L)[:, None] + first)
        self._version[:] += 1

    def planned(self, routing: Routing, plan: Plan) -> None:
        self._step += 1.0
        odds = self.predictor.update(routing)  # odds against a use: L / p = L + L * odds
        _core.expect_uses(self._rows[routing.layer], odds, self._step, float(self.num_layers))
        self._version[routing.layer] += 1

    def begin(self) -> None:
        self.predictor.begin()

    def tokens(self, ids: NDArray[np.int32], sequences: int = 1) -> None:
        self.predictor.tokens(ids, sequences)

    def passed(self) -> None:
        self.predictor.learn()

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        return self.predictor.state()

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        self.predictor.restore(state)
        self._expect()


class _FrequencyDistance(Eviction):
    """The eviction of the expert with the smallest frequency / distance (EdgeMoE III-C-2).

    The distance of an expert is the number of layers until its layer runs again. The formula printed in the paper has
    the opposite sign of what its text intends, and divides by zero at the current layer. The code follows the intent:
    the layer that has just run is a whole round away.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        L = self.num_layers
        self._frequency = Frequency(self.priorities.scores, 1e-3, half_life=256)
        distance = (np.arange(L)[None, :] - np.arange(L)[:, None]) % L
        distance[distance == 0] = L
        self._nearness = list(1.0 / distance)  # one row for each layer that may be running

    def planned(self, routing: Routing, plan: Plan) -> None:
        self._frequency.update(routing)
        self.priorities.version[routing.layer] += 1
        self.priorities.scale[:] = self._nearness[routing.layer]

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        return {"frequency.values": self._frequency.values}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        if "frequency.values" in state:
            self._frequency.values[:] = state["frequency.values"]
            self.priorities.version[:] += 1


@dataclass(frozen=True, slots=True)
class HobbitWeights:
    """The four weights of HOBBIT's cache priority. The paper fits them and does not print them."""

    recency: float = 0.25
    frequency: float = 0.25
    high: float = 0.25
    """Of the frequency of uses at high precision."""
    distance: float = 0.25
    """Of the nearness in layers."""

    def __post_init__(self) -> None:
        total = self.recency + self.frequency + self.high + self.distance
        for name in ("recency", "frequency", "high", "distance"):
            check(f"w_{name}", getattr(self, name), 0, 1)
        if not 0.99 <= total <= 1.01:
            raise ValueError(
                f"w_recency, w_frequency, w_high, w_distance: expected a sum of 1, got {total:g}"
            )


class _HobbitMix(Eviction):
    """The eviction of the expert with the lowest weighted sum of four terms, over this sequence only (HOBBIT 3.4).

    The terms are recency R/T, frequency F/T, frequency at high precision H/T, and nearness of the layer,
    1 - ((l_expert - l_now + L) mod L) / L, where T counts tokens. All are stored multiplied by T, which does not change
    their order. Every level above the best one of at most half the bits counts as high precision.
    """

    def __init__(self, setting: Setting, weights: HobbitWeights) -> None:
        super().__init__(setting)
        L = self.num_layers
        self._recency = weights.recency
        self._worth = np.full(9, weights.frequency)  # what a use adds, by its bits
        low = max((b for b in setting.level_bits if b <= setting.bits // 2), default=0)
        self._worth[low + 1 :] += weights.high
        self._records = (
            self.priorities.scores
        )  # the first three terms, times T; the fourth is `Priorities.shift`
        self._last = np.zeros((L, self.num_experts))
        self._records_rows, self._last_rows = list(self._records), list(self._last)
        near = 1.0 - ((np.arange(L)[None, :] - np.arange(L)[:, None]) % L) / L
        self._near = weights.distance * near  # one row for each layer that may be running
        self.begin()

    def _start_token(self, count: int) -> None:
        self._tokens += count
        self._worth_now = self._worth + self._recency * self._tokens
        self._near_now = list(self._near * self._tokens)

    def begin(self) -> None:
        self._records.fill(0.0)
        self.priorities.shift.fill(0.0)
        self.priorities.version[:] += 1
        self._last.fill(0.0)
        self._tokens = 0.0
        self._start_token(0)

    def planned(self, routing: Routing, plan: Plan) -> None:
        layer, experts = routing.layer, plan.experts
        if layer == 0:
            self._start_token(len(routing.experts))
        records, last = self._records_rows[layer], self._last_rows[layer]
        now = self._recency * self._tokens
        if len(routing.experts) == 1:
            # The recency term was `last` and becomes its weight times T.
            _core.renew_records(records, last, experts, plan.bits, self._worth_now, now)
        else:
            worth = self._worth.take(plan.bits) * np.diff(plan.offsets)
            records += np.bincount(experts, worth, self.num_experts)
            records[experts] += now - last[experts]
            last[experts] = now
        self.priorities.version[layer] += 1
        self.priorities.shift[:] = self._near_now[layer]

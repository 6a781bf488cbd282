"""What the cache drops first: policies that any scheduler can be combined with. All are exact.

Each keeps live scores of all experts, of which the cache drops the lowest that is not in use (`Scheduler.priorities`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Routing
from edgemoe.scheduler.base import Setting
from edgemoe.scheduler.options import check
from edgemoe.scheduler.paths import PathUse
from edgemoe.scheduler.predict import Frequency, NextUse

__all__ = ["EVICTIONS", "Eviction", "Frequent", "HobbitWeights", "SoonestUse", "make_eviction"]

EVICTIONS = ("lfu", "lru", "next-use", "next-path", "frequency-distance", "hobbit")
"""lfu: the least frequently used, decayed, as the cache does by itself. lru: the least recently used.
next-use: the one whose next use is expected last. next-path: the same, by the file's trained predictor of paths too.
frequency-distance: EdgeMoE's. hobbit: HOBBIT's four terms."""


class Eviction(ABC):
    """Scores experts by what runs. Made for one engine."""

    def __init__(self, setting: Setting) -> None:
        self.num_layers, self.num_experts = setting.num_layers, setting.num_experts
        self.priorities: NDArray[np.float64] = np.zeros(setting.num_layers * setting.num_experts)
        """[num_layers * num_experts], live; the lowest goes first."""
        self.rows = list(self.priorities.reshape(self.num_layers, self.num_experts))

    @abstractmethod
    def planned(self, routing: Routing, plan: Plan) -> None:
        """A layer was planned and nothing is loaded yet."""

    def begin(self) -> None:  # noqa: B027 (there may be nothing to do)
        """A new sequence starts."""

    def tokens(self, ids: NDArray[np.int32], sequences: int = 1) -> None:  # noqa: B027 (likewise)
        """See `Scheduler.tokens`."""

    def passed(self) -> None:  # noqa: B027 (likewise)
        """All layers have run."""

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        return {}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:  # noqa: B027
        """See `Scheduler.restore`."""


def make_eviction(name: str, setting: Setting, weights: HobbitWeights) -> Eviction | None:
    """Returns a policy by its name in `EVICTIONS`; None for the cache's own."""
    if name == "lru":
        return _Recency(setting)
    if name == "next-use":
        return SoonestUse(setting)
    if name == "next-path":
        return SoonestUse(setting, PathUse(setting))
    if name == "frequency-distance":
        return _FrequencyDistance(setting)
    if name == "hobbit":
        return _HobbitMix(setting, weights)
    return None


class _Recency(Eviction):
    """The least recently used goes first. Collapses where one token's experts do not fit: layers come in turn."""

    _step = 0.0

    def planned(self, routing: Routing, plan: Plan) -> None:
        self._step += 1.0
        self.rows[routing.layer][plan.experts] = self._step


class Frequent(Eviction):
    """The least frequently used goes first, where a use counts half after 64 tokens: what the cache does by itself.

    The same in the same words as csrc/policy.cpp.
    """

    _LARGEST = 1e200

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._weight, self._tokens = 1.0, 0

    def planned(self, routing: Routing, plan: Plan) -> None:
        if routing.layer == 0:
            # Uses from now on weigh more; where that ends, the old ones weigh less.
            left = self._decay()
            if self._weight < self._LARGEST * left:
                self._weight /= left
            else:
                self.priorities *= left / self._weight
                self._weight = 1.0
        self._tokens = len(routing.experts)
        row = self.rows[routing.layer]
        if self._tokens == 1:
            row[plan.experts.astype(np.intp)] += self._weight
        else:
            uses = np.diff(plan.offsets)
            row += self._weight * np.bincount(plan.experts, uses, self.num_experts)

    def _decay(self) -> float:
        """Returns what the pass leaves of a use before it; 0 after very many tokens, never infinite."""
        return float(2.0 ** (-self._tokens / 64))

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        uses = self.priorities * (self._decay() / self._weight)
        return {"frequent.uses": uses.reshape(self.num_layers, -1)}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        if "frequent.uses" in state:
            self.priorities[:] = state["frequent.uses"].reshape(-1)


class SoonestUse(Eviction):
    """The one whose next use is expected last goes first, after Belady's optimum.

    An expert that is used with probability p whenever its layer runs is expected to run L / p layers after its layer
    ran last, if a model has L layers with experts and uses were independent. This moment does not move until the
    layer runs again, so a layer changes its own row only. What was just used may go at once.
    """

    def __init__(self, setting: Setting, predictor: NextUse | None = None) -> None:
        super().__init__(setting)
        L, E, K = self.num_layers, self.num_experts, setting.experts_per_token
        self.predictor = NextUse(L, E, K) if predictor is None else predictor
        self._step = 0.0
        self._expect()

    def _expect(self) -> None:
        """Scores all experts by their frequency alone."""
        L = self.num_layers
        first = L / np.maximum(self.predictor.frequency, 1e-9)
        self.priorities.reshape(L, -1)[:] = -(np.arange(L)[:, None] + first)

    def planned(self, routing: Routing, plan: Plan) -> None:
        self._step += 1.0
        L, row = float(self.num_layers), self.rows[routing.layer]
        odds = self.predictor.update(routing)  # L / p = L + L * odds against
        odds *= -L
        np.subtract(odds, self._step + L, out=row)

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
    """EdgeMoE III-C-2: the smallest frequency / distance goes first, distance in layers until its layer runs again.

    The printed distance has the opposite sign of the text's intent and divides by zero at the present layer; this is
    the intent (the layer just run is a whole round away).
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        L = self.num_layers
        self._frequency = Frequency(L, self.num_experts, 1e-3, half_life=256)
        self._table = self.priorities.reshape(L, self.num_experts)
        distance = (np.arange(L)[None, :] - np.arange(L)[:, None]) % L
        distance[distance == 0] = L
        self._nearness = list((1.0 / distance)[:, :, None])  # by the layer that runs

    def planned(self, routing: Routing, plan: Plan) -> None:
        self._frequency.update(routing)
        np.multiply(self._frequency.values, self._nearness[routing.layer], out=self._table)

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        return {"frequency.values": self._frequency.values}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        if "frequency.values" in state:
            self._frequency.values[:] = self._table[:] = state["frequency.values"]


@dataclass(frozen=True, slots=True)
class HobbitWeights:
    """The four weights of HOBBIT's cache priority; the paper fits them and does not print them."""

    recency: float = 0.25
    frequency: float = 0.25
    high: float = 0.25
    """Of uses at high precision."""
    distance: float = 0.25
    """Of being near in layers."""

    def __post_init__(self) -> None:
        total = self.recency + self.frequency + self.high + self.distance
        for name in ("recency", "frequency", "high", "distance"):
            check(f"w_{name}", getattr(self, name), 0, 1)
        if not 0.99 <= total <= 1.01:
            raise ValueError(
                f"w_recency, w_frequency, w_high, w_distance: expected a sum of 1, got {total:g}"
            )


class _HobbitMix(Eviction):
    """HOBBIT 3.4: the lowest weighted sum of four terms goes first; records are of this sequence only.

    Recency R/T, frequency F/T, frequency at high precision H/T, and nearness of the layer,
    1 - ((l_expert - l_now + L) mod L) / L, where T counts tokens. All are kept times T, which changes no order.
    """

    def __init__(self, setting: Setting, weights: HobbitWeights) -> None:
        super().__init__(setting)
        L = self.num_layers
        self._recency = weights.recency
        self._worth = np.full(9, weights.frequency)  # of a use, by its bits
        self._worth[setting.bits] += weights.high
        self._records = np.zeros((L, self.num_experts))  # the first three terms times T
        self._last = np.zeros((L, self.num_experts))
        near = 1.0 - ((np.arange(L)[None, :] - np.arange(L)[:, None]) % L) / L
        self._near = weights.distance * near[:, :, None]  # by the layer that runs
        self._table = self.priorities.reshape(L, self.num_experts)
        self.begin()

    def _start_token(self, count: int) -> None:
        self._tokens += count
        self._worth_now = self._worth + self._recency * self._tokens
        self._near_now = list(self._near * self._tokens)

    def begin(self) -> None:
        self._records.fill(0.0)
        self._last.fill(0.0)
        self._tokens = 0.0
        self._start_token(0)

    def planned(self, routing: Routing, plan: Plan) -> None:
        layer, experts = routing.layer, plan.experts.astype(np.intp)
        if layer == 0:
            self._start_token(len(routing.experts))
        records, last = self._records[layer], self._last[layer]
        if len(routing.experts) == 1:
            # Recency was what `last` says and is T.
            records[experts] += self._worth_now.take(plan.bits) - last.take(experts)
        else:
            worth = self._worth.take(plan.bits) * np.diff(plan.offsets)
            records += np.bincount(experts, worth, self.num_experts)
            records[experts] += self._recency * self._tokens - last[experts]
        last[experts] = self._recency * self._tokens
        np.add(self._records, self._near_now[layer], out=self._table)

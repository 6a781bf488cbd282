"""Any scheduler, combined with an eviction policy and with levers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Routing
from edgemoe.scheduler.base import Scheduler, Setting
from edgemoe.scheduler.evict import EVICTIONS, HobbitWeights, make_eviction
from edgemoe.scheduler.levers import (
    CachePrior,
    Levers,
    low_bits_first,
    skip_small,
    without_misses,
)
from edgemoe.scheduler.options import option
from edgemoe.scheduler.plans import add_ahead
from edgemoe.scheduler.spared import spare

__all__ = ["Combined", "Dropping"]


@dataclass(frozen=True, slots=True)
class Dropping:
    """The exact options that every scheduler takes: what the cache evicts first."""

    eviction: str = option(
        "default", "what the cache drops first; the default is what the scheduler was made with",
        choices=("default", *EVICTIONS),
    )  # fmt: skip
    lower_to: int = option(
        0,
        "lower what has to go to so many bits, and evict only when all is lowered; 0 evicts at once",
    )
    w_recency: float = option(0.25, "weight of a term of the eviction hobbit; the four sum to 1")
    w_frequency: float = option(0.25, "the same, of uses")
    w_high: float = option(0.25, "the same, of uses at high precision")
    w_distance: float = option(0.25, "the same, of nearness in layers")


class Combined(Scheduler):
    """A scheduler that plans as another one does, with levers before and after and an eviction policy of its own."""

    def __init__(
        self,
        inner: Scheduler,
        setting: Setting,
        *,
        dropping: Dropping,
        levers: Levers,
        spared: NDArray[np.bool_] | None = None,
    ) -> None:
        """Args:
        dropping: its `eviction` is not "default".
        spared: [num_layers, num_experts], see `spared_experts`; None for none.
        """
        d = dropping
        weights = HobbitWeights(d.w_recency, d.w_frequency, d.w_high, d.w_distance)
        self.inner = inner
        self.eviction = make_eviction(d.eviction, setting, weights)
        self.policy = inner.policy if self.eviction is None else self.eviction.priorities
        self.levers = levers
        self.notes = (*inner.notes, *levers.notes)
        self.look_ahead = inner.look_ahead
        self.reads_ahead = inner.reads_ahead or levers.reads_ahead
        self.bit_routers = inner.bit_routers
        self.leaves_out = inner.leaves_out or levers.leaves_out
        if levers.miss_bits and levers.miss_bits not in setting.level_bits:
            listed = ", ".join(map(str, setting.level_bits))
            raise ValueError(f"miss_bits: expected one of {listed}, got {levers.miss_bits}")
        if levers.cache_prior and inner.bit_routers is not None:
            raise ValueError(
                "cache_prior: trained bit routers know only the experts that it replaces; router=rule does not"
            )
        self._num_experts = setting.num_experts
        self._bits_of = np.array([0, *setting.level_bits], np.int8)
        self._top_level = len(setting.level_bits)
        self._all_at_top = np.full(setting.num_experts, self._top_level, np.int8)
        self._prior = (
            CachePrior(setting, levers.cache_prior, levers.protect, spared)
            if levers.cache_prior
            else None
        )
        self._spared = spared
        self._spares = [] if spared is None else [bool(row.any()) for row in spared]
        fixed = inner.fixed_bits
        self._own_bits = _all_at(setting) if fixed is None else fixed
        self._has_levers = bool(levers.notes) or spared is not None

    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """See `Scheduler.plan`."""
        make = self._plan_with_levers if self._has_levers else self.inner.plan
        plan = make(routing, residency)
        if self.eviction is not None:
            self.eviction.planned(routing, plan)
        return plan

    def _plan_with_levers(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        levers, layer, resident = self.levers, routing.layer, residency[routing.layer]
        first, is_decoding = layer * self._num_experts, routing.is_decoding
        displaced = None
        if self._prior is not None and is_decoding:
            routing, displaced = self._prior.choose(routing, np.equal(resident, self._all_at_top))
            self.substituted = self._prior.substituted
        plan = self.inner.plan(routing, residency)
        if levers.top_p < 1 or levers.skip_below:
            plan = skip_small(
                plan, routing.gates, top_p=levers.top_p, skip_below=levers.skip_below,
                renormalise=levers.renormalise,
            )  # fmt: skip
        if levers.stand_in_below and is_decoding:
            plan = without_misses(plan, routing, resident, levers.stand_in_below)
        if levers.miss_bits and is_decoding:
            plan = low_bits_first(plan, self._bits_of[resident], levers.miss_bits, first)
        if self._spared is not None and self._spares[layer]:
            plan = spare(plan, routing, self._spared[layer], self._own_bits[layer])
        if displaced is not None and levers.admit:
            bits = np.full(len(displaced), self._bits_of[self._top_level], np.int8)
            plan = add_ahead(plan, displaced + np.int32(first), bits)
        return plan

    def begin(self) -> None:
        """See `Scheduler.begin`."""
        self.inner.begin()
        if self.eviction is not None:
            self.eviction.begin()

    def tokens(self, ids: NDArray[np.int32], sequences: int = 1) -> None:
        """See `Scheduler.tokens`."""
        self.inner.tokens(ids, sequences)
        if self.eviction is not None:
            self.eviction.tokens(ids, sequences)

    def passed(self, tokens: int, seconds: float, sequences: int = 1) -> None:
        """See `Scheduler.passed`."""
        self.inner.passed(tokens, seconds, sequences)
        self.look_ahead = self.inner.look_ahead
        if self.eviction is not None:
            self.eviction.passed()

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        return {
            **self.inner.state(),
            **(self.eviction.state() if self.eviction is not None else {}),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        self.inner.restore(state)
        if self.eviction is not None:
            self.eviction.restore(state)

    def report(self) -> str:
        """See `Scheduler.report`."""
        return self.inner.report()


def _all_at(setting: Setting) -> NDArray[np.int8]:
    return np.full((setting.num_layers, setting.num_experts), setting.bits, np.int8)

"""A scheduler that tries levers one after another while running and keeps those that make tokens faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Routing
from edgemoe.scheduler.base import Scheduler, Setting
from edgemoe.scheduler.evict import SoonestUse
from edgemoe.scheduler.levers import low_bits_first, skip_small
from edgemoe.scheduler.look_ahead import LookAhead
from edgemoe.scheduler.on_demand import OnDemand
from edgemoe.scheduler.options import check, option, read_options
from edgemoe.scheduler.trial import Trial

__all__ = ["Auto"]


@dataclass(frozen=True, slots=True)
class AutoOptions:
    """The options of auto."""

    window: int = option(12, "tokens of a window; the first quarter is not counted")
    rounds: int = option(3, "windows with and windows without a lever, in turn")
    gain: float = option(0.03, "share of a token's time that a lever must save to be kept")
    lossy: bool = option(
        False, "try levers that change answers too: fewer bits on a miss, skipping"
    )
    miss_bits: int = option(4, "with lossy: bits of an expert that is not resident")
    skip_below: float = option(
        0.2, "with lossy: skip experts with a gate below this times the largest"
    )

    def __post_init__(self) -> None:
        check("window", self.window, 4, 1 << 16)
        check("rounds", self.rounds, 1, 1 << 10)
        check("gain", self.gain, 0, 1)
        check("skip_below", self.skip_below, 0, 1)


@dataclass(frozen=True, slots=True)
class _Choice:
    """The levers that are on, and their values."""

    eviction: str = "lfu"
    look_ahead: bool = False
    miss_bits: int = 0
    skip_below: float = 0.0


class Auto(Scheduler):
    """Starts exact and on demand, measures one lever after another, keeps what pays and reports it.

    The levers, in order: the eviction `next-use`; look-ahead; with `lossy`, also fewer bits on a miss, then skipping
    experts with small gates. Each lever runs in windows of tokens that alternate with windows of what has been kept so
    far; the medians of seconds per token decide. Answers stay exact unless `lossy` is on. Nothing is tried when every
    expert fits in memory.
    """

    Options = AutoOptions
    drops = "own"

    def __init__(self, setting: Setting, **options: Any) -> None:
        self.options = o = read_options(AutoOptions, options)
        if o.lossy and o.miss_bits not in setting.level_bits:
            listed = ", ".join(map(str, setting.level_bits))
            raise ValueError(f"miss_bits: expected one of {listed}, got {o.miss_bits}")
        self._exact = OnDemand(setting, look_ahead=False)
        self._ahead = LookAhead(setting, trials=False)
        self._soonest: SoonestUse | None = SoonestUse(setting)
        self.policy = self._priorities = self._soonest.priorities
        self._priorities.decides[0] = 0
        self._num_experts = setting.num_experts
        self._bits_of = np.array([0, *setting.level_bits], np.int8)
        self._now = self.kept = _Choice()
        self._done: list[str] = []
        self._to_try: list[tuple[str, Callable[[_Choice], _Choice]]] = []
        if not setting.fits:
            self._to_try += [
                ("next-use", lambda c: replace(c, eviction="next-use")),
                ("look_ahead", lambda c: replace(c, look_ahead=True)),
            ]
        if o.lossy and not setting.fits:
            self.leaves_out = o.skip_below > 0
            self._to_try += [
                (f"miss_bits {o.miss_bits}", lambda c: replace(c, miss_bits=o.miss_bits)),
                (f"skip_below {o.skip_below:g}", lambda c: replace(c, skip_below=o.skip_below)),
            ]
            self.notes = (
                f"lossy: may run experts that are not resident at {o.miss_bits} bits and skip those "
                f"below {o.skip_below:g} of the largest gate, if that is faster",
            )
        self.reads_ahead = bool(self._to_try)
        self._trial = Trial(o.window, o.rounds) if self._to_try else None

    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """See `Scheduler.plan`."""
        layer, now = routing.layer, self._now
        plan = self._exact.plan(routing, residency)
        if now.look_ahead and routing.is_decoding:
            plan.ahead, plan.ahead_bits = self._ahead.wishes(routing, residency)
        if now.skip_below:
            plan = skip_small(
                plan, routing.gates, top_p=1.0, skip_below=now.skip_below, renormalise=False
            )  # fmt: skip
        if now.miss_bits and routing.is_decoding:
            resident = self._bits_of[residency[layer]]
            plan = low_bits_first(plan, resident, now.miss_bits, layer * self._num_experts)
        if self._soonest is not None:
            self._soonest.planned(routing, plan)
        return plan

    def passed(self, tokens: int, seconds: float, sequences: int = 1) -> None:
        """See `Scheduler.passed`. Times decoding passes only, and decides on a lever when its trial is over."""
        if self._soonest is not None:
            self._soonest.passed()
        if self._now.look_ahead:
            self._ahead.passed(tokens, seconds, sequences)
        if tokens != sequences or self._trial is None:
            return
        name, change = self._to_try[0]
        new = change(self.kept)
        if self._trial.add(seconds):
            saved = self._trial.saved
            pays = saved >= self.options.gain
            if pays:
                self.kept = new
            self._done.append(f"{'+' if pays else '-'}{name} ({100 * saved:+.0f}%)")
            self._to_try.pop(0)
            is_left = bool(self._to_try)
            self._trial = Trial(self.options.window, self.options.rounds) if is_left else None
            self._switch(self.kept)
            if self.kept.eviction == "lfu":
                self._soonest = None
        else:
            self._switch(new if self._trial.is_new else self.kept)

    def _switch(self, choice: _Choice) -> None:
        if choice == self._now:
            return
        self._now = choice
        self.look_ahead = int(choice.look_ahead)
        self._priorities.decides[0] = choice.eviction == "next-use"
        self._priorities.version[:] += 1

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        soonest = {} if self._soonest is None else self._soonest.state()
        return {**self._ahead.state(), **soonest}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        self._ahead.restore(state)
        if self._soonest is not None:
            self._soonest.restore(state)

    def report(self) -> str:
        """Returns the levers that were kept (+) and those that were not (-), with the share of time that each saved."""
        return "auto " + (", ".join(self._done) or "measuring") if self._done or self._trial else ""

"""Replays of a trace through any scheduler, policy and budget, with the runtime's own cache code and no weights.

Hits, misses and evictions are exactly those of a real run as long as they do not depend on the speed of reads. That is
so for schedulers that read nothing ahead, on single tokens and on chunks whose experts all fit the budget together.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.lab.routing.oracles import ORACLES, Oracle
from edgemoe.lab.routing.timing import Pipeline, Timing
from edgemoe.plan import Plan, Routing
from edgemoe.runtime.trace import NO_EXPERT, NO_TOKEN, Trace, TraceHeader
from edgemoe.scheduler import SCHEDULERS, Scheduler, Setting
from edgemoe.scheduler.watched import seen
from edgemoe.store import ExpertStore
from edgemoe.store.tiers import Tiers

__all__ = ["Replay", "Tape", "make_scheduler", "replay", "setting"]


_NOMINAL_S, _NOMINAL_RATE = 1e-2, 1e9  # seconds of a token besides reads, and bytes per second


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What would have happened. Sums are over single tokens, with memory as the chunks before them left it."""

    hits: int
    """Uses of an expert that was resident."""
    misses: int
    """Uses of an expert that had to be read."""
    evictions: int
    bytes_read: int
    bits: int
    """Bits, summed over uses of experts."""
    tokens: int
    ahead_hits: int
    """How many of the hits were read ahead. A real run counts those that arrive late as misses."""
    prompt_hits: int
    """Hits of chunks, which are not in `hits`."""
    prompt_misses: int
    """Misses of chunks, which are not in `misses`."""
    device_hits: int
    """How many of the hits were on experts in the device's memory."""
    device_bytes_in: int
    """Bytes copied to the device."""
    plan_us: float
    """Median time of `Scheduler.plan` for one token and layer, in microseconds."""
    seconds: float
    """Time predicted by the timing model; 0 without one."""
    wait_s: float
    """The part of `seconds` that is spent waiting for reads."""

    @property
    def hit_rate(self) -> float:
        """Hits per use of an expert; 1 if there were no uses."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else 1.0

    @property
    def device_rate(self) -> float:
        """Uses on the device per use of an expert."""
        uses = self.hits + self.misses
        return self.device_hits / uses if uses else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes read per token."""
        return self.bytes_read / self.tokens if self.tokens else 0.0

    @property
    def rate(self) -> float:
        """Predicted tokens per second; 0 without a timing model."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def average_bits(self) -> float:
        """Mean bits over uses of experts; 0 if there were no uses."""
        uses = self.hits + self.misses
        return self.bits / uses if uses else 0.0


class Tape:
    """A trace prepared for replays, in its own order or, as a control, with its single tokens shuffled."""

    def __init__(self, trace: Trace, *, shuffle: bool = False, seed: int = 0) -> None:
        first, tokens = trace.passes()
        if shuffle:  # chunks stay in place: they fill the cache
            single = np.flatnonzero(tokens == 1)
            first[single] = first[np.random.default_rng(seed).permutation(single)]
        self.header = trace.header
        self.num_tokens = int((tokens == 1).sum())
        """How many tokens were computed one at a time."""
        rows, L = trace.rows, trace.header.num_layers
        experts, gates = rows["experts"].astype(np.int32), rows["gates"].astype(np.float32)
        p = trace.header.look_ahead
        ahead = rows["ahead_experts"].astype(np.int32) if p else None
        ahead_gates = rows["ahead_gates"].astype(np.float32) if p else None
        known = (ahead[:, :, 0] != NO_EXPERT).sum(axis=1) if ahead is not None else None
        self.passes: list[list[Routing]] = []
        self.begins: list[bool] = []
        self.ids: list[NDArray[np.int32] | None] = []
        """The tokens [T] of each pass; None if the trace does not have them."""
        self.computing_us: list[list[tuple[float, float]]] = []
        """Per pass and layer, the recorded times before the experts and of computing them, in microseconds."""
        for f, T in zip(first.tolist(), tokens.tolist(), strict=True):
            layers, times = [], []
            for layer in range(L):
                at, until = f + layer * T, f + layer * T + T
                n = int(known[at]) if known is not None else 0
                layers.append(
                    Routing(
                        layer, experts[at:until], gates[at:until],
                        ahead[at:until, :n].swapaxes(0, 1) if ahead is not None and n else None,
                        ahead_gates[at:until, :n].swapaxes(0, 1) if ahead_gates is not None and n else None,
                        sequences=int(rows["sequences"][at]),
                    )
                )  # fmt: skip
                r = rows[at]
                times.append((float(r["before_us"]), float(r["experts_us"] - r["wait_us"])))
            self.passes.append(layers)
            self.begins.append(int(rows["token"][f]) == 0)
            ids = rows["id"][f : f + T]
            self.ids.append(None if (ids == NO_TOKEN).any() else ids.astype(np.int32))
            self.computing_us.append(times)

    def halves(self) -> tuple[Tape, Tape]:
        """Returns two tapes, each with half of the single tokens. Each begins a sequence, even in the middle of one.

        Raises:
            ValueError: there are fewer than two single tokens.
        """
        if self.num_tokens < 2:
            raise ValueError(f"expected a trace of 2 or more single tokens, got {self.num_tokens}")
        is_single = [len(layers[0].experts) == 1 for layers in self.passes]
        at = int(np.searchsorted(np.cumsum(is_single), self.num_tokens // 2)) + 1
        return self._part(slice(at)), self._part(slice(at, None))

    def _part(self, passes: slice) -> Tape:
        part = copy.copy(self)
        part.passes, part.ids = self.passes[passes], self.ids[passes]
        part.begins = [True, *self.begins[passes][1:]]
        part.computing_us = self.computing_us[passes]
        part.num_tokens = sum(len(layers[0].experts) == 1 for layers in part.passes)
        return part

    @property
    def requests(self) -> list[NDArray[np.int32]]:
        """The experts of every pass and layer, [T, K] each, for an oracle."""
        return [routing.experts for layers in self.passes for routing in layers]


def setting(
    header: TraceHeader, budget_bytes: int, sections: Mapping[str, bytes] | None = None
) -> Setting:
    """Returns the setting that a scheduler would have with this budget; `sections` are those of the model's file."""
    return Setting(
        num_layers=header.num_layers,
        num_experts=header.num_experts,
        experts_per_token=header.experts_per_token,
        bits=header.bits,
        level_bits=header.level_bits,
        level_bytes=header.mean_bytes,
        slots_bytes=budget_bytes,
        sections=sections or {},
        has_inputs=False,
    )


def make_scheduler(
    tape: Tape,
    name: str,
    *,
    budget_bytes: int,
    options: Mapping[str, Any] | None = None,
    sections: Mapping[str, bytes] | None = None,
) -> Scheduler:
    """Returns a scheduler of `edgemoe.scheduler`, or the oracle "sch" or "belady".

    Raises:
        ValueError: there is no such scheduler, or an option is wrong.
    """
    given = setting(tape.header, budget_bytes, sections)
    if name in ORACLES:
        return Oracle(given, tape.requests, name)
    if name not in SCHEDULERS:
        known = ", ".join([*SCHEDULERS, *ORACLES])
        raise ValueError(f"scheduler: expected one of {known}, got {name}")
    return SCHEDULERS[name](given, **(options or {}))


def replay(
    tape: Tape,
    scheduler: Scheduler,
    *,
    budget_bytes: int,
    vram_bytes: int = 0,
    policy: str = "lfu",
    timing: Timing | None = None,
    progressive: float = 0.0,
    each: Callable[[Routing, NDArray[np.int8]], None] | None = None,
) -> Replay:
    """Replays a tape through a scheduler and returns what would have happened.

    Args:
        scheduler: made for this budget, and not used before.
        budget_bytes: memory for experts.
        vram_bytes: a device's memory for experts; 0 for no device. `Tiers` decides which experts it gets.
        policy: "lfu" or "lru"; ignored for a scheduler that has a policy other than "lfu".
        timing: predicts the time; None for no prediction. Ignored if there is a device.
        progressive: see `edgemoe.lab.routing.timing.Pipeline`.
        each: called before each layer is planned, with its recorded routing and the live residency [layers, E].

    Raises:
        OutOfBudget: not even one expert fits.
    """
    header = tape.header
    store = ExpertStore.dry(
        num_layers=header.num_layers, num_experts=header.num_experts,
        level_bits=header.level_bits, level_bytes=header.level_bytes, budget_bytes=budget_bytes,
        rungs=np.array(header.rungs, np.uint8) if header.rungs else None,
        policy=policy if scheduler.policy == "lfu" else scheduler.policy,
    )  # fmt: skip
    store.cache.keep(scheduler.keep_level)
    if vram_bytes:
        timing, store = None, _over(store, header, vram_bytes)
    pipeline = None if timing is None else _Player(timing, header, progressive)
    residency, counts = store.residency, _counts(store)
    sums = np.zeros((2, 8), np.int64)
    seconds = waited = 0.0
    spent: list[float] = []
    for begins, ids, layers, times in zip(
        tape.begins, tape.ids, tape.passes, tape.computing_us, strict=True
    ):
        if begins:
            scheduler.begin()
        if ids is not None:
            scheduler.tokens(ids, layers[0].sequences)
        is_single = len(layers[0].experts) == 1
        start = (pipeline.now_s, pipeline.wait_s) if pipeline else (0.0, 0.0)
        for recorded, time_us in zip(layers, times, strict=True):
            routing = seen(recorded, scheduler.look_ahead)
            if each is not None:
                each(recorded, residency)
            before = time.perf_counter()
            plan = scheduler.plan(routing, residency)
            if is_single:
                spent.append(time.perf_counter() - before)
            finish = pipeline.play(plan, residency, time_us) if pipeline else None
            store.request(plan)
            for _ in store.ready_groups():
                pass
            if finish:
                finish()
        took = (pipeline.now_s, pipeline.wait_s) if pipeline else (0.0, 0.0)
        last, counts = counts, _counts(store)
        sums[int(is_single)] += counts - last
        # Schedulers with timed trials need some time to measure. Without a timing model only reads make a difference.
        spent_s = (
            took[0] - start[0] if pipeline else _NOMINAL_S + (counts - last)[3] / _NOMINAL_RATE
        )
        scheduler.passed(len(layers[0].experts), float(spent_s), layers[0].sequences)
        if is_single:
            seconds, waited = seconds + took[0] - start[0], waited + took[1] - start[1]
    hits, misses, evictions, bytes_read, bits, ahead_hits, device_hits, copied = sums[1].tolist()
    return Replay(
        hits=hits, misses=misses, evictions=evictions, bytes_read=bytes_read, bits=bits,
        tokens=tape.num_tokens, ahead_hits=ahead_hits, device_hits=device_hits, device_bytes_in=copied,
        prompt_hits=int(sums[0, 0]), prompt_misses=int(sums[0, 1]),
        plan_us=1e6 * float(np.median(spent)) if spent else 0.0, seconds=seconds, wait_s=waited,
    )  # fmt: skip


def _counts(store: ExpertStore) -> NDArray[np.int64]:
    names = (
        "hits", "misses", "evictions", "bytes_read", "bits", "ahead_used", "device_hits", "device_bytes_in",
    )  # fmt: skip
    stats = store.stats
    return np.array([stats.get(name, 0) for name in names], np.int64)


def _over(store: ExpertStore, header: TraceHeader, vram_bytes: int) -> ExpertStore:
    """Returns a store of the same experts with a device on top, whose slots hold whole experts."""
    rungs = np.array(header.rungs, np.uint8) if header.rungs else None
    there = ExpertStore.dry(
        num_layers=header.num_layers, num_experts=header.num_experts, level_bits=header.level_bits,
        level_bytes=[header.level_bytes[-1]] * len(header.level_bytes), budget_bytes=vram_bytes, rungs=rungs,
    )  # fmt: skip
    tiers = Tiers(store.host, there.host, header.num_layers)
    every = header.num_layers * header.num_experts
    return ExpertStore(
        tiers, num_experts=header.num_experts, level_bits=header.level_bits,
        rungs=np.full(every, len(header.level_bits), np.uint8) if rungs is None else rungs,
    )  # fmt: skip


class _Player:
    """An adapter that turns plans into layers of the pipeline."""

    def __init__(self, timing: Timing, header: TraceHeader, progressive: float) -> None:
        self._pipeline = Pipeline(timing, progressive=progressive)
        self._timing = timing
        self._E = header.num_experts
        self._sizes = [0, *header.level_bytes]
        self._mean = header.mean_bytes[-1]
        every = header.num_layers * header.num_experts
        self._rungs = header.rungs or (len(header.level_bytes),) * every
        self._levels = np.zeros(9, np.int64)
        self._levels[list(header.level_bits)] = np.arange(1, len(header.level_bits) + 1)

    @property
    def now_s(self) -> float:
        return self._pipeline.now / 1e6

    @property
    def wait_s(self) -> float:
        return self._pipeline.wait_us / 1e6

    def play(
        self, plan: Plan, residency: NDArray[np.int8], time_us: tuple[float, float]
    ) -> Callable[[], None]:
        """Records what is resident before a request; call the returned function after the request.

        Args:
            time_us: the recorded times before the experts and of computing them; used for chunks.
        """
        timing, sizes = self._timing, self._sizes
        single = len(plan.gates) == 1
        before = timing.before_us[plan.layer] if single else time_us[0]
        wanted = (plan.experts + plan.layer * self._E).tolist()
        most = [self._rungs[e] for e in wanted]
        have = list(map(min, residency[plan.layer][plan.experts].tolist(), most))
        need = list(map(min, self._levels[plan.bits].tolist(), most))
        # Compute time is proportional to the bytes that it reads from memory. For a chunk it was measured with as many
        # tokens.
        one = (
            timing.expert_us / self._mean
            if single
            else time_us[1] / max(1, sum(map(sizes.__getitem__, need)))
        )
        ready, reads = [], []
        for h, n in zip(have, need, strict=True):
            compute = one * sizes[n]
            if h >= n:
                ready.append(compute)
            else:
                reads.append((sizes[n] - sizes[h], compute))
        flat = residency.reshape(-1)
        had = flat[plan.ahead] if plan.ahead is not None else None

        def finish() -> None:
            ahead = []
            if plan.ahead is not None and had is not None:
                for e, was, now in zip(
                    plan.ahead.tolist(), had.tolist(), flat[plan.ahead].tolist(), strict=True
                ):
                    if now > was:
                        ahead.append((e, sizes[min(now, self._rungs[e])] - sizes[was]))
            self._pipeline.layer(before, ready, reads, wanted=wanted, ahead=ahead)

        return finish

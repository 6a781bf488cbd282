"""A timing model of a layer on this machine, with overlapping reads and compute, fitted to a trace's own times.

The part of a layer before its experts takes a fixed time. Then reads start while the experts in memory are computed;
the other experts are computed as they arrive. A few readers hide each other's latency and share one link, the disk. A
miss costs some computing of its own: system calls, checksums, a smaller group. Reads ahead use the link when nothing
else needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.runtime.trace import Trace
from edgemoe.store.records import NUM_READERS

__all__ = ["Pipeline", "Timing", "fit", "quiet_tokens"]

_DOUBT = 0.02  # how much worse, relatively, a fit may be with a rate lower by a factor of e


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of the parts of a layer for a single token, in microseconds, and the rate of reads."""

    before_us: tuple[float, ...]
    """Per layer, the time until its experts begin."""
    expert_us: float
    """The time to compute one expert at the trace's bits, in a group that is in memory."""
    miss_us: float
    """Extra computing time in a layer with n reads, divided by √n: few reads arrive one by one, many in groups."""
    latency_us: float
    """The time from asking for a read to its first byte."""
    rate: float
    """The rate of all readers together, in bytes per microsecond."""

    @property
    def rate_gb_s(self) -> float:
        """The rate in GB/s."""
        return self.rate / 1e3


class Pipeline:
    """A simulation that plays layers one after the other and keeps the time, in microseconds."""

    def __init__(self, timing: Timing, *, progressive: float = 0.0) -> None:
        """Args:
        progressive: the share of an expert's computing that could be done while waiting for its last byte, if its
            planes were multiplied as they arrive. This gives an upper bound of the gain: all of the share may be done
            at any moment of the wait, at no extra cost.
        """
        self._progressive = progressive
        self.now = 0.0
        self.wait_us = 0.0
        self.timing = timing
        self._readers = [0.0] * NUM_READERS
        self._link = 0.0
        # Reads ahead that have not begun: bytes, and when they were asked for.
        self._queue: dict[int, tuple[int, float]] = {}
        self._arrivals: dict[int, float] = {}  # when reads ahead that have begun arrive
        self._begun = 0  # how many reads ahead have begun since the layer before

    def layer(
        self,
        before_us: float,
        ready: Sequence[float],
        reads: Sequence[tuple[int, float]],
        *,
        wanted: Iterable[int] = (),
        ahead: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Plays one layer.

        Args:
            before_us: the time until the experts begin.
            ready: the computing time of each expert that is in memory or was read ahead.
            reads: the bytes and the computing time of each expert that must be read, in order.
            wanted: the experts that run, to find those that are still being read ahead.
            ahead: experts to read ahead and their bytes, in addition to those asked for before.
        """
        self.now += before_us
        self._begin_ahead(self.now)
        arrivals = [(self._read(size, self.now), compute) for size, compute in reads]
        done = self.now
        late = []
        if self._queue or self._arrivals:
            for expert in wanted:
                if expert in self._queue:
                    late.append(self._read(self._queue.pop(expert)[0], self.now))
                elif (end := self._arrivals.pop(expert, 0.0)) > self.now:
                    late.append(end)
        order = sorted(ready)
        for end in late:  # which of the ready experts is late does not matter: they are alike
            arrivals.append((end, order.pop() if order else 0.0))
        # Every read costs computing time. Reads for later layers cost theirs during this layer.
        begun, self._begun = self._begun, 0
        extra = self.timing.miss_us / max(len(arrivals) + begun, 1) ** 0.5
        arrivals = [(end, compute + extra) for end, compute in arrivals]
        done += begun * extra
        for expert, size in ahead:
            self._queue.setdefault(expert, (size, self.now))
        done += sum(order)
        arrivals.sort()
        early = [self._progressive * compute for _, compute in arrivals]
        for i, (end, compute) in enumerate(arrivals):
            idle = max(end - done, 0.0)
            done = max(end, done)
            for j in range(i, len(early) if self._progressive else 0):
                part = min(idle, early[j])
                early[j] -= part
                idle -= part
            self.wait_us += idle
            done += compute - (self._progressive * compute - early[i])
        self.now = done
        self._begin_ahead(done)

    def _read(self, size: float, at: float) -> float:
        """Returns when a read that is asked for at `at` will have arrived."""
        reader = min(range(NUM_READERS), key=self._readers.__getitem__)
        asked = max(at, self._readers[reader])
        end = max(asked + self.timing.latency_us, self._link) + size / self.timing.rate
        self._readers[reader] = self._link = end
        return end

    def _begin_ahead(self, until: float) -> None:
        """Starts reads ahead as readers become free before `until`; one reader is kept free for reads on demand."""
        while self._queue:
            expert, (size, asked) = next(iter(self._queue.items()))
            start = max(sorted(self._readers)[1], asked)
            if start >= until:
                return
            del self._queue[expert]
            self._begun += 1
            self._arrivals[expert] = self._read(size, start)


def fit(trace: Trace) -> Timing:
    """Fits the model to the single tokens of a trace.

    It is fitted to means over the quiet tokens (`quiet_tokens`). Other work on the machine makes some tokens slow, and
    the model is of a machine without it. Means of the parts of a token add up to its time; medians do not.

    Raises:
        ValueError: the trace has too few single tokens, or no miss among them, or its scheduler read ahead.
    """
    header = trace.header
    if header.reads_ahead:
        raise ValueError(
            "timing: this trace was recorded while reading ahead; `edgemoe profile trace` records one that can be used"
        )
    before = trace.by_token("before_us", single=True)[1:]
    if len(before) < 8:
        raise ValueError("timing: expected a trace with at least 9 tokens computed one at a time")
    wait = trace.by_token("wait_us", single=True)[1:]
    computing = trace.by_token("experts_us", single=True)[1:] - wait
    size = trace.by_token("bytes_read", single=True)[1:]
    ran, misses = (a[1:] for a in _counts(trace))
    if not misses.any():
        raise ValueError(
            "timing: nothing had to be read in this trace; record it with a smaller --ram"
        )
    quiet = quiet_tokens(trace)[1:]
    before = before[quiet]
    ran, misses, computing, wait, size = (
        a[quiet].ravel() for a in (ran, misses, computing, wait, size)
    )
    # For each pair of numbers, of experts that ran and of misses among them: how often it came, and mean times.
    kinds = np.unique(np.stack([ran, misses], axis=1), axis=0)
    table = []
    for r, m in kinds.tolist():
        mask = (ran == r) & (misses == m)
        table.append(
            (r, m, mask.sum(), computing[mask].mean(), wait[mask].mean(), size[mask].mean())
        )
    before_us = tuple(before.mean(axis=0).tolist())
    rows = np.array(table)
    expert_us, miss_us = _computing(rows)
    read = rows[:, 1] > 0
    slowest = float(
        (rows[read, 2] * rows[read, 5]).sum() / (rows[read, 2] * rows[read, 3:5].sum(axis=1)).sum()
    )

    def error(latency: float, rate: float) -> float:
        timing = Timing(before_us, expert_us, miss_us, latency, rate)
        total = 0.0
        for r, m, count, _, waited, bytes_read in table:
            if m == 0:
                continue
            play = Pipeline(timing)
            one = (bytes_read / m, expert_us)
            play.layer(0.0, [expert_us] * (r - m), [one] * m)
            total += count * (play.wait_us - waited) ** 2
        # If all layers read much, latency and rate cannot be told apart. Then the lower rate is likelier.
        return total * (1 + _DOUBT * float(np.log(max(rate, slowest) / slowest)) ** 2)

    # A grid search, then finer grids around the best: the error is not smooth and has several minima.
    latency, rate = 100.0, 10 * slowest
    for span, points in ((20.0, 25), (1.3, 9), (1.05, 9)):
        steps = span ** np.linspace(-1, 1, points)
        _, latency, rate = min(
            (error(latency * a, rate * b), latency * a, rate * b) for a in steps for b in steps
        )
    return Timing(before_us, expert_us, miss_us, float(latency), float(rate))


def quiet_tokens(trace: Trace) -> NDArray[np.bool_]:
    """Returns the half of the single tokens that was least disturbed, as a mask [T]: those fastest for their work.

    A token's work is how many experts ran and how many of them were missing in each layer; the median time of equal
    work is the expected time. The fastest half without regard to work would be the tokens with few misses.
    """
    before, experts = (trace.by_token(n, single=True) for n in ("before_us", "experts_us"))
    ran, misses = _counts(trace)
    kinds = ran * (trace.header.experts_per_token + 1) + misses
    usual = np.zeros(experts.shape)
    for kind in np.unique(kinds):
        mask = kinds == kind
        usual[mask] = np.median(experts[mask])
    expected = usual.sum(axis=1) + np.median(before, axis=0).sum()
    ratio = (before + experts).sum(axis=1) / np.maximum(expected, 1e-9)
    quiet: NDArray[np.bool_] = ratio <= np.median(ratio)
    return quiet


def _counts(trace: Trace) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns how many experts ran in each layer of each single token, and how many of them had to be read, [T, L]."""
    bits = trace.by_token("bits", single=True)
    levels = np.zeros(256, np.int64)
    levels[list(trace.header.level_bits)] = np.arange(1, len(trace.header.level_bits) + 1)
    missing = levels[bits] > trace.by_token("resident", single=True)
    return (bits > 0).sum(axis=2), missing.sum(axis=2)


def _computing(table: NDArray[np.float64]) -> tuple[float, float]:
    """Returns the expert_us and miss_us that fit best, neither negative.

    Args:
        table: [n, …], with columns for the experts that ran, misses, how often this came, and mean computing time.
    """
    ran, misses, count, computing = table.T[:4]
    weights = np.sqrt(count)
    columns = np.stack([ran, np.sqrt(misses)], axis=1) * weights[:, None]
    parts, *_ = np.linalg.lstsq(columns, computing * weights, rcond=None)
    if parts.min() >= 0:
        return float(parts[0]), float(parts[1])
    return float((computing * count).sum() / (ran * count).sum()), 0.0

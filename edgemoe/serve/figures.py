"""The server's counters, in the format of Prometheus. They contain no texts of users."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from edgemoe import hardware
from edgemoe.runtime.batching import Batcher
from edgemoe.runtime.model import Model
from edgemoe.runtime.requests import Outcome

__all__ = ["ServerFigures"]

_MOST_NAMES, _OTHERS = 1000, "further fields"  # with a counter each; that of all others
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class _Histogram:
    def __init__(self) -> None:
        self.counts, self.total, self.count = [0] * len(_SECONDS), 0.0, 0

    def add(self, seconds: float) -> None:
        self.total += seconds
        self.count += 1
        for i, bound in enumerate(_SECONDS):
            self.counts[i] += seconds <= bound

    def lines(self, name: str) -> list[str]:
        pairs = zip(_SECONDS, self.counts, strict=True)
        return [
            f"# TYPE {name} histogram",
            *(f'{name}_bucket{{le="{bound:g}"}} {count}' for bound, count in pairs),
            f'{name}_bucket{{le="+Inf"}} {self.count}', f"{name}_sum {self.total}",
            f"{name}_count {self.count}",
        ]  # fmt: skip


class ServerFigures:
    """The counters of a server. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._ignored: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._first, self._between, self._queue = _Histogram(), _Histogram(), _Histogram()
        self.pace = 1.0
        """Seconds that a request takes, as a moving average: estimates how long another one may have to wait."""

    def request(self, route: str, status: int) -> None:
        """Counts a request that was answered."""
        with self._lock:
            self._requests[route, status] += 1

    def ignored(self, names: Sequence[str]) -> list[str]:
        """Counts fields that have no effect; returns those that are seen for the first time.

        There are counters for a thousand names; all others share one more.
        """
        new = []
        with self._lock:
            for name in names:
                if name not in self._ignored and len(self._ignored) >= _MOST_NAMES:
                    name = _OTHERS
                if name not in self._ignored:
                    new.append(name)
                self._ignored[name] += 1
        return new

    def reply(self, outcome: Outcome) -> None:
        """Counts a reply that has ended."""
        f = outcome.figures
        with self._lock:
            self._tokens["cached"] += f.cached_tokens
            self._tokens["computed"] += f.prompt_tokens - f.cached_tokens
            self._tokens["made"] += f.new_tokens
            self._queue.add(f.queue_s)
            if f.new_tokens:
                self._first.add(f.queue_s + f.prompt_s)
            if f.new_tokens > 1:
                self._between.add(f.decode_s / (f.new_tokens - 1))
            self.pace += 0.2 * (f.prompt_s + f.decode_s - self.pace)

    def text(self, model: Model, batcher: Batcher, kept: Mapping[str, tuple[int, int, int]]) -> str:
        """Returns all figures as text for Prometheus.

        Args:
            model: what runs.
            batcher: its requests.
            kept: what is kept of prefixes, by place: their number, their bytes, and the most bytes allowed.
        """
        store, budget = model.counters.store, model.budget
        with self._lock:
            lines = [
                *_counter("requests_total", {
                    f'route="{r}",code="{c}"': n for (r, c), n in self._requests.items()
                }),
                *_counter("prompt_tokens_total", {
                    'cached="true"': self._tokens["cached"], 'cached="false"': self._tokens["computed"],
                }),
                *_counter("tokens_total", {"": self._tokens["made"]}),
                *_counter("ignored_fields_total", {
                    f'field="{_label(n)}"': c for n, c in self._ignored.items()
                }),
                *self._first.lines("edgemoe_first_token_seconds"),
                *self._between.lines("edgemoe_inter_token_seconds"),
                *self._queue.lines("edgemoe_queue_seconds"),
            ]  # fmt: skip
        counters = {
            "expert_hits_total": store["hits"], "expert_misses_total": store["misses"],
            "evictions_total": store["evictions"], "read_bytes_total": store["bytes_read"],
            "read_seconds_total": store["read_s"], "wait_seconds_total": store["wait_s"],
            "skipped_total": model.counters.skipped, "substituted_total": model.counters.substituted,
        }  # fmt: skip
        for name, value in counters.items():
            lines += _counter(name, {"": value})
        uses = store["hits"] + store["misses"]
        parts = {
            "dense": budget.dense, "kv": budget.kv, "scratch": budget.scratch, "slots": model.room.size,
            "process": hardware.process_bytes(), "prefixes": kept["memory"][1],
        }  # fmt: skip
        gauges = {
            "requests_running": {"": sum(view.is_busy for view in batcher.views)},
            "requests_waiting": {"": batcher.waiting},
            "bits_average": {"": store["bits"] / uses if uses else 0},
            "ram_bytes": {f'part="{name}"': size for name, size in parts.items()},
            "ram_limit_bytes": {"": budget.ram},
            "resident_bytes": {"": store["resident_bytes"]},
            "resident_experts": _resident(model),
            "prefixes": {f'place="{place}"': found[0] for place, found in kept.items()},
            "prefix_bytes": {f'place="{place}"': found[1] for place, found in kept.items()},
        }  # fmt: skip
        for name, values in gauges.items():
            lines += _counter(name, values, kind="gauge")
        return "\n".join(lines) + "\n"


def _resident(model: Model) -> dict[str, float]:
    """Returns the number of experts in memory at each level, by a label with its bits."""
    levels = np.bincount(
        model.store.residency.reshape(-1), minlength=len(model.store.level_bits) + 1
    )
    counts = zip(model.store.level_bits, levels[1:].tolist(), strict=False)
    return {f'bits="{bits}"': count for bits, count in counts}


def _counter(name: str, values: Mapping[str, float], kind: str = "counter") -> list[str]:
    lines = [f"# TYPE edgemoe_{name} {kind}"]
    for label, value in values.items():
        lines.append(f"edgemoe_{name}{f'{{{label}}}' if label else ''} {value}")
    return lines


def _label(text: str) -> str:
    """Returns a name that a client sent in a form that is safe in a label."""
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in text[:60])

"""Experts in three tiers: a device's memory, the host's memory, and the file.

An expert that the device has needs no room in the host's memory and no read. An expert that it lacks is run by the host
from its own memory, and may be copied to the device ("promoted") while other work is done. Where an expert runs never
changes the result. Experts that both have are the first that the host drops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.plan import Priorities
from edgemoe.store.rates import Rates
from edgemoe.store.uses import Uses

__all__ = ["Tiers"]

_PROMOTED = 2  # the most experts of a request to promote; more would delay the work of those already on the device
_GAIN = 1.2  # on a full device, the least ratio of an expert's uses to those of the one it replaces
_FILLED = 64  # experts that `fill` copies at a time


class Tiers:
    """A cache in the host's memory and one on a device, with the interface of a `_core.Cache`. One thread at a time."""

    def __init__(
        self,
        host: _core.Cache,
        device: _core.Cache,
        num_layers: int,
        stream: _core.DeviceStream | None = None,
        rates: Rates | None = None,
    ) -> None:
        """Args:
        num_layers: the number of layers with experts; requests come for each in turn.
        stream: passes experts through the device without keeping them there; None if there is no room for that.
        rates: decides which experts pass.
        """
        self.host, self.device = host, device
        self.stream, self.rates = stream, rates
        self.streamed = 0
        """How many experts have passed through the device, counted once for each use."""
        self.residency: NDArray[np.int8] = np.maximum(host.residency, device.residency)
        """[experts], the higher of the levels on host and device: a live view for others."""
        self._ran_there: NDArray[np.uint8] | None = None
        self.is_there = False
        """Whether the group that `next` last gave is on the device."""
        self._there: NDArray[np.int64] | None = np.empty(0, np.int64)
        """Positions of the request whose experts are on the device; None for all."""
        self._here = np.empty(0, np.int64)
        """The other positions, whose experts the host has or reads."""
        self._count = 0
        self._given = True
        """Whether `next` has given the device's group."""
        self._is_open = False
        self._levels_of = host.levels
        self._promoted = np.empty(0, np.int32)
        self._levels = np.empty(0, np.int8)
        self._ran = np.empty(0, np.int32)
        self._ran_levels = np.empty(0, np.int8)
        self.sizes: NDArray[np.int64] = np.array(
            [host.slot_bytes(i) for i in range(host.max_level + 1)]
        )
        # A slot on the device takes the same memory for every level.
        self._num_slots = device.stats["budget_bytes"] // device.slot_bytes(1)
        self.used = Uses(num_layers, len(self.residency))
        """Uses on host and device. The device drops experts by these, as its own counts lack the host's uses."""
        device.set_policy(self.used.order)

    def ask(
        self,
        layer: int,
        experts: NDArray[np.int32],
        bits: NDArray[np.int8],
        offsets: NDArray[np.int32],
        num_tokens: int,
        ahead: NDArray[np.int32] | None = None,
        ahead_bits: NDArray[np.int8] | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        """See `_core.Cache.ask`."""
        self.close()
        experts = experts + np.int32(layer * self.used.order.scores.shape[1])
        levels: NDArray[np.int8] = self._levels_of[bits]
        later = None if ahead_bits is None else self._levels_of[ahead_bits]
        self.begin(experts, levels, offsets, num_tokens, ahead, later)
        return experts, levels

    def begin(
        self,
        experts: NDArray[np.int32],
        levels: NDArray[np.int8],
        offsets: NDArray[np.int32],
        num_tokens: int,
        ahead: NDArray[np.int32] | None = None,
        ahead_levels: NDArray[np.int8] | None = None,
    ) -> None:
        """See `_core.Cache.begin`; the host is not asked for experts that the device has."""
        counts = offsets[1:] - offsets[:-1]
        there = self.device.residency[experts] >= levels
        self._count, self._is_open = len(experts), True
        if self._ran_there is not None:
            self._ran_there[experts] = there
        self.used.count(experts, counts, num_tokens)
        self._ran, self._ran_levels = self._ran[:0], self._ran_levels[:0]
        if len(self._promoted):
            # The others have been copied.
            self._promote(self.device.residency[self._promoted] < self._levels)
        if ahead is None and not len(self._promoted) and there.all():  # the host has nothing to do
            self._there, self._given = None, not len(experts)
            self.device.begin(experts, levels, offsets, num_tokens)
            return
        self._there, self._here = np.flatnonzero(there), np.flatnonzero(~there)
        self._given = len(self._there) == 0
        # Experts that have left the host's memory since can no longer be copied.
        self._promote(self.host.residency[self._promoted] >= self._levels)
        self._promote(self._admitted(self._promoted, experts[self._there]))
        # The device first: it copies experts that are in the host's memory now, and the host may then drop some.
        self.device.begin(
            *_some(experts, levels, counts, self._there), num_tokens,
            ahead=self._promoted, ahead_levels=self._levels,
        )  # fmt: skip
        if ahead is not None and ahead_levels is not None:
            wanted = self.device.residency[ahead] < ahead_levels
            ahead, ahead_levels = ahead[wanted], ahead_levels[wanted]
        here = _some(experts, levels, counts, self._here)
        self._make_room(here[0], here[1])
        self.host.begin(*here, num_tokens, ahead=ahead, ahead_levels=ahead_levels)
        if num_tokens:
            self._ran, self._ran_levels = here[0], here[1]
        self._look()

    @property
    def is_settled(self) -> bool:
        """Whether no request is open and no copy to the device is under way, so that it may run what it has."""
        return not self._is_open and not len(self._promoted)

    def next(self) -> list[int]:
        """See `_core.Cache.next`; a group is all on the device or all on the host, as `is_there` says."""
        if not self._given:
            self._given = self.is_there = True
            group = self.device.next()
            wanted = self._count if self._there is None else len(self._there)
            if len(group) != wanted:
                raise RuntimeError("an expert left the device before it was used")
            # All are pinned until `close`.
            return group if self._there is None else [int(i) for i in self._there]
        self.is_there = False
        if self._there is None:
            return []
        return [int(self._here[i]) for i in self.host.next()]

    def close(self) -> None:
        """See `_core.Cache.close`; then chooses which of the host's experts to promote."""
        if not self._is_open:
            return
        self._is_open = False
        self.device.close()
        if self._there is None:
            return
        self.host.close()
        self._choose()
        self._look()

    def _look(self) -> None:
        """Brings `residency` up to date."""
        np.maximum(self.host.residency, self.device.residency, out=self.residency)

    def _promote(self, keep: NDArray[np.bool_]) -> None:
        """Keeps only some of the experts that are to be promoted."""
        self._promoted, self._levels = self._promoted[keep], self._levels[keep]

    def count(self, experts: NDArray[np.int32], levels: NDArray[np.int8]) -> None:
        """See `_core.Cache.count`; for experts [n, K] of n layers that the device ran without a request."""
        self.device.count(experts.reshape(-1), levels.reshape(-1))
        self.used.scores[experts] += self.used.unit
        self.used.advance(experts[:, 0], len(experts))

    def _choose(self) -> None:
        """Chooses what to promote: of the experts that the host has just run, those that are used most."""
        ran, levels = self._ran, self._ran_levels
        self._ran, self._ran_levels = ran[:0], levels[:0]
        if not len(ran):
            return
        order = np.argsort(-self.used.scores[ran], kind="stable")[:_PROMOTED]
        order = order[self._admitted(ran[order], ran[:0])]
        self._promoted, self._levels = ran[order], levels[order]

    def _admitted(self, experts: NDArray[np.int32], wanted: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Returns which of some experts may be on the device: those that have a slot there, or may take one.

        Args:
            wanted: experts whose slots may not be taken, as the request needs them.
        """
        out = self.device.residency[experts] > 0
        free = self._num_slots - self.device.taken_slots
        if free >= len(experts) - int(out.sum()):
            return np.ones(len(experts), np.bool_)
        uses = np.where(self.device.residency > 0, self.used.scores, np.inf)
        uses[wanted] = uses[experts] = np.inf
        least = iter(np.sort(np.partition(uses, min(_PROMOTED, len(uses)) - 1)[:_PROMOTED]))
        victim = next(least)
        for i in np.flatnonzero(~out):
            if free > 0:
                free -= 1
            elif self.used.scores[experts[i]] > _GAIN * victim:
                victim = next(least, np.inf)
            else:
                continue
            out[i] = True
        return out

    def _make_room(self, experts: NDArray[np.int32], levels: NDArray[np.int8]) -> None:
        """Makes room in the host's memory for reads, by dropping experts that the device has too.

        Drops only as many as the reads need, the least used first.
        """
        has = self.host.residency[experts]
        lacks = has < levels
        if not lacks.any():
            return
        sizes = self.sizes
        need = int((sizes[levels[lacks]] - sizes[has[lacks]]).sum())
        stats = self.host.stats
        need -= stats["budget_bytes"] - stats["resident_bytes"]
        if need <= 0:
            return
        twice = (self.host.residency > 0) & (self.device.residency >= self.host.residency)
        twice[experts] = twice[self._promoted] = False
        spare = np.flatnonzero(twice)
        for expert in spare[np.argsort(self.used.scores[spare], kind="stable")].tolist():
            size = int(sizes[self.host.residency[expert]])
            if need > 0 and self.host.shrink(expert, 0):
                need -= size

    def fill(self, levels: NDArray[np.int8]) -> None:
        """Copies all experts to the device, through the host's memory, if it has room for all. Otherwise does nothing.

        Args:
            levels: [experts], the level of each.

        Raises:
            ReadError: a read failed.
            FormatError: an expert's checksum does not match.
        """
        if self._num_slots < len(levels):
            return
        room = self.host.stats["budget_bytes"] // self.host.slot_bytes(int(levels.max()))
        step = min(max(room, 1), _FILLED)
        every = np.arange(len(levels), dtype=np.int32)
        unused = np.zeros(step + 1, np.int32)
        for first in range(0, len(levels), step):
            part = every[first : first + step]
            wish = part, levels[part], unused[: len(part) + 1], 0
            for cache in (self.host, self.device):
                try:
                    cache.begin(*wish)
                    while cache.next():
                        pass
                finally:
                    cache.close()
            for expert in part.tolist():  # the host will not need these
                self.host.shrink(expert, 0)
        self._look()

    def watch(self) -> NDArray[np.uint8]:
        """See `ExpertStore.watch`."""
        if self._ran_there is None:
            self._ran_there = np.zeros(len(self.residency), np.uint8)
        return self._ran_there

    def passing(
        self,
        experts: NDArray[np.int32],
        levels: NDArray[np.int8],
        offsets: NDArray[np.int32],
        group: list[int],
    ) -> tuple[list[int], list[int]]:
        """Splits a group of the host's experts into those that pass through the device and those that the CPU runs.

        Args:
            experts: those of the request, with `levels`.
            offsets: of the plan: where each expert's tokens begin.
            group: positions in the request.

        Returns:
            The positions of both.
        """
        if self.stream is None or self.rates is None:
            return [], group
        at = np.array(group)
        tokens = (offsets[at + 1] - offsets[at]).astype(np.int64)
        goes = self.rates.split(self.sizes[levels[at]], tokens)
        self.streamed += int(goes.sum())
        if self._ran_there is not None:
            self._ran_there[experts[at[goes]]] = 1
        return at[goes].tolist(), at[~goes].tolist()

    # ------------------------------------------------------------ the host's cache, or both caches

    def shrink(self, expert: int, level: int) -> bool:
        """See `_core.Cache.shrink`."""
        shrunk = self.host.shrink(expert, level)
        shrunk = self.device.shrink(expert, level) and shrunk
        self.residency[expert] = max(self.host.residency[expert], self.device.residency[expert])
        return shrunk

    def set_budget(self, bytes: int) -> None:
        """See `_core.Cache.set_budget`; for the host's cache."""
        self.host.set_budget(bytes)
        self._look()

    def keep(self, level: int) -> None:
        """See `_core.Cache.keep`; for the host's cache."""
        self.host.keep(level)

    def set_policy(self, policy: str | Priorities) -> None:
        """See `_core.Cache.set_policy`; for the host's cache."""
        self.host.set_policy(policy)

    def slot_bytes(self, level: int) -> int:
        """See `_core.Cache.slot_bytes`; of the host's cache."""
        return self.host.slot_bytes(level)

    def read_rate(self, threads: int) -> float:
        """See `_core.Cache.read_rate`; of the host's cache."""
        return self.host.read_rate(threads)

    def check_integrity(self) -> None:
        """Raises an error if the books of either cache do not agree."""
        self.host.check_integrity()
        self.device.check_integrity()

    @property
    def reads(self) -> NDArray[np.uint32]:
        """See `_core.Cache.reads`; of the host's cache, as only that reads the file."""
        return self.host.reads

    @property
    def runs(self) -> NDArray[np.uint32]:
        """See `_core.Cache.runs`; the sum of both caches."""
        return self.host.runs + self.device.runs

    @property
    def lacks(self) -> NDArray[np.uint32]:
        """See `_core.Cache.lacks`; of the host's cache, as only that reads the file."""
        return self.host.lacks

    @property
    def uses(self) -> NDArray[np.float64]:
        """See `_core.Cache.uses`; the sum of both caches."""
        return self.host.uses + self.device.uses

    @uses.setter
    def uses(self, uses: NDArray[np.float64]) -> None:
        self.host.uses = uses
        self.device.uses = np.zeros_like(uses)
        self.used.take(uses)

    @property
    def progress(self) -> tuple[int, float]:
        """See `_core.Cache.progress`; of the host's cache, as only that reads the file."""
        return self.host.progress

    @property
    def stats(self) -> dict[str, Any]:
        """See `_core.Cache.stats`; the host's, with the hits and bits of both, and counters of the device alone."""
        out, there = self.host.stats, self.device.stats
        out["hits"] += there["hits"]
        out["bits"] += there["bits"]
        out["device_hits"] = there["hits"] + self.streamed
        out["device_bytes"] = there["resident_bytes"]
        passed = 0 if self.stream is None else self.stream.bytes_in
        out["device_bytes_in"] = there["bytes_read"] + passed
        return out


def _some(
    experts: NDArray[np.int32],
    levels: NDArray[np.int8],
    counts: NDArray[np.int32],
    at: NDArray[np.int64],
) -> tuple[NDArray[np.int32], NDArray[np.int8], NDArray[np.int32]]:
    """Returns experts, levels and offsets of a request for the positions `at` of another."""
    offsets = np.zeros(len(at) + 1, np.int32)
    np.cumsum(counts[at], out=offsets[1:])
    return experts[at], levels[at], offsets

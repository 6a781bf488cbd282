"""Experts in a device's memory, over those in the host's, over the file.

An expert that the device has needs no room in the host's memory and no read. One that it lacks is run by the host, from
its own memory, and may be copied to the device behind the computing: where an expert runs never changes what comes out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.plan import Priorities

__all__ = ["Tiers"]

_PROMOTED = 2  # experts of a request that are copied to the device at most: more would delay those that it has
_GAIN = 1.2  # by how much one must be used more than the least used one on a full device
_HALF_LIFE = 64  # tokens after which a use counts half
_LARGEST = 1e100


class Tiers:
    """Is a `_core.Cache` in the host's memory and one on a device, with the interface of one. One thread at a time."""

    def __init__(self, host: _core.Cache, device: _core.Cache) -> None:
        self.host, self.device = host, device
        self.residency: NDArray[np.int8] = np.maximum(host.residency, device.residency)
        """The higher level of both: a live view for others."""
        self.is_there = False
        """The group that `next` gave last is the device's."""
        self._there: NDArray[np.int64] | None = np.empty(0, np.int64)
        """Positions that are the device's; None for all."""
        self._here = np.empty(0, np.int64)
        self._count = 0
        self._given = True
        self._is_open = False
        self._promoted = np.empty(0, np.int32)
        self._levels = np.empty(0, np.int8)
        self._ran = np.empty(0, np.int32)
        self._ran_levels = np.empty(0, np.int8)
        self._num_slots = device.stats["budget_bytes"] // device.slot_bytes(1)
        # Uses so far, a use of now weighing `_unit`, which doubles every half-life: as good as forgetting, and cheaper.
        self._uses = np.zeros(len(self.residency))
        self._unit = 1.0

    def begin(
        self,
        experts: NDArray[np.int32],
        levels: NDArray[np.int8],
        offsets: NDArray[np.int32],
        num_tokens: int,
        ahead: NDArray[np.int32] | None = None,
        ahead_levels: NDArray[np.int8] | None = None,
    ) -> None:
        """See `_core.Cache.begin`; what the device has is not wanted of the host."""
        counts = offsets[1:] - offsets[:-1]
        there = self.device.residency[experts] >= levels
        self._count, self._is_open = len(experts), True
        self._note(experts, counts, num_tokens)
        self._ran, self._ran_levels = self._ran[:0], self._ran_levels[:0]
        if len(self._promoted):
            self._promote(self.device.residency[self._promoted] < self._levels)  # the rest is there
        if ahead is None and not len(self._promoted) and there.all():  # the host has nothing to do
            self._there, self._given = None, not len(experts)
            self.device.begin(experts, levels, offsets, num_tokens)
            return
        self._there, self._here = np.flatnonzero(there), np.flatnonzero(~there)
        self._given = len(self._there) == 0
        # Others left the host's memory again.
        self._promote(self.host.residency[self._promoted] >= self._levels)
        # First, as it copies from the host's memory what is there now.
        self.device.begin(
            *_some(experts, levels, counts, self._there), num_tokens,
            ahead=self._promoted, ahead_levels=self._levels,
        )  # fmt: skip
        if ahead is not None and ahead_levels is not None:
            wanted = self.device.residency[ahead] < ahead_levels
            ahead, ahead_levels = ahead[wanted], ahead_levels[wanted]
        here = _some(experts, levels, counts, self._here)
        self.host.begin(*here, num_tokens, ahead=ahead, ahead_levels=ahead_levels)
        if num_tokens:
            self._ran, self._ran_levels = here[0], here[1]
        np.maximum(self.host.residency, self.device.residency, out=self.residency)

    def next(self) -> list[int]:
        """See `_core.Cache.next`; a group is all the device's or all the host's, as `is_there` says."""
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
        """See `_core.Cache.close`; chooses what of the host's experts the device gets."""
        if not self._is_open:
            return
        self._is_open = False
        self.device.close()
        if self._there is None:
            return
        self.host.close()
        self._choose()
        np.maximum(self.host.residency, self.device.residency, out=self.residency)

    def _promote(self, keep: NDArray[np.bool_]) -> None:
        """Leaves those of what is promoted."""
        self._promoted, self._levels = self._promoted[keep], self._levels[keep]

    def _note(self, experts: NDArray[np.int32], counts: NDArray[np.int32], tokens: int) -> None:
        """Counts uses; a use of an earlier layer counts as much as one of this."""
        if not tokens or len(experts) == 0:
            return
        self._uses[experts] += counts * self._unit
        # Each layer comes once for a token, so that a layer's share of the time is its share of the experts.
        self._unit *= 2.0 ** (tokens / _HALF_LIFE * self._layer_share)
        if self._unit > _LARGEST:
            self._uses /= self._unit
            self._unit = 1.0

    _layer_share = 1.0

    def spread(self, num_layers: int) -> None:
        """Says of how many layers requests come in turn."""
        self._layer_share = 1.0 / num_layers

    def _choose(self) -> None:
        ran, levels = self._ran, self._ran_levels
        self._ran, self._ran_levels = ran[:0], levels[:0]
        if not len(ran):
            return
        order = np.argsort(-self._uses[ran], kind="stable")[:_PROMOTED]
        if self.device.stats["resident_experts"] + _PROMOTED > self._num_slots:
            least = np.where(self.device.residency > 0, self._uses, np.inf).min()
            order = order[self._uses[ran[order]] > _GAIN * least]
        self._promoted, self._levels = ran[order], levels[order]

    # ------------------------------------------------------------ of one or of both

    def shrink(self, expert: int, level: int) -> bool:
        """See `_core.Cache.shrink`."""
        shrunk = self.host.shrink(expert, level)
        return self.device.shrink(expert, level) and shrunk

    def set_budget(self, bytes: int) -> None:
        """See `_core.Cache.set_budget`: the host's."""
        self.host.set_budget(bytes)

    def keep(self, level: int) -> None:
        """See `_core.Cache.keep`: the host's."""
        self.host.keep(level)

    def set_policy(self, policy: str | Priorities) -> None:
        """See `_core.Cache.set_policy`: the host's."""
        self.host.set_policy(policy)

    def slot_bytes(self, level: int) -> int:
        """See `_core.Cache.slot_bytes`: the host's."""
        return self.host.slot_bytes(level)

    def read_rate(self, threads: int) -> float:
        """See `_core.Cache.read_rate`: the host's."""
        return self.host.read_rate(threads)

    def check_integrity(self) -> None:
        """Raises what either says of its books."""
        self.host.check_integrity()
        self.device.check_integrity()

    @property
    def reads(self) -> NDArray[np.uint32]:
        """See `_core.Cache.reads`: the host's, which reads."""
        return self.host.reads

    @property
    def runs(self) -> NDArray[np.uint32]:
        """See `_core.Cache.runs`: of both together."""
        return self.host.runs + self.device.runs

    @property
    def lacks(self) -> NDArray[np.uint32]:
        """See `_core.Cache.lacks`: the host's, which reads."""
        return self.host.lacks

    @property
    def uses(self) -> NDArray[np.float64]:
        """See `_core.Cache.uses`: of both together."""
        return self.host.uses + self.device.uses

    @uses.setter
    def uses(self, uses: NDArray[np.float64]) -> None:
        self.host.uses = uses
        self.device.uses = np.zeros_like(uses)

    @property
    def progress(self) -> tuple[int, float]:
        """See `_core.Cache.progress`: the host's, which reads."""
        return self.host.progress

    @property
    def stats(self) -> dict[str, Any]:
        """See `_core.Cache.stats`; hits, uses and bits of both, and what the device did by itself."""
        out, there = self.host.stats, self.device.stats
        out["hits"] += there["hits"]
        out["bits"] += there["bits"]
        out["device_hits"] = there["hits"]
        out["device_bytes"] = there["resident_bytes"]
        out["device_bytes_in"] = there["bytes_read"]
        return out


def _some(
    experts: NDArray[np.int32],
    levels: NDArray[np.int8],
    counts: NDArray[np.int32],
    at: NDArray[np.int64],
) -> tuple[NDArray[np.int32], NDArray[np.int8], NDArray[np.int32]]:
    """Returns the wish for some positions of another: experts, levels, offsets."""
    offsets = np.zeros(len(at) + 1, np.int32)
    np.cumsum(counts[at], out=offsets[1:])
    return experts[at], levels[at], offsets

"""Routed experts in a cache: read from the file within a budget, and lent to the kernels group by group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import MATRICES
from edgemoe.file.format import MoeFile
from edgemoe.plan import Plan, Priorities
from edgemoe.store.records import NUM_READERS
from edgemoe.store.request import Request
from edgemoe.store.tiers import Tiers

__all__ = ["ExpertStore"]

# Experts that `load` asks for in one request. The cache looks through all experts of a request whenever one arrives, so
# large requests would be slow.
_REQUEST = 256

Policy = str | Priorities
"""What the cache drops first: "lfu", "lru", or the expert with the lowest of live priorities."""


class ExpertStore:
    """The routed experts of a model, in a cache with a budget of bytes. One thread at a time."""

    def __init__(
        self,
        cache: _core.Cache | Tiers,
        *,
        num_experts: int,
        level_bits: Sequence[int],
        rungs: NDArray[np.uint8],
        is_lent: bool = False,
    ) -> None:
        """See `open` and `dry`.

        Args:
            num_experts: per layer.
            level_bits: the bits of each level, ascending.
            rungs: [layers * num_experts], how many rungs each expert has.
            is_lent: whether a device runs all experts straight from the host's memory.
        """
        self.cache = cache
        self.host = cache.host if isinstance(cache, Tiers) else cache
        """The part of the cache that is in the host's memory."""
        self._is_lent = is_lent
        self._num_experts = num_experts
        self._rungs = rungs
        self.level_bits = tuple(level_bits)
        """The bits of each level, ascending."""
        self._level_bytes = np.array([cache.slot_bytes(i) for i in range(len(level_bits) + 1)])
        self._levels = np.full(256, -1, np.int8)  # of each number of bits, the level; -1 for none
        self._levels[[0, *level_bits]] = np.arange(len(level_bits) + 1)
        # Experts of the open request, after which `ready_groups` stops. -1 if the plan has a list of experts to read
        # ahead: then the cache is asked once more after the last group, as it may start such reads.
        self._count = -1
        self._residency: NDArray[np.int8] = cache.residency.reshape(-1, num_experts)
        # The number of each layer's first expert.
        self._first = np.arange(0, self._residency.size, num_experts, dtype=np.int32)

    @classmethod
    def open(
        cls,
        moe: MoeFile,
        *,
        bits: int,
        budget_bytes: int,
        most_bytes: int = 0,
        verify: bool,
        policy: Policy = "lfu",
        device: _core.Device | None = None,
    ) -> ExpertStore:
        """Returns a store of a file's experts.

        Args:
            bits: the highest precision that will be asked for.
            budget_bytes: the memory for experts.
            most_bytes: the most that `cache.set_budget` may later raise the budget to.
            verify: whether to compare the checksum of everything that is read.
            policy: what is dropped first: the least frequently used expert ("lfu"), the least recently used one
                ("lru"), or the one with the lowest of some live priorities.
            device: a device without memory of its own, which computes experts where they lie in the host's memory.
                Slots then have room for a whole expert each, and are all allocated from the start.

        Raises:
            OutOfBudget: not even one expert fits.
        """
        config, ladder = moe.config, moe.ladder
        last = [(0, 0, 0), *ladder[:-1]]
        cache = _core.Cache(
            file=moe.file,
            num_experts=moe.places,
            hidden=config.hidden_size,
            expert_hidden=config.expert_hidden,
            rung_widths=[
                [b - a for a, b in zip(low, high, strict=True)]
                for low, high in zip(last, ladder, strict=True)
            ],
            offsets=moe.experts.offsets,
            ends=moe.experts.ends,
            crcs=moe.experts.crcs,
            rungs=moe.experts.rungs,
            layers=list(config.moe_layers),
            max_level=moe.level(bits),
            budget_bytes=budget_bytes,
            verify=verify,
            num_readers=NUM_READERS,
            policy=policy,
            scheme=moe.scheme.name,
            row_scales=moe.scheme.row_scales,
            ranks=[moe.scheme.ranks(f"experts.{part}") for part in MATRICES],
            most_bytes=most_bytes,
            gated=config.expert_shapes[0][0] > 0,
            others=moe.experts.others,
            file_of=moe.experts.file_of,
            names=moe.experts.names,
            device=device,
        )
        return cls(
            cache, num_experts=moe.places, level_bits=[r[0] for r in ladder],
            rungs=moe.experts.rungs, is_lent=device is not None,
        )  # fmt: skip

    @classmethod
    def dry(
        cls,
        *,
        num_layers: int,
        num_experts: int,
        level_bits: Sequence[int],
        level_bytes: Sequence[int],
        rungs: NDArray[np.uint8] | None = None,
        budget_bytes: int,
        most_bytes: int = 0,
        policy: Policy = "lfu",
    ) -> ExpertStore:
        """Returns a store for replaying traces: it has no file, and every read ends at once.

        Args:
            num_experts: per layer.
            level_bits: the bits of each level, ascending.
            level_bytes: the bytes of an expert at each level.
            rungs: [num_layers * num_experts], how many of the levels each expert has; None for all.
            budget_bytes: see `open`, as for `most_bytes` and `policy`.

        Raises:
            OutOfBudget: not even one expert fits.
        """
        n, levels = num_layers * num_experts, len(level_bits)
        rungs = np.full(n, levels, np.uint8) if rungs is None else rungs
        cache = _core.Cache(
            file=None,
            num_experts=num_experts,
            hidden=1,
            expert_hidden=1,
            rung_widths=[[w] * 3 for w in np.diff([0, *level_bits]).tolist()],
            offsets=np.zeros(n, np.uint64),
            ends=list(level_bytes),
            crcs=np.zeros((n, levels), np.uint32),
            rungs=rungs,
            layers=list(range(num_layers)),
            max_level=levels,
            budget_bytes=budget_bytes,
            most_bytes=most_bytes,
            verify=False,
            num_readers=1,
            policy=policy,
        )
        return cls(cache, num_experts=num_experts, level_bits=level_bits, rungs=rungs)

    @property
    def residency(self) -> NDArray[np.int8]:
        """The level of each expert in memory [layers, E], 0 = absent: a live view, read only.

        An expert counts as at the highest level once all of its rungs are in memory, even if it has fewer than others.
        """
        return self._residency

    @property
    def reads(self) -> NDArray[np.uint32]:
        """How often each expert was read since the start [layers, E], in whole or in part.

        The counters wrap around. Any thread may read them.
        """
        return self.cache.reads.reshape(-1, self._num_experts)

    @property
    def runs(self) -> NDArray[np.uint32]:
        """How many tokens each expert has run since the start [layers, E]; wraps around. Any thread may read it."""
        return self.cache.runs.reshape(-1, self._num_experts)

    @property
    def lacks(self) -> NDArray[np.uint32]:
        """How often each expert was wanted while it was not in memory at the wanted bits, since the start [layers, E].

        The counters wrap around. Any thread may read them.
        """
        return self.cache.lacks.reshape(-1, self._num_experts)

    def levels(self, bits: NDArray[np.int8]) -> NDArray[np.int8]:
        """Returns the level for each number of bits, in an array of the same shape; 0 for 0 bits, which is no expert.

        Raises:
            ValueError: no level has so many bits.
        """
        levels: NDArray[np.int8] = self._levels[bits]
        if (levels < 0).any():
            unknown = int(np.asarray(bits)[levels < 0][0])
            expected = ", ".join(map(str, (0, *self.level_bits)))
            raise ValueError(f"bits: expected one of {expected}, got {unknown}")
        return levels

    def watch(self) -> NDArray[np.uint8] | None:
        """Returns where each expert last ran, from now on [layers, E]: 1 on a device, 0 on the CPU.

        It is a live view; None if there is no device.
        """
        if self._is_lent:
            return np.ones(self._residency.shape, np.uint8)
        if not isinstance(self.cache, Tiers):
            return None
        return self.cache.watch().reshape(self._residency.shape)

    def sizes(self, experts: NDArray[np.int32], bits: NDArray[np.int8]) -> NDArray[np.int64]:
        """Returns the bytes of memory that experts take at bits, [n] each; experts as layer * num_experts + expert."""
        return self._level_bytes[np.minimum(self.levels(bits), self._rungs[experts])]

    def request(self, plan: Plan) -> Request:
        """Opens the request of a plan: lowers what it drops, and starts the reads that it needs."""
        if plan.drop is not None and plan.drop_bits is not None:
            self.cache.close()  # Ctrl-C may have left a request open
            levels = self.levels(plan.drop_bits)
            for expert, level in zip(plan.drop.tolist(), levels.tolist(), strict=True):
                self.cache.shrink(expert, level)
        ahead = plan.ahead
        self._count = len(plan.experts) if ahead is None else -1
        experts, levels = self.cache.ask(
            plan.layer,
            plan.experts,
            plan.bits,
            plan.offsets,
            len(plan.gates),
            ahead,
            plan.ahead_bits,
        )
        return Request(self.cache, experts, levels)

    def ready_groups(self) -> Iterator[list[int]]:
        """Yields groups of positions in the requested plan as their experts arrive.

        A group stays in memory until the next one is asked for.

        Raises:
            ReadError: a read failed. The request is closed, and the store stays usable.
            FormatError: an expert's checksum does not match; likewise.
        """
        left, self._count = self._count, -1
        try:
            while left and (group := self.cache.next()):
                left -= len(group)
                yield group
        finally:
            self.cache.close()

    def count(
        self, layers: Sequence[int], experts: NDArray[np.int32], levels: NDArray[np.int8]
    ) -> None:
        """Counts uses of experts that one token ran without a request, as they were in memory.

        Args:
            layers: [n], their positions among the layers with experts.
            experts: [n, K], the experts that ran in each of `layers`.
            levels: [layers * E], the levels at which experts run.
        """
        used = experts + self._first[layers][:, None]
        self.cache.count(used, levels[used])

    def lower(self, bits: NDArray[np.int8]) -> None:
        """Drops what experts have in memory beyond `bits` [layers * E], except for experts that are being read."""
        self.cache.close()
        levels = np.minimum(self.levels(bits), self._rungs)
        for expert in np.flatnonzero(self._residency.reshape(-1) > levels).tolist():
            self.cache.shrink(expert, int(levels[expert]))

    def load(self, experts: NDArray[np.int32], bits: NDArray[np.int8]) -> None:
        """Reads experts into memory in advance, in the given order. Does not count as use.

        Args:
            experts: [n], as layer * num_experts + expert, without repeats; together they must fit the budget.
            bits: [n], the precision of each.

        Raises:
            ReadError: a read failed. The store stays usable, as it does after Ctrl-C.
            FormatError: an expert's checksum does not match; likewise.
        """
        levels = self.levels(bits)
        unused = np.zeros(_REQUEST + 1, np.int32)
        self._count = -1
        self.cache.close()
        for i in range(0, len(experts), _REQUEST):
            part = experts[i : i + _REQUEST]
            self.cache.begin(part, levels[i : i + _REQUEST], unused[: len(part) + 1], 0)
            for _ in self.ready_groups():
                pass

    @property
    def uses(self) -> NDArray[np.float64]:
        """How much each expert was used [layers, E]: a use now counts 1, a use 64 tokens ago 1/2. A copy."""
        return self.cache.uses.reshape(-1, self._num_experts)

    @uses.setter
    def uses(self, uses: NDArray[np.float64]) -> None:
        self.cache.uses = uses.reshape(-1)

    def read_rate(self, threads: int) -> float:
        """Returns the bytes per second at which `threads` threads read the experts now in memory; 0 if there are none.

        With less than some 100 MiB of experts, the CPU's caches are measured in part.
        """
        return self.cache.read_rate(threads)

    @property
    def progress(self) -> tuple[int, float]:
        """Bytes read, and seconds waited for reads, since the start. An observer gets them after every layer."""
        return self.cache.progress

    @property
    def stats(self) -> dict[str, Any]:
        """Counters since the start; see `CacheStats` and `LoaderStats` in csrc."""
        stats: dict[str, Any] = self.cache.stats
        if self._is_lent:
            stats["device_hits"] = stats["hits"] + stats["misses"]
            stats["device_bytes"], stats["device_bytes_in"] = stats["resident_bytes"], 0
        return stats

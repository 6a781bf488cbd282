"""Where weights live: dense ones resident, experts in the cache, both read from one `.moe` file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import MATRICES
from edgemoe.file.adapter import AdapterFile
from edgemoe.file.format import ALIGNMENT, MoeFile, Tensor
from edgemoe.plan import Plan, Priorities
from edgemoe.quant import plane_widths

__all__ = [
    "EMBED_ROWS", "ExpertStore", "Request", "Told", "all_expert_bytes", "dense_bytes", "disk_rate",
    "expert_bytes", "has_stored_rows", "level_bytes", "load_dense", "load_rows", "load_tensors", "looked_up_bytes",
    "nobody", "num_there", "read_dense", "read_rate", "rows_bytes", "tensors_bytes",
]  # fmt: skip

_REQUEST = 256  # experts that `load` asks for at once: the cache looks through all of a request's at every arrival
_NUM_READERS = 4  # reads in flight; more added latency and no throughput (benchmarks/LOG.md)

Policy = str | Priorities
Weight = _core.Nested | NDArray[np.float32]
EMBED_ROWS = "embed.rows"
"""Name of what looks up the embedding's rows at the file's highest level, where its matrices are at a lower one."""
Told = Callable[[float], object]
"""Is called with the share of the bytes that has been read."""


def nobody(share: float) -> None:
    """Is told, where nobody asked."""


def dense_bytes(moe: MoeFile, level: int) -> int:
    """Returns the memory that `load_dense` takes."""
    return tensors_bytes(moe, moe.tensors, level) + (0 if moe.bases is None else moe.bases.nbytes)


def tensors_bytes(of: MoeFile | AdapterFile, names: Iterable[str], level: int) -> int:
    """Returns the memory that `load_tensors` takes, each tensor in whole pages."""
    whole, stored = _divided(of, names, level)
    rows = rows_bytes(of, level if of.config.tied else 0) if stored else 0
    return _pages([of.tensors[name] for name in whole], level) + rows


def looked_up_bytes(moe: MoeFile, level: int) -> int:
    """Returns what of `dense_bytes` only the look-up of the embedding's rows needs, of which a token reads one."""
    if has_stored_rows(moe, level):
        return rows_bytes(moe, level if moe.config.tied else 0)
    return 0 if moe.config.tied else sum(moe.tensors["embed"].lengths[:level])


def has_stored_rows(of: MoeFile | AdapterFile, level: int) -> bool:
    """Says whether the file has more of the embedding than a level: its rows are looked up there then."""
    return "embed" in of.tensors and level < len(of.tensors["embed"].lengths)


def rows_bytes(of: MoeFile | AdapterFile, resident: int) -> int:
    """Returns the memory of what `load_rows` returns, beside the resident rungs."""
    rows, cols = of.tensors["embed"].spec.shape
    return _core.StoredRows.bytes_for(
        rows, cols, _widths(of, "embed"), resident, *_coding(of, "embed")
    )


def _divided(of: MoeFile | AdapterFile, names: Iterable[str], level: int) -> tuple[list[str], bool]:
    """Returns which tensors are resident at a level, and whether the embedding's rows are looked up in the file.

    An embedding that is not the head is not resident then: nobody computes with it as a whole.
    """
    stored = "embed" in (whole := list(names)) and has_stored_rows(of, level)
    if stored and not of.config.tied:
        whole.remove("embed")
    return whole, stored


def _pages(tensors: Iterable[Tensor], level: int) -> int:
    page = _core.system_page()
    return sum(-(-sum(t.lengths[:level]) // page) * page for t in tensors)


def _expert_pages(moe: MoeFile, level: int) -> NDArray[np.int64]:
    """Returns the memory of each expert at a level, whole pages."""
    page = _core.system_page()
    pages: NDArray[np.int64] = -(-moe.experts.sizes(level) // page) * page
    return pages


def expert_bytes(moe: MoeFile, level: int) -> int:
    """Returns the memory of the largest expert at a level, and of the window that each lies in."""
    return int(_expert_pages(moe, level).max())


def all_expert_bytes(moe: MoeFile, level: int) -> int:
    """Returns the memory of all experts at a level."""
    return int(_expert_pages(moe, level).sum())


def level_bytes(moe: MoeFile, level: int) -> tuple[int, ...]:
    """Returns the mean memory of an expert at each level up to `level`, rounded down."""
    return tuple(all_expert_bytes(moe, i) // num_there(moe) for i in range(1, level + 1))


def num_there(moe: MoeFile) -> int:
    """Returns how many experts there are: places may be without."""
    return int(np.count_nonzero(moe.experts.rungs))


def load_dense(moe: MoeFile, level: int, *, verify: bool, told: Told = nobody) -> dict[str, Weight]:
    """Reads every tensor outside the routed experts into memory of its own.

    With them come the bases of experts' corrections as "layers.I.experts.basis", which the file has read already.

    Args:
        level: rungs of the matrices.
        told: is called after each tensor.

    Raises:
        FormatError: a checksum does not match.
        ReadError: the disk failed.
    """
    weights = load_tensors(moe, moe.tensors, level, verify=verify, told=told)
    matrices = [w for w in weights.values() if isinstance(w, _core.Nested)]
    for before, after in pairwise(matrices):  # as those of q, k and v
        after.share_basis(before)
    if moe.bases is not None:
        for layer, basis in zip(moe.config.moe_layers, moe.bases, strict=True):
            weights[f"layers.{layer}.experts.basis"] = cast(
                Weight, basis
            )  # int8, for experts alone
    return weights


def load_tensors(
    of: MoeFile | AdapterFile,
    names: Iterable[str],
    level: int,
    *,
    verify: bool,
    told: Told = nobody,
) -> dict[str, Weight]:
    """Reads tensors of a file outside the routed experts; see `load_dense`.

    Below the highest level of the embedding its rows come with it, as `EMBED_ROWS`, or instead of it.
    """
    whole, stored = _divided(of, names, level)
    nested = [of.tensors[name] for name in whole if of.tensors[name].spec.kind == "nested"]
    arena = _core.Arena(_pages(nested, level)) if nested else None
    every = _told_of({name: of.tensors[name] for name in whole}, level, told)
    out = {name: _read(of, name, level, verify, arena) for name in every}
    if stored:
        resident = cast("_core.Nested | None", out.get("embed"))
        rows = load_rows(of, resident, verify=verify)
        out[EMBED_ROWS] = cast(Weight, rows)  # for look-ups alone
    return out


def load_rows(
    of: MoeFile | AdapterFile, resident: _core.Nested | None, *, verify: bool
) -> _core.StoredRows:
    """Returns what looks up rows of the embedding at the highest level of its file.

    Args:
        resident: its first rungs, None for none.
        verify: goes through the others once, and compares every read with what they were.

    Raises:
        FormatError: a checksum does not match.
        ReadError: the disk failed.
    """
    t = of.tensors["embed"]
    rows, cols = t.spec.shape
    return _core.StoredRows(
        of.file, t.offset, t.lengths, t.crcs, rows, cols, _widths(of, "embed"), resident, verify, "embed",
        *_coding(of, "embed"),
    )  # fmt: skip


def read_dense(
    moe: MoeFile, names: Iterable[str], level: int, *, verify: bool, told: Told = nobody
) -> Iterator[tuple[str, Weight]]:
    """Yields tensors of a level, each by itself: for who takes it elsewhere before the next is read."""
    for name in _told_of({name: moe.tensors[name] for name in names}, level, told):
        t = moe.tensors[name]
        arena = _core.Arena(_pages([t], level)) if t.spec.kind == "nested" else None
        yield name, _read(moe, name, level, verify, arena)


def _told_of(tensors: Mapping[str, Tensor], level: int, told: Told) -> Iterator[str]:
    """Yields each tensor's name, and tells after it which share has been read."""
    sizes = {name: sum(t.lengths[:level]) for name, t in tensors.items()}
    total, done = sum(sizes.values()), 0
    for name, size in sizes.items():
        yield name
        done += size
        told(done / total)


def _read(
    moe: MoeFile | AdapterFile, name: str, level: int, verify: bool, arena: _core.Arena | None
) -> Weight:
    """Reads a tensor; a matrix into an arena."""
    t = moe.tensors[name]
    if arena is None or t.spec.kind == "f32":
        return _core.read_f32(moe.file, t.offset, t.spec.shape, t.crcs[0], verify, name)
    rows, cols = t.spec.shape
    count = min(level, len(t.lengths))
    return _core.Nested.from_file(
        arena, moe.file, t.offset, t.lengths[:count], t.crcs[:count], rows, cols,
        _widths(moe, name)[:count], verify, name, *_coding(moe, name),
    )  # fmt: skip


def _widths(of: MoeFile | AdapterFile, name: str) -> Sequence[int]:
    """Returns the bits that each rung of a matrix adds."""
    return plane_widths(of.dense_ladder)[: len(of.tensors[name].lengths)]


def _coding(of: MoeFile | AdapterFile, name: str) -> tuple[str, Sequence[int], Sequence[int]]:
    """Returns what a matrix's rungs mean, as `_core` takes it."""
    scheme = of.scheme.of(name)
    return scheme.name, scheme.row_scales, scheme.ranks(name)


def disk_rate(moe: MoeFile, level: int, *, seconds: float, room: int) -> float:
    """Returns the bytes per second of reading experts in random order as the cache does, for about `seconds`.

    Where `room` bytes do not hold as many experts as are read at once, only the first part of each is read.
    """
    rng = np.random.default_rng(0)
    most = max(room // (2 * _NUM_READERS) // ALIGNMENT, 1) * ALIGNMENT
    length, count = min(expert_bytes(moe, level), most), 32
    starts = moe.experts.offsets[moe.experts.offsets + np.uint64(length) <= moe.file_bytes]
    while True:
        offsets = rng.permutation(starts)[:count].tolist()
        rate = _core.disk_rate(moe.file, offsets, length, _NUM_READERS)
        if length * count / rate >= seconds or count >= len(starts):
            return rate
        count *= 2


def read_rate(moe: MoeFile, size: int, *, total: int) -> float:
    """Returns the bytes per second of reads of `size` bytes at scattered places of a file, `total` bytes of them."""
    rng = np.random.default_rng(0)
    places = rng.integers((moe.file_bytes - size) // ALIGNMENT + 1, size=max(1, total // size))
    return _core.disk_rate(moe.file, (places * ALIGNMENT).tolist(), size, _NUM_READERS)


@dataclass(slots=True)
class Request:
    """A plan's experts under way, or here: what operations find their weights by."""

    slots: _core.Cache
    """Where they lie; the operations of the device that made it know what it is."""
    experts: NDArray[np.int32]
    """[n], as the file numbers them, in the plan's order."""
    levels: NDArray[np.int8]
    """[n]"""
    projected: Any = None
    """What operations made of the tokens for the corrections of all groups; theirs alone."""


class ExpertStore:
    """Holds routed experts inside a budget and lends them group by group. One thread at a time."""

    def __init__(
        self,
        cache: _core.Cache,
        *,
        num_experts: int,
        level_bits: Sequence[int],
        rungs: NDArray[np.uint8],
        is_lent: bool = False,
    ) -> None:
        """See `open` and `dry`.

        Args:
            is_lent: a device runs all experts, from the host's memory.
        """
        self.cache = cache
        self._is_lent = is_lent
        self._num_experts = num_experts
        self._rungs = rungs
        self.level_bits = tuple(level_bits)
        """Of each level, ascending."""
        self._level_bytes = np.array([cache.slot_bytes(i) for i in range(len(level_bits) + 1)])
        self._levels = np.zeros(9, np.int8)
        self._levels[list(level_bits)] = np.arange(1, len(level_bits) + 1)
        self._count = (
            -1
        )  # experts of the request; after the last one reads ahead may go on, if there are any
        self._residency: NDArray[np.int8] = cache.residency.reshape(-1, num_experts)
        self._first = np.arange(
            0, self._residency.size, num_experts, dtype=np.int32
        )  # of each layer

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
            budget_bytes: for slots, all of it.
            most_bytes: to what `cache.set_budget` may raise that later.
            policy: what is dropped first: the least frequently or the least recently used, "lfu" or "lru", or the
                lowest of a live array [layers * experts].
            device: one that has no memory of its own, and computes the experts where they lie; slots are whole experts
                then, and all of them are taken at once.

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
            num_readers=_NUM_READERS,
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
        """Returns a store that reads nothing and where every read ends at once, for replaying traces.

        Args:
            level_bits: of each level, ascending.
            level_bytes: of an expert at each level.
            rungs: [num_layers * num_experts], how many of the levels each expert has; None for all.

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
        """Levels in memory [layers, E], 0 = absent: a live view, read only.

        An expert of which all that the file has is there is at the highest level, however much that is.
        """
        return self._residency

    @property
    def reads(self) -> NDArray[np.uint32]:
        """How often each expert was read since the start [layers, E], in whole or in part; wraps around. Any thread may
        look."""
        return self.cache.reads.reshape(-1, self._num_experts)

    @property
    def runs(self) -> NDArray[np.uint32]:
        """How many tokens each expert ran since the start [layers, E]; wraps around. Any thread may look."""
        return self.cache.runs.reshape(-1, self._num_experts)

    @property
    def lacks(self) -> NDArray[np.uint32]:
        """How often each expert was wanted while it was not in memory, or not at these bits, since the start [layers,
        E]; wraps around. Any thread may look."""
        return self.cache.lacks.reshape(-1, self._num_experts)

    def levels(self, bits: NDArray[np.int8]) -> NDArray[np.int8]:
        """Returns the level of each precision, of the same shape."""
        levels: NDArray[np.int8] = self._levels[bits]
        return levels

    def watch(self) -> NDArray[np.uint8] | None:
        """Returns where each expert ran last, from now on [layers, E]: 1 on a device, 0 on the processor. A live view;
        None where there is no device."""
        if self._is_lent:
            return np.ones(self._residency.shape, np.uint8)
        watch = getattr(self.cache, "watch", None)  # of tiers
        return (
            None
            if watch is None
            else cast("NDArray[np.uint8]", watch()).reshape(self._residency.shape)
        )

    def sizes(self, experts: NDArray[np.int32], bits: NDArray[np.int8]) -> NDArray[np.int64]:
        """Returns the memory of experts at some bits, [n] each; experts as layer * num_experts + expert."""
        return self._level_bytes[np.minimum(self._levels[bits], self._rungs[experts])]

    def request(self, plan: Plan) -> Request:
        """Starts what a plan needs."""
        self.cache.close()  # what Ctrl-C may have left open
        if plan.drop is not None and plan.drop_bits is not None:
            for expert, bits in zip(plan.drop.tolist(), plan.drop_bits.tolist(), strict=True):
                self.cache.shrink(expert, self._levels[bits])
        experts = plan.experts + self._first[plan.layer]
        levels = self._levels.take(plan.bits)
        if plan.ahead is None or plan.ahead_bits is None:
            self._count = len(experts)
            self.cache.begin(experts, levels, plan.offsets, len(plan.gates))
        else:
            later = self._levels.take(plan.ahead_bits)
            self._count = -1
            self.cache.begin(
                experts, levels, plan.offsets, len(plan.gates), ahead=plan.ahead, ahead_levels=later
            )
        return Request(self.cache, experts, levels)

    def ready_groups(self) -> Iterator[list[int]]:
        """Yields positions of the requested plan as their experts arrive; a group is pinned until the next.

        Raises:
            ReadError: a read failed; the request is over and the store usable.
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
        """Counts uses by one token of experts that were here, and that nobody asked for.

        Args:
            experts: [n, K], of each of `layers` [n].
            levels: [layers * E], at which they ran.
        """
        used = experts + self._first[layers][:, None]
        cast(Any, self.cache).count(used, levels[used])

    def lower(self, bits: NDArray[np.int8]) -> None:
        """Gives back what experts have in memory beyond `bits` [layers * E]; but for what is being read."""
        self.cache.close()
        levels = np.minimum(self._levels[bits], self._rungs)
        for expert in np.flatnonzero(self._residency.reshape(-1) > levels).tolist():
            self.cache.shrink(expert, int(levels[expert]))

    def load(self, experts: NDArray[np.int32], bits: NDArray[np.int8]) -> None:
        """Brings experts into memory that nothing asked for yet, in their order; does not count as use.

        Args:
            experts: [n], as layer * num_experts + expert, none twice; together no more than the slots hold.
            bits: [n]

        Raises:
            ReadError: a read failed; the store stays usable, as after Ctrl-C.
            FormatError: an expert's checksum does not match; likewise.
        """
        levels = self._levels[bits]
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
        """How much each expert was used [layers, E]: one use of now counts 1, one of 64 tokens ago half. A copy."""
        return self.cache.uses.reshape(-1, self._num_experts)

    @uses.setter
    def uses(self, uses: NDArray[np.float64]) -> None:
        self.cache.uses = uses.reshape(-1)

    def read_rate(self, threads: int) -> float:
        """Returns the bytes per second that threads read of the experts in memory now, 0 without any.

        Less than some 100 MiB of them partly measure the processor's cache.
        """
        return self.cache.read_rate(threads)

    @property
    def progress(self) -> tuple[int, float]:
        """Bytes read and seconds waited since the start: what an observer is told after every layer."""
        return self.cache.progress

    @property
    def stats(self) -> dict[str, Any]:
        """Counters since the start; see `CacheStats` and `LoaderStats` in csrc."""
        stats: dict[str, Any] = self.cache.stats
        if self._is_lent:
            stats["device_hits"] = stats["hits"] + stats["misses"]
            stats["device_bytes"], stats["device_bytes_in"] = stats["resident_bytes"], 0
        return stats

"""Forecasts of how a model would fit a machine: the engine's own division of memory, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edgemoe import hardware
from edgemoe.errors import OutOfBudget
from edgemoe.file.format import MoeFile
from edgemoe.file.reader import open_moe
from edgemoe.ops import OpsShape
from edgemoe.runtime.budget import Budget
from edgemoe.runtime.opening import Text
from edgemoe.runtime.options import EngineOptions
from edgemoe.runtime.pace import Pace
from edgemoe.runtime.precisions import with_kv_table
from edgemoe.store import expert_bytes, level_bytes, num_there

__all__ = ["Band", "Forecast", "Row"]

_STEP = 1 << 20  # bytes: the resolution of the search for the smallest budget
_WIDTH = 2  # ratio of a band's ends: an idle machine reaches what was measured, a busy one often half of it
_READS = 1.3  # times the probe's rate: what reads between computing reach (benchmarks/forecast.py)
_REPEATS = 1.75  # the miss rate is the absent share to this power, as text repeats; 1: all alike
_GROWN = 6 << 20  # bytes of `Budget.growth` that a process has really used after its first reply
_REPLY = 256  # tokens of the conversation that a band is for
_NEAR = 0.75  # kernels that reach this share of the memory bandwidth are bounded by it


@dataclass(frozen=True, slots=True)
class Row:
    """One way to run a model: at so many bits, with this division of memory."""

    bits: int
    budget: Budget
    token_bytes: int
    """Bytes that a token of a reply reads from the file if all experts are equally likely."""

    used_bytes: int
    """Bytes of its experts' weights that computing a token reads from memory."""
    read_size: int
    """Bytes of one read: a whole expert at `bits`."""

    @property
    def resident(self) -> float:
        """The share of the experts that is certain to be in memory."""
        return min(1.0, self.budget.slots / self.budget.experts)


@dataclass(frozen=True, slots=True)
class Band:
    """The range of speeds at which one reply is written, in tokens per second, at a short context."""

    low: float
    high: float
    bound: str
    """What takes most of the time: "disk"; "memory" or "computing" for the weights; or "layers", their overhead."""


class Forecast:
    """Forecasts for one file. Only its index and sections are read; its weights may be holes of a sparse file."""

    def __init__(
        self, path: Path, *, context: int | None = None, options: EngineOptions | None = None
    ) -> None:
        """Opens a file and its tokenizer, whose memory counts too.

        Args:
            path: the `.moe` file.
            context: tokens that must fit; None for as many as fit well.
            options: the types of keys and values, and their table; the other options have no effect.

        Raises:
            FormatError: it is not a sound `.moe` file, or its table of KV types is not sound.
            ValueError: the model has no such context, or no table of KV types where one is asked for.
            OSError: the table cannot be read.
        """
        moe = open_moe(path)
        types = with_kv_table(moe, options or EngineOptions()).kv_types
        most = moe.config.context_length
        if context is not None and not 1 <= context <= most:
            raise ValueError(f"context: expected 1 to {most} (the model's), got {context}")
        self._text = Text.of(moe)
        self.moe: MoeFile = replace(moe, sections={})
        self._context, self._types = context, types
        self._shape = OpsShape.of(moe.config, hardware.num_threads())
        hardware.trim()
        self._process = hardware.process_bytes()

    @property
    def levels(self) -> tuple[int, ...]:
        """The bits that experts may run at, ascending."""
        return tuple(bits for bits, _, _ in self.moe.ladder)

    def file_bytes(self, bits: int) -> int:
        """Returns the approximate size in bytes of a file that has no more than a level's bits."""
        level, moe = self.moe.level(bits), self.moe
        dense = sum(t.size(moe.dense_level_beside(bits)) for t in moe.tensors.values())
        return dense + num_there(moe) * level_bytes(moe, level)[-1]

    def row(self, ram: int, bits: int) -> Row:
        """Returns how `ram` bytes for the whole process are divided at a level.

        Raises:
            OutOfBudget: says the smallest budget that works.
        """
        budget = self._divide(ram, bits)
        config = self.moe.config
        each = level_bytes(self.moe, self.moe.level(bits))[-1]
        missing = 1 - min(1.0, budget.slots / budget.experts)
        used = len(config.moe_layers) * config.experts_per_token * each
        return Row(
            bits, budget, int(missing * used), used, expert_bytes(self.moe, self.moe.level(bits))
        )

    def band(
        self, row: Row, pace: Pace, disk: float | None, misses: float | None = None
    ) -> Band | None:
        """Returns how fast one reply is written; None if that depends on a disk that was not measured.

        The upper end is 1 / (max(c, r) + min(c, r) / 2) for c seconds of computing and r seconds of reading per token:
        half of the shorter one is hidden behind the longer one. The lower end is half of that. c is the bytes of
        weights divided by the kernels' rate, and the overhead of each layer. r is the bytes of the experts that miss,
        divided by 1.3 times `disk`, as reads between computing are faster than the probe's.

        Experts also use the memory that is reserved for a longer context (`lent`). If a share m of the experts is
        absent, a share m ** 1.75 of the wanted ones is taken to miss, as text repeats itself.

        Args:
            row: the way to run the model.
            pace: what this machine does.
            disk: bytes per second of reads of one expert; None if unknown.
            misses: the share of the wanted experts that are absent, if a trace gives it.
        """
        config = self.moe.config
        dense_bits = self.moe.dense_ladder[-1]
        layers = config.num_layers * pace.layer_s
        weights = row.used_bytes / pace.kernel(row.bits) + row.budget.active_dense / pace.kernel(
            dense_bits
        )
        computing = weights + layers
        absent = 1 - self.lent(row)
        if misses is None:
            misses = absent**_REPEATS
        reading = 0.0
        if absent > 0:
            if disk is None:
                return None
            reading = misses * row.used_bytes / (_READS * disk)
        least = max(computing, reading) + min(computing, reading) / 2
        bound = "layers" if layers > weights else "computing"
        if reading > computing:
            bound = "disk"
        elif bound == "computing" and pace.kernel(row.bits) > _NEAR * pace.memory:
            bound = "memory"
        return Band(1 / (_WIDTH * least), 1 / least, bound)

    def lent(self, row: Row) -> float:
        """Returns the share of the experts that is in memory as long as the conversation is short.

        Until a context fills up, experts use the memory that is reserved for it.
        """
        b = row.budget
        kv = b.sequences * (b.kv_at_once + b.kv_bytes(min(_REPLY, b.context)))
        spare = b.ram - b.process - b.tables - b.dense - kv - b.scratch - _GROWN
        return min(1.0, max(spare, b.slots) / b.experts)

    def smallest(self, bits: int) -> Row:
        """Returns the division of the smallest budget that works at a level, in whole MiB."""
        low, high = 1, 2
        while self._is_too_small(high * _STEP, bits):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self._is_too_small(middle * _STEP, bits):
                low = middle
            else:
                high = middle
        return self.row(high * _STEP, bits)

    def _is_too_small(self, ram: int, bits: int) -> bool:
        try:
            self._divide(ram, bits)
        except OutOfBudget:
            return True
        return False

    def _divide(self, ram: int, bits: int) -> Budget:
        moe = self.moe
        return Budget.divide(
            moe, ram=ram, process=self._process, level=moe.level(bits),
            dense_level=len(moe.dense_ladder), context=self._context, kv_types=self._types,
            ops=self._shape,
        )  # fmt: skip

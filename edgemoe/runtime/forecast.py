"""How a model would fit a machine: the engine's own division of memory, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edgemoe import hardware
from edgemoe.errors import OutOfBudget
from edgemoe.file.format import MoeFile, open_moe
from edgemoe.ops import OpsShape
from edgemoe.runtime.budget import Budget
from edgemoe.runtime.opening import Text
from edgemoe.runtime.options import EngineOptions
from edgemoe.runtime.pace import Pace
from edgemoe.runtime.precisions import with_kv_table
from edgemoe.store import expert_bytes, level_bytes, num_there

__all__ = ["Band", "Forecast", "Row"]

_STEP = 1 << 20  # of the search for the smallest budget
_WIDTH = 2  # of a band: alone, and at its best, a machine does what was measured; in use often half of that
_READS = 1.3  # of the probe's rate, which reads between computing reach (benchmarks/forecast.py)
_REPEATS = 1.75  # a wanted expert is absent as often as experts are, to this power; 1: all alike
_GROWN = 6 << 20  # what a process has grown by when it has replied, of all that is kept for it
_REPLY = 256  # tokens of a conversation that a band is for
_NEAR = 0.75  # kernels that reach this share of what memory gives are bounded by it


@dataclass(frozen=True, slots=True)
class Row:
    """Is one way to run a model."""

    bits: int
    budget: Budget
    token_bytes: int
    """What a token of the reply reads from the file if every expert is as likely as any other."""

    used_bytes: int
    """What computing a token reads of memory, for its experts."""
    read_size: int
    """What one expert is read in."""

    @property
    def resident(self) -> float:
        """Share of the experts that is in memory."""
        return min(1.0, self.budget.slots / self.budget.experts)


@dataclass(frozen=True, slots=True)
class Band:
    """Is between which speeds one reply is written, in tokens per second, at a short context."""

    low: float
    high: float
    bound: str
    """What takes most of the time: "disk", "memory", "computing" of weights, or "layers", what they cost beside it."""


class Forecast:
    """Divides budgets for a file, whose weights are not looked at and may be holes."""

    def __init__(
        self, path: Path, *, context: int | None = None, options: EngineOptions | None = None
    ) -> None:
        """Opens a file, and its tokenizer, which takes memory too.

        Args:
            context: tokens that must fit; None for what fits well.
            options: how keys and values are held.

        Raises:
            FormatError: it is no sound `.moe` file, or its table of KV types is none.
            ValueError: the model has no such context, or no such table.
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
        """The bits that experts may run at."""
        return tuple(bits for bits, _, _ in self.moe.ladder)

    def file_bytes(self, bits: int) -> int:
        """Returns about how large a file is that ends at a level."""
        level, moe = self.moe.level(bits), self.moe
        dense = sum(t.size(moe.dense_level_beside(bits)) for t in moe.tensors.values())
        return dense + num_there(moe) * level_bytes(moe, level)[-1]

    def row(self, ram: int, bits: int) -> Row:
        """Returns how a budget for the whole process is divided at a level.

        Raises:
            OutOfBudget: says the smallest that works.
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
        """Returns how fast one reply is written, or None where that hangs on a disk that nobody measured.

        At the upper end, what a token computes takes its bytes divided by what the kernels do, and what each layer
        costs beside them; and reads are hidden behind half of that. Experts have what is kept for a longer context and
        is not used yet. Text repeats itself: where a share m of the experts is absent, m ** 1.75 of the wanted ones
        were, in measurements m ** 1.5 to m ** 2 (docs/benchmarks.md).

        Args:
            disk: bytes per second of reads of an expert.
            misses: share of the wanted experts that are absent, where a trace tells it.
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
        """Returns the share of the experts that is in memory as long as a conversation is short."""
        b = row.budget
        kv = b.sequences * (b.kv_at_once + b.kv_bytes(min(_REPLY, b.context)))
        spare = b.ram - b.process - b.tables - b.dense - kv - b.scratch - _GROWN
        return min(1.0, max(spare, b.slots) / b.experts)

    def smallest(self, bits: int) -> Row:
        """Returns the smallest budget that works at a level, in whole MiB."""
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

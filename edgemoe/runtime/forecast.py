"""How a model would fit a machine: the engine's own division of memory, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edgemoe import hardware
from edgemoe.errors import OutOfBudget
from edgemoe.file.format import MoeFile, open_moe
from edgemoe.model import KvTypes
from edgemoe.ops import OpsShape
from edgemoe.runtime.budget import Budget
from edgemoe.runtime.opening import Text
from edgemoe.store import level_bytes

__all__ = ["Forecast", "Row"]

_STEP = 1 << 20  # of the search for the smallest budget


@dataclass(frozen=True, slots=True)
class Row:
    """Is one way to run a model."""

    bits: int
    budget: Budget
    token_bytes: int
    """What a token of the reply reads from the file if every expert is as likely as any other."""

    @property
    def resident(self) -> float:
        """Share of the experts that is in memory."""
        return min(1.0, self.budget.slots / self.budget.experts)


class Forecast:
    """Divides budgets for a file, whose weights are not looked at and may be holes."""

    def __init__(
        self, path: Path, *, context: int | None = None, types: KvTypes | None = None
    ) -> None:
        """Opens a file, and its tokenizer, which takes memory too.

        Args:
            context: tokens that must fit; None for what fits well.
            types: of keys and values.

        Raises:
            FormatError: it is no sound `.moe` file.
            ValueError: the model has no such context.
        """
        moe = open_moe(path)
        most = moe.config.context_length
        if context is not None and not 1 <= context <= most:
            raise ValueError(f"context: expected 1 to {most} (the model's), got {context}")
        self._text = Text.of(moe)
        self.moe: MoeFile = replace(moe, sections={})
        self._context, self._types = context, types or KvTypes()
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
        dense = sum(sum(t.lengths[:level]) for t in moe.tensors.values())
        return dense + len(moe.experts.offsets) * level_bytes(moe, level)[-1]

    def row(self, ram: int, bits: int) -> Row:
        """Returns how a budget for the whole process is divided at a level.

        Raises:
            OutOfBudget: says the smallest that works.
        """
        budget = self._divide(ram, bits)
        config = self.moe.config
        each = level_bytes(self.moe, self.moe.level(bits))[-1]
        missing = 1 - min(1.0, budget.slots / budget.experts)
        uses = len(config.moe_layers) * config.experts_per_token
        return Row(bits, budget, int(missing * uses * each))

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

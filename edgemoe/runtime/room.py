"""The room for experts, which follows what the rest of an engine takes, so that the budget is kept and used."""

from __future__ import annotations

import logging
import time
from weakref import WeakSet

from edgemoe import _core, hardware
from edgemoe.errors import OutOfBudget, size_text
from edgemoe.model import Batch, SequenceState
from edgemoe.runtime.budget import Budget
from edgemoe.runtime.context import KV_STEP
from edgemoe.store.tiers import Tiers

__all__ = ["Room"]

logger = logging.getLogger(__name__)

_WARM_TOKENS = 3
"""Decoding passes after which a process has grown by about what `Budget.growth` reserves."""
_SHARE = 0.005
"""The most of the time that measuring may take: it walks the page tables, in some 30 ms for each GiB."""

_NOISE = 1 << 19
"""What the process may have grown by before it is worth a measurement, in bytes; a part of `Budget.slack`."""


_TRIMMED = 8 << 20
"""What it may have grown by before memory that was freed is given back to the system, in bytes."""


class Room:
    """The size of the expert slots, which is adjusted before each pass.

    Memory for contexts and chunks is reserved when a model is opened, but used later or never. Until then it holds
    experts. If the whole process must stay below a bound, its size is measured now and then: the slots then take what
    the reserve turned out not to need, and give back what the process has grown by. Exact schedulers give the same
    answers at any size.
    """

    def __init__(
        self, budget: Budget, slots: _core.Cache | Tiers, *, is_measured: bool, is_steady: bool
    ) -> None:
        """Args:
        budget: how the memory was divided.
        slots: the expert slots, of `budget.slots` bytes now.
        is_measured: `budget.ram` bounds the whole process, so that its size must be measured.
        is_steady: the slots keep their size, so that runs can be compared.
        """
        self._budget, self._slots = budget, slots
        self._is_measured, self._is_steady = is_measured, is_steady
        self.states: WeakSet[SequenceState] = WeakSet()
        """The states of all sequences that exist."""
        self._tokens = 0  # of the largest pass so far
        self._singles = 0  # decoding passes so far
        self._is_lent = False
        self._beside = self._borrowed = 0
        # Without what `take_in` has added since the last measurement, and with it.
        self._ram = self._whole = budget.ram
        self.is_resting = False
        """Whether the slots' memory was given back to the system, until the next pass."""
        self._base = budget.fixed - budget.kv - budget.chunk * budget.row
        self._base += budget.sequences * budget.kv_at_once
        self._size = budget.slots
        self._next_s = 0.0

    @property
    def size(self) -> int:
        """Bytes that the slots may take now."""
        return self._size

    @property
    def spare(self) -> int:
        """Bytes that can be borrowed or kept beside what is already, though passes take all that is reserved."""
        return self._spare(self._reserved())

    def hold(self) -> None:
        """Fixes the slots at the size that the budget reserved for them, from now on."""
        if not self._is_steady:
            self._is_steady = True
            self._resize(self._budget.slots)

    def fit(self, batch: Batch) -> None:
        """Makes room for a pass. Called before each pass."""
        if self._is_steady:
            return
        if self.is_resting:
            self.is_resting = False
            self._resize(self._left())
        tokens = len(batch)
        self._singles += batch.is_decoding
        is_warm = self._is_measured and self._singles > _WARM_TOKENS
        is_due = is_warm and (
            time.perf_counter() >= self._next_s or (self._whole > self._ram and not self._borrowed)
        )
        grown = [s for s in batch.slices if s.state.length + s.count > s.state.reach]
        if not (is_due or grown or tokens > self._tokens or self._is_lent):
            return
        taken = self._counted() + self._borrowed
        if self._is_lent and is_warm and not is_due:
            is_due = self._taken(hardware.process_bytes()) > self._base + taken + _NOISE
        self._is_lent = False
        if is_due:
            whole = self._whole  # before measuring, which counts what it has been used for
            self._measure(taken)
            if not self._borrowed:
                self._ram = whole
        for part in grown:
            self._reach(part.state, part.state.length + part.count)
        self._tokens = max(tokens, self._tokens)
        self._resize(self._left())

    def reach(self, state: SequenceState, length: int) -> None:
        """Makes room for a sequence that gets `length` tokens at once, without a pass, as a restored one does."""
        if not self._is_steady and length > state.reach:
            self._reach(state, length)
            self._resize(self._left())

    @staticmethod
    def _reach(state: SequenceState, length: int) -> None:
        state.reach = min(-(-length // KV_STEP) * KV_STEP, state.capacity)

    def lend(self, size: int) -> None:
        """Takes `size` bytes from the slots until the next pass, in place of what the last call took.

        Until the first reply, and where slots keep their size, `Budget.growth` is there for them.

        Raises:
            OutOfBudget: the budget does not leave as many; nothing has changed.
        """
        if not self._is_measured:
            return
        is_grown = self._singles > _WARM_TOKENS and not self._is_steady
        beyond = size if is_grown else size - self._budget.growth
        if beyond <= 0:
            return
        taken = self._counted()
        if beyond > self._spare(taken) and is_grown:
            hardware.trim()  # what others took and gave back is there too
            self._measure(taken + self._borrowed)
        spare = self._spare(self._reserved() if self._is_steady else taken)
        if beyond > spare:
            there = max(spare + size - beyond, 0)
            raise OutOfBudget(
                f"this takes {size_text(size)} of memory for a while, of which the budget leaves {size_text(there)}"
            )
        if not self._is_steady:
            self._is_lent = True
            self._resize(self._left(beyond))

    def borrow(self, size: int) -> int:
        """Takes `size` bytes from the slots until `borrow(0)`, in place of what the last call took.

        Returns:
            How many bytes are missing, as one expert has to fit, or all slots where they keep their size; if any are,
            nothing has changed.
        """
        if not self._is_measured:
            return 0
        missing = size - self._borrowed - self.spare
        if size > self._borrowed and missing > 0:
            return missing
        self._borrowed = size
        if not size:  # the next pass takes it back, and measures if not all of it came back
            self._is_lent = True
        elif not self.is_resting and not self._is_steady:
            self._resize(self._left())
        return 0

    def take_in(self, size: int) -> None:
        """Adds `size` bytes to the budget, which were reserved beside it and are in use, and will stay so.

        They count from the next measurement on, as that counts what they are used for. One thread may call it while
        another one runs passes.
        """
        self._whole += size

    def rest(self) -> None:
        """Gives the slots' memory back to the system, except for one expert; the next pass takes it again."""
        if not self._is_steady:
            self.is_resting = True
            self._resize(self._budget.expert)

    def keep(self, size: int) -> int:
        """Takes `size` bytes from the slots for prefixes in memory, in place of what the last `keep` took.

        Returns:
            How many bytes are missing, as one expert has to fit; if any are, nothing has changed.

        Raises:
            ValueError: the slots have a fixed size.
        """
        if self._is_steady:
            raise ValueError("room: the slots keep their size")
        missing = size - self._beside - self.spare
        if size > self._beside and missing > 0:
            return missing
        self._beside = size
        self._resize(self._left())
        return 0

    def _reserved(self) -> int:
        """Returns the bytes that are counted once passes take all that is reserved for them."""
        budget = self._budget
        most = budget.sequences * budget.kv_bytes(budget.context) + budget.chunk * budget.row
        return max(most + self._beside, self._counted())

    def _spare(self, taken: int) -> int:
        """Returns the bytes that are left, beside `taken`, when the slots have given up all that they can."""
        budget = self._budget
        least = self._size if self._is_steady else budget.expert
        return self._ram - self._base - taken - self._borrowed - least

    def _left(self, beside: int = 0) -> int:
        """Returns the bytes that are left for slots when everything that is counted, and `beside` bytes, are taken."""
        budget = self._budget
        left = self._ram - self._base - self._counted() - beside - self._borrowed
        return min(max(left, budget.expert), budget.experts)

    def _counted(self) -> int:
        """Returns the bytes that sequences, passes so far and `keep` take, beyond `_base`."""
        states = sum(self._budget.kv_bytes(state.reach) for state in self.states)
        return states + self._tokens * self._budget.row + self._beside

    def _measure(self, taken: int) -> None:
        """Measures what everything takes but the slots and `taken` bytes, and may take before the next measurement."""
        start = time.perf_counter()
        base = self._taken(hardware.exact_process_bytes()) - taken
        if base > self._base + _TRIMMED:
            hardware.trim()
            base = self._taken(hardware.exact_process_bytes()) - taken
        now = time.perf_counter()
        self._next_s = now + (now - start) / _SHARE
        # How much of what is borrowed is in use is not known: until it comes back, only growth is certain.
        self._base = max(base, self._base) if self._borrowed else base

    def _taken(self, process: int) -> int:
        budget, slots = self._budget, int(self._slots.stats["resident_bytes"])
        late = len(self.states) * budget.kv_late
        late += (budget.sequences - len(self.states)) * budget.kv_at_once
        return process - slots + budget.tables + late + budget.slack

    def _resize(self, size: int) -> None:
        # Growing by less than an expert is not worth a change. Shrinking always is, to keep the budget.
        grows = size >= self._size + self._budget.expert or size == self._budget.experts
        if size == self._size or (size > self._size and not grows):
            return
        self._slots.close()  # a request that Ctrl-C may have left open
        self._slots.set_budget(size)
        self._size = size
        logger.debug("room: %d of %d bytes for experts", size, self._budget.experts)

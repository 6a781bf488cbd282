"""Keeps an engine inside its budget while it runs, and the budget in use."""

from __future__ import annotations

import logging
import time
from weakref import WeakSet

from edgemoe import _core, hardware
from edgemoe.model import Batch, SequenceState
from edgemoe.runtime.budget import Budget
from edgemoe.runtime.context import KV_STEP

__all__ = ["Room"]

logger = logging.getLogger(__name__)

_WARM_TOKENS = 3
"""Single tokens after which a process has grown by what the reserve is for."""
_SHARE = 0.005
"""Of the time, that measuring may take: it walks the page tables, some 30 ms for each GiB."""


class Room:
    """Sizes the expert slots before each pass.

    What a sequence and a chunk may take is promised when a model is opened, and touched later or never. Until then it
    holds experts. Where the whole process is to stay below a bound, it is measured now and then: slots take what the
    reserve turned out not to need, and give back what the process has grown by. Exact schedulers give the same answers
    at any size.
    """

    def __init__(
        self, budget: Budget, slots: _core.Cache, *, is_measured: bool, is_steady: bool
    ) -> None:
        """Args:
        budget: how the memory was divided; slots have `budget.slots` now.
        is_measured: `budget.ram` bounds the whole process.
        is_steady: slots keep their size, as where results are compared.
        """
        self._budget, self._slots = budget, slots
        self._is_measured, self._is_steady = is_measured, is_steady
        self.states: WeakSet[SequenceState] = WeakSet()
        """Those of the sequences that there are."""
        self._tokens = 0  # of the largest pass
        self._singles = 0
        self._is_lent = False
        self._beside = 0
        self.is_resting = False
        """The slots were given back, until the next pass."""
        self._base = budget.fixed - budget.kv - budget.chunk * budget.row
        self._base += budget.sequences * budget.kv_at_once
        self._size = budget.slots
        self._next_s = 0.0

    @property
    def size(self) -> int:
        """What the slots may take now."""
        return self._size

    def hold(self) -> None:
        """Slots have the size that the budget promised, from now on."""
        if not self._is_steady:
            self._is_steady = True
            self._resize(self._budget.slots)

    def fit(self, batch: Batch) -> None:
        """Makes room for a pass: called before each."""
        if self._is_steady:
            return
        if self.is_resting:
            self.is_resting = False
            self._resize(self._left())
        tokens = len(batch)
        self._singles += batch.is_decoding
        is_due = (
            self._is_measured
            and self._singles > _WARM_TOKENS
            and time.perf_counter() >= self._next_s
        )
        grown = [s for s in batch.slices if s.state.length + s.count > s.state.reach]
        if not (is_due or grown or tokens > self._tokens or self._is_lent):
            return
        if self._is_lent:
            self._is_lent = False
            is_due = is_due or self._taken(hardware.process_bytes()) > self._base + self._counted()
        if is_due:
            self._base = self._measured() - self._counted()
        for part in grown:
            self._reach(part.state, part.state.length + part.count)
        self._tokens = max(tokens, self._tokens)
        self._resize(self._left())

    def reach(self, state: SequenceState, length: int) -> None:
        """Makes room for a sequence that will hold `length` tokens at once, as one that is restored does."""
        if not self._is_steady and length > state.reach:
            self._reach(state, length)
            self._resize(self._left())

    @staticmethod
    def _reach(state: SequenceState, length: int) -> None:
        state.reach = min(-(-length // KV_STEP) * KV_STEP, state.capacity)

    def lend(self, size: int) -> None:
        """Takes `size` bytes from the slots until the next pass; before a reply was made the reserve is for that."""
        if self._is_measured and not self._is_steady and self._singles > _WARM_TOKENS:
            self._is_lent = True
            self._resize(self._left(size))

    def rest(self) -> None:
        """Gives the slots' memory back to the system, but for one expert; the next pass takes it again."""
        if not self._is_steady:
            self.is_resting = True
            self._resize(self._budget.expert)

    def keep(self, size: int) -> None:
        """Takes `size` bytes from the slots for what is kept beside them, in place of what `keep` took before.

        Raises:
            ValueError: the slots keep their size.
        """
        if self._is_steady:
            raise ValueError("room: the slots keep their size")
        self._beside = size
        self._resize(self._left())

    def _left(self, beside: int = 0) -> int:
        """Returns what is left for slots beside all that is counted and so many bytes."""
        budget = self._budget
        left = budget.ram - self._base - self._counted() - beside
        return min(max(left, budget.expert), budget.experts)

    def _counted(self) -> int:
        """Returns what sequences and passes so far take, beside what was there at once."""
        states = sum(self._budget.kv_bytes(state.reach) for state in self.states)
        return states + self._tokens * self._budget.row + self._beside

    def _measured(self) -> int:
        """Returns what all but the slots takes, or may take before it is measured again."""
        start = time.perf_counter()
        taken = self._taken(hardware.exact_process_bytes())
        now = time.perf_counter()
        self._next_s = now + (now - start) / _SHARE
        return taken

    def _taken(self, process: int) -> int:
        budget, slots = self._budget, int(self._slots.stats["resident_bytes"])
        late = len(self.states) * budget.kv_late
        late += (budget.sequences - len(self.states)) * budget.kv_at_once
        return process - slots + budget.tables + late + budget.slack

    def _resize(self, size: int) -> None:
        # A little more is not worth a change; a little less is.
        grows = size >= self._size + self._budget.expert or size == self._budget.experts
        if size == self._size or (size > self._size and not grows):
            return
        self._slots.close()  # what Ctrl-C may have left open
        self._slots.set_budget(size)
        self._size = size
        logger.debug("room: %d of %d bytes for experts", size, self._budget.experts)

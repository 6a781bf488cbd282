"""A pool of prefixes in memory: what sequences give up is kept inside the budget, and overflows to disk."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe.model import SequenceState
from edgemoe.runtime.model import Model
from edgemoe.runtime.prefix import LEAST, Prefix, covers, fill, longest
from edgemoe.runtime.prefix_store import PrefixStore

__all__ = ["PrefixPool"]


class PrefixPool:
    """Prefixes in memory that would otherwise hold experts. Used on the model's thread alone.

    A prefix that a sequence takes back leaves the pool. What the sequence holds in the end is kept when it is given up.
    """

    def __init__(self, model: Model, *, most_bytes: int, below: PrefixStore | None) -> None:
        """Makes an empty pool.

        Args:
            model: whose sequences it serves; its experts give up memory as the pool grows.
            most_bytes: the most bytes of all prefixes. Beyond that, the oldest leave.
            below: takes those that leave; None to drop them.

        Raises:
            ValueError: the model's expert slots have a fixed size (`EngineOptions.steady`).
        """
        self._model, self._most, self._below = model, most_bytes, below
        self._kept: list[Prefix] = []
        model.room.keep(0)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return sum(prefix.size for prefix in self._kept)

    def look(self) -> None:
        """Drops all prefixes: the model has changed, and they are no longer right."""
        self._kept = []
        self._model.room.keep(0)
        if self._below is not None:
            self._below.look()

    def exchange(
        self, state: SequenceState, tokens: NDArray[np.int32], shared: int, most: int,
        adapter: int = 0,
    ) -> int:  # fmt: skip
        """Does what `PrefixStore.exchange` does, but looks in memory first."""
        least = shared + LEAST - 1
        found, best = longest(self._model, state, self._kept, tokens, least, most, adapter)
        if found is not None:
            self._kept.remove(found)  # before `_keep`, which needs its place
        if state.length - shared >= LEAST:
            self._keep(state, beside=0 if found is None else found.size)
        state.use(adapter)
        below = self._below
        saved, longer = (None, 0) if below is None else below.find(state, tokens, best, most)
        if saved is not None and below is not None:
            if found is not None:
                self._add(found)
            return min(longer, below.restore(saved, state))
        if found is None:
            return shared
        fill(self._model, state, found.ids, found.turned, found.parts.__getitem__, 0)
        self._model.room.keep(self.size)
        return best

    def save(self, state: SequenceState) -> None:
        """Saves what a sequence holds, and all prefixes of the pool, to disk, if there is a store for them."""
        if self._below is not None:
            self._below.save(state)
            for prefix in self._kept:
                self._below.put(prefix)

    def _keep(self, state: SequenceState, *, beside: int) -> None:
        """Keeps what a sequence holds; `beside` bytes of another prefix are in memory at the same time."""
        prefix = Prefix.of(state)
        if prefix is None:
            return
        model, is_whole = self._model, prefix.is_whole
        if any(covers(model, kept, prefix, is_whole=is_whole) for kept in self._kept):
            return
        if prefix.size > self._most:
            self._spill(prefix)
            return
        self._kept = [
            kept for kept in self._kept if not covers(model, prefix, kept, is_whole=is_whole)
        ]
        self._drop(self._most - prefix.size)
        while self._model.room.keep(self.size + prefix.size + beside):
            if not self._kept:  # not even it alone fits
                self._model.room.keep(beside)
                self._spill(prefix)
                return
            self._drop(self.size - 1)
        self._kept.append(prefix.copy())

    def _add(self, prefix: Prefix) -> None:
        self._drop(self._most - prefix.size)
        self._kept.append(prefix)
        self._model.room.keep(self.size)

    def _drop(self, most: int) -> None:
        """Moves the oldest prefixes to disk, or drops them, until the rest takes at most `most` bytes."""
        while self.size > most:
            self._spill(self._kept.pop(0))

    def _spill(self, prefix: Prefix) -> None:
        if self._below is not None:
            self._below.put(prefix)

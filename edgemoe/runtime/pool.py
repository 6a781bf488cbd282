"""Prefixes in memory: what sequences lose, kept inside the budget; what it has no room for goes to disk."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe.model import SequenceState
from edgemoe.runtime.model import Model
from edgemoe.runtime.prefixes import LEAST, Prefix, PrefixStore, fill, shared_tokens

__all__ = ["PrefixPool"]


class PrefixPool:
    """Keeps prefixes in memory that experts would have. One thread at a time, that of the model.

    A prefix that a sequence takes back leaves the pool: it is kept again when the sequence loses it.
    """

    def __init__(self, model: Model, *, most_bytes: int, below: PrefixStore | None) -> None:
        """Starts without any.

        Args:
            most_bytes: beyond that those that came first leave.
            below: where these go; None for nowhere.

        Raises:
            ValueError: experts keep their size.
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
        """Forgets all: the model is another one, and what is kept of it is wrong."""
        self._kept = []
        self._model.room.keep(0)
        if self._below is not None:
            self._below.look()

    def exchange(
        self, state: SequenceState, tokens: NDArray[np.int32], shared: int, most: int,
        adapter: int = 0,
    ) -> int:  # fmt: skip
        """Does what `PrefixStore.exchange` does, in memory first."""
        found, best = None, shared + LEAST - 1
        for prefix in self._kept:
            if prefix.adapter != adapter:
                continue
            count = shared_tokens(
                self._model, state, prefix.ids, prefix.turned, tokens[:most], len(tokens)
            )
            if count > best:
                found, best = prefix, count
        if found is not None:
            self._kept.remove(found)  # first: it needs no place while the other one takes it
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
        """Saves what a sequence holds on disk, and all that is kept, where there is a place for it."""
        if self._below is not None:
            self._below.save(state)
            for prefix in self._kept:
                self._below.put(prefix)

    def _keep(self, state: SequenceState, *, beside: int) -> None:
        """Keeps what a sequence holds, while `beside` bytes more are in use."""
        prefix = Prefix.of(state)
        if prefix is None or any(kept.covers(prefix) for kept in self._kept):
            return
        if prefix.size > self._most:
            if self._below is not None:
                self._below.put(prefix)
            return
        self._kept = [kept for kept in self._kept if not prefix.covers(kept)]
        self._drop(self._most - prefix.size)
        self._model.room.keep(self.size + prefix.size + beside)
        self._kept.append(prefix.copy())

    def _add(self, prefix: Prefix) -> None:
        self._drop(self._most - prefix.size)
        self._kept.append(prefix)
        self._model.room.keep(self.size)

    def _drop(self, most: int) -> None:
        """Lets those go that came first, until the rest takes no more than `most` bytes."""
        while self.size > most:
            oldest = self._kept.pop(0)
            if self._below is not None:
                self._below.put(oldest)

"""What a model remembers of one sequence: its tokens, and a state for each layer.

A pass over further tokens may end half-way: a read fails in layer 7, or Ctrl-C comes. Then every layer must be where it
was. So what counts is one list, the tokens, which gets longer in one step after the last layer. What layers have
written by then for tokens that do not count is theirs to ignore, and it never takes the place of what does count.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["SNAPSHOTS", "SequenceState", "State"]

SNAPSHOTS = 2
"""Of a layer and sequence: where the last turn of a conversation begins, and where its reply does."""

_REPLY_START = 16
"""Tokens at the end of a prompt that may differ when a conversation goes on: how its template begins a reply."""


class State(Protocol):
    """Is what one layer remembers of one sequence; made by the layer's mixer, which alone looks into it.

    A pass gives the layer tokens from position `pos`, where `pos` tokens count. Until the sequence says otherwise the
    layer can be asked to go on from `pos` again: keys and values are written behind it, a recurrent layer keeps the
    matrix of `pos` beside the one after the pass.
    """

    can_rewind_anywhere: bool
    """It can go back to every length, so that snapshots are of no use to it."""
    can_look_back: bool
    """A snapshot may be of any length that the last pass went over; else of that where it ended."""

    def reaches(self, length: int) -> int:
        """Returns the longest length, at most `length`, that it can go back to: 0 for the start."""

    def rewind(self, length: int) -> None:
        """Goes back to `length` tokens, one that `reaches` returns, or 0; what was kept of longer ones is void."""

    def snapshot(self, length: int) -> None:
        """Keeps what it takes for `rewind` to come back to `length`, the present one or see `can_look_back`."""

    def parts(self, length: int) -> tuple[Any, ...] | None:
        """Returns what stands for `length` tokens, the present length, to be saved; None where that cannot be."""

    def make_parts(self, length: int) -> tuple[Any, ...]:
        """Returns what `parts` does of a layer at the start, to be filled: `length` tokens are there then."""


_numbers = itertools.count()


class SequenceState:
    """Holds the tokens that count and the layers' states. One thread at a time."""

    def __init__(self, layers: Sequence[State], capacity: int) -> None:
        self.number = next(_numbers)
        """Of no other, also once it is gone."""
        self.ids: list[int] = []
        """The tokens that the states stand for."""
        self.layers = list(layers)
        self.held = 0
        """How many of `ids` the layers hold: all, unless these turned their positions as no longer is right."""
        self.turned = 0
        """The sequence's length for which positions of what is held were turned; RoPE may depend on it."""
        self.goal = 0
        """The length that the call under way will reach; 0 for no more than each pass brings."""
        self.capacity = capacity
        """The most tokens."""
        self.reach = 0
        """Tokens for which memory is counted: the most that were ever there, and a few."""
        self.mark = 0
        """The length of the next snapshot, 0 for none; passes may have to end there, see `span`."""
        self.is_dirty = False
        """A pass is under way, or was broken off."""
        self.adapter = 0
        """The number of the adapter that its tokens are computed with, 0 for none; see `use`."""

    def use(self, adapter: int) -> None:
        """Computes what comes with another adapter, and from the start: what is held is the other's."""
        if adapter != self.adapter:
            self.rewind(0)
            self.adapter = adapter

    @property
    def needs_snapshots(self) -> bool:
        """Whether it takes them to come back to a length."""
        return not all(state.can_rewind_anywhere for state in self.layers)

    @property
    def length(self) -> int:
        """Tokens that count: the position of the next one."""
        return len(self.ids)

    def begin(self, count: int) -> None:
        """A pass over `count` more tokens starts.

        Raises:
            ValueError: they do not fit, or a pass that was broken off has cost tokens; `length` says how many are left.
        """
        before = self.length
        if self.is_dirty and self.rewind(before) < before:
            raise ValueError(
                f"a pass that was broken off took the sequence back from {before} to {self.length} tokens"
            )
        if before + count > self.capacity:
            have = f" with {before} tokens in it" if before else ""
            raise ValueError(f"{count} tokens do not fit a context of {self.capacity}{have}")
        self.is_dirty = True

    def commit(self, ids: Sequence[int]) -> None:
        """The pass has succeeded: its tokens count from now on."""
        is_passed = self.length < self.mark <= self.length + len(ids)
        self.ids.extend(ids)  # one step, so that Ctrl-C comes before it or after it
        self.held = len(self.ids)
        self.is_dirty = False
        if is_passed:
            self._snapshot(self.mark)

    def begin_turn(self, prompt: int) -> None:
        """The first `prompt` tokens will be there, and a reply follows.

        Layers that cannot go back to every token keep where the turn begins and where its reply does, for a
        conversation in which either is written anew.
        """
        if self.needs_snapshots:
            self.snapshot()
            self.mark = max(prompt - _REPLY_START, 0)

    def span(self, count: int) -> int:
        """Returns how many of the next `count` tokens a pass may take."""
        left = self.mark - self.length
        if 0 < left < count and not all(state.can_look_back for state in self.layers):
            return left
        return count

    def reaches(self, length: int) -> int:
        """Returns how many tokens `rewind` would leave."""
        length = min(length, self.length)
        while (reached := min((s.reaches(length) for s in self.layers), default=length)) < length:
            length = reached
        return length

    def rewind(self, length: int) -> int:
        """Goes back to the first `length` tokens, or as many as all layers can go on from; returns how many."""
        length = self.reaches(length)
        self.is_dirty = True  # until all layers agree
        for state in self.layers:
            state.rewind(length)
        del self.ids[length:]
        self.held = min(self.held, length)
        self.is_dirty = False
        return length

    def snapshot(self) -> None:
        """Keeps what it takes to come back here with `rewind`, until the sequence has gone back further."""
        self._snapshot(self.length)

    def _snapshot(self, length: int) -> None:
        for state in self.layers:
            state.snapshot(length)

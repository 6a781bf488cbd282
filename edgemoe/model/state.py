"""What a model remembers of one sequence: its tokens, and a state for each layer.

A pass may break off half-way: a read fails in layer 7, or Ctrl-C comes. Then every layer must be where it was before.
So the length of a sequence is that of one list, its tokens, which grows in a single step after the last layer. By then
layers have written state for tokens that do not count yet. They ignore it if the pass breaks off, and never write it
over the state of tokens that count.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["SNAPSHOTS", "SequenceState", "State"]

SNAPSHOTS = 2
"""How many a layer keeps for each sequence: the start of the conversation's last turn, and the start of its reply."""

_REPLY_START = 16
"""Tokens at the end of a prompt with which a chat template opens the reply; they may differ when the chat goes on."""


class State(Protocol):
    """What one layer remembers of one sequence. Only the layer's mixer, which makes it, looks inside.

    A pass gives the layer tokens from position `pos`, where `pos` tokens count. Until the pass is committed, the layer
    must be able to go on from `pos` again. Attention does so by writing keys and values behind `pos` only; a recurrent
    layer keeps its state at `pos` beside the state after the pass.
    """

    can_rewind_anywhere: bool
    """Whether it can go back to every length, so that it needs no snapshots."""
    can_look_back: bool
    """Whether a snapshot may be of any length that the last pass went over, and not only of where the pass ended."""

    def reaches(self, length: int) -> int:
        """Returns the longest length, at most `length`, that it can go back to; 0 for the start."""

    def rewind(self, length: int) -> None:
        """Goes back to `length` tokens, and drops what was kept for longer lengths.

        Args:
            length: one that `reaches` returns.
        """

    def snapshot(self, length: int) -> None:
        """Keeps what `rewind` needs to come back to `length`: the present length, or see `can_look_back`."""

    def parts(self, length: int) -> tuple[Any, ...] | None:
        """Returns the arrays that stand for the first `length` tokens, for saving them.

        Args:
            length: the present length.

        Returns:
            None if the state cannot be saved.
        """

    def make_parts(self, length: int) -> tuple[Any, ...]:
        """Returns the arrays that `parts` would return, for the caller to fill. The layer then holds `length` tokens.

        The layer must be at the start.
        """


_numbers = itertools.count()


class SequenceState:
    """The tokens of one sequence that count, and the layers' states. One thread at a time."""

    def __init__(self, layers: Sequence[State], capacity: int) -> None:
        self.number = next(_numbers)
        """Unique in this process; never used again, even when the sequence is gone."""
        self.ids: list[int] = []
        """The tokens that count."""
        self.layers = list(layers)
        self.held = 0
        """How many of `ids` the layers hold.

        All of them, unless the sequence has reached a length with other RoPE frequencies. Then what was held is void,
        and is computed again."""
        self.turned = 0
        """The sequence length whose RoPE frequencies rotated the keys that are held; see `RopeSpec.frequencies`."""
        self.goal = 0
        """The length that the sequence will have when the present call is done; 0 if only each pass's own is known."""
        self.capacity = capacity
        """The most tokens."""
        self.reach = 0
        """Tokens for which memory is counted: the most the sequence ever had, rounded up."""
        self.mark = 0
        """The length at which to take the next snapshot, 0 for none; passes may have to end there, see `span`."""
        self.is_dirty = False
        """Whether a pass is under way, or broke off."""
        self.adapter = 0
        """The number of the adapter that its tokens are computed with, 0 for none; see `use`."""

    def use(self, adapter: int) -> None:
        """Switches to another adapter. The sequence starts afresh, as its state was computed with the old one."""
        if adapter != self.adapter:
            self.rewind(0)
            self.adapter = adapter

    @property
    def needs_snapshots(self) -> bool:
        """Whether some layer cannot go back to every length without a snapshot."""
        return not all(state.can_rewind_anywhere for state in self.layers)

    @property
    def length(self) -> int:
        """The number of tokens that count, which is the position of the next one."""
        return len(self.ids)

    def begin(self, count: int) -> None:
        """Starts a pass over `count` more tokens.

        Raises:
            ValueError: the tokens do not fit the context; or an earlier pass broke off and the layers could not go back
                to where it began, so that tokens are lost. `length` then says how many are left.
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
        """Ends a pass that succeeded: its tokens count from now on."""
        is_passed = self.length < self.mark <= self.length + len(ids)
        self.ids.extend(ids)  # a single step, so that Ctrl-C comes before it or after it
        self.held = len(self.ids)
        self.is_dirty = False
        if is_passed:
            self._snapshot(self.mark)

    def begin_turn(self, prompt: int) -> None:
        """Prepares for a turn of a conversation: its prompt ends at length `prompt`, and a reply follows.

        Layers that cannot go back to every length take a snapshot at the start of the turn and one near the start of
        its reply. So the user can edit the prompt, or ask for another reply, without the whole conversation being
        computed again.
        """
        if self.needs_snapshots:
            self.snapshot()
            self.mark = max(prompt - _REPLY_START, 0)

    def span(self, count: int) -> int:
        """Returns how many of the next `count` tokens a pass may take.

        Some layers can only take a snapshot where a pass ends; then a pass must end at `mark`.
        """
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
        """Goes back to the first `length` tokens, or to as many as all layers can go on from; returns how many."""
        length = self.reaches(length)
        self.is_dirty = True  # until all layers agree
        for state in self.layers:
            state.rewind(length)
        del self.ids[length:]
        self.held = min(self.held, length)
        self.is_dirty = False
        return length

    def snapshot(self) -> None:
        """Keeps what `rewind` needs to come back to the present length, until the sequence goes back further."""
        self._snapshot(self.length)

    def _snapshot(self, length: int) -> None:
        for state in self.layers:
            state.snapshot(length)

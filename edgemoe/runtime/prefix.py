"""Prefixes: the tokens and states of sequences, kept so that a prompt that comes back is not computed again.

They are kept in memory (`edgemoe.runtime.pool`) or on disk (`edgemoe.runtime.prefix_store`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import FormatError
from edgemoe.model import SequenceState
from edgemoe.runtime.model import Model

__all__ = ["LEAST", "Prefix", "covers", "fill", "longest"]

LEAST = 64
"""The fewest tokens that are worth keeping."""
_WORDS = np.dtype("<u4")


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """The tokens of a sequence, and the states of its layers after them."""

    ids: NDArray[np.int64]
    """[n]: the tokens."""
    turned: int
    """The sequence's length for which positions were rotated; see `SequenceState.turned`."""
    adapter: int
    """The number of the adapter that it was computed with; 0 for the model alone."""
    is_whole: bool
    """Whether it can be used with all of its tokens only; see `SequenceState.needs_snapshots`."""
    parts: dict[str, NDArray[np.uint32]]
    """The parts of all layers' states, by LAYER.PART."""

    @classmethod
    def of(cls, state: SequenceState) -> Prefix | None:
        """Returns what a sequence holds; None if a layer's state cannot be taken.

        The arrays are views of the sequence's memory; see `copy`.
        """
        ids = np.array(state.ids, np.int64)
        parts: dict[str, NDArray[np.uint32]] = {}
        if state.held < len(ids):
            return None
        for i, layer in enumerate(state.layers):
            found = layer.parts(len(ids))
            if found is None:
                return None
            parts |= {f"{i}.{j}": part.view(_WORDS) for j, part in enumerate(found)}
        return cls(ids, state.turned, state.adapter, state.needs_snapshots, parts)

    @property
    def size(self) -> int:
        """Its memory in bytes."""
        return self.ids.nbytes + sum(part.nbytes for part in self.parts.values())

    def copy(self) -> Prefix:
        """Returns a prefix with arrays of its own."""
        parts = {name: np.array(part) for name, part in self.parts.items()}
        return replace(self, parts=parts)


class _Known(Protocol):
    """What is known of a prefix without its states; see `Prefix`."""

    @property
    def ids(self) -> NDArray[np.int64]: ...
    @property
    def turned(self) -> int: ...
    @property
    def adapter(self) -> int: ...


_K = TypeVar("_K", bound=_Known)


def covers(model: Model, one: _Known, other: _Known, *, is_whole: bool) -> bool:
    """Returns whether one prefix is as useful as another to every prompt; see `longest`.

    Args:
        model: that both are for.
        one: the prefix that may stand for both.
        other: the prefix that may be redundant.
        is_whole: see `Prefix.is_whole`.
    """
    length = len(other.ids)
    if len(one.ids) < length or (is_whole and len(one.ids) > length):
        return False
    is_alike = one.adapter == other.adapter and model.config.turns_alike(one.turned, other.turned)
    return is_alike and np.array_equal(one.ids[:length], other.ids)


def longest(
    model: Model, state: SequenceState, prefixes: Iterable[_K], tokens: NDArray[np.int32],
    least: int, most: int, adapter: int,
) -> tuple[_K | None, int]:  # fmt: skip
    """Returns the prefix that shares the most tokens with a prompt, and how many it shares.

    Args:
        model: that all are for.
        state: a sequence that would take the prefix.
        prefixes: those to choose from.
        tokens: the prompt, [T].
        least: it must share more tokens than this; otherwise the result is (None, `least`).
        most: how many tokens of the prompt may be reused at most.
        adapter: the number of the adapter that the prompt is computed with.
    """
    found, best = None, least
    for prefix in prefixes:
        if prefix.adapter != adapter:
            continue
        count = _shared(model, state, prefix, tokens[:most], len(tokens))
        if count > best:
            found, best = prefix, count
    return found, best


def _shared(
    model: Model, state: SequenceState, prefix: _Known, tokens: NDArray[np.int32], length: int
) -> int:
    """Returns how many of a prefix's tokens can be used for a prompt, of `length` tokens, that begins with `tokens`.

    That is the length of their common beginning; 0 where the layers cannot go back to it, as recurrent layers go back
    to snapshots only, or where the prompt's length changes the frequencies of RoPE.
    """
    ids = prefix.ids
    if not model.config.turns_alike(prefix.turned, length):
        return 0
    count = min(len(ids), len(tokens))
    differ = np.flatnonzero(ids[:count] != tokens[:count])
    count = int(differ[0]) if len(differ) else count
    return count if count == len(ids) or not state.needs_snapshots else 0


def fill(
    model: Model, state: SequenceState, ids: NDArray[np.int64], turned: int,
    part: Callable[[str], NDArray[np.uint32]], beside: int,
) -> None:  # fmt: skip
    """Puts a prefix into a sequence, one part after another.

    Args:
        model: that the sequence belongs to.
        state: the sequence, which loses what it holds.
        ids: [n]: the prefix's tokens.
        turned: see `Prefix.turned`.
        part: returns a part by its name, LAYER.PART.
        beside: the most bytes that `part` allocates at a time; experts make room for them.

    Raises:
        OutOfBudget: there is no room for them.
        FormatError, KeyError: a part does not fit this sequence. Then the sequence must be rewound to the start before
            it is used again.
    """
    length = len(ids)
    state.rewind(0)
    model.room.reach(state, length)
    model.room.lend(beside)
    state.begin(length)
    for i, layer in enumerate(state.layers):
        for j, target in enumerate(layer.make_parts(length)):
            target, found = target.view(_WORDS), part(f"{i}.{j}")
            if found.shape != target.shape:
                raise FormatError(f"{i}.{j} is of another shape")
            target[...] = found
    state.turned = turned
    state.commit(ids.tolist())
    state.snapshot()

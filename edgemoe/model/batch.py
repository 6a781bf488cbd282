"""Batches: the tokens of one or several sequences that go through the layers together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import Cancelled
from edgemoe.model.state import SequenceState

__all__ = ["Batch", "Slice"]


@dataclass(slots=True)
class Slice:
    """Rows [start, start + count) of a batch: the tokens that come next in one sequence."""

    state: SequenceState
    start: int
    count: int

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + self.count


class Batch:
    """The tokens of one or several sequences, for one forward pass.

    Only mixers look at which sequence a row belongs to. Everything else treats each row by itself.
    """

    def __init__(self, ids: NDArray[np.int32], slices: Sequence[Slice]) -> None:
        """See `of`."""
        self.ids = ids
        """[T] tokens."""
        self.slices = slices
        """The rows of each sequence."""
        self.is_decoding = len(slices) == len(ids)
        """Whether every sequence has exactly one token, as when generating; otherwise the batch has a prompt in it."""
        self.shared: dict[Any, Any] = {}
        """What each mixer keeps for the duration of the pass. Keys are the mixers."""
        self.variant = 0
        """The number of the set of weights that the batch runs with; see `Decoder`."""
        self.adapted = [
            (slice(s.start, s.stop), s.state.adapter) for s in slices if s.state.adapter
        ]
        """For each sequence with an adapter, its rows and the adapter's number."""
        self.is_cancelled: Callable[[], bool] | None = None
        """Returns whether the caller no longer wants the result; asked between layers. None: it is always wanted."""

    @classmethod
    def of(cls, *parts: tuple[SequenceState, NDArray[np.int32]]) -> Batch:
        """Returns a batch with the next tokens of each sequence.

        Args:
            parts: a sequence and its tokens, int32 [n] with n > 0, for each sequence.

        Raises:
            ValueError: a sequence has no tokens, or is given twice.
        """
        if len(parts) == 1:  # most batches
            state, ids = parts[0]
            return cls(ids, (Slice(state, 0, len(ids)),))
        if len({id(state) for state, _ in parts}) < len(parts):
            raise ValueError("batch: expected each sequence once")
        slices, start = [], 0
        for state, ids in parts:
            if len(ids) == 0:
                raise ValueError("batch: expected at least one token of each sequence")
            slices.append(Slice(state, start, len(ids)))
            start += len(ids)
        return cls(np.concatenate([ids for _, ids in parts]).astype(np.int32), slices)

    def __len__(self) -> int:
        """Returns T, the number of tokens."""
        return len(self.ids)

    def check(self) -> None:
        """Raises Cancelled if the caller no longer wants the result."""
        if self.is_cancelled is not None and self.is_cancelled():
            raise Cancelled("the pass was broken off")

    @property
    def positions(self) -> NDArray[np.int64]:
        """The position of each token in its sequence, [T]."""
        first = (np.arange(s.state.held, s.state.held + s.count) for s in self.slices)
        return np.concatenate(list(first))

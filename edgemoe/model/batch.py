"""What goes through the layers together: tokens of one sequence or of several."""

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
        """Returns the row after its last."""
        return self.start + self.count


class Batch:
    """Is tokens of one sequence or of several. All but the mixers treats each row alone, whoever's it is."""

    def __init__(self, ids: NDArray[np.int32], slices: Sequence[Slice]) -> None:
        """See `of`."""
        self.ids = ids
        """[T]"""
        self.slices = slices
        self.is_decoding = len(slices) == len(ids)
        """Whether every sequence has one token, as in replies: else there is a prompt among them."""
        self.shared: dict[Any, Any] = {}
        """What mixers keep for the length of the pass, by mixer."""
        self.variant = 0
        """With which weights, see `Decoder`."""
        self.adapted = [
            (slice(s.start, s.stop), s.state.adapter) for s in slices if s.state.adapter
        ]
        """The rows of each sequence that has an adapter, and its number."""
        self.is_cancelled: Callable[[], bool] | None = None
        """Whether nobody waits for it any more; asked before each layer. None for one that is always wanted."""

    @classmethod
    def of(cls, *parts: tuple[SequenceState, NDArray[np.int32]]) -> Batch:
        """Returns the next tokens of each sequence, at least one of each.

        Raises:
            ValueError: a sequence without tokens, or there twice.
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
        """Returns T."""
        return len(self.ids)

    def check(self) -> None:
        """Raises Cancelled when nobody waits for it any more."""
        if self.is_cancelled is not None and self.is_cancelled():
            raise Cancelled("the pass was broken off")

    @property
    def positions(self) -> NDArray[np.int64]:
        """Returns each token's position in its sequence, [T]."""
        first = (np.arange(s.state.held, s.state.held + s.count) for s in self.slices)
        return np.concatenate(list(first))

"""Scratch arrays for activations, sized for the largest batch; a smaller batch uses their first rows."""

from __future__ import annotations

from typing import Any

from edgemoe.ops import Ops

__all__ = ["Rows", "Scratch"]


class Rows:
    """Arrays [n, …] with the same number of rows, and views of their first rows.

    The last views are cached, as most passes have the same number of tokens.
    """

    def __init__(self, *arrays: Any) -> None:
        self._arrays = arrays
        self._count = -1
        self._views: tuple[Any, ...] = ()

    def first(self, count: int) -> tuple[Any, ...]:
        """Returns views of the first `count` rows of each array."""
        if count != self._count:
            self._views, self._count = self.between(0, count), count
        return self._views

    def between(self, start: int, stop: int) -> tuple[Any, ...]:
        """Returns views of rows [start, stop) of each array."""
        return tuple(array[start:stop] for array in self._arrays)


class Scratch:
    """Scratch arrays of mixers. Mixers with equal widths share theirs, as only one layer runs at a time."""

    def __init__(self, ops: Ops, max_tokens: int) -> None:
        self._ops, self._max_tokens = ops, max_tokens
        self._rows: dict[tuple[int, ...], Rows] = {}

    def rows(self, *widths: int) -> Rows:
        """Returns an array [max tokens, width] for each width. The same widths give the same arrays."""
        if widths not in self._rows:
            self._rows[widths] = Rows(*(self._ops.empty(self._max_tokens, n) for n in widths))
        return self._rows[widths]

"""Scratch of which a pass uses the first rows."""

from __future__ import annotations

from typing import Any

from edgemoe.ops import Ops

__all__ = ["Rows", "Scratch"]


class Rows:
    """Holds arrays [n, …] and lends views of their rows; the last ones are kept, as most passes are alike."""

    def __init__(self, *arrays: Any) -> None:
        self._arrays = arrays
        self._count = -1
        self._views: tuple[Any, ...] = ()

    def first(self, count: int) -> tuple[Any, ...]:
        """Returns the first `count` rows of each."""
        if count != self._count:
            self._views, self._count = self.between(0, count), count
        return self._views

    def between(self, start: int, stop: int) -> tuple[Any, ...]:
        """Returns rows [start, stop) of each."""
        return tuple(array[start:stop] for array in self._arrays)


class Scratch:
    """Makes rows of activations. Mixers of equal widths share them, as one layer runs at a time."""

    def __init__(self, ops: Ops, max_tokens: int) -> None:
        self._ops, self._max_tokens = ops, max_tokens
        self._rows: dict[tuple[int, ...], Rows] = {}

    def rows(self, *widths: int) -> Rows:
        """Returns an array [max tokens, width] for each width: the same ones for the same widths."""
        if widths not in self._rows:
            self._rows[widths] = Rows(*(self._ops.empty(self._max_tokens, n) for n in widths))
        return self._rows[widths]

"""Scratch of which a pass uses the first rows."""

from __future__ import annotations

from typing import Any

__all__ = ["Rows"]


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

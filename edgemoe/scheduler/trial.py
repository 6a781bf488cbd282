"""Timed trials, while the model runs, of which of two ways makes tokens faster."""

from __future__ import annotations

from statistics import median

__all__ = ["Trial"]


class Trial:
    """A comparison of two ways by the seconds that each token takes, in alternating windows of tokens."""

    def __init__(self, window: int, rounds: int) -> None:
        self._window, self._rounds = window, rounds
        self._seconds: tuple[list[float], list[float]] = ([], [])
        self._tokens = 0

    @property
    def is_new(self) -> bool:
        """Whether the next token runs the new way. The old way has the first window."""
        return self._tokens // self._window % 2 == 1

    def add(self, seconds: float) -> bool:
        """Counts a token; returns whether the trial is over."""
        if self._tokens % self._window >= self._window // 4:  # caches adapt with a delay
            self._seconds[self.is_new].append(seconds)
        self._tokens += 1
        return self._tokens >= 2 * self._window * self._rounds

    @property
    def saved(self) -> float:
        """The share of a token's time that the new way saves, by medians; negative if it is slower."""
        old, new = self._seconds
        return 1.0 - median(new) / median(old)

"""Look-ahead: the next layer's experts are guessed from this layer's input and read early, as long as that pays.

After HOBBIT (arXiv 2411.01433, section 3.3), which loads every guess. Here a guess is loaded if guesses of its rank
(its place in the router's order, best first) were right often enough. All look-ahead is switched off while tokens are
faster without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Routing
from edgemoe.scheduler.base import Setting
from edgemoe.scheduler.trial import Trial

__all__ = ["LookAhead"]

_WORTH = 0.5
"""A rank is read ahead while at least this share of its guesses that were not in memory ran (benchmarks/LOG.md)."""
_KEEP = 0.98
"""The factor by which the counts of a rank decay with each token."""
_WARM, _WINDOW, _ROUNDS, _PAUSE = 16, 8, 4, 1000
"""Tokens before the first trial, tokens per window, pairs of windows per trial, and tokens between starts of trials."""
_MARGIN = 0.02
"""The share of a token's time by which tokens must be faster without look-ahead for it to be switched off."""


class LookAhead:
    """The look-ahead of a scheduler, which asks it in each layer while decoding. Exact: it only reads early."""

    def __init__(
        self, setting: Setting, bits: NDArray[np.int8] | None = None, *, trials: bool = True
    ) -> None:
        """Args:
        bits: [num_layers, num_experts], the bits of each expert; None for the setting's.
        trials: time tokens now and then with and without look-ahead, and switch it off if they are faster without.
        """
        L, E, K = setting.num_layers, setting.num_experts, setting.experts_per_token
        self._shape = (L, K)
        self._base = np.arange(0, L * E, E, dtype=np.int32)
        self._bits = np.full(L * E, setting.bits, np.int8) if bits is None else bits.reshape(-1)
        self._start(1)
        self._right, self._seen = np.full(K, 6.0), np.full(K, 8.0)
        self._cut = K  # ranks that are worth reading
        self._last = L - 1
        self._tokens = 0
        self._trials = trials
        self._trial: Trial | None = None
        self.is_on = True

    @property
    def ranks(self) -> int:
        """How many of a token's best guesses are worth reading."""
        return self._cut

    def _start(self, rows: int) -> None:
        """From now on, guesses for `rows` tokens at once, one of each sequence."""
        (L, K), self._rows = self._shape, rows
        self._guess = np.full((L, rows, K), -1, np.int32)  # for each layer, made one layer before
        self._had = np.ones((L, rows, K), np.int8)  # levels of the guessed experts at that time
        self._actual = np.zeros((L, rows, K), np.int32)

    def wishes(
        self, routing: Routing, residency: NDArray[np.int8]
    ) -> tuple[NDArray[np.int32] | None, NDArray[np.int8] | None]:
        """Returns `Plan.ahead` and `Plan.ahead_bits` for a layer's plan: guesses of all tokens, best ranks first."""
        self.note(routing, residency)
        layer = routing.layer
        if routing.ahead_experts is None or layer == self._last:
            return None, None
        guess = routing.ahead_experts[0]
        best = guess[0, : self._cut]
        if len(guess) > 1:
            best = np.array(list(dict.fromkeys(guess[:, : self._cut].T.ravel().tolist())), np.int32)
        wishes = best + self._base[layer + 1]
        return wishes, self._bits.take(wishes)

    def note(self, routing: Routing, residency: NDArray[np.int8]) -> None:
        """Records which experts a layer runs and which are guessed for the next layer, to learn from both."""
        layer, T = routing.layer, len(routing.experts)
        if self._rows != T:
            self._start(T)
        self._actual[layer] = routing.experts
        if routing.ahead_experts is None or layer == self._last:
            return
        guess = routing.ahead_experts[0]
        self._guess[layer + 1] = guess
        self._had[layer + 1] = residency[layer + 1].take(guess)

    def passed(self, tokens: int, seconds: float, sequences: int = 1) -> None:
        """See `Scheduler.passed`. Learns from this pass's guesses, and by trials whether look-ahead makes it faster."""
        if tokens != sequences:
            return
        if self.is_on:
            self._learn()
        self._tokens += 1
        if self._trial is not None:
            if self._trial.add(seconds):
                self.is_on = self._trial.saved >= -_MARGIN
                self._trial = None
            else:
                self.is_on = self._trial.is_new
        elif self._trials and self._tokens % _PAUSE == _WARM:
            self._trial = Trial(_WINDOW, _ROUNDS)
            self.is_on = self._trial.is_new

    def _learn(self) -> None:
        hit = (self._guess[..., None] == self._actual[:, :, None]).any(3)
        absent = self._had == 0
        self._right = self._right * _KEEP + (hit & absent).sum((0, 1))
        self._seen = self._seen * _KEEP + absent.sum((0, 1))
        self._guess[:] = -1
        self._had[:] = 1
        self._cut = self._worth()

    def _worth(self) -> int:
        """Returns how many ranks are worth reading."""
        worth = self._right >= _WORTH * self._seen
        # Each rank is worse than the one before it; a rank whose guesses were all in memory does not matter.
        return int(np.argmin(np.append(worth, False)))

    def state(self) -> dict[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        return {"look_ahead.right": self._right, "look_ahead.seen": self._seen}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        self._right = state.get("look_ahead.right", self._right)
        self._seen = state.get("look_ahead.seen", self._seen)
        self._cut = self._worth()

    def report(self) -> str:
        """Returns how well look-ahead does, in a few words."""
        if not self.is_on and self._trial is None:
            return "look-ahead off: it was slower"
        right, seen = self._right[: self._cut].sum(), self._seen[: self._cut].sum()
        if not self._cut:
            return "look-ahead off: its guesses were wrong"
        return f"look-ahead {right / seen:.0%} right" if seen >= 1 else ""

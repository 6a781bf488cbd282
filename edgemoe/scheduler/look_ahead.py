"""Guesses what the next layer will want from this layer's input, and finds out whether reading it early pays.

After HOBBIT (arXiv 2411.01433, section 3.3). There every guess is loaded. Here a guess is loaded if guesses of its rank
were right often enough, and all of it is switched off when tokens are faster without.
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
"""A rank is loaded ahead when at least this share of its absent experts was wanted (benchmarks/LOG.md)."""
_KEEP = 0.98
"""What the counts of a rank are worth after a token."""
_WARM, _WINDOW, _ROUNDS, _PAUSE = 16, 8, 4, 1000
"""Tokens before the first trial, tokens and pairs of windows of a trial, and tokens from one trial to the next."""
_MARGIN = 0.02
"""By how much tokens must be faster without it to switch it off."""


class LookAhead:
    """Is asked by a scheduler in each layer while decoding; exact, as it only reads early."""

    def __init__(
        self, setting: Setting, bits: NDArray[np.int8] | None = None, *, trials: bool = True
    ) -> None:
        """Args:
        bits: what each expert runs at, [num_layers, num_experts]; None for the setting's.
        trials: find out now and then whether tokens are faster without, and switch it off if so.
        """
        L, E, K = setting.num_layers, setting.num_experts, setting.experts_per_token
        self._shape = (L, K)
        self._base = np.arange(0, L * E, E, dtype=np.int32)
        self._bits = np.full(L * E, setting.bits, np.int8) if bits is None else bits.reshape(-1)
        self._start(1)
        self._right, self._seen = np.full(K, 6.0), np.full(K, 8.0)
        self._cut = K  # ranks that are worth it
        self._last = L - 1
        self._tokens = 0
        self._trials = trials
        self._trial: Trial | None = None
        self.is_on = True

    @property
    def ranks(self) -> int:
        """How many of a token's guesses are worth reading, the best ones."""
        return self._cut

    def _start(self, rows: int) -> None:
        """Guesses for so many tokens at once from now on, one of each sequence."""
        (L, K), self._rows = self._shape, rows
        self._guess = np.full((L, rows, K), -1, np.int32)  # of each layer, made in the layer before
        self._had = np.ones((L, rows, K), np.int8)  # levels of the guesses then
        self._actual = np.zeros((L, rows, K), np.int32)

    def wishes(
        self, routing: Routing, residency: NDArray[np.int8]
    ) -> tuple[NDArray[np.int32] | None, NDArray[np.int8] | None]:
        """Returns `Plan.ahead` and `Plan.ahead_bits` of a layer: best guesses first, those of all tokens in turn."""
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
        """Notes what a layer runs, and what its input says of the next one, to learn from both."""
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
        """See `Scheduler.passed`: learns from the guesses of this pass, and which is faster: with or without."""
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
        """Returns how many ranks are worth it."""
        worth = self._right >= _WORTH * self._seen
        # Ranks get worse one after the other; one that was never absent does not matter.
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
        """Returns how it does, in a few words."""
        if not self.is_on and self._trial is None:
            return "look-ahead off: it was slower"
        right, seen = self._right[: self._cut].sum(), self._seen[: self._cut].sum()
        if not self._cut:
            return "look-ahead off: its guesses were wrong"
        return f"look-ahead {right / seen:.0%} right" if seen >= 1 else ""

"""Predictors that several schedulers share: which experts will run next. Numpy only, learned while running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.plan import Routing

__all__ = ["Frequency", "Logistic", "NextUse", "Turns", "features_first"]

Array = NDArray[np.float64]


_TINY = 1e-9  # a probability that is nothing
_LESSON = 4096
"""Experts to learn five numbers from at once; more of one token would cost more and say hardly more."""


def _decayed(row: Array, experts: NDArray[np.int32], keep: float) -> None:
    """Adds the uses of T tokens, [T, K], to decayed frequencies [E], where each token leaves `keep` of those before."""
    T, K = experts.shape
    weights = (1.0 - keep) * keep ** np.arange(T - 1, -1, -1.0)
    row *= keep**T
    row += np.bincount(experts.reshape(-1), np.repeat(weights, K), len(row))


class Frequency:
    """How often each expert runs, per token, where a use counts half after `half_life` tokens."""

    def __init__(self, values: Array, start: float, half_life: float) -> None:
        """Args:
        values: [num_layers, num_experts], where to keep them.
        start: what it takes for the frequency of every expert before anything is known, above 0.
        """
        values.fill(start)
        self.values = values
        """[num_layers, num_experts]"""
        self._rows = list(self.values)
        self._keep = 0.5 ** (1.0 / half_life)

    def update(self, routing: Routing) -> None:
        """One layer has routed its tokens."""
        row = self._rows[routing.layer]
        if len(routing.experts) == 1:
            _core.decay_uses(row, routing.experts[0], self._keep)
        else:
            _decayed(row, routing.experts, self._keep)


class Logistic:
    """An online logistic regression: the probability that an expert is used is that of the logits weights · features.

    Weights follow by one Newton step per token with all tokens' curvature.
    """

    _CALM, _EVERY = 256, 8  # after so many tokens weights hardly move: learn from every eighth only

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights: Array = np.array(weights)
        """[n]"""
        self.against: Array = -self.weights
        """[n], live: their negatives, for the logarithms of the odds against use."""
        self.curvature: Array | None = None
        """[n, n]; None before anything is learned."""
        self._tokens = 0

    @property
    def is_due(self) -> bool:
        """Counts a token, and says whether to learn from it."""
        due = self.is_next_due
        self._tokens += 1
        return due

    @property
    def is_next_due(self) -> bool:
        """Says whether to learn from the next token."""
        return self._tokens < self._CALM or (self._tokens + 1) % self._EVERY == 0

    def learn(self, x: Array, used: Array) -> None:
        """Learns from features [n, m] and what happened [m], 1.0 for a use."""
        p = 1.0 / (1.0 + np.exp(np.minimum(self.against @ x, 20.0)))
        if self.curvature is None:
            # A prior as heavy as ten uses, in units of each feature's own size: margins differ much between models.
            self.curvature = np.diag(10.0 * np.mean(x * x, axis=1) + 1e-6)
        self.curvature += (x * (p * (1.0 - p))) @ x.T
        self.weights += np.linalg.solve(self.curvature, x @ (used - p))
        np.negative(self.weights, out=self.against)


class Turns:
    """Which layers are learned from: as many at once as have `_LESSON` experts, in turn; of small models all."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._num_layers, self._count = num_layers, max(_LESSON // num_experts, 1)
        self.now = range(min(self._count, num_layers))
        """Those whose turn it is."""

    def take(self) -> slice:
        """Returns them, and it is the next ones' turn."""
        taken = slice(self.now.start, self.now.stop)
        start = taken.stop % self._num_layers
        self.now = range(start, min(start + self._count, self._num_layers))
        return taken


class NextUse:
    """The probability that an expert is used when its layer runs next, by logistic regression, learned on the way.

    Features of an expert, for the token that its layer saw last: whether it was used, the logarithm of its decayed
    frequency, how far its router score lies above the last chosen one's (in logarithms, that is a difference of
    logits), and a moving average of that. Before anything is learned the odds are the frequency's. On the
    traces of benchmarks/LOG.md this was as good after 32 tokens as a fit on another text.
    """

    # Half-lives of 64 and 4 tokens; longer and shorter ones, and all of them, did no better.
    _KEEP, _SHARE = 0.5 ** (1.0 / 64), 1.0 - 0.5 ** (1.0 / 4)

    def __init__(self, num_layers: int, num_experts: int, experts_per_token: int) -> None:
        L, E = num_layers, num_experts
        # Per layer what logarithms are taken of: frequencies and router scores.
        self._raw = np.full((L, 2, E), experts_per_token / E)
        # Rows: one, used, log frequency, margin, its average. Of the last token and of the one before.
        self._now, self._before = np.zeros((2, L, 5, E))
        self._now[:, 0] = 1.0
        self._now[:, 2] = np.log(experts_per_token / E)
        self._raw_rows = list(self._raw)
        self._odds = np.empty(E)
        self.habit = Logistic([0.0, 0.0, 1.0, 0.0, 0.0])
        """Of the features."""
        self._features = _core.UseRows(
            raw=self._raw, now=self._now, before=self._before, odds=self._odds,
            weights=self.habit.against, left=self._KEEP, share=self._SHARE,
        )  # fmt: skip
        self._is_first = self._is_lesson = True
        self._lesson = Turns(L, E)

    def begin(self) -> None:
        """A new sequence starts."""

    def tokens(self, ids: NDArray[np.int32], sequences: int = 1) -> None:
        """See `Scheduler.tokens`."""

    def path(self) -> Array | None:
        """Returns the odds against each expert's use by the token that runs next, [L, E], in logarithms, if known."""
        return None

    def update(self, routing: Routing) -> Array:
        """Takes one layer's routing and returns the odds against each expert's next use, [E]; scratch of one call."""
        layer, experts, scores = routing.layer, routing.experts, routing.scores
        keep = self._is_lesson and layer in self._lesson.now
        if len(experts) == 1 and scores is not None:
            self._features.token(layer, experts, scores, keep)
        else:
            self._features.weigh(layer, *self._several(routing), keep)
        return self._odds

    def _several(self, routing: Routing) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Takes the routing of any number of tokens; returns which experts ran, and those that margins are against."""
        f, s = self._raw_rows[routing.layer]
        several = routing.sequences > 1 and routing.is_decoding
        chosen = np.unique(routing.experts) if several else routing.experts[-1]
        _decayed(f, routing.experts, self._KEEP)
        if routing.scores is None:  # gates alone say nothing about the experts that were not chosen
            s.fill(routing.gates[-1, -1])
            s[routing.experts[-1]] = routing.gates[-1]
        else:
            s[...] = routing.scores.max(0) if several else routing.scores[-1]
        s += _TINY
        return chosen, chosen if several else chosen[-1:]

    def learn(self) -> None:
        """All layers have run: learns from what was said about them one token before."""
        if self._is_first:
            self._is_first = False
        elif self.habit.is_due:
            layers = self._lesson.take()
            self.habit.learn(features_first(self._before[layers]), self._now[layers, 1].reshape(-1))
        self._is_lesson = self.habit.is_next_due

    @property
    def frequency(self) -> Array:
        """Uses per token, decayed, [num_layers, num_experts]; a live view."""
        return self._raw[:, 0]

    def state(self) -> dict[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        curvature = np.zeros((5, 5)) if self.habit.curvature is None else self.habit.curvature
        return {
            "next_use.weights": self.habit.weights,
            "next_use.curvature": curvature,
            "next_use.frequency": self.frequency,
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        if any(name not in state for name in self.state()):
            return
        self.habit.weights[:] = state["next_use.weights"]
        np.negative(self.habit.weights, out=self.habit.against)
        if state["next_use.curvature"].any():
            self.habit.curvature = state["next_use.curvature"].copy()
        self.frequency[:] = state["next_use.frequency"]
        self._now[:, 2] = np.log(np.maximum(self.frequency, _TINY))


def features_first(x: Array) -> Array:
    """Returns features [L, n, E] as [n, L * E]."""
    flat: Array = x.transpose(1, 0, 2).reshape(x.shape[1], -1)
    return flat

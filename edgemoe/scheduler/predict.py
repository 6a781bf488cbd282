"""Predictors of which experts will run next, shared by several schedulers. Numpy only, learned while running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.plan import Routing

__all__ = ["Frequency", "Logistic", "NextUse", "Turns", "features_first"]

Array = NDArray[np.float64]


_TINY = 1e-9  # stands in for a probability of 0
_LESSON = 4096
"""How many experts of one token the five weights are learned from; more would cost more and add hardly anything."""


def _decayed(row: Array, experts: NDArray[np.int32], keep: float) -> None:
    """Adds the uses by T tokens, experts [T, K], to the frequencies in row [E], which each token decays by `keep`."""
    T, K = experts.shape
    weights = (1.0 - keep) * keep ** np.arange(T - 1, -1, -1.0)
    row *= keep**T
    row += np.bincount(experts.reshape(-1), np.repeat(weights, K), len(row))


class Frequency:
    """How often each expert runs, in uses per token, where a use counts half after `half_life` tokens."""

    def __init__(self, values: Array, start: float, half_life: float) -> None:
        """Args:
        values: [num_layers, num_experts], the array that frequencies are kept in; it is overwritten.
        start: the frequency of every expert before anything is known, above 0.
        half_life: in tokens.
        """
        values.fill(start)
        self.values = values
        """[num_layers, num_experts]"""
        self._rows = list(self.values)
        self._keep = 0.5 ** (1.0 / half_life)

    def update(self, routing: Routing) -> None:
        """Counts the experts that one layer has routed its tokens to."""
        row = self._rows[routing.layer]
        if len(routing.experts) == 1:
            _core.decay_uses(row, routing.experts[0], self._keep)
        else:
            _decayed(row, routing.experts, self._keep)


class Logistic:
    """An online logistic regression: the probability that an expert is used is sigmoid(weights · features).

    Each token moves the weights by one Newton step, whose curvature is the sum over all tokens so far.
    """

    _CALM, _EVERY = 256, 8  # after 256 tokens weights hardly move: learn from every eighth only

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights: Array = np.array(weights)
        """[n]"""
        self.against: Array = -self.weights
        """[n], kept up to date: -weights; against · features is the logarithm of the odds against use."""
        self.curvature: Array | None = None
        """[n, n]; None before anything is learned."""
        self._tokens = 0

    def count_token(self) -> bool:
        """Counts a token; returns whether to learn from it."""
        due = self.is_next_due
        self._tokens += 1
        return due

    @property
    def is_next_due(self) -> bool:
        """Whether to learn from the next token."""
        return self._tokens < self._CALM or (self._tokens + 1) % self._EVERY == 0

    def learn(self, x: Array, used: Array) -> None:
        """Learns from the features [n, m] of m experts and from what happened [m]: 1.0 for a use, else 0.0."""
        p = 1.0 / (1.0 + np.exp(np.minimum(self.against @ x, 20.0)))
        if self.curvature is None:
            # A prior with the weight of ten uses, scaled to each feature: margins differ much between models.
            self.curvature = np.diag(10.0 * np.mean(x * x, axis=1) + 1e-6)
        self.curvature += (x * (p * (1.0 - p))) @ x.T
        self.weights += np.linalg.solve(self.curvature, x @ (used - p))
        np.negative(self.weights, out=self.against)


class Turns:
    """The layers that are learned from next: in turn, as many as have about `_LESSON` experts; all in a small model."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._num_layers, self._count = num_layers, max(_LESSON // num_experts, 1)
        self.now = range(min(self._count, num_layers))
        """The layers whose turn it is."""

    def take(self) -> slice:
        """Returns the layers whose turn it is, and moves on to the next ones."""
        taken = slice(self.now.start, self.now.stop)
        start = taken.stop % self._num_layers
        self.now = range(start, min(start + self._count, self._num_layers))
        return taken


class NextUse:
    """The probability that an expert is used when its layer runs next, by a logistic regression learned while running.

    The features of an expert, for the token that its layer saw last, are: a constant 1; whether it was used; the
    logarithm of its decayed frequency; the margin, which is how far its router score lies above that of the last expert
    chosen (a difference of logarithms, so of logits); and a moving average of the margin. Before anything is learned,
    the odds are those of the frequency. On the traces of benchmarks/LOG.md this was as good after 32 tokens as a fit on
    another text.
    """

    # Half-lives of 64 tokens (frequency) and 4 (margin); longer ones, shorter ones and all together did no better.
    _KEEP, _SHARE = 0.5 ** (1.0 / 64), 1.0 - 0.5 ** (1.0 / 4)

    def __init__(self, num_layers: int, num_experts: int, experts_per_token: int) -> None:
        L, E = num_layers, num_experts
        # Per layer the values whose logarithms are features: frequencies and router scores.
        self._raw = np.full((L, 2, E), experts_per_token / E)
        # The five features as rows, for the last token and for the one before: one, used, log frequency, margin, its
        # moving average.
        self._now, self._before = np.zeros((2, L, 5, E))
        self._now[:, 0] = 1.0
        self._now[:, 2] = np.log(experts_per_token / E)
        self._raw_rows = list(self._raw)
        self._odds = np.empty(E)
        self.habit = Logistic([0.0, 0.0, 1.0, 0.0, 0.0])
        """The regression on these five features."""
        self._features = _core.UseRows(
            raw=self._raw, now=self._now, before=self._before, odds=self._odds,
            weights=self.habit.against, left=self._KEEP, share=self._SHARE,
        )  # fmt: skip
        self._is_first = self._is_lesson = True
        self._lesson = Turns(L, E)

    def begin(self) -> None:
        """See `Scheduler.begin`."""

    def tokens(self, ids: NDArray[np.int32], sequences: int = 1) -> None:
        """See `Scheduler.tokens`."""

    def path(self) -> Array | None:
        """Returns the log-odds against each expert's use by the token that runs next, [L, E]; None if not known."""
        return None

    def update(self, routing: Routing) -> Array:
        """Takes one layer's routing and returns the odds against each expert's next use, [E].

        The array is overwritten by the next call.
        """
        layer, experts, scores = routing.layer, routing.experts, routing.scores
        keep = self._is_lesson and layer in self._lesson.now
        if len(experts) == 1 and scores is not None:
            self._features.token(layer, experts, scores, keep)
        else:
            self._features.weigh(layer, *self._several(routing), keep)
        return self._odds

    def _several(self, routing: Routing) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Takes the routing of any number of tokens.

        Returns the experts that ran, and the experts whose scores margins are measured from. Both are those of the
        last token, or of all tokens while several sequences decode.
        """
        f, s = self._raw_rows[routing.layer]
        several = routing.sequences > 1 and routing.is_decoding
        chosen = np.unique(routing.experts) if several else routing.experts[-1]
        _decayed(f, routing.experts, self._KEEP)
        if routing.scores is None:  # gates say nothing about the experts that were not chosen
            s.fill(routing.gates[-1, -1])
            s[routing.experts[-1]] = routing.gates[-1]
        else:
            s[...] = routing.scores.max(0) if several else routing.scores[-1]
        s += _TINY
        return chosen, chosen if several else chosen[-1:]

    def learn(self) -> None:
        """Called after all layers have run. Learns from what was predicted for them one token before."""
        if self._is_first:
            self._is_first = False
        elif self.habit.count_token():
            layers = self._lesson.take()
            self.habit.learn(features_first(self._before[layers]), self._now[layers, 1].reshape(-1))
        self._is_lesson = self.habit.is_next_due

    @property
    def frequency(self) -> Array:
        """[num_layers, num_experts]: decayed uses per token; a live view."""
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
    """Returns features [L, n, E] reordered to [n, L * E]."""
    flat: Array = x.transpose(1, 0, 2).reshape(x.shape[1], -1)
    return flat

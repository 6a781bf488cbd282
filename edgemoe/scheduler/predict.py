"""Predictors that several schedulers share: which experts will run next. Numpy only, learned while running."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.errors import FormatError
from edgemoe.file.tensors import is_finite, view
from edgemoe.plan import Routing

__all__ = ["Frequency", "Logistic", "NextUse", "Transitions", "Turns", "features_first"]

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

    _HALF_LIFE, _AVERAGE = (
        64.0,
        4.0,
    )  # tokens; longer and shorter ones, and all of them, did no better

    def __init__(self, num_layers: int, num_experts: int, experts_per_token: int) -> None:
        L, E = num_layers, num_experts
        self._keep = 0.5 ** (1.0 / self._HALF_LIFE)
        self._decay = 0.5 ** (1.0 / self._AVERAGE)
        # Per layer what logarithms are taken of: frequencies and router scores.
        self._raw = np.full((L, 2, E), experts_per_token / E)
        # Rows: one, used, log frequency, margin, its average. Of the last token and of the one before.
        self._now, self._before = np.zeros((2, L, 5, E))
        self._now[:, 0] = 1.0
        self._now[:, 2] = np.log(experts_per_token / E)
        self._features = _core.UseRows(raw=self._raw, now=self._now, before=self._before)
        self._raw_rows = list(self._raw)
        self._odds = np.empty(E)
        self.habit = Logistic([0.0, 0.0, 1.0, 0.0, 0.0])
        """Of the features."""
        self._against = self.habit.against
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
        odds = self.log_odds(routing)
        _core.raise_odds(odds)
        return odds

    def log_odds(self, routing: Routing, out: Array | None = None) -> Array:
        """As `update`, and returns the logarithms of these odds; in `out` [E], if given."""
        layer, features = routing.layer, self._features
        if self._is_lesson and layer in self._lesson.now:
            features.keep(layer)
        odds = self._odds if out is None else out
        chosen, share = routing.experts[-1], 1.0 - self._decay
        if len(routing.experts) == 1 and routing.scores is not None:
            scores = routing.scores[0]
            features.token(layer, chosen, scores, self._keep, share, self._against, odds)
        else:
            chosen, against = self._several(routing)
            features.weigh(layer, chosen, against, share, self._against, odds)
        return odds

    def _several(self, routing: Routing) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Takes the routing of any number of tokens; returns which experts ran, and those that margins are against."""
        f, s = self._raw_rows[routing.layer]
        several = routing.sequences > 1 and routing.is_decoding
        chosen = np.unique(routing.experts) if several else routing.experts[-1]
        _decayed(f, routing.experts, self._keep)
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


class Transitions:
    """Which experts of the next layer follow those of the layers before it (EdgeMoE III-C-1).

    The paper's table, for one or two experts per token: the key is the sorted experts of the two previous layers, the
    value counts of what ran next; where the key is new, that of one layer. Larger sets hardly ever repeat, so
    for them, and where both keys are new, the answer is the mean over the experts of the two previous layers of what
    followed each; at last it is the layer's own frequencies. These are ours: the paper has one expert per token.
    """

    _MOST_PAIRS = 1 << 27  # half a gigabyte; 48 layers of 512 experts have a tenth
    _LARGEST = 1 << 12  # keys; then the tables of tuples no longer grow

    def __init__(
        self, num_layers: int, num_experts: int, experts_per_token: int, *, depth: int = 2
    ) -> None:
        """Args:
        depth: how many previous layers the mean is over, 1 or 2; there is a table for each.
        """
        L, E = num_layers, num_experts
        if L * E * E > self._MOST_PAIRS:
            raise ValueError(
                f"transitions: {L} layers of {E} experts are {L * E * E} pairs; expected at most {self._MOST_PAIRS}"
            )
        self._num_experts, self._experts_per_token = E, experts_per_token
        self._has_tuples = experts_per_token <= 2
        self._tuples: dict[tuple[int, bytes], NDArray[np.float32]] = {}
        self._pairs = np.zeros((L, E, E), np.float32)
        self._far_pairs = np.zeros((L, E, E), np.float32) if depth > 1 else None  # two layers apart
        self._totals = np.zeros((L, E), np.float32)
        self._uses = np.ones((L, E), np.float32)  # at least 1, to divide by
        self._table = _core.PathTable(
            pairs=self._pairs, far=self._far_pairs, totals=self._totals, uses=self._uses
        )
        self._path: list[NDArray[np.int32]] = []
        self._total = np.empty(E, np.float32)

    def update(self, routing: Routing) -> None:
        """One layer has routed its tokens, of which the last one's path counts."""
        if routing.layer == 0:
            self._path.clear()
        self._path.append(routing.experts[-1].copy())

    def learn(self) -> None:
        """All layers have run: counts the path."""
        if len(self._totals) == len(self._path):  # else it did not begin with the first layer
            self.count(np.array(self._path))

    def count(self, path: NDArray[np.int32]) -> None:
        """Counts the path of a token, int32 [L, K]."""
        self._path = list(path)
        self._table.count(path)
        if self._has_tuples:
            for layer in range(1, len(path)):
                self._count_tuples(layer, path[layer])

    def _count_tuples(self, layer: int, chosen: NDArray[np.int32]) -> None:
        for key in self._keys(layer):
            counts = self._tuples.get(key)
            if counts is None:
                if len(self._tuples) >= self._LARGEST:
                    continue
                counts = self._tuples[key] = np.zeros(self._num_experts, np.float32)
            counts[chosen] += 1.0

    def _keys(self, layer: int) -> Iterator[tuple[int, bytes]]:
        """Yields the path's keys for a layer, the longest first."""
        last = np.sort(self._path[layer - 1]).tobytes()
        if layer > 1:
            yield layer, np.sort(self._path[layer - 2]).tobytes() + last
        yield layer, last

    def predict(self, layer: int) -> NDArray[np.float32]:
        """Returns a score per expert of a layer that follows the one just routed, [E]; larger is likelier.

        It is valid until the next call, and live.
        """
        marginal: NDArray[np.float32] = self._totals[layer]
        if not 0 < layer == len(self._path):
            return marginal
        if self._has_tuples:
            for key in self._keys(layer):
                counts = self._tuples.get(key)
                if counts is not None:
                    return counts
        before = self._path[layer - 2] if self._far_pairs is not None and layer > 1 else None
        is_known = self._table.follow(layer, self._path[layer - 1], before, self._total)
        return self._total if is_known else marginal

    def state(self) -> dict[str, NDArray[Any]]:
        """See `Scheduler.state`.

        A key of the table of tuples is a row: its layer, the experts two layers before, -1 where the key has none, and
        those of one layer before.
        """
        state = {"transitions.pairs": self._pairs, "transitions.totals": self._totals}
        if self._far_pairs is not None:
            state["transitions.far_pairs"] = self._far_pairs
        if self._tuples:
            K = self._experts_per_token
            keys = np.full((len(self._tuples), 1 + 2 * K), -1, np.float32)
            for row, (layer, experts) in zip(keys, self._tuples, strict=True):
                ids = np.frombuffer(experts, np.int32)
                row[0], row[len(row) - len(ids) :] = layer, ids
            state["transitions.keys"] = keys
            state["transitions.followers"] = np.array(list(self._tuples.values()))
        return state

    def take(self, section: bytes) -> None:
        """Takes what `edgemoe profile train --table` has learned: the section "transitions" of a file, safetensors
        of what `state` returns.

        Raises:
            FormatError: damaged, or of another model.
        """
        L, E, K = *self._totals.shape, self._experts_per_token
        try:
            state, _ = view(section)
            n = len(state["transitions.keys"]) if "transitions.keys" in state else 0
        except (ValueError, TypeError):
            raise FormatError("section transitions: not a table of edgemoe") from None
        shapes = {
            "transitions.pairs": (L, E, E), "transitions.far_pairs": (L, E, E), "transitions.totals": (L, E),
            "transitions.keys": (n, 1 + 2 * K), "transitions.followers": (n, E),
        }  # fmt: skip
        for name, shape in shapes.items():
            if n == 0 and len(shape) == 2 and shape[0] == 0:
                continue
            if name not in state or state[name].shape != shape or not is_finite(state[name]):
                raise FormatError(
                    f"section transitions: expected {name} to be {list(shape)} finite numbers; train it again "
                    "for this model"
                )
        self.restore(state)

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        if all(name in state for name in ("transitions.pairs", "transitions.totals")):
            self._pairs[:] = state["transitions.pairs"]
            if self._far_pairs is not None and "transitions.far_pairs" in state:
                self._far_pairs[:] = state["transitions.far_pairs"]
            self._totals[:] = state["transitions.totals"]
            self._uses[:] = np.maximum(self._totals, 1.0)
            self._restore_tuples(state)

    def _restore_tuples(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._tuples.clear()
        keys, counts = state.get("transitions.keys"), state.get("transitions.followers")
        if not self._has_tuples or keys is None or counts is None:
            return
        # What is no key of this model is never asked for.
        ids = np.clip(keys, -1, self._num_experts + len(self._totals)).astype(np.int32)
        for row, followers in zip(ids[: self._LARGEST], counts, strict=False):
            experts = row[1:][row[1:] >= 0]
            self._tuples[int(row[0]), experts.tobytes()] = followers.astype(np.float32)

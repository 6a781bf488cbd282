"""What next-use knows of experts, against the same in numpy, a row at a time."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe import _core
from edgemoe.plan import Routing
from edgemoe.scheduler.predict import NextUse

L, E, K = 3, 40, 4
KEEP, DECAY = 0.5 ** (1 / 64), 0.5 ** (1 / 4)


class Reference:
    """Is `NextUse`'s features and odds for one layer, without learning."""

    def __init__(self):
        self.frequency = np.full(E, K / E)
        self.average = np.zeros(E)

    def log_odds(self, weights, experts, scores, ran, against):
        for token in experts:
            self.frequency *= KEEP
            self.frequency[token] += 1 - KEEP
        used = np.zeros(E)
        used[ran] = 1.0
        logs = np.log(scores.astype(float) + 1e-9)
        margin = logs - logs[against].min()
        self.average += (margin - self.average) * (1 - DECAY)
        rows = np.array([np.ones(E), used, np.log(self.frequency), margin, self.average])
        return -weights @ rows


def routing(rng, layer, tokens, *, sequences=1, has_scores=True):
    scores = rng.dirichlet(np.ones(E), tokens).astype(np.float32)
    experts = np.argsort(-scores, axis=1)[:, :K].astype(np.int32)
    gates = np.take_along_axis(scores, experts, 1)
    return Routing(
        layer, experts, gates, scores=scores if has_scores else None, sequences=sequences
    )


@pytest.mark.parametrize(
    ("tokens", "sequences", "has_scores"),
    [(1, 1, True), (5, 1, True), (3, 3, True), (1, 1, False), (4, 1, False)],
)
def test_odds_are_those_of_the_rows(tokens, sequences, has_scores):
    rng = np.random.default_rng(0)
    model = NextUse(L, E, K)
    model.habit.weights[:] = weights = rng.normal(size=5)
    np.negative(model.habit.weights, out=model.habit.against)
    reference = [Reference() for _ in range(L)]
    for _ in range(20):
        for layer in range(L):
            r = routing(rng, layer, tokens, sequences=sequences, has_scores=has_scores)
            several = sequences > 1
            ran = np.unique(r.experts) if several else r.experts[-1]
            if has_scores:
                scores = r.scores.max(0) if several else r.scores[-1]
            else:
                scores = np.full(E, r.gates[-1, -1])
                scores[r.experts[-1]] = r.gates[-1]
            ref = reference[layer]
            expected = ref.log_odds(
                weights, r.experts, scores, ran, ran if several else r.experts[-1, -1:]
            )
            np.testing.assert_allclose(model.log_odds(r), expected, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(model.frequency[layer], ref.frequency, rtol=1e-12)


def test_odds_against_have_a_bound():
    model = NextUse(L, E, K)
    model.habit.against[:] = [100.0, 0.0, 0.0, 0.0, 0.0]
    assert model.update(routing(np.random.default_rng(0), 0, 1)) == pytest.approx(np.exp(20.0))


def test_it_learns_from_what_it_knew_a_token_before():
    """Also where only some tokens and some layers are lessons, and only their rows are kept."""
    rng = np.random.default_rng(1)
    model = NextUse(2, 4096, 2)  # layers in turn
    seen, lessons = [], []
    model.habit.learn = lambda x, used: lessons.append((x.copy(), used.copy()))
    for token in range(300):
        before = model._now.copy()
        for layer in range(2):
            scores = rng.dirichlet(np.ones(4096), 1).astype(np.float32)
            experts = np.argsort(-scores, axis=1)[:, :2].astype(np.int32)
            model.update(Routing(layer, experts, np.ones((1, 2), np.float32), scores=scores))
        count = len(lessons)
        model.learn()
        if len(lessons) > count:
            seen.append(token)
            layer = count % 2
            np.testing.assert_array_equal(lessons[-1][0], before[layer])
            np.testing.assert_array_equal(lessons[-1][1], model._now[layer, 1])
    assert seen == [*range(1, 257), *range(264, 300, 8)]


def test_rows_refuse_what_they_cannot_index():
    raw, rows = np.zeros((2, 2, 8)), np.zeros((2, 5, 8))
    with pytest.raises(ValueError, match="before: expected shape"):
        _core.UseRows(raw=raw, now=rows, before=rows[:, :4].copy())
    live = _core.UseRows(raw=raw, now=rows, before=rows.copy())
    some, scores = np.array([7], np.int32), np.ones(8, np.float32)
    odds, weights = np.zeros(8), np.zeros(5)
    with pytest.raises(ValueError, match="layer"):
        live.keep(2)
    for bad in ([8], [-1], []):
        with pytest.raises(ValueError, match="chosen"):
            live.token(0, np.array(bad, np.int32), scores, 0.5, 0.5, weights, odds)
    with pytest.raises(ValueError, match="scores"):
        live.token(0, some, scores[:7], 0.5, 0.5, weights, odds)
    with pytest.raises(ValueError, match="against"):
        live.weigh(0, some, np.array([9], np.int32), 0.5, weights, odds)
    with pytest.raises(ValueError, match="odds"):
        live.weigh(0, some, some, 0.5, weights, odds[:7])
    with pytest.raises(TypeError):
        live.weigh(0, some, some, 0.5, weights.astype(np.float32), odds)
    odds.flags.writeable = False
    with pytest.raises(ValueError, match="writ"):
        live.weigh(0, some, some, 0.5, weights, odds)

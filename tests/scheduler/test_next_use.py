"""The next-use predictor agrees with plain numpy, one row at a time."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe import _core
from edgemoe.plan import Routing
from edgemoe.scheduler.predict import NextUse

L, E, K = 3, 40, 4
KEEP, DECAY = 0.5 ** (1 / 64), 0.5 ** (1 / 4)


class Reference:
    """The features and odds of `NextUse` for one layer, without learning."""

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
            odds = np.exp(np.minimum(expected, 20.0))
            np.testing.assert_allclose(model.update(r), odds, rtol=1e-11, atol=1e-300)
            np.testing.assert_allclose(model.frequency[layer], ref.frequency, rtol=1e-12)


@pytest.mark.parametrize("power", [-np.inf, -800.0, -3.5, 0.0, 0.1, 19.9, 20.0, 100.0, np.inf])
def test_odds_against_have_bounds(power):
    model = NextUse(L, E, K)
    model.habit.against[:] = [power, 0.0, 0.0, 0.0, 0.0]
    odds = model.update(routing(np.random.default_rng(0), 0, 1))
    np.testing.assert_allclose(odds, np.exp(np.clip(power, -700, 20)), rtol=1e-13)


def test_odds_are_mixed_with_those_of_a_text():
    rng = np.random.default_rng(0)
    plain, mixed = NextUse(L, E, K), NextUse(L, E, K)
    for model in (plain, mixed):
        model.habit.against[:] = [-0.3, 0.5, -0.9, 0.2, -0.1]
    habit, text = np.zeros((L, E)), rng.normal(size=(L, E)).astype(np.float32)
    weights = np.array([0.2, -0.4, 0.6])
    mixed._features.mix(habit=habit, text=text, weights=weights)
    for layer in range(L):
        for tokens in (1, 3):
            r = routing(rng, layer, tokens)
            logs = np.log(plain.update(r))
            expected = np.exp(weights @ [np.ones(E), logs, text[layer]])
            np.testing.assert_allclose(mixed.update(r), expected, rtol=1e-11)
            np.testing.assert_allclose(habit[layer], logs, rtol=1e-11, atol=1e-13)
    for name in ("habit", "text"):
        given = {"habit": habit, "text": text, name: {"habit": habit, "text": text}[name][:1]}
        with pytest.raises(ValueError, match=name):
            mixed._features.mix(**given, weights=weights)


def test_it_learns_from_what_it_knew_a_token_before():
    """Also if it learns only from some tokens and layers, and keeps only their rows."""
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
    odds, weights = np.zeros(8), np.zeros(5)
    given = {"raw": raw, "now": rows, "before": rows.copy(), "odds": odds, "weights": weights}
    rest = {"left": 0.5, "share": 0.5}
    for name, wrong in [
        ("before", rows[:, :4].copy()), ("odds", odds[:7]), ("weights", weights[:4]),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            _core.UseRows(**{**given, name: wrong}, **rest)
    with pytest.raises(TypeError):
        _core.UseRows(**{**given, "weights": weights.astype(np.float32)}, **rest)
    live = _core.UseRows(**given, **rest)
    some, scores = np.array([[7]], np.int32), np.ones((1, 8), np.float32)
    for layer in (-1, 2):
        with pytest.raises(ValueError, match="layer"):
            live.token(layer, some, scores, False)
    for bad in ([[8]], [[-1]], [[]], [[1], [2]]):
        with pytest.raises(ValueError, match="chosen"):
            live.token(0, np.array(bad, np.int32), scores, False)
    with pytest.raises(ValueError, match="scores"):
        live.token(0, some, scores[:, :7].copy(), False)
    with pytest.raises(ValueError, match="against"):
        live.weigh(0, some[0], np.array([9], np.int32), False)
    odds.flags.writeable = False
    with pytest.raises(ValueError, match="writ"):
        _core.UseRows(**given, **rest)

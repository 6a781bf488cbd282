"""Routing metrics agree with examples worked by hand, and with brute force on small cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from edgemoe.lab.routing.metrics import (
    RULES,
    entropy,
    hit_rate,
    merged,
    segment_counts,
    share_of_hottest,
    shuffled,
    srp,
    srp_interval,
)


def column(*experts):
    """Returns the routing of one layer with one expert per token."""
    return np.array(experts).reshape(-1, 1, 1)


def routing(seed, T, L, E, K):
    """Returns a random routing with locality: half of the time a token keeps the experts of the one before."""
    rng = np.random.default_rng(seed)
    out = np.empty((T, L, K), np.int64)
    for t, layer in itertools.product(range(T), range(L)):
        keep = t > 0 and rng.random() < 0.5
        out[t, layer] = out[t - 1, layer] if keep else rng.permutation(E)[:K]
    return out


def test_srp_of_an_example_worked_by_hand():
    # Expert 0 is active at 0, 1 and 4; windows of two hold 2 1 0 1 uses: predicting "on" from
    # one use on: match 4, predicted 6, active 4, F1 0.8; from two on: match 2, predicted 2, F1 2/3.
    counts = segment_counts(column(0, 0, 1, 1, 0), 2, window=2)
    assert counts.counts[0, 0].tolist() == [[1, 2, 1], [1, 2, 1]]
    one = srp(counts, layer=0, expert=0)
    assert (one.f1, one.size, one.threshold) == (pytest.approx(0.8), pytest.approx(1.5), 1)
    # Both experts have the same SRP here, and so has the layer; a perfect block has SRP 1.
    assert srp(counts, layer=0).f1 == pytest.approx(0.8)
    still = segment_counts(column(3, 3, 3, 3), 4, window=2)
    assert (srp(still).f1, srp(still).size, srp(still).threshold) == (1, 1, 1)
    assert math.isnan(srp(still, layer=0, expert=0).f1)
    with pytest.raises(ValueError, match="does not fit"):
        segment_counts(column(1, 2), 4, window=3)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_srp_equals_brute_force(window):
    experts, E, sample = routing(1, 50, 2, 5, 2), 5, 20

    def best(layers, indices):
        values = []
        for a in range(window + 1):
            match = predicted = active = 0
            for start in (0, 20, 40):
                part = experts[start : start + sample]
                for at, layer, e in itertools.product(
                    range(len(part) - window + 1), layers, indices
                ):
                    c = int((part[at : at + window, layer] == e).sum())
                    active += c
                    match += c * (c >= a)
                    predicted += window * (c >= a)
            values.append((2 * match / (predicted + active), predicted / active))
        return max(values, key=lambda v: v[0])

    counts = segment_counts(experts, E, window=window, sample=sample)
    for got, layers, indices in [
        (srp(counts, layer=1, expert=2), [1], [2]),
        (srp(counts, layer=0), [0], range(E)),
        (srp(counts), [0, 1], range(E)),
    ]:
        f1, size = best(layers, indices)
        assert got.f1 == pytest.approx(f1)
        assert got.size == pytest.approx(size)


def test_the_interval_holds_the_value_and_repeats():
    counts = segment_counts(routing(2, 400, 2, 8, 2), 8, window=4, sample=40)
    low, high = srp_interval(counts)
    assert low < srp(counts).f1 < high
    assert high - low < 0.2
    assert srp_interval(counts) == (low, high)
    alone = segment_counts(routing(2, 40, 2, 8, 2), 8, window=4)
    assert srp_interval(alone) == pytest.approx((srp(alone).f1,) * 2)


def slow_hits(tokens, slots, rule, window):
    """Returns the hits by the definition, step by step, from nothing but past and future tokens."""
    here, hits, clock, last, order = set(), 0, 0, {}, []
    for t, now in enumerate(tokens):
        hits += sum(e in here for e in now)
        for k, e in enumerate(now):
            if e not in here and len(here) == slots:

                def worth(x, t=t, k=k):
                    # This token's experts that are not in the cache yet are still to come.
                    left = [*([tokens[t][k:]]), *tokens[t + 1 :]]
                    uses = [i for i, token in enumerate(left) if x in token]
                    if rule == "lru":
                        return last.get(x, 0)
                    if rule == "lfu":
                        return (order.count(x), last.get(x, 0))
                    if rule == "sch":
                        # The window advances after the expert's own use in this token, or after the token.
                        return (
                            sum(i < window for i in uses),
                            last.get(x, 0),
                        )
                    return (-(uses[0] if uses else len(tokens) - t), last.get(x, 0))

                here.remove(min(here, key=worth))
            here.add(e)
            clock += 1
            last[e] = clock
            order.append(e)
    return hits


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("E", "K", "slots"), [(6, 1, 1), (6, 1, 3), (8, 2, 2), (8, 3, 5), (4, 2, 4)]
)
def test_hit_rates_equal_the_definition(rule, E, K, slots):
    experts = routing(E * 10 + K, 60, 2, E, K)
    got = hit_rate(experts, E, slots, rule, window=4)
    expected = [
        slow_hits(experts[:, layer].tolist(), slots, rule, 4) / (60 * K) for layer in range(2)
    ]
    assert got.tolist() == pytest.approx(expected)


def test_sch_counts_the_next_tokens_and_breaks_ties_by_age():
    # At the third token, 0 and 1 are both used once in the next 3 tokens: 0, the older one, goes.
    assert hit_rate(column(0, 1, 2, 1, 0), 3, 2, "sch", window=3)[0] == 1 / 5
    # With a window of 2 only the use of expert 1 is in sight: 0 goes again.
    assert hit_rate(column(0, 1, 2, 1, 0), 3, 2, "sch", window=2)[0] == 1 / 5
    # LRU drops 0 as well. Here the future helps: 0 comes twice more, and 1 never again.
    assert hit_rate(column(0, 1, 2, 0, 0), 3, 2, "sch", window=3)[0] == 2 / 5
    assert hit_rate(column(0, 1, 2, 0, 0), 3, 2, "lru")[0] == 1 / 5


def test_no_choice_of_victims_beats_belady():
    rng = np.random.default_rng(5)
    for _ in range(20):
        tokens = rng.integers(0, 4, 9).tolist()

        def best(t, here, tokens=tokens, slots=2):
            if t == len(tokens):
                return 0
            e = tokens[t]
            if e in here or len(here) < slots:
                return (e in here) + best(t + 1, here | {e})
            return max(best(t + 1, (here - {x}) | {e}) for x in here)

        hits = round(9 * hit_rate(column(*tokens), 4, 2, "belady")[0])
        assert hits == best(0, frozenset())
        for rule in RULES:
            assert hit_rate(column(*tokens), 4, 2, rule)[0] * 9 <= hits + 1e-9


def test_a_pool_of_all_layers_and_the_shuffled_control():
    experts = routing(3, 300, 3, 6, 2)
    pool = merged(experts, 6)
    assert pool.shape == (300, 1, 6)
    assert sorted(pool[7, 0].tolist()) == sorted(
        int(e) + 6 * layer for layer in range(3) for e in experts[7, layer]
    )
    assert hit_rate(pool, 18, 18, "lru")[0] == pytest.approx(
        1 - 18 / (300 * 6)
    )  # misses only at the start
    local = hit_rate(pool, 18, 9, "lru")[0]
    control = hit_rate(merged(shuffled(experts), 6), 18, 9, "lru")[0]
    assert local > control + 0.05  # this routing has locality, and the control has none
    with pytest.raises(ValueError, match="fewer"):
        hit_rate(experts, 6, 1, "lru")


def test_usage_summaries():
    assert entropy(np.array([5, 5, 5, 5])) == pytest.approx(1)
    assert entropy(np.array([7, 0, 0])) == 0
    assert entropy(np.array([1, 1, 0, 0])) == pytest.approx(0.5)
    assert math.isnan(entropy(np.array([3])))
    assert share_of_hottest(np.array([1, 6, 2, 1]), [0.25, 0.5, 1]) == pytest.approx([0.6, 0.8, 1])

"""Schedulers: plans follow the papers' formulas and examples, every plan is valid, and exact ones are exact."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from engines import with_slots
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

import edgemoe
from edgemoe.errors import FormatError
from edgemoe.plan import Plan, Priorities, Routing
from edgemoe.quant import Allocation, BitRouters
from edgemoe.scheduler import KINDS, SCHEDULERS, Setting
from edgemoe.scheduler.auto import Auto
from edgemoe.scheduler.combined import Combined
from edgemoe.scheduler.d2moe import D2moe
from edgemoe.scheduler.evict import HobbitWeights, make_eviction
from edgemoe.scheduler.expertwise import Expertwise
from edgemoe.scheduler.hobbit import Hobbit, fit_thresholds, unimportance
from edgemoe.scheduler.levers import small_gates
from edgemoe.scheduler.mc import Mc
from edgemoe.scheduler.on_demand import OnDemand
from edgemoe.scheduler.plans import keep_slots, plan_slots, slot_bits
from edgemoe.scheduler.predict import NextUse, Turns
from edgemoe.scheduler.transitions import Transitions
from edgemoe.scheduler.trial import Trial
from edgemoe.store import ExpertStore

LEVELS = (2, 3, 4, 6, 8)
LOSSY = {"hobbit", "d2moe", "mc"}


def setting(*, layers=3, experts=4, top_k=2, bits=8, slots=6, sections=None):
    levels = tuple(b for b in LEVELS if b <= bits)
    return Setting(
        num_layers=layers, num_experts=experts, experts_per_token=top_k, bits=bits, level_bits=levels,
        level_bytes=tuple(b * 4096 for b in levels), slots_bytes=slots * bits * 4096,
        sections=sections or {},
    )  # fmt: skip


def routing(experts, gates, layer=0, *, scores=None, ahead=None):
    extra = {}
    if ahead is not None:
        extra = {
            "ahead_experts": np.array(ahead[0], np.int32)[:, None],
            "ahead_gates": np.array(ahead[1], np.float32)[:, None],
        }
    if scores is not None:
        extra["scores"] = np.atleast_2d(np.array(scores, np.float32))
    return Routing(
        layer, np.atleast_2d(np.array(experts, np.int32)), np.atleast_2d(np.array(gates, np.float32)),
        **extra,
    )  # fmt: skip


def scored(p: Priorities):
    return p.scores * p.scale[:, None] + p.shift[:, None]


def residency(layers=3, experts=4, **levels):
    """Returns a residency; residency(e1_0=5) has expert 0 of layer 1 at level 5."""
    out = np.zeros((layers, experts), np.int8)
    for name, level in levels.items():
        layer, expert = map(int, name[1:].split("_"))
        out[layer, expert] = level
    return out


def check_lawful(plan: Plan, r: Routing, level_bits, *, exact: bool, layers: int) -> None:
    """Checks that every routed slot is in the plan once, or skipped, and that the plan keeps its contract."""
    T, K = r.experts.shape
    n, m, E = len(plan.experts), len(plan.tokens), 1 << 16
    assert plan.layer == r.layer
    assert plan.rows.shape == plan.gates.shape == (T, K)
    assert len(plan.bits) == n
    assert len(plan.offsets) == n + 1
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == m
    assert (np.diff(plan.offsets) > 0).all()
    assert set(plan.bits.tolist()) <= set(level_bits)
    used = plan.rows[plan.rows >= 0]
    assert sorted(used.tolist()) == list(range(m))
    of_row = np.repeat(plan.experts, np.diff(plan.offsets))
    for t in range(T):
        for k in range(K):
            row = plan.rows[t, k]
            if row >= 0:
                assert plan.tokens[row] == t
                assert of_row[row] == r.experts[t, k]
    last: dict[int, int] = {}
    for e, b in zip(plan.experts.tolist(), plan.bits.tolist(), strict=True):
        assert b > last.get(e, 0), "an expert comes again only at more bits"
        last[e] = b
    if exact:
        assert (plan.rows >= 0).all()
        assert (plan.bits == level_bits[-1]).all()
        np.testing.assert_array_equal(plan.gates, r.gates)
    for ids, bits, zero in (
        (plan.ahead, plan.ahead_bits, False),
        (plan.drop, plan.drop_bits, True),
    ):
        assert (ids is None) == (bits is None)
        if ids is not None:
            assert len(ids) == len(bits)
            assert set(bits.tolist()) <= {*level_bits, *([0] * zero)}
            assert ((ids >= 0) & (ids < layers * E)).all()
            assert len(set(ids.tolist())) == len(ids)


def random_routing(rng, layer, T, E, K, ahead, sequences=1):
    logits = rng.normal(0, 2, (T, E))
    scores = np.exp(logits)
    scores /= scores.sum(1, keepdims=True)
    order = np.argsort(-scores, axis=1)[:, :K].astype(np.int32)
    gates = np.take_along_axis(scores, order, 1).astype(np.float32)
    r = Routing(layer, order, gates, scores=scores.astype(np.float32), sequences=sequences)
    if ahead and r.is_decoding:
        r.ahead_experts, r.ahead_gates = order[None].repeat(ahead, 0), gates[None].repeat(ahead, 0)
    return r


CASES = [
    *((name, {}) for name in KINDS),
    *(("on-demand", {"eviction": e}) for e in ("lru", "next-use", "frequency-distance", "hobbit")),
    ("on-demand", {"look_ahead": False}),
    ("on-demand", {"cache_prior": 0.5, "protect": 1}),
    ("on-demand", {"cache_prior": 0.5, "admit": True, "look_ahead": False}),
    ("on-demand", {"top_p": 0.6}),
    ("on-demand", {"skip_below": 0.5, "renormalise": True}),
    ("on-demand", {"miss_bits": 3}),
    ("on-demand", {"miss_bits": 3, "look_ahead": False}),
    ("hobbit", {"t1": 0.3, "t2": 0.6, "strict": False, "renormalise": True, "look_ahead": 3}),
    ("hobbit", {"cache_prior": 0.5, "skip_below": 0.2, "miss_bits": 2}),
    ("d2moe", {"hottest_first": False, "frees": "always", "levels": 2}),
    ("auto", {"lossy": True, "window": 4, "rounds": 1}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_every_plan_is_lawful(name, options, data):
    L, E = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 9))
    K = data.draw(st.integers(1, E))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    s = setting(layers=L, experts=E, top_k=K, slots=max(K, L * E // 2))
    scheduler = SCHEDULERS[name](s, **options)
    scheduler.begin()
    exact = not scheduler.notes
    for _ in range(8):
        T = int(rng.integers(1, 5)) if rng.random() < 0.5 else 1
        sequences = T if rng.random() < 0.5 else 1  # tokens of replies, or a prompt
        scheduler.tokens(rng.integers(0, 99, T).astype(np.int32), sequences)
        for layer in range(L):
            here = rng.integers(0, len(LEVELS) + 1, (L, E)).astype(np.int8)
            p = min(scheduler.look_ahead, L - 1 - layer)
            r = random_routing(rng, layer, T, E, K, p, sequences)
            before = here.copy()
            plan = scheduler.plan(r, here)
            if options.get("cache_prior") and r.is_decoding:
                of_row = np.repeat(plan.experts, np.diff(plan.offsets))
                for row, best in zip(plan.rows, r.experts[:, 0], strict=True):
                    chosen = of_row[row[row >= 0]].tolist()  # the plan's own choice of experts
                    assert len(set(chosen)) == len(chosen)
                    assert row[0] < 0 or best in chosen
            else:
                check_lawful(plan, r, LEVELS, exact=exact, layers=L)
            np.testing.assert_array_equal(here, before)
            assert plan.ahead is None or scheduler.reads_ahead
            if isinstance(scheduler.policy, Priorities):
                assert scored(scheduler.policy).shape == (L, E)
                assert np.isfinite(scored(scheduler.policy)).all()
        scheduler.passed(T, float(rng.random()), sequences)
    assert isinstance(scheduler.report(), str)


def test_only_schedulers_that_are_lossy_say_so():
    for name in KINDS:
        notes = SCHEDULERS[name](setting()).notes
        assert bool(notes) == (name in LOSSY)
        assert all(line.startswith("lossy: ") for line in notes)


# --- plans


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32), st.booleans(), st.booleans()
)  # fmt: skip
def test_plan_slots_holds_every_slot_at_its_bits(T, E, seed, hottest_first, skips):
    rng = np.random.default_rng(seed)
    K = int(rng.integers(1, E + 1))
    r = random_routing(rng, 1, T, E, K, 0)
    bits = rng.choice([*([0] if skips else []), 2, 4, 8], (T, K)).astype(np.int8)
    has = rng.choice([0, 2, 8], E).astype(np.int8)
    plan = plan_slots(r, bits, hottest_first=hottest_first, resident_bits=has)
    check_lawful(plan, r, LEVELS, exact=False, layers=2)
    np.testing.assert_array_equal(slot_bits(plan), bits)
    keep = rng.random((T, K)) < 0.6
    kept = keep_slots(plan, keep, r.gates)
    check_lawful(kept, r, LEVELS, exact=False, layers=2)
    np.testing.assert_array_equal(slot_bits(kept), np.where(keep, bits, 0))
    order = list(zip(plan.experts.tolist(), plan.bits.tolist(), strict=True))
    assert [o for o in order if o in set(zip(kept.experts.tolist(), kept.bits.tolist(), strict=True))] == list(
        zip(kept.experts.tolist(), kept.bits.tolist(), strict=True)
    )  # fmt: skip


# --- HOBBIT


def test_hobbit_scores_are_sums_of_better_gates():
    np.testing.assert_allclose(
        unimportance(np.array([[0.5, 0.3, 0.2], [2.0, 1.0, 1.0]], np.float32)),
        [[0, 0.5, 0.8], [0, 0.5, 0.75]],
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("top", "second"), [(0.55, 8), (0.599, 8), (0.61, 4), (0.899, 4), (0.91, 0), (0.99, 0)]
)
def test_hobbit_of_two_experts_is_the_rule_on_the_first_gate(top, second):
    plan = Hobbit(setting()).plan(routing([2, 0], [top, 1 - top]), residency())
    assert slot_bits(plan).tolist() == [[8, second]]


@pytest.mark.parametrize(
    ("level", "score", "bits"),
    [
        (5, 0.95, 8),  # resident at high bits: runs so, whatever its score
        (3, 0.95, 4),  # resident at low bits, would be skipped: runs as it is
        (3, 0.7, 4),  # low is asked for and resident
        (3, 0.5, 8),  # high is asked for: low is not enough
        (4, 0.7, 6),  # more than low is resident: that serves a request for low
        (1, 0.7, 4),  # less than low is not enough
    ],
)
def test_hobbit_scores_only_misses(level, score, bits):
    plan = Hobbit(setting()).plan(routing([2, 0], [score, 1 - score]), residency(e0_0=level))
    assert slot_bits(plan)[0, 1] == bits


def test_hobbit_without_strict_uses_low_bits_for_high_requests():
    plan = Hobbit(setting(), strict=False).plan(routing([2, 0], [0.5, 0.5]), residency(e0_0=3))
    assert slot_bits(plan).tolist() == [[8, 4]]


def test_hobbit_keeps_gates_unless_told():
    r = routing([2, 0], [0.95, 0.05])
    assert Hobbit(setting()).plan(r, residency()).gates.tolist() == r.gates.tolist()
    gates = Hobbit(setting(), renormalise=True).plan(r, residency()).gates
    assert gates[0, 0] == pytest.approx(1.0)


def test_hobbit_reads_an_expert_of_a_prompt_once_at_what_its_best_token_needs():
    r = routing([[0, 1], [1, 2], [0, 2]], [[0.7, 0.3], [0.8, 0.2], [0.95, 0.05]])
    plan = Hobbit(setting()).plan(r, residency())
    # Expert 1 is token 1's best, expert 2 scores 0.8 and 0.95: low for one of them, so low for both.
    assert dict(zip(plan.experts.tolist(), plan.bits.tolist(), strict=True)) == {0: 8, 1: 8, 2: 4}


def test_hobbit_looks_ahead_up_to_the_first_layer_with_a_miss():
    ahead = ([[0, 1], [2, 3]], [[0.7, 0.3], [0.7, 0.3]])
    h = Hobbit(setting(), look_ahead=2)
    all_here = residency(e1_0=5, e1_1=5)
    plan = h.plan(routing([0, 1], [0.5, 0.5], ahead=ahead), all_here)
    assert plan.ahead.tolist() == [4, 5, 10, 11]  # layer 1 is resident, and kept; layer 2 is read
    assert plan.ahead_bits.tolist() == [8, 8, 8, 4]
    plan = h.plan(routing([0, 1], [0.5, 0.5], ahead=ahead), residency(e1_0=5))
    assert plan.ahead.tolist() == [4, 5]
    plain = Hobbit(setting(), look_ahead=2, mixed_ahead=False)
    plan = plain.plan(routing([0, 1], [0.5, 0.5], ahead=ahead), residency(e1_0=5))
    assert plan.ahead_bits.tolist() == [8, 8]


def test_hobbit_fits_thresholds_to_shares_of_scores():
    rng = np.random.default_rng(0)
    scores = rng.random(10_000).astype(np.float32)
    t1, t2 = fit_thresholds(scores, low=0.30, skip=0.03)
    assert np.mean(scores > t2) == pytest.approx(0.03, abs=2e-3)
    assert np.mean((scores > t1) & (scores <= t2)) == pytest.approx(0.30, abs=2e-3)
    h = Hobbit(setting(layers=1, experts=8, top_k=4))
    for _ in range(40):
        h.plan(random_routing(rng, 0, 1, 8, 4, 0), residency(1, 8))
        h.passed(1, 0.1)
    assert (h.t1, h.t2) != (0.6, 0.9)
    assert 0 < h.t1 < h.t2 < 1


def test_hobbit_goes_on_with_thresholds_that_a_profile_has():
    rng = np.random.default_rng(0)

    def ran(h, tokens):
        for _ in range(tokens):
            h.plan(random_routing(rng, 0, 1, 8, 4, 0), residency(1, 8))
            h.passed(1, 0.1)
        return h

    s = setting(layers=1, experts=8, top_k=4)
    assert "hobbit.thresholds" not in ran(Hobbit(s), 15).state()  # nothing is fitted yet
    first = ran(Hobbit(s), 40)
    second = Hobbit(s)
    second.restore(first.state())
    fitted = first.t1, first.t2
    assert (second.t1, second.t2) == fitted
    assert (ran(second, 31).t1, second.t2) == fitted  # rests on fewer tokens than what it has
    assert ran(second, 1).t1 != fitted[0]
    last = ran(Hobbit(s), 520)
    third = Hobbit(s)
    third.restore(last.state())
    assert (ran(third, 600).t1, third.t2) == (last.t1, last.t2)
    for options in ({"low": 0.2}, {"t1": 0.5, "t2": 0.8}):
        other = Hobbit(s, **options)
        before = other.t1, other.t2
        other.restore(last.state())
        assert (other.t1, other.t2) == before


def test_hobbit_priority_is_the_four_terms():
    s = setting(layers=4, experts=2, top_k=1)
    w = HobbitWeights(0.4, 0.3, 0.2, 0.1)
    e = make_eviction("hobbit", s, w)
    e.begin()
    uses = [(0, 0, 8), (1, 1, 4), (2, 0, 8), (3, 1, 8)], [(0, 1, 8), (1, 1, 8), (2, 0, 4)]
    last, count, high = Counter(), Counter(), Counter()
    for t, token in enumerate(uses, 1):
        for layer, expert, bits in token:
            r = routing([expert], [1.0], layer)
            e.planned(r, plan_slots(r, np.array([[bits]], np.int8)))
            last[layer, expert] = t
            count[layer, expert] += 1
            high[layer, expert] += bits == 8
    T, now = 2, 2
    for layer in range(4):
        for expert in range(2):
            k = layer, expert
            distance = 1 - ((layer - now + 4) % 4) / 4
            want = (0.4 * last[k] + 0.3 * count[k] + 0.2 * high[k]) / T + 0.1 * distance
            assert scored(e.priorities)[layer, expert] / T == pytest.approx(want)
    e.begin()
    r = routing([0], [1.0], 0)
    e.planned(r, plan_slots(r, np.array([[8]], np.int8)))
    assert scored(e.priorities)[1, 0] == pytest.approx(
        0.1 * (1 - 1 / 4)
    )  # records are of one sequence


def test_hobbit_weights_must_sum_to_one():
    with pytest.raises(ValueError, match="expected a sum of 1"):
        SCHEDULERS["hobbit"](setting(), w_recency="0.9")


# --- EdgeMoE


def test_frequency_over_distance_keeps_what_runs_soon():
    s = setting(layers=3, experts=2, top_k=1)
    e = make_eviction("frequency-distance", s, HobbitWeights())
    for _ in range(50):
        for layer in range(3):
            r = routing([0], [1.0], layer)
            e.planned(r, plan_slots(r, np.array([[8]], np.int8)))
    r = routing([0], [1.0], 0)
    e.planned(r, plan_slots(r, np.array([[8]], np.int8)))
    p = scored(e.priorities)
    # With equal frequencies the next layer stays longest, and the one that just ran goes first (distance 3, not 0).
    assert p[1, 0] > p[2, 0] > p[0, 0]
    assert p[1, 0] / p[2, 0] == pytest.approx(2, rel=1e-2)
    assert p[0, 1] < p[0, 0]  # never used


def test_transitions_prefer_the_path_and_fall_back():
    t = Transitions(3, 4, 1)

    def walk(*path):
        for layer, experts in enumerate(path):
            t.update(routing(experts, [0.5] * len(experts), layer))
        t.learn()

    for _ in range(3):
        walk([0], [1], [2])
        walk([3], [1], [0])
    t.update(routing([0], [1.0], 0))
    t.update(routing([1], [1.0], 1))
    assert t.predict(2).argmax() == 2  # by the last two layers
    t.update(routing([2], [1.0], 0))
    t.update(routing([1], [1.0], 1))
    assert t.predict(2).tolist() == [3, 0, 3, 0]  # the pair is new: by the last layer
    t.update(routing([2], [1.0], 0))
    t.update(routing([3], [1.0], 1))
    assert t.predict(2).tolist() == t._totals[2].tolist()  # both are new: by frequency
    # Tuples do not depend on the order of gates.
    t = Transitions(2, 4, 2)
    walk([0, 1], [2, 3])
    t.update(routing([1, 0], [0.6, 0.4], 0))
    assert t.predict(1).tolist() == [0, 0, 1, 1]


def test_transitions_of_many_experts_are_means_over_two_layers():
    one, two = (Transitions(3, 6, 3, depth=depth) for depth in (1, 2))
    for t in (one, two):
        for first, last in (([0, 1, 2], [0, 1, 2]), ([3, 4, 5], [3, 4, 5])):
            for layer, experts in enumerate((first, [0, 1, 2], last)):
                t.update(routing(experts, [0.4, 0.3, 0.3], layer))
            t.learn()
        t.update(routing([0, 1, 4], [0.4, 0.3, 0.3], 0))
        t.update(routing([0, 1, 3], [0.4, 0.3, 0.3], 1))
    # Experts 0 and 1 of layer 1 preceded both triples; in layer 0, two of three preceded the first one.
    np.testing.assert_allclose(one.predict(2), [1] * 6)
    np.testing.assert_allclose(two.predict(2), [3, 3, 3, 2, 2, 2])
    fresh = Transitions(3, 6, 3)
    fresh.restore(two.state())
    fresh.update(routing([0, 1, 4], [0.4, 0.3, 0.3], 0))
    fresh.update(routing([0, 1, 3], [0.4, 0.3, 0.3], 1))
    np.testing.assert_allclose(fresh.predict(2), two.predict(2))


@pytest.mark.parametrize(("E", "K"), [(4, 1), (4, 2), (6, 3)])
def test_transitions_go_on_from_what_was_kept(E, K):
    """Restored tables predict the same and learn the same; keys of one layer are distinct from keys of two."""
    rng = np.random.default_rng(E + K)

    def path():
        return np.array([rng.permutation(E)[:K] for _ in range(3)], np.int32)

    whole = Transitions(3, E, K)
    for _ in range(12):
        whole.count(path())
    again = Transitions(3, E, K)
    again.restore({name: array.copy() for name, array in whole.state().items()})
    section = Transitions(3, E, K)
    section.take(save({name: array.copy() for name, array in whole.state().items()}))
    assert ("transitions.keys" in whole.state()) == (K <= 2)
    for _ in range(12):
        walked = path()
        for layer, experts in enumerate(walked):
            for t in (whole, again, section):
                t.update(routing(experts, [1 / K] * K, layer))
            if layer < 2:
                expected = whole.predict(layer + 1).copy()
                assert np.array_equal(again.predict(layer + 1), expected)
                assert np.array_equal(section.predict(layer + 1), expected)
        for t in (whole, again, section):
            t.learn()


def test_a_table_of_another_model_is_refused():
    t = Transitions(3, 4, 2)
    t.count(np.array([[0, 1], [2, 3], [0, 2]], np.int32))
    kept = {name: array.copy() for name, array in t.state().items()}
    for sections, said in (
        (b"x", "section transitions: not a table of edgemoe"),
        (
            save({n: a[:, :3] if n == "transitions.totals" else a for n, a in kept.items()}),
            r"totals to be \[3, 4\]",
        ),
        (
            save({n: a * np.float32(np.nan) for n, a in kept.items()}),
            r"finite numbers; train it again",
        ),
        (
            save({n: a[:, 1:] if n == "transitions.keys" else a for n, a in kept.items()}),
            r"keys to be \[3, 5\]",
        ),
        (
            save({n: a for n, a in kept.items() if n != "transitions.followers"}),
            r"followers to be \[3, 4\]",
        ),
    ):
        with pytest.raises(FormatError, match=said):
            SCHEDULERS["expertwise"](setting(sections={"transitions": sections}))
    SCHEDULERS["expertwise"](setting(sections={"transitions": save(kept)}))


def test_hobbit_reads_ahead_in_prompts_that_want_everything():
    gates = [[0.5, 0.5], [0.5, 0.5]]
    there = residency(e1_1=5)
    for options, experts, expected in (
        ({}, [[0, 1], [2, 3]], [4 + 0, 4 + 2, 4 + 3]),
        ({}, [[0, 1], [2, 1]], None),  # expert 3 is not wanted
        ({"prompt_ahead": False}, [[0, 1], [2, 3]], None),
        ({"look_ahead": 0}, [[0, 1], [2, 3]], None),
    ):
        options = {"prompt_ahead": True, **options}
        plan = Hobbit(setting(), **options).plan(routing(experts, gates), there)
        assert (None if plan.ahead is None else plan.ahead.tolist()) == expected
    last = Hobbit(setting(), prompt_ahead=True).plan(routing([[0, 1], [2, 3]], gates, 2), there)
    assert last.ahead is None
    fits = Hobbit(setting(slots=12), prompt_ahead=True).plan(
        routing([[0, 1], [2, 3]], gates), there
    )
    assert fits.ahead is None


def test_expertwise_preloads_the_likeliest_missing_experts():
    e = Expertwise(setting(layers=2, experts=4, top_k=2), preload=1)
    for _ in range(3):
        for layer, experts in enumerate(([0, 1], [2, 3])):
            e.plan(routing(experts, [0.5, 0.5], layer), residency(2))
        e.passed(1, 0.1)
    plan = e.plan(routing([0, 1], [0.5, 0.5]), residency(2, e1_2=5))
    assert plan.ahead.tolist() == [4 + 3]
    assert plan.ahead_bits.tolist() == [8]
    last = e.plan(routing([2, 3], [0.5, 0.5], 1), residency(2))
    assert last.ahead is None


def allocation(bits):
    value = {
        "edgemoe_allocation": 1, "method": "test", "settings": {}, "layers": list(range(len(bits))),
        "bits": bits, "protected": [],
    }  # fmt: skip
    return {"allocation": json.dumps(value).encode()}


def test_allocated_bits_are_planned_and_announced():
    s = setting(layers=2, experts=2, top_k=2, sections=allocation([[2, 8], [4, 3]]))
    for kind in (Expertwise, Mc):
        made = kind(s, **({"prune": False} if kind is Mc else {}))
        assert "4.25 bits" in made.notes[0]
        assert slot_bits(made.plan(routing([1, 0], [0.6, 0.4], 0), residency(2, 2))).tolist() == [
            [8, 2]
        ]
        assert slot_bits(made.plan(routing([1, 0], [0.6, 0.4], 1), residency(2, 2))).tolist() == [
            [3, 4]
        ]
    plan = Expertwise(s, allocation=False).plan(routing([1, 0], [0.6, 0.4], 1), residency(2, 2))
    assert slot_bits(plan).tolist() == [[8, 8]]


@pytest.mark.parametrize("bits", [[[2, 8]], [[2, 8], [5, 3]], [[2, 8.5], [2, 3]], "x"])
def test_a_wrong_allocation_is_one_error(bits):
    with pytest.raises(edgemoe.FormatError, match="allocation"):
        Expertwise(setting(layers=2, experts=2, sections=allocation(bits)))


# --- MC-MoE


def test_mc_leaves_out_small_gates_and_may_give_their_share_to_the_others():
    mc = Mc(setting(top_k=3), beta=0.5, layers=1, renormalise=True)
    gates = [0.5, 0.3, 0.2]
    early = mc.plan(routing([0, 1, 2], gates, 1), residency())
    assert slot_bits(early).tolist() == [[8, 8, 8]]  # only the last layer prunes
    plan = mc.plan(routing([0, 1, 2], gates, 2), residency())
    assert slot_bits(plan).tolist() == [[8, 8, 0]]
    np.testing.assert_allclose(plan.gates[0, :2], [0.625, 0.375])
    flat = routing(
        [0, 1, 2], [0.6, 0.2, 0.2], 2
    )  # both others are below half of the first: one is pruned
    assert slot_bits(mc.plan(flat, residency())).tolist() == [[8, 8, 0]]
    two = Mc(setting(top_k=3), beta=0.5, layers=1, most=2)
    plan = two.plan(flat, residency())
    assert slot_bits(plan).tolist() == [[8, 0, 0]]
    assert plan.gates.tolist() == flat.gates.tolist()
    prompt = mc.plan(routing([[0, 1, 2]] * 2, [gates] * 2, 2), residency())
    assert (prompt.rows >= 0).all()


def test_mc_prunes_in_the_layers_that_a_user_names():
    s = replace(setting(top_k=3), layers=(1, 4, 7))  # of a model whose others are dense
    mc = Mc(s, beta=0.5, prune_in="7, 1")
    pruned = [
        (slot_bits(mc.plan(routing([0, 1, 2], [0.5, 0.3, 0.2], i), residency())) == 0).any()
        for i in range(3)
    ]
    assert pruned == [True, False, True]
    assert mc.notes == ("lossy: experts with small gates are left out in 2 of 3 layers",)
    assert mc.report() == "beta 0.50"
    for wrong in ("2", "x", "1,,4", "-1"):
        with pytest.raises(ValueError, match="prune_in: the model has no layer '"):
            Mc(s, prune_in=wrong)


def test_mc_finds_the_median_ratio():
    mc = Mc(setting(layers=1, top_k=2))
    rng = np.random.default_rng(0)
    ratios = rng.uniform(0.2, 0.6, 600)
    for ratio in ratios:
        mc.plan(routing([0, 1], [1 / (1 + ratio), ratio / (1 + ratio)]), residency(1))
    assert mc.betas[0] == pytest.approx(0.4, abs=0.08)


def test_mc_with_equal_gates_keeps_all():
    mc = Mc(setting(layers=1, top_k=2))
    for _ in range(100):
        plan = mc.plan(routing([0, 1], [0.5, 0.5]), residency(1))
        assert (plan.rows >= 0).all()
    assert mc.betas[0] > 0.9


# --- D2MoE


def test_hottest_expert_bit_goes_first_with_cumulative_demand():
    # D2MoE's example: three requests for expert 2, one at 2 bits and two at 3: base used 3 times, next plane twice.
    r = routing([[2, 0], [2, 1], [2, 0]], [[0.6, 0.4]] * 3)
    bits = np.array([[2, 2], [3, 2], [3, 3]], np.int8)
    plan = plan_slots(r, bits, hottest_first=True)
    got = list(zip(plan.experts.tolist(), plan.bits.tolist(), strict=True))
    assert got == [(2, 2), (0, 2), (2, 3), (0, 3), (1, 2)]
    resident = np.array([0, 2, 0, 0], np.int8)
    plan = plan_slots(r, bits, hottest_first=True, resident_bits=resident)
    assert (plan.experts[0], plan.bits[0]) == (1, 2)


def makespan(items, io, compute):
    """Returns the time of D2MoE's pipeline.

    io_end[s] = io_end[s-1] + io; start = max(io_end[s], comp_end[s-1]); comp_end = start + compute.
    """
    io_end = comp_end = 0.0
    for item in items:
        io_end += io[item]
        comp_end = max(io_end, comp_end) + compute[item]
    return comp_end


def test_hottest_first_is_near_the_bound_and_file_order_is_not():
    """A simulation of D2MoE's pipeline: 8 experts, planes whose reads take 2:1:1, skewed routing, 4 to 32 tokens."""
    rng = np.random.default_rng(0)
    io_of = {2: 2.0, 3: 1.0, 4: 1.0}
    hottest, by_file = [], []
    for _ in range(80):
        T, E, K = int(rng.integers(4, 33)), 8, 2
        p = rng.dirichlet(np.ones(E)) + 0.01
        experts = np.array(
            [rng.choice(E, K, replace=False, p=p / p.sum()) for _ in range(T)], np.int32
        )
        bits = rng.choice([2, 3, 4], (T, K), p=[0.3, 0.4, 0.3]).astype(np.int8)
        r = routing(experts, np.full((T, K), 0.5))
        demand = {
            (e, b): int(((experts == e) & (bits >= b)).sum()) for e in range(E) for b in (2, 3, 4)
        }
        scale = rng.uniform(0.5, 1.5) * 2 * E / sum(demand.values())
        for first, out in ((True, hottest), (False, by_file)):
            plan = plan_slots(r, bits, hottest_first=first)
            items = planes(plan)
            io = {item: io_of[item[1]] for item in items}
            compute = {item: scale * demand[item] for item in items}
            total_io, total_compute = sum(io.values()), sum(compute.values())
            bound = max(total_io + min(compute.values()), io[items[0]] + total_compute)
            out.append(makespan(items, io, compute) / bound)
    assert np.mean(hottest) < 1.03
    assert max(hottest) < 1.2
    assert np.mean(by_file) > np.mean(hottest) + 0.03


def planes(plan):
    """Returns the planes of a plan in reading order; an entry reads all missing planes up to its bits."""
    here, out = Counter(), []
    for e, b in zip(plan.experts.tolist(), plan.bits.tolist(), strict=True):
        for plane in (2, 3, 4):
            if here[e] < plane <= b:
                out.append((e, plane))
                here[e] = plane
    return out


def test_d2moe_bits_keep_the_papers_shares():
    d = D2moe(setting(layers=1, experts=16, top_k=4, bits=4))
    rng = np.random.default_rng(0)
    counts = Counter()
    for i in range(1500):
        r = random_routing(rng, 0, 1, 16, 4, 0)
        bits = d.slot_precisions(r)
        if i > 500:
            counts.update(bits.reshape(-1).tolist())
        assert (np.diff(bits[0]) <= 0).all()  # a larger gate never has fewer bits
    shares = [counts[b] / sum(counts.values()) for b in (2, 3, 4)]
    np.testing.assert_allclose(shares, [0.3, 0.4, 0.3], atol=0.04)


def test_d2moe_drops_the_layer_befores_high_planes_first_and_bases_last():
    s = setting(layers=2, experts=4, top_k=2, bits=8, slots=2)  # room for 16 units of 4096 bytes
    d = D2moe(s, levels=1, frees="always")
    full = residency(2, e0_0=5, e0_1=5)  # 16 units
    plan = d.plan(routing([0, 1], [0.5, 0.5], 1), full)  # needs 16 more: all must go
    assert plan.drop.tolist() == [0, 1]
    assert plan.drop_bits.tolist() == [0, 0]
    d = D2moe(setting(layers=2, experts=4, top_k=1, bits=8, slots=2), levels=1, frees="always")
    plan = d.plan(routing([0], [1.0], 1), full)  # 8 more: 8 to 4 bits each gives 8
    assert plan.drop.tolist() == [0, 1]
    assert plan.drop_bits.tolist() == [4, 4]
    plan = d.plan(routing([0], [1.0], 1), residency(2, e0_0=5))
    assert plan.drop is None
    plan = d.plan(routing([0], [1.0], 1), residency(2, e0_0=5, e0_1=5, e1_0=5))
    assert plan.drop is None  # nothing to read


def test_d2moe_frees_for_prompts_alone_unless_it_is_told_otherwise():
    L, E, K = 2, 4, 2
    full = residency(L, e0_0=5, e0_1=5)
    token = routing([2, 3], [0.5, 0.5], 1)
    prompt = random_routing(np.random.default_rng(0), 1, 6, E, K, 0)
    for frees, expected in (("prompts", (0, 2)), ("always", (2, 2)), ("off", (0, 0))):
        d = D2moe(setting(layers=L, experts=E, top_k=K, bits=8, slots=2), levels=1, frees=frees)
        drops = [d.plan(r, full).drop for r in (token, prompt)]
        assert tuple(0 if drop is None else len(drop) for drop in drops) == expected
        # A prompt after tokens counts the present residency, not the one before them.
        d.plan(token, full)
        empty = d.plan(prompt, residency(L)).drop
        assert empty is None


def test_d2moe_takes_trained_levels_of_0_but_for_the_best_expert():
    L, E, K = 1, 4, 2
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((L, E, 3, 8)).astype(np.float32)
    section = BitRouters(
        levels=(0, 2, 4),
        weight=weight,
        gate_weight=weight[..., 0].copy(),
        bias=weight[..., 1].copy(),
    )
    s = replace(
        setting(layers=L, experts=E, top_k=K, bits=8), sections={"bit-routers": section.to_bytes()}
    )
    d = D2moe(s)
    assert d.notes == (
        "lossy: each token runs its experts at 2, 4 bits or not at all, as trained routers say",
    )
    logits = np.array([[[9, 1, 2], [9, 1, 2]], [[9, 2, 1], [0, 1, 2]]], np.float32)
    gates = np.full((2, K), 0.5, np.float32)
    experts = np.array([[0, 1], [0, 2]], np.int32)
    plan = d.plan(Routing(0, experts, gates, bit_logits=logits), np.zeros((L, E), np.int8))
    assert slot_bits(plan).tolist() == [[4, 0], [2, 4]]
    plan = d.plan(
        Routing(0, experts[:1], gates[:1], bit_logits=logits[:1]), np.zeros((L, E), np.int8)
    )
    assert (plan.experts.tolist(), plan.rows.tolist()) == ([0], [[0, -1]])


# --- prediction and ExpertFlow


def test_next_use_learns_what_its_features_tell():
    rng = np.random.default_rng(0)
    E, K = 16, 4
    p = NextUse(1, E, K)
    taste = rng.normal(0, 1.0, E)
    drift = np.zeros(E)
    losses = {"learned": [], "frequency": []}
    counts = np.full(E, K / E)
    odds = None
    for i in range(400):
        drift = 0.9 * drift + rng.normal(0, 0.7, E)
        scores = np.exp(taste + drift)
        scores /= scores.sum()
        order = np.argsort(-scores)[:K]
        used = np.isin(np.arange(E), order)
        if odds is not None and i > 100:
            q = 1 / (1 + odds)
            f = np.clip(counts, 0.01, 0.99)
            for name, x in (("learned", q), ("frequency", f)):
                losses[name].append(-np.mean(np.log(np.where(used, x, 1 - x))))
        odds = p.update(routing(order, scores[order], scores=scores)).copy()
        counts += 0.02 * (used - counts)
        p.learn()
    assert np.mean(losses["learned"]) < 0.9 * np.mean(losses["frequency"])


def test_next_use_evicts_what_is_expected_last():
    s = setting(layers=2, experts=3, top_k=1)
    e = make_eviction("next-use", s, HobbitWeights())
    for _ in range(30):
        for layer in range(2):
            r = routing([0], [0.8], layer, scores=[0.8, 0.15, 0.05])
            e.planned(r, plan_slots(r, np.array([[8]], np.int8)))
        e.passed()
    p = scored(e.priorities)
    assert (p[:, 0] > p[:, 1]).all()
    assert (p[:, 1] >= p[:, 2]).all()
    assert p[0, 0] > p[1, 0]  # equally sure, and its layer runs sooner


def test_d2moe_knows_what_is_resident_without_counting_all_of_it():
    L, E, K = 6, 16, 4
    s = setting(layers=L, experts=E, top_k=K, slots=L * E // 3)
    d = SCHEDULERS["d2moe"](s, frees="always")
    store = ExpertStore.dry(
        num_layers=L, num_experts=E, level_bits=s.level_bits, level_bytes=s.level_bytes, budget_bytes=s.slots_bytes,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    sizes = np.array([0, *s.level_bytes])
    drops = 0
    for _ in range(40):
        for layer in range(L):
            plan = d.plan(random_routing(rng, layer, 1, E, K, 0), store.residency)
            used = int(sizes[store.residency].sum())
            if plan.drop is not None:  # only when memory is full, and at most a level too much
                drops += 1
                levels = store.residency.reshape(-1)[plan.drop]
                kept = np.searchsorted(s.level_bits, plan.drop_bits, side="right")
                freed = int((sizes[levels] - sizes[kept]).sum())
                need = sum(
                    max(0, int(sizes[np.searchsorted(s.level_bits, b) + 1] - sizes[store.residency[layer][e]]))
                    for e, b in zip(plan.experts, plan.bits, strict=True)
                )  # fmt: skip
                assert used + need > s.slots_bytes
                one_less = np.minimum(levels, kept + 1)
                assert (
                    freed - int((sizes[one_less] - sizes[kept]).sum()) < used + need - s.slots_bytes
                )
            store.request(plan)
            for _ in store.ready_groups():
                pass
        d.passed(1, 0.1)
    assert drops > 20


def test_expertflow_keeps_the_predicted_path_and_drops_what_it_missed():
    flow = SCHEDULERS["expertflow"](setting(layers=2, experts=4, top_k=1), prefetch=1)
    scores = [0.7, 0.1, 0.1, 0.1]
    for _ in range(20):
        for layer in range(2):
            plan = flow.plan(routing([0], [0.7], layer, scores=scores), residency(2))
            if layer == 0:
                first = plan
        flow.passed(1, 0.1)
    assert first.ahead.tolist() == [4]
    assert first.ahead_bits.tolist() == [8]
    p = scored(flow.priorities)
    assert p[0].argmax() == 0
    assert p[1].argmax() == 0
    assert flow.report() == "path 100% right"


def test_expertflow_priorities_are_rounds_until_use():
    class Given:
        """A predictor that returns the odds given by the test."""

        def update(self, routing):
            return np.array(self.against)

    flow = SCHEDULERS["expertflow"](setting(layers=2, experts=4, top_k=1))
    flow._predictor = given = Given()
    given.against = [0.1, 1, 2, 3]
    flow.plan(routing([0], [0.7], 0), residency(2))
    L, step = 2, 1
    np.testing.assert_allclose(
        scored(flow.priorities)[0], [-L - step, -3 * L - step, -4 * L - step, -5 * L - step]
    )
    given.against = [1, 1, 1, 0.1]  # expert 0 was predicted, 3 runs and is predicted again
    flow.plan(routing([3], [0.7], 0), residency(2))
    step = 2
    np.testing.assert_allclose(
        scored(flow.priorities)[0], [-(3 + 4) * L - step, -3 * L - step, -3 * L - step, -L - step]
    )


def test_expertflow_gives_slots_to_the_layer_that_runs_next_first():
    """The paper's example: two layers need 3 and 2 experts. Of 4 slots they get 3 and 1."""

    class Given:
        """A predictor that returns the odds given by the test."""

        def update(self, routing):
            return np.array(against[routing.layer])

    against = [[0.1, 0.2, 0.3, 30.0], [30.0, 0.1, 0.2, 0.3], [0.2, 30.0, 0.1, 30.0]]
    flow = SCHEDULERS["expertflow"](setting(layers=3, experts=4, top_k=3))
    flow._predictor = Given()
    for layer in range(3):
        flow.plan(routing([0, 1, 2], [0.4, 0.3, 0.3], layer), residency(3))
    flow.plan(routing([0, 1, 2], [0.4, 0.3, 0.3], 0), residency(3))
    p = scored(flow.priorities)
    needed = [(p[1, e], 1, e) for e in (1, 2, 3)] + [(p[2, e], 2, e) for e in (0, 2)]
    assert {(layer, e) for _, layer, e in sorted(needed)[1:]} >= {(1, 1), (1, 2), (1, 3)}


# --- levers


def protecting(*pairs):
    return Allocation(
        method="error", layers=(0, 1, 2), bits=np.full((3, 4), 8, np.int8), protected=pairs
    ).to_json()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("on-demand", {"skip_below": 0.5}),
        ("on-demand", {"top_p": 0.1, "renormalise": True}),
        ("on-demand", {"miss_bits": 2}),
        ("hobbit", {"t1": 0.0, "t2": 0.1}),
        ("mc", {"beta": 0.9, "layers": 3}),
        ("d2moe", {"levels": 3}),
    ],
    ids=str,
)
def test_spared_experts_run_whole_whatever_else_is_left_out(name, options):
    r = routing([0, 1, 2], [0.8, 0.15, 0.05], 1)
    plans = {}
    for spared in ({}, {"spare": "1.2"}, {"spare": "none"}):
        s = setting(top_k=3, sections={} if spared else {"allocation": protecting((1, 2))})
        plans[str(spared)] = SCHEDULERS[name](s, **options, **spared).plan(r, residency())
    by_file, named, none = plans.values()
    assert slot_bits(none)[0, 2] < 8
    for plan in (by_file, named):
        assert slot_bits(plan).tolist() == [[*slot_bits(none)[0, :2].tolist(), 8]]
        check_lawful(plan, r, LEVELS, exact=False, layers=3)
        if slot_bits(none)[0, 2] == 0:
            assert plan.gates.tolist() == r.gates.tolist()
    prompt = routing([[0, 1, 2], [3, 1, 0]], [[0.8, 0.15, 0.05]] * 2, 1)
    plan = SCHEDULERS[name](setting(top_k=3), **options, spare="1.2").plan(prompt, residency())
    assert slot_bits(plan)[0, 2] == 8
    check_lawful(plan, prompt, LEVELS, exact=False, layers=3)


def test_a_spared_expert_is_not_displaced_by_resident_ones():
    scores = [0.4, 0.3, 0.2, 0.1]
    r = routing([0, 1], [0.4, 0.3], scores=scores)
    for spared, chosen in (("none", [0, 2]), ("0.1", [0, 1])):
        s = SCHEDULERS["on-demand"](setting(), cache_prior=5.0, protect=1, spare=spared)
        plan = s.plan(r, residency(e0_2=5, e0_3=5))
        assert sorted(plan.experts.tolist()) == chosen


def test_levels_between_count_as_high_in_hobbit_s_eviction():
    """With `bits` 8, levels above 4 count as high: a use at 6 is worth as much as one at 8, and more than one at 4."""
    worth = {}
    for bits in (2, 4, 6, 8):
        e = make_eviction("hobbit", setting(experts=2, top_k=1), HobbitWeights())
        r = routing([0], [1.0])
        e.planned(r, plan_slots(r, np.array([[bits]], np.int8)))
        worth[bits] = scored(e.priorities)[0, 0]
    assert worth[2] == worth[4] < worth[6] == worth[8]


def test_lowering_is_an_option_of_every_scheduler():
    for name in KINDS:
        assert SCHEDULERS[name](setting(), lower_to=3).keep_level == 2
        assert SCHEDULERS[name](setting()).keep_level == 0
    for wrong in (5, 8, -2):
        with pytest.raises(ValueError, match=f"lower_to: expected one of 2, 3, 4, 6, got {wrong}"):
            SCHEDULERS["on-demand"](setting(), lower_to=wrong)
    with pytest.raises(ValueError, match="spare: only with a lossy option or scheduler"):
        SCHEDULERS["on-demand"](setting(), spare="0.1")
    with pytest.raises(ValueError, match=r"spare: the model has no routed expert 3\.0"):
        SCHEDULERS["hobbit"](setting(), spare="3.0")
    with pytest.raises(ValueError, match=r"spare: expected file, none or LAYER\.EXPERT,…, got 'x'"):
        SCHEDULERS["hobbit"](setting(), spare="x")


def test_hobbit_reads_ahead_what_ranks_are_worth():
    """The second of two ranks is always wrong: it is no longer read, unless trials are off, as in the paper."""
    for trials, expected in ((True, 1), (False, 2)):
        h = SCHEDULERS["hobbit"](
            setting(layers=2, experts=8, top_k=2, slots=3), t1=0.9, t2=0.9, trials=trials
        )
        for _ in range(14):
            guess = [[2, 3]], [[0.6, 0.4]]
            plan = h.plan(routing([0, 1], [0.6, 0.4], 0, ahead=guess), residency(2, 8))
            h.plan(routing([2, 5], [0.6, 0.4], 1), residency(2, 8))
            h.passed(1, 0.1)
        assert len(plan.ahead) == expected
        assert plan.ahead[0] == 8 + 2


def test_dynamic_top_p_keeps_the_crossing_expert():
    gates = np.array([[0.5, 0.3, 0.1, 0.1]], np.float32)
    for p, kept in ((0.4, 1), (0.5, 2), (0.7, 2), (0.85, 3), (1.0, 4)):
        assert small_gates(gates, top_p=p, skip_below=0).sum() == kept
    assert small_gates(gates, top_p=0, skip_below=1).sum() == 1


def test_a_token_keeps_the_same_experts_alone_and_in_a_prompt():
    """Also if a sum of gates is exactly at the threshold, so that rounding decides."""
    rng = np.random.default_rng(0)
    gates = -np.sort(-rng.random((200, 10), np.float32))
    gates /= gates.sum(axis=1, keepdims=True)
    experts = np.tile(np.arange(10, dtype=np.int32), (200, 1))
    for top_p in (0.5, *np.cumsum(gates, axis=1)[:5, 3].tolist()):
        s = SCHEDULERS["on-demand"](setting(experts=10, top_k=10), top_p=top_p, skip_below=0.1)
        prompt = s.plan(Routing(0, experts, gates), residency(experts=10)).rows >= 0
        for t in range(200):
            r = Routing(0, experts[t : t + 1], gates[t : t + 1])
            np.testing.assert_array_equal(s.plan(r, residency(experts=10)).rows[0] >= 0, prompt[t])


def test_skipping_by_ratio_and_its_share():
    s = SCHEDULERS["on-demand"](setting(top_k=3), skip_below=0.5)
    r = routing([[0, 1, 2], [3, 1, 0]], [[0.5, 0.3, 0.2], [0.4, 0.3, 0.3]])
    plan = s.plan(r, residency())
    assert (plan.rows >= 0).tolist() == [[True, True, False], [True, True, True]]
    assert plan.gates.tolist() == r.gates.tolist()
    s = SCHEDULERS["on-demand"](setting(top_k=3), skip_below=0.5, renormalise="on")
    np.testing.assert_allclose(s.plan(r, residency()).gates[0, :2], [0.625, 0.375])


def test_cache_prior_prefers_residents_but_not_over_the_protected():
    s = setting(top_k=2)
    scores = [0.4, 0.3, 0.25, 0.05]
    r = routing([0, 1], [0.4, 0.3], scores=scores)
    here = residency(e0_2=5, e0_3=5)
    made = SCHEDULERS["on-demand"](s, cache_prior=0.2, admit=True)
    plan = made.plan(r, here)
    assert plan.experts.tolist() == [0, 2]  # 0 is protected, 2 is near enough, 3 is not
    assert made.substituted == 1
    np.testing.assert_allclose(plan.gates, [[0.7 * 0.4 / 0.65, 0.7 * 0.25 / 0.65]], rtol=1e-6)
    assert plan.ahead.tolist() == [1]  # the displaced expert is read in the background
    assert made.plan(r, residency(e0_0=5, e0_1=5, e0_2=5)).experts.tolist() == [0, 1]
    assert SCHEDULERS["on-demand"](s, cache_prior=0.2).plan(r, here).ahead is None
    strong = SCHEDULERS["on-demand"](s, cache_prior=5.0, protect=0)
    assert sorted(strong.plan(r, here).experts.tolist()) == [2, 3]
    assert SCHEDULERS["on-demand"](s, cache_prior=0.001).plan(r, here).experts.tolist() == [0, 1]
    with pytest.raises(ValueError, match="scores"):
        made.plan(routing([0, 1], [0.4, 0.3]), here)


def test_a_miss_runs_at_what_is_resident_and_is_upgraded_later():
    made = SCHEDULERS["on-demand"](setting(layers=2, top_k=3), miss_bits=3)
    here = residency(2, e1_0=5, e1_1=4, e1_2=1)
    plan = made.plan(routing([0, 1, 2], [0.5, 0.3, 0.2], 1), here)
    assert slot_bits(plan).tolist() == [[8, 6, 3]]
    assert plan.ahead.tolist() == [5, 6]
    assert plan.ahead_bits.tolist() == [8, 8]
    prompt = made.plan(routing([[0, 1, 2]] * 2, [[0.5, 0.3, 0.2]] * 2, 1), here)
    assert (prompt.bits == 8).all()


# --- auto


def test_a_trial_compares_windows_in_turn():
    trial = Trial(window=4, rounds=2)
    order = []
    for _ in range(16):
        order.append(trial.is_new)
        # Tokens right after a change are slow, and must not count.
        fresh = len(order) % 4 == 1
        over = trial.add(9.0 if fresh else 0.8 if trial.is_new else 1.0)
    assert over
    assert order == ([False] * 4 + [True] * 4) * 2
    assert trial.saved == pytest.approx(0.2)


def run_auto(auto, seconds, tokens=400):
    """Feeds single tokens, whose time depends on which options are on."""
    for _ in range(tokens):
        plan = auto.plan(routing([0, 1], [0.9, 0.1], 0), residency(1))
        auto.passed(1, seconds(auto, plan))


def test_auto_keeps_what_pays():
    s = setting(layers=1, slots=2)

    def seconds(auto, plan):
        return 1.0 - 0.2 * (auto.look_ahead == 1) - 0.01 * (auto._now.eviction == "next-use")

    auto = Auto(s, window=4, rounds=2)
    run_auto(auto, seconds)
    assert auto.look_ahead == 1
    assert auto.kept.eviction == "lfu"
    assert auto.report() == "auto -next-use (+1%), +look_ahead (+20%)"
    assert auto.notes == ()
    ahead = routing([0, 1], [0.9, 0.1], 0, ahead=([[1, 0]], [[0.6, 0.4]]))
    two = Auto(setting(layers=2, slots=2), window=4, rounds=2)
    run_auto(two, seconds)
    assert two.plan(ahead, residency(2)).ahead.tolist() == [5, 4]

    def lossy_seconds(auto, plan):
        return 0.5 if (plan.rows < 0).any() else 1.0

    auto = Auto(s, window=4, rounds=2, lossy=True)
    run_auto(auto, lossy_seconds)
    assert auto.kept.skip_below == 0.2
    assert auto.kept.miss_bits == 0
    assert len(auto.notes) == 1


def test_auto_tries_nothing_when_all_fits():
    for options in ({}, {"lossy": True}, {"lossy": True, "spare": "none"}):
        auto = SCHEDULERS["auto"](setting(layers=1, slots=4), **options)
        run_auto(auto, lambda a, p: 1.0, tokens=50)
        assert auto.report() == ""
        assert (auto.notes, auto.leaves_out, auto.reads_ahead) == ((), False, False)
    for spare in ("nonsense", "9.9"):  # is wrong also where nothing is left out
        with pytest.raises(ValueError, match="spare"):
            SCHEDULERS["auto"](setting(layers=1, slots=4), lossy=True, spare=spare)


# --- options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("on-demand", {"t1": "0.5"}, "option t1: there is no such; expected one of: look_ahead"),
        ("hobbit", {"t1": "0.5"}, "t1 and t2: expected both or none"),
        ("hobbit", {"t1": "0.9", "t2": "0.5"}, "t1: expected at most t2 = 0.5, got 0.9"),
        ("hobbit", {"low_bits": "5"}, "low_bits: expected one of 2, 3, 4, 6, 8, got 5"),
        ("hobbit", {"strict": "maybe"}, "strict: expected a switch, on or off, got 'maybe'"),
        ("hobbit", {"look_ahead": "1.5"}, "look_ahead: expected a whole number, got '1.5'"),
        ("hobbit", {"low": "nan"}, "low: expected a number, got 'nan'"),
        ("mc", {"beta": "2"}, "beta: expected 0 to 1, got 2"),
        ("on-demand", {"eviction": "fifo"}, "eviction: expected one of default, lfu"),
        ("expertflow", {"eviction": "lru"}, "eviction: this scheduler decides itself"),
        ("on-demand", {"miss_bits": "5"}, "miss_bits: expected one of 2, 3, 4, 6, 8, got 5"),
        ("on-demand", {"top_p": "1.5"}, "top_p: expected 0 to 1, got 1.5"),
        ("on-demand", {"w_recency": "1"}, "w_recency: only the eviction hobbit"),
        ("on-demand", {"protect": "2"}, "protect: only with cache_prior"),
        ("on-demand", {"renormalise": "on"}, "renormalise: only with top_p or skip_below"),
        ("auto", {"lossy": "on", "miss_bits": "5"}, "miss_bits: expected one of"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(name, options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        SCHEDULERS[name](setting(), **options)
    assert "\n" not in str(error.value)


def test_options_may_be_texts_or_values():
    for value in ("on", True, "TRUE"):
        made = SCHEDULERS["hobbit"](setting(), renormalise=value, t1="0.2", t2=0.3, low_bits="2")
        assert isinstance(made, Combined)
        assert made.inner.options.renormalise is True
        assert (made.inner.t1, made.inner.t2) == (0.2, 0.3)


def test_the_plain_baseline_costs_nothing_more():
    assert isinstance(SCHEDULERS["on-demand"](setting()), OnDemand)


# --- on a model

EXACT = [
    *(name for name in KINDS if name not in LOSSY),
    *(f"on-demand {e}" for e in ("lru", "next-use", "frequency-distance", "hobbit")),
    "on-demand alone",
]


def logits_of(path, name, *, ram=None, ids=range(40, 60)):
    name, _, extra = name.partition(" ")
    options = {}
    if extra:
        options = {"look_ahead": "off"} if extra == "alone" else {"eviction": extra}
    if name == "auto":
        options = {"window": 4, "rounds": 1}
    with edgemoe.load(path, scheduler=name, options=options, ram=ram, context=64, threads=1) as e:
        rows = [e.logits(list(ids), last_only=True).copy()]
        rows += [e.extend([i]).copy() for i in range(20)]
        return np.concatenate(rows), e.stats


@pytest.fixture(scope="module")
def exact_logits(tiny_moe):
    return logits_of(tiny_moe, "on-demand")[0]


@pytest.fixture
def room(monkeypatch):
    """Returns a function that gives every engine slots for so many experts."""

    def limit(count):
        with_slots(monkeypatch, lambda budget: count * budget.expert)

    return limit


@pytest.mark.parametrize("name", EXACT)
def test_exact_schedulers_do_not_change_an_answer(tiny_moe, exact_logits, name, room):
    for experts in (1, 5):
        room(experts)
        got, stats = logits_of(tiny_moe, name)
        assert stats.evictions > 0
        assert stats.skipped_share == stats.substituted_share == 0
        np.testing.assert_array_equal(got, exact_logits)


@pytest.mark.parametrize(
    ("name", "options"), [(n, o) for n, o in CASES if n in LOSSY or set(o) & {"top_p", "miss_bits", "cache_prior"}],
    ids=str,
)  # fmt: skip
def test_lossy_schedulers_run_and_say_what_they_did(tiny_moe, name, options, room):
    room(5)
    with edgemoe.load(tiny_moe, scheduler=name, options=options, context=64, threads=1) as e:
        assert any(line.startswith("lossy: ") for line in e.notes)
        e.logits(list(range(20)), last_only=True)
        for i in range(30):
            row = e.extend([i])
            assert np.isfinite(row).all()
        e.model.store.cache.check_integrity()
        list(e.generate(list(range(20)), edgemoe.SamplingParams(temperature=0, max_tokens=20)))
        stats = e.stats
    assert 2 <= stats.average_bits <= 8
    if "top_p" in options:
        assert 0 < stats.skipped_share < 1


def test_large_models_learn_from_their_layers_in_turn():
    small = Turns(3, 64)
    assert [small.take() for _ in range(2)] == [slice(0, 3)] * 2
    large = Turns(5, 2048)
    assert list(large.now) == [0, 1]
    turns = [large.take() for _ in range(4)]
    assert turns == [slice(0, 2), slice(2, 4), slice(4, 5), slice(0, 2)]
    assert [huge.take() for huge in [Turns(2, 10000)] * 3] == [
        slice(0, 1),
        slice(1, 2),
        slice(0, 1),
    ]

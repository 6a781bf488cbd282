"""A replayed trace and a real run agree, and nothing beats the oracle."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

import edgemoe
from edgemoe.file.reader import open_moe
from edgemoe.lab.report import tables
from edgemoe.lab.routing.oracles import Oracle
from edgemoe.lab.routing.predictors import predictions
from edgemoe.lab.routing.record import follow
from edgemoe.lab.routing.replay import Tape, make_scheduler, replay, setting
from edgemoe.lab.routing.study import lines, study
from edgemoe.lab.routing.timing import Pipeline, Timing, fit
from edgemoe.lab.routing.weights import NAMES, fit_weights
from edgemoe.runtime.trace import Trace, TraceHeader, read, record
from edgemoe.scheduler import OnDemand
from edgemoe.store import ExpertStore, expert_bytes

IDS = np.random.default_rng(3).integers(0, 256, 120).tolist()
SIZE = 4096


def made(experts, E, *, chunk=0, bits=4, ahead=None, times=None):
    """Returns a trace of experts [T, L, K], whose first `chunk` tokens are one pass."""
    T, L, K = experts.shape
    p = 0 if ahead is None else ahead.shape[2]
    header = TraceHeader(
        model="made", num_experts=E, experts_per_token=K, num_layers=L, bits=bits, level_bits=(2, bits),
        level_bytes=(SIZE, 2 * SIZE), slots_bytes=2 * SIZE * E, scheduler="on-demand", look_ahead=p, threads=1,
    )  # fmt: skip
    passes = ([range(chunk)] if chunk else []) + [[t] for t in range(chunk, T)]
    rows = np.zeros(T * L, record(K, p))
    at = 0
    for tokens, layer in itertools.product(passes, range(L)):
        block = rows[at : at + len(tokens)]
        block["token"], block["layer"], block["experts"] = tokens, layer, experts[tokens, layer]
        block["tokens"][0], block["bits"], block["gates"] = len(tokens), bits, 1 / K
        block["sequences"][0] = 1
        if ahead is not None:
            block["ahead_experts"] = ahead[tokens, layer]
        if times is not None:
            for name, values in times.items():
                block[name] = values[tokens, layer]
        at += len(tokens)
    return Trace(header, rows)


def routing(seed, T, L, E, K):
    rng = np.random.default_rng(seed)
    weights = rng.random((L, E)) ** 2
    keys = rng.random((T, L, E)) ** (1 / (weights + 1e-3))
    return np.argsort(-keys, axis=2)[:, :, :K]


@pytest.mark.parametrize(("num_experts", "bits"), [(5, 4), (9.5, 8), (16, 8)])
def test_a_real_run_has_exactly_the_hits_of_its_replay(tiny_moe, tmp_path, num_experts, bits):
    moe = open_moe(tiny_moe)
    slots = int(num_experts * expert_bytes(moe, moe.level(bits)))
    path = tmp_path / "x.trace"
    with edgemoe.load(
        tiny_moe, bits=bits, slots=slots, trace=path, options={"look_ahead": False}
    ) as engine:
        follow(engine, IDS, prompt=1 if num_experts < 8 else 20)
        real = engine.model.store.stats
    tape = Tape(read(path))
    got = replay(tape, OnDemand(setting(tape.header, slots), look_ahead=False), budget_bytes=slots)
    assert got.hits + got.prompt_hits == real["hits"]
    assert got.misses + got.prompt_misses == real["misses"]
    assert (got.hits > 0, got.misses > 0) == (True, num_experts < 16)
    resident = read(path).by_token("resident", single=True) > 0
    assert got.hits == resident.sum()
    if num_experts < 8:  # the whole trace is single tokens
        assert got.evictions == real["evictions"] > 0
        assert got.bytes_read == real["bytes_read"]
        assert got.average_bits == bits


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_real_cache_does_what_the_dry_one_does_under_each_policy(tiny_moe, policy):
    moe = open_moe(tiny_moe)
    experts = routing(1, 150, 2, 8, 2)
    budget = 6 * expert_bytes(moe, 3)
    trace = made(experts, 8)
    header = dataclasses.replace(
        trace.header, level_bits=(2, 3, 4), level_bytes=tuple(expert_bytes(moe, i) for i in (1, 2, 3))
    )  # fmt: skip
    tape = Tape(dataclasses.replace(trace, header=header))
    store = ExpertStore.open(moe, bits=4, budget_bytes=budget, verify=True, policy=policy)
    scheduler = OnDemand(setting(header, budget), look_ahead=False)
    for layers in tape.passes:
        for wanted in layers:
            store.request(scheduler.plan(wanted, store.residency))
            list(store.ready_groups())
    got = replay(
        tape, OnDemand(setting(header, budget), look_ahead=False), budget_bytes=budget, policy=policy
    )  # fmt: skip
    real = store.stats
    assert (got.hits, got.misses, got.evictions) == (
        real["hits"], real["misses"], real["evictions"],
    )  # fmt: skip
    assert got.bytes_read == real["bytes_read"]
    assert 0 < got.hits < 600


def test_no_order_of_evictions_beats_the_oracle():
    rng = np.random.default_rng(0)
    for _ in range(15):
        experts = np.sort(np.argsort(rng.random((5, 1, 5)), axis=2)[:, :, :2], axis=2)
        requests = [frozenset(t[0].tolist()) for t in experts]

        def best(i, here, requests=requests, slots=3):
            if i == len(requests):
                return 0
            now = requests[i]
            kept = here - now
            choices = [
                frozenset(c) for n in range(slots - len(now) + 1) for c in itertools.combinations(kept, n)
            ]  # fmt: skip
            return len(here & now) + max(best(i + 1, now | c) for c in choices)

        tape, budget = Tape(made(experts, 5)), 3 * 2 * SIZE
        got = replay(tape, make_scheduler(tape, "belady", budget_bytes=budget), budget_bytes=budget)
        assert got.hits == best(0, frozenset())


def test_the_oracles_count_the_future_over_layers_and_chunks():
    experts = routing(4, 40, 3, 6, 2)
    trace = made(experts, 6, chunk=4)
    tape = Tape(trace)
    window = 3
    oracle = Oracle(setting(trace.header, 1 << 20), tape.requests, "sch", window=window)
    belady = Oracle(setting(trace.header, 1 << 20), tape.requests, "belady")
    order = [(p, layer) for p in range(37) for layer in range(3)]
    uses = [
        set(np.unique(experts[:4, layer] if p == 0 else experts[p + 3, layer]))
        for p, layer in order
    ]
    residency = np.zeros((3, 6), np.int8)
    for at, (p, layer) in enumerate(order):
        wanted = tape.passes[p][layer]
        for scheduler in (oracle, belady):
            scheduler.plan(wanted, residency)
        for other, e in itertools.product(range(3), range(6)):
            coming = [i for i in range(at + 1, len(order)) if order[i][1] == other and e in uses[i]]
            soon = [i for i in coming if order[i][0] < p + window + (other <= layer)]
            assert oracle.priorities.scores[other, e] // 2**32 == len(soon)
            used = any(order[i][1] == other and e in uses[i] for i in range(at + 1))
            if used:
                assert belady.priorities.scores[other, e] == -(coming[0] if coming else len(order))
    with pytest.raises(ValueError, match="foretold"):
        oracle.plan(tape.passes[0][0], residency)


def test_the_shuffled_control_keeps_tokens_whole_and_chunks_in_place():
    experts = routing(5, 30, 2, 6, 2)
    tape = Tape(made(experts, 6, chunk=5), shuffle=True)
    plain = Tape(made(experts, 6, chunk=5))

    def tokens(tape):
        return [tuple(int(e) for r in layers for e in r.experts.ravel()) for layers in tape.passes]

    assert tokens(tape)[0] == tokens(plain)[0]
    assert tokens(tape) != tokens(plain)
    assert sorted(tokens(tape)) == sorted(tokens(plain))
    assert (tape.num_tokens, plain.num_tokens) == (25, 25)


TIMING = Timing(before_us=(10.0, 10.0), expert_us=4.0, miss_us=0.0, latency_us=5.0, rate=2.0)


def test_a_layer_takes_what_one_can_work_out_by_hand():
    # Two experts in memory take 8 µs. One read of 40 bytes takes 5 + 20 µs, and computing it 5 more.
    play = Pipeline(TIMING)
    play.layer(10.0, [4.0, 4.0], [(40, 5.0)])
    assert (play.now, play.wait_us) == (10 + 25 + 5, 25 - 8)
    # Two reads share the disk and hide each other's latency: they end at 25 and 45; the first is computed meanwhile.
    play = Pipeline(TIMING)
    play.layer(0.0, [], [(40, 5.0), (40, 5.0)])
    assert (play.now, play.wait_us) == (50, 25 + 15)
    # A read ahead that ends before its layer costs nothing; one that does not is waited for.
    play = Pipeline(TIMING)
    play.layer(0.0, [4.0], [], wanted=[0], ahead=[(7, 40)])
    play.layer(100.0, [4.0], [], wanted=[7])
    assert (play.now, play.wait_us) == (4 + 100 + 4, 0)
    play = Pipeline(TIMING)
    play.layer(0.0, [4.0], [], wanted=[0], ahead=[(7, 40)])
    play.layer(10.0, [4.0], [], wanted=[7])
    assert play.now == pytest.approx(25 + 4)  # asked for at 0
    # The extra cost of a miss is shared by the misses of a layer.
    play = Pipeline(dataclasses.replace(TIMING, miss_us=6.0))
    play.layer(0.0, [], [(40, 0.0)] * 4)
    assert play.now == 5 + 4 * 20 + 3
    # A read that is wanted now goes before reads ahead that wait in the queue.
    play = Pipeline(TIMING)
    play.layer(0.0, [], [(40, 5.0)], ahead=[(7, 4000), (8, 4000), (9, 4000), (5, 4000)])
    assert play.now == 30


def test_progressive_compute_uses_idle_moments_only():
    at_once = dataclasses.replace(TIMING, latency_us=0.0, rate=1.0)
    for share, now, wait in [(0.0, 49.0, 31.0), (2 / 3, 43.0, 25.0)]:
        # Two reads of 20 bytes end at 20 and 40. Of 9 µs of computing for each, 6 can be done while waiting.
        play = Pipeline(at_once, progressive=share)
        play.layer(0.0, [], [(20, 9.0), (20, 9.0)])
        assert (play.now, play.wait_us) == (pytest.approx(now), pytest.approx(wait))
        play = Pipeline(at_once, progressive=share)
        play.layer(0.0, [30.0], [(20, 9.0)])  # never idle
        assert (play.now, play.wait_us) == (39.0, 0.0)


def test_the_timing_comes_back_from_a_trace_that_it_made():
    rng = np.random.default_rng(2)
    T, L, K, E = 300, 2, 4, 16
    true = Timing(
        before_us=(300.0, 50.0),
        expert_us=20.0,
        miss_us=7.0,
        latency_us=60.0,
        rate=200.0,
    )
    misses = rng.integers(0, K + 1, (T, L))
    times = {
        name: np.zeros((T, L)) for name in ("before_us", "experts_us", "wait_us", "bytes_read")
    }
    for t, layer in itertools.product(range(T), range(L)):
        n = misses[t, layer]
        play = Pipeline(true)
        play.layer(0.0, [20.0] * (K - n), [(2 * SIZE, 20.0)] * n)
        times["before_us"][t, layer] = true.before_us[layer]
        times["experts_us"][t, layer] = play.now
        times["wait_us"][t, layer] = play.wait_us
        times["bytes_read"][t, layer] = n * 2 * SIZE
    trace = made(routing(1, T, L, E, K), E, times=times)
    at = trace.rows["resident"].reshape(T, L, K)
    at[:] = np.where(np.arange(K) < misses[:, :, None], 0, 2)
    got = fit(trace)
    assert got.before_us == pytest.approx(true.before_us)
    assert (got.expert_us, got.miss_us) == pytest.approx((20, 7))
    assert got.rate == pytest.approx(200, rel=0.03)
    assert got.latency_us == pytest.approx(60, rel=0.2)
    busy = np.flatnonzero(rng.random(T) < 0.45)  # other work on the machine
    disturbed = trace.rows.copy()
    for name in ("before_us", "experts_us", "wait_us"):
        disturbed[name].reshape(T, L)[busy] *= 3
    assert dataclasses.astuple(fit(Trace(trace.header, disturbed)))[1:] == pytest.approx(
        dataclasses.astuple(got)[1:], rel=0.05
    )
    ahead = dataclasses.replace(trace.header, reads_ahead=True)
    with pytest.raises(ValueError, match="reading ahead"):
        fit(Trace(ahead, trace.rows))
    at[:] = 2
    with pytest.raises(ValueError, match="nothing had to be read"):
        fit(trace)


def test_a_replay_takes_the_time_that_its_misses_take():
    experts = np.array([[[0], [0]], [[0], [0]], [[1], [0]]])
    tape = Tape(made(experts, 3))
    timing = dataclasses.replace(TIMING, rate=SIZE / 10)
    budget = 100 * SIZE
    got = replay(tape, OnDemand(setting(tape.header, budget)), budget_bytes=budget, timing=timing)
    hit, miss = 10 + 4, 10 + 5 + 20 + 4
    assert (got.hits, got.misses) == (3, 3)
    assert got.seconds * 1e6 == pytest.approx(3 * hit + 3 * miss)
    assert got.wait_s * 1e6 == pytest.approx(3 * 25)
    assert got.rate == pytest.approx(3e6 / (3 * hit + 3 * miss))


def test_perfect_look_ahead_hides_reads_and_is_told_apart():
    experts = routing(8, 80, 3, 16, 2)
    ahead = np.full((80, 3, 1, 2), 0xFFFF)
    ahead[:, :-1, 0] = experts[:, 1:]
    trace = made(experts, 16, ahead=ahead)
    tape, budget = Tape(trace), 8 * 2 * SIZE
    timing = Timing((500.0,) * 3, 4.0, 1.0, 5.0, SIZE / 10)
    plain, early = (
        replay(
            tape, OnDemand(setting(trace.header, budget), look_ahead=on), budget_bytes=budget,
            timing=timing,
        )
        for on in (False, True)
    )  # fmt: skip
    assert plain.ahead_hits == 0
    assert early.ahead_hits > 0.25 * (plain.misses + plain.hits)
    assert early.misses < plain.misses
    assert early.wait_s < 0.6 * plain.wait_s
    assert early.bytes_read <= 1.1 * plain.bytes_read
    guesses = {(g.name, g.distance): g for g in predictions(trace, None)}
    assert guesses["router ahead", 1].recall == 1
    assert guesses["router ahead", 1].useful == 1
    assert guesses["frequency", 0].recall < 0.9
    # A layer that repeats the one before is predictable from transitions.
    copied = experts.copy()
    copied[:, 1] = (experts[:, 0] + 3) % 16
    again = {(g.name, g.distance): g for g in predictions(made(copied, 16), None)}
    assert again["transition table", 1].recall > guesses["transition table", 1].recall + 0.1


def test_what_arrives_in_time_is_bound_by_the_link():
    experts = routing(9, 64, 2, 8, 2)
    ahead = np.full((64, 2, 1, 2), 0xFFFF)
    ahead[:, 0, 0] = experts[:, 1]
    times = {"before_us": np.full((64, 2), 100.0), "experts_us": np.full((64, 2), 10_000.0)}
    trace = made(experts, 8, ahead=ahead, times=times)
    trace = Trace(dataclasses.replace(trace.header, slots_bytes=6 * 2 * SIZE), trace.rows)
    fast, slow = (Timing((100.0,) * 2, 4.0, 1.0, 5.0, rate) for rate in (1e5, 1e-3))
    assert predictions(trace, fast)[0].in_time == 1
    assert predictions(trace, slow)[0].in_time == 0
    assert predictions(trace, fast)[0].in_time_bytes > 0
    with pytest.raises(ValueError, match="at least 16"):
        predictions(made(experts[:10], 8), None)


def test_a_study_always_has_its_lines_and_orders_them():
    trace = made(routing(6, 120, 3, 8, 2), 8, chunk=10)
    ways = lines(["on-demand"], ["lru", "lfu"], {"on-demand": {"look_ahead": False}})
    budget = 12 * 2 * SIZE
    seen = []
    rows = study(
        trace, ways, [budget], timing=None, progress=lambda done, total: seen.append((done, total))
    )
    names = [r["name"] for r in rows]
    assert names == ["lru", "lfu", "on-demand, lru", "on-demand, lfu", "SCH(16)", "Belady"]
    hits = dict(zip(names, (r["hits"] for r in rows), strict=True))
    assert hits["lru"] == hits["on-demand, lru"]
    assert hits["lfu"] == hits["on-demand, lfu"]
    assert max(hits.values()) == hits["Belady"] > hits["lfu"]
    assert rows[0]["share"] == 0.5
    assert seen[-1] == (6, 6)
    with pytest.raises(ValueError, match="policy"):
        lines([], ["mru"], {})
    with pytest.raises(ValueError, match="expected one of"):
        study(trace, lines(["nosuch"], ["lfu"], {}), [budget], timing=None)
    with pytest.raises(edgemoe.OutOfBudget):
        study(trace, ways, [100], timing=None)


def test_a_device_over_the_memory_says_what_vram_is_worth():
    trace = made(routing(6, 400, 3, 8, 2), 8, chunk=10)
    ways, whole = lines(["on-demand"], ["lfu"], {"on-demand": {"look_ahead": False}}), 24 * 2 * SIZE
    rows = study(trace, ways, [whole // 2], vrams=[0, whole // 6, whole // 2, whole], timing=None)
    mine = [r for r in rows if r["name"] == "on-demand"]
    assert [r["vram_share"] for r in mine] == pytest.approx([0, 1 / 6, 1 / 2, 1])
    assert mine[0]["hit_rate"] == study(trace, ways, [whole // 2], timing=None)[-3]["hit_rate"]
    there, hits = ([r[name] for r in mine] for name in ("device_rate", "hit_rate"))
    assert there[0] == 0 < there[1] < there[2] < there[3]
    assert there[3] > 0.9  # all fit, and each is copied once
    assert sum(r["device_bytes_in"] for r in mine[3:]) <= whole
    assert hits == sorted(hits)  # the host need not hold what the device has
    assert all(r["rate"] == 0 for r in mine)
    _, columns, out = tables.studied(rows)
    assert columns[7:10] == ["of a device", "run there", "copied/token"]
    assert {len(row) for row in out} == {len(columns)}


# --- HOBBIT's four weights


def test_fitted_weights_are_the_best_of_all_that_were_tried():
    """The experts in use change every ten tokens, so that recency reads less than frequency."""
    rng = np.random.default_rng(0)
    T, L, E, K = 120, 2, 12, 2
    experts = np.array(
        [[(t // 10 * 5 + rng.permutation(4)[:K]) % E for _ in range(L)] for t in range(T)]
    )
    tape = Tape(made(experts, E, chunk=4))
    budget = 2 * SIZE * L * 5
    first, second = tape.halves()
    assert (first.num_tokens, second.num_tokens) == (58, 58)
    assert [len(p[0].experts) for p in first.passes] == [4] + [1] * 58
    assert second.begins[:2] == [True, False]

    def read(half, weights):
        options = {"eviction": "hobbit", **dict(zip(NAMES, weights, strict=True))}
        made_ = make_scheduler(half, "on-demand", budget_bytes=budget, options=options)
        return replay(half, made_, budget_bytes=budget).bytes_read

    seen = []
    found = fit_weights(tape, budget_bytes=budget, progress=seen.append)
    assert sum(found.weights) == 1
    assert seen == list(range(1, found.replays + 1))
    rows = {name: (a.bytes_read, b.bytes_read) for name, a, b in found.rows}
    assert list(rows) == ["lru", "lfu", "next-use", "hobbit, equal weights", "hobbit, fitted"]
    assert rows["hobbit, fitted"] == (read(first, found.weights), read(second, found.weights))
    corners = [tuple(float(i == j) for j in range(4)) for i in range(4)]
    assert rows["hobbit, fitted"][0] <= min(read(first, w) for w in corners)
    assert rows["hobbit, fitted"][0] < rows["lfu"][0]
    assert found.weights[0] > 0
    with pytest.raises(ValueError, match="2 or more single tokens, got 1"):
        fit_weights(Tape(made(experts[:5], E, chunk=4)), budget_bytes=budget)

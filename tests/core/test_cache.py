"""The expert cache against a small Python model, and its invariants under thousands of random requests."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import numpy as np
import pytest
from engines import begin

from edgemoe.errors import FormatError, OutOfBudget, ReadError
from edgemoe.file.reader import open_moe
from edgemoe.plan import Plan, Priorities
from edgemoe.store import ExpertStore, expert_bytes

N = 16  # experts of the tiny model
ONE = np.arange(2, dtype=np.int32)


@pytest.fixture(scope="module")
def moe(tiny_moe):
    return open_moe(tiny_moe)


def pages(moe, level):
    return expert_bytes(moe, level) // 4096


class Model:
    """A model of the cache: the levels of its experts, in pages, and what a request for one expert must do."""

    def __init__(self, sizes, budget, policy, kept=0):
        self.sizes, self.budget, self.policy, self.kept = sizes, budget, policy, kept
        self.level = {}
        self.scores = [0.0] * N
        self.weight = 1.0
        self.layer = -1
        self.hits = self.misses = self.evictions = 0

    def used(self):
        return sum(self.sizes[level] for level in self.level.values())

    def request(self, expert, level):
        if self.policy == "lru":
            self.weight += 1
            self.scores[expert] = self.weight
        else:  # a use counts half after 64 passes of a token
            if expert // 8 <= self.layer:
                self.weight *= 2 ** (1 / 64)
            self.layer = expert // 8
            self.scores[expert] += self.weight
        if self.level.get(expert, 0) >= level:
            self.hits += 1
            return
        self.misses += 1
        self.level.pop(expert, 0)
        while self.used() + self.sizes[level] > self.budget:
            sizes, kept = self.sizes, self.kept
            larger = [e for e, own in self.level.items() if kept and sizes[own] > sizes[kept]]
            if larger:
                self.level[min(larger, key=self.scores.__getitem__)] = self.kept
                continue
            del self.level[min(self.level, key=self.scores.__getitem__)]
            self.evictions += 1
        self.level[expert] = level

    def shrink(self, expert, level):
        if level < self.level.get(expert, 0):
            if level == 0:
                del self.level[expert]
                self.evictions += 1
            else:
                self.level[expert] = level


def one(cache, expert, level):
    cache.begin(np.array([expert], np.int32), np.array([level], np.int8), ONE, 1)
    assert cache.next() == [0]
    assert cache.residency[expert] >= level
    assert cache.next() == []


@pytest.mark.parametrize("budget_experts", [1, 2.5, 4, 7.3, 16, 40])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("policy", "kept"), [("lru", 0), ("lfu", 0), ("lru", 2)])
def test_single_requests_equal_the_model(moe, budget_experts, mixed, policy, kept):
    top = 5
    sizes = [0] + [pages(moe, level) for level in range(1, top + 1)]
    budget = int(budget_experts * sizes[top])
    store = ExpertStore.open(moe, bits=8, budget_bytes=budget * 4096, verify=True, policy=policy)
    cache, model = store.cache, Model(sizes, budget, policy, kept)
    cache.keep(kept)
    rng = np.random.default_rng(int(budget_experts * 10) + mixed)
    for _ in range(1500 if not kept else 500):
        expert = int(min(rng.geometric(0.15) - 1, N - 1))
        level = int(rng.integers(1, top + 1)) if mixed else top
        if mixed and rng.random() < 0.1:
            level = int(rng.integers(0, top + 1))
            assert cache.shrink(expert, level)
            model.shrink(expert, level)
        else:
            one(cache, expert, level)
            model.request(expert, level)
        cache.check_integrity()
        assert dict(model.level) == {e: lv for e, lv in enumerate(cache.residency) if lv}
    stats = cache.stats
    assert (stats["hits"], stats["misses"], stats["evictions"]) == (
        model.hits,
        model.misses,
        model.evictions,
    )
    assert stats["peak_bytes"] <= budget * 4096


@pytest.mark.parametrize("budget_experts", [1, 2, 3.2, 6, 16])
def test_every_expert_of_a_request_is_given_once_and_pinned(moe, budget_experts):
    store = ExpertStore.open(
        moe, bits=8, budget_bytes=int(budget_experts * expert_bytes(moe, 5)), verify=True
    )
    cache = store.cache
    rng = np.random.default_rng(0)
    for _ in range(400):
        n = int(rng.integers(1, N + 1))
        experts = rng.permutation(N)[:n].astype(np.int32)
        levels = rng.integers(1, 6, n).astype(np.int8)
        cache.begin(experts, levels, np.arange(n + 1, dtype=np.int32), 1)
        given = []
        while group := cache.next():
            for i in group:
                assert cache.residency[experts[i]] >= levels[i]
                assert not cache.shrink(int(experts[i]), 0)
            given += group
            cache.check_integrity()
            if rng.random() < 0.05:
                break
        else:
            assert sorted(given) == list(range(n))
        cache.close()
        cache.check_integrity()


def test_requests_that_make_no_sense_are_refused(moe):
    store = ExpertStore.open(moe, bits=4, budget_bytes=1 << 20, verify=True)
    cache = store.cache
    for experts, levels in [
        ([3] * 70, [1] * 70),
        ([16], [1]),
        ([-1], [1]),
        ([0], [0]),
        ([0], [4]),
        ([1, 1], [1, 1]),
    ]:
        with pytest.raises(ValueError, match="Cache"):
            cache.begin(
                np.array(experts, np.int32), np.array(levels, np.int8),
                np.arange(len(experts) + 1, dtype=np.int32), 1,
            )  # fmt: skip
        cache.check_integrity()
    with pytest.raises(TypeError):
        cache.begin(
            np.zeros(4, np.int32)[::2], np.ones(2, np.int8), np.arange(3, dtype=np.int32), 1
        )
    with pytest.raises(ValueError, match="experts ahead and their levels together"):
        cache.begin(ONE[1:], np.ones(1, np.int8), ONE, 1, ahead=ONE)
    with pytest.raises(OutOfBudget, match="one expert takes"):
        ExpertStore.open(moe, bits=8, budget_bytes=expert_bytes(moe, 5) - 4096, verify=True)


def test_a_failing_read_surfaces_where_its_weights_are_used(tiny_moe, tmp_path):
    path = tmp_path / "x.moe"
    path.write_bytes(tiny_moe.read_bytes())
    moe = open_moe(path)
    store = ExpertStore.open(moe, bits=8, budget_bytes=6 * expert_bytes(moe, 5), verify=True)
    lost = 5
    os.truncate(path, int(moe.experts.offsets[lost]) + 100)

    def plan(experts):
        n = len(experts)
        return Plan(
            0, np.array(experts, np.int32), np.full(n, 8, np.int8), np.arange(n + 1, dtype=np.int32),
            np.zeros(n, np.int32), np.arange(n, dtype=np.int32).reshape(1, n), np.ones((1, n), np.float32),
        )  # fmt: skip

    for _ in range(3):
        with pytest.raises(ReadError, match=rf"{path}: .*ends at offset"):
            store.request(plan([0, lost, 1, 2]))
            list(store.ready_groups())
        store.cache.check_integrity()
        assert store.residency[0, lost] == 0
        store.request(plan([0, 1, 2]))
        assert sorted(i for group in store.ready_groups() for i in group) == [0, 1, 2]
    path.write_bytes(tiny_moe.read_bytes())
    store.request(plan([lost]))
    assert list(store.ready_groups()) == [[0]]


def test_residency_is_a_read_only_live_view(moe):
    store = ExpertStore.open(moe, bits=8, budget_bytes=1 << 22, verify=True)
    view = store.residency[1]
    assert view.sum() == 0
    one(store.cache, 9, 3)
    assert view.tolist() == [0, 3, 0, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def run(cache, *request):
    begin(cache, *request)
    given = []
    while group := cache.next():
        given += group
    return given


def test_an_expert_read_ahead_is_there_when_it_is_wanted(moe):
    cache = ExpertStore.open(moe, bits=8, budget_bytes=1 << 22, verify=True).cache
    run(cache, [0, 1], [5, 5], [8, 9], [5, 2])
    deadline = time.monotonic() + 30
    while cache.residency[[8, 9]].tolist() != [5, 2] and time.monotonic() < deadline:
        run(cache, [], [], [8, 9], [5, 2])
    begin(cache, [8, 9, 10], [5, 2, 5])
    cache.next()
    cache.close()
    stats = cache.stats
    assert (stats["hits"], stats["misses"]) == (2, 3)
    assert (stats["ahead_reads"], stats["ahead_used"]) == (2, 2)
    cache.check_integrity()


def test_reads_ahead_take_nothing_that_is_wanted(moe):
    """With room for three, of which two are in use and one is wanted soon: nothing else is read ahead.

    The one that is wanted soon is dropped last.
    """
    top = expert_bytes(moe, 5)
    cache = ExpertStore.open(moe, bits=8, budget_bytes=3 * top, verify=True).cache
    run(cache, [0], [5])
    run(cache, [8], [5])  # the least used of those in memory, but wanted soon
    for _ in range(3):
        run(cache, [0], [5])
    begin(cache, [1, 2], [5, 5], [8, 9, 10], [5, 5, 5])
    # The first group has one or both. Until the next call each of the two is in use, or waited for.
    given = cache.next()
    assert set(np.flatnonzero(cache.residency)) <= {1, 2, 8}
    while group := cache.next():
        given += group
        cache.check_integrity()
    assert sorted(given) == [0, 1]
    run(cache, [8], [5])
    assert cache.stats["hits"] == 4


def test_reads_ahead_that_never_began_are_not_counted(moe):
    cache = ExpertStore.open(moe, bits=8, budget_bytes=1 << 22, verify=True).cache
    for _ in range(20):
        for expert in range(8, 16):
            cache.shrink(expert, 0)
        run(cache, [], [], range(8, 16), [5] * 8)
        run(cache, [], [])  # cancels reads that have not begun
    deadline = time.monotonic() + 30
    while cache.residency[8] == 0 and time.monotonic() < deadline:  # one that does begin
        run(cache, [], [], [8], [5])
    while cache.stats["reads"] != cache.stats["ahead_reads"] and time.monotonic() < deadline:
        run(cache, [], [])
    assert cache.stats["reads"] == cache.stats["ahead_reads"] > 0
    cache.check_integrity()


def test_random_requests_with_wishes_keep_the_books(moe):
    rng = np.random.default_rng(1)
    for experts in (1, 2.5, 5, 12, 40):
        store = ExpertStore.open(
            moe, bits=8, budget_bytes=int(experts * expert_bytes(moe, 5)), verify=True
        )
        cache = store.cache
        for _ in range(300):
            base = 8 * int(rng.integers(2))
            n, m = rng.integers(1, 6), rng.integers(0, 9)
            chosen = base + rng.permutation(8)[:n]
            low = rng.integers(1, 6, n)
            # Asks for some of them again, at a higher level.
            again = [(e, lv + 1) for e, lv in zip(chosen, low, strict=True) if lv < 5]
            wanted = [*zip(chosen, low, strict=True), *again[:2]]
            ids, levels = (list(v) for v in zip(*wanted, strict=True))
            soon = rng.permutation(N)[:m]
            begin(cache, ids, levels, soon, rng.integers(1, 6, m))
            given = []
            while group := cache.next():
                for i in group:
                    assert cache.residency[ids[i]] >= levels[i]
                given += group
                cache.check_integrity()
                if rng.random() < 0.05:
                    break
            else:
                assert sorted(given) == list(range(len(ids)))
            cache.close()
            cache.check_integrity()
        assert cache.stats["peak_bytes"] <= cache.stats["budget_bytes"]


def test_a_dry_cache_decides_as_the_real_one(moe):
    rng = np.random.default_rng(2)
    sizes = [expert_bytes(moe, level) for level in range(1, 6)]
    priorities = Priorities.zeros(2, 8)
    for policy in ("lru", "lfu", priorities):
        for experts in (4, 7.3):
            budget = int(experts * sizes[-1])
            real = ExpertStore.open(
                moe, bits=8, budget_bytes=budget, verify=True, policy=policy
            ).cache
            dry = ExpertStore.dry(
                num_layers=2, num_experts=8, level_bits=(2, 3, 4, 6, 8), level_bytes=sizes,
                budget_bytes=budget, policy=policy,
            ).cache  # fmt: skip
            for _ in range(300):
                base = 8 * int(rng.integers(2))
                chosen, levels = base + rng.permutation(8)[:3], rng.integers(1, 6, 3)
                priorities.scores[:] = rng.random((2, 8))
                priorities.version[:] += 1
                assert run(dry, chosen, levels) == [0, 1, 2]
                assert sorted(run(real, chosen, levels)) == [0, 1, 2]
                assert (real.residency == dry.residency).all()
                dry.check_integrity()
            same = ("hits", "misses", "evictions", "bytes_read", "reads", "resident_bytes", "bits")
            assert {k: real.stats[k] for k in same} == {k: dry.stats[k] for k in same}


def open_with(moe, policy):
    ExpertStore.open(moe, bits=8, budget_bytes=1 << 22, verify=True, policy=policy)


def test_the_lowest_priority_goes_first(moe):
    priorities = Priorities.zeros(2, 8)
    scores = priorities.scores.reshape(-1)
    scores[:] = np.arange(N)
    cache = ExpertStore.open(
        moe, bits=8, budget_bytes=3 * expert_bytes(moe, 5), verify=True, policy=priorities
    ).cache
    for e in (0, 1, 2):
        one(cache, e, 5)
    scores[0], scores[2] = 9, -1
    priorities.version[0] += 1
    one(cache, 3, 5)
    assert np.flatnonzero(cache.residency).tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match=r"scores: expected shape \[2, 8\], got \[2, 4\]"):
        open_with(moe, Priorities.zeros(2, 4))
    with pytest.raises(ValueError, match="decides: expected shape"):
        open_with(moe, replace(priorities, decides=np.ones(2, np.uint8)))
    with pytest.raises(TypeError, match="whose scale is a contiguous float64 array"):
        open_with(moe, replace(priorities, scale=np.ones(4)[::2]))
    with pytest.raises(TypeError, match="whose version is a contiguous uint32 array"):
        open_with(moe, replace(priorities, version=np.ones(2)))
    with pytest.raises(TypeError, match="policy: expected a name or priorities"):
        open_with(moe, np.zeros(N))


def test_a_failing_read_ahead_harms_nobody(tiny_moe, tmp_path):
    path = tmp_path / "x.moe"
    path.write_bytes(tiny_moe.read_bytes())
    moe = open_moe(path)
    cache = ExpertStore.open(moe, bits=8, budget_bytes=6 * expert_bytes(moe, 5), verify=True).cache
    lost = 8
    with open(path, "r+b") as file:
        file.seek(int(moe.experts.offsets[lost]) + 100)
        file.write(b"\xff\x00\xff")
    for _ in range(3):
        assert sorted(run(cache, [0, 1], [5, 5], [lost], [5])) == [0, 1]
        cache.check_integrity()
        with pytest.raises(FormatError, match="checksum of expert 0 of layer 1"):
            run(cache, [lost], [5])
        cache.check_integrity()


def test_a_dry_cache_has_no_weights_to_give():
    cache = ExpertStore.dry(
        num_layers=1,
        num_experts=2,
        level_bits=(2, 4),
        level_bytes=(4096, 8192),
        budget_bytes=1 << 14,
    ).cache
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the cache is dry"):
            cache.decode(0, 1)
        cache.check_integrity()
    assert run(cache, [0, 1], [1, 2]) == [0, 1]


def test_a_plan_is_asked_for_by_layer_and_bits():
    cache = ExpertStore.dry(
        num_layers=2, num_experts=4, level_bits=(2, 4, 8), level_bytes=(4096, 8192, 16384),
        budget_bytes=4 * 16384,
    ).cache  # fmt: skip
    assert cache.levels.tolist() == [0, 0, 1, 0, 2, 0, 0, 0, 3]
    some, bits = np.array([3, 1], np.int32), np.array([8, 2], np.int8)
    offsets = np.array([0, 1, 1], np.int32)
    experts, levels = cache.ask(1, some, bits, offsets, 1, np.array([6], np.int32), bits[:1] // 2)
    assert experts.tolist() == [7, 5]
    assert levels.tolist() == [3, 1]
    experts, levels = cache.ask(0, some, bits, offsets, 1)  # replaces the open request
    assert experts.tolist() == [3, 1]
    while cache.next():
        pass
    assert cache.residency.tolist() == [0, 1, 0, 3, 0, 1, 2, 3]
    for given, what in [
        ({"layer": 2}, "layer"), ({"layer": -1}, "layer"), ({"experts": some + 1}, "experts"),
        ({"bits": bits + 1}, "bits"), ({"bits": bits - 1}, "Cache"), ({"bits": bits[:1]}, "bits"),
        ({"offsets": offsets[1:]}, "offsets"), ({"ahead": some}, "together"),
        ({"ahead": some, "ahead_bits": bits[:1]}, "ahead_bits"),
    ]:  # fmt: skip
        right = {"layer": 0, "experts": some, "bits": bits, "offsets": offsets, "num_tokens": 1}
        with pytest.raises(ValueError, match=what):
            cache.ask(**{**right, **given})
        cache.check_integrity()


def test_an_expert_is_used_as_often_as_it_has_tokens():
    cache = ExpertStore.dry(
        num_layers=1, num_experts=4, level_bits=(8,), level_bytes=(4096,), budget_bytes=2 * 4096
    ).cache
    levels = np.ones(2, np.int8)

    def run(experts, offsets):
        experts, offsets = np.array(experts, np.int32), np.array(offsets, np.int32)
        cache.begin(experts, levels[: len(experts)], offsets, int(offsets[-1]))
        while cache.next():
            pass

    run([0, 1], [0, 3, 4])
    np.testing.assert_allclose(cache.uses[:2], [3 * 2 ** (-4 / 64), 2 ** (-4 / 64)])
    run([2], [0, 1])
    assert np.flatnonzero(cache.residency).tolist() == [0, 2]


def test_an_upgrade_reads_only_what_is_missing():
    cache = ExpertStore.dry(
        num_layers=1,
        num_experts=2,
        level_bits=(4, 8),
        level_bytes=(4096, 12288),
        budget_bytes=24576,
    ).cache
    for level, total in ((1, 4096), (2, 12288), (2, 12288), (1, 12288)):
        begin(cache, [0], [level])
        while cache.next():
            pass
        assert cache.stats["bytes_read"] == total


def test_what_has_to_go_is_lowered_before_anything_is_evicted():
    cache = ExpertStore.dry(
        num_layers=1, num_experts=5, level_bits=(4, 8), level_bytes=(4096, 8192), budget_bytes=16384,
        policy="lru",
    ).cache  # fmt: skip
    cache.keep(1)
    for expert, levels in enumerate(
        ([2, 0, 0, 0, 0], [2, 2, 0, 0, 0], [1, 1, 2, 0, 0], [0, 1, 1, 2, 0], [0, 0, 1, 1, 2])
    ):
        begin(cache, [expert], [2])
        while cache.next():
            pass
        assert cache.residency.tolist() == levels
        cache.check_integrity()
    before = cache.stats["bytes_read"]
    begin(cache, [2], [2])  # only the missing rungs are read
    while cache.next():
        pass
    assert cache.stats["bytes_read"] - before == 4096
    assert cache.stats["evictions"] == 2
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="no such level"):
            cache.keep(wrong)
    begin(cache, [2], [2])
    with pytest.raises(RuntimeError, match="a request is open"):
        cache.keep(0)

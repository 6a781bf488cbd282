"""The expert cache against a small Python model, and its invariants under thousands of random requests."""

from __future__ import annotations

import os

import numpy as np
import pytest

from edgemoe.errors import OutOfBudget, ReadError
from edgemoe.format import open_moe
from edgemoe.plan import Plan
from edgemoe.store import ExpertStore, expert_bytes

N = 16  # experts of the tiny model
ONE = np.arange(2, dtype=np.int32)


@pytest.fixture(scope="module")
def moe(tiny_moe):
    return open_moe(tiny_moe)


def pages(moe, level):
    return expert_bytes(moe, level) // 4096


class Model:
    """Experts at levels, in pages, and what a request of one expert must do."""

    def __init__(self, sizes, budget, policy):
        self.sizes, self.budget, self.policy = sizes, budget, policy
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
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_single_requests_equal_the_model(moe, budget_experts, mixed, policy):
    top = 5
    sizes = [0] + [pages(moe, level) for level in range(1, top + 1)]
    budget = int(budget_experts * sizes[top])
    store = ExpertStore(moe, bits=8, budget_bytes=budget * 4096, verify=True, policy=policy)
    cache, model = store.cache, Model(sizes, budget, policy)
    rng = np.random.default_rng(int(budget_experts * 10) + mixed)
    for _ in range(1500):
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
    store = ExpertStore(
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
    store = ExpertStore(moe, bits=4, budget_bytes=1 << 20, verify=True)
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
    with pytest.raises(OutOfBudget, match="one expert takes"):
        ExpertStore(moe, bits=8, budget_bytes=expert_bytes(moe, 5) - 4096, verify=True)


def test_a_failing_read_surfaces_where_its_weights_are_used(tiny_moe, tmp_path):
    path = tmp_path / "x.moe"
    path.write_bytes(tiny_moe.read_bytes())
    moe = open_moe(path)
    store = ExpertStore(moe, bits=8, budget_bytes=6 * expert_bytes(moe, 5), verify=True)
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
    store = ExpertStore(moe, bits=8, budget_bytes=1 << 22, verify=True)
    view = store.residency[1]
    assert view.sum() == 0
    one(store.cache, 9, 3)
    assert view.tolist() == [0, 3, 0, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1

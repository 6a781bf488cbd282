"""The cache's books agree with the kernel's, which `mincore` tells, while levels mix and the budget changes."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
from engines import begin

from edgemoe import _core
from edgemoe.errors import OutOfBudget
from edgemoe.file.reader import open_moe
from edgemoe.store import ExpertStore, expert_bytes

N, TOP = 16, 5  # experts and levels of the tiny model
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def resident_bytes(owner) -> int:
    """Returns how many bytes of a cache's slots, or of a layer's keys and values, are in memory, by the kernel."""
    content = owner.content
    pages = ctypes.create_string_buffer(-(-content.size // mmap.PAGESIZE))
    assert _libc.mincore(content.ctypes.data, content.size, pages) == 0, ctypes.get_errno()
    return mmap.PAGESIZE * sum(page & 1 for page in pages.raw)


def run(cache, *request):
    begin(cache, *request)
    while cache.next():
        pass


@pytest.fixture(scope="module")
def moe(tiny_moe):
    return open_moe(tiny_moe)


@pytest.fixture(scope="module")
def top(moe):
    return expert_bytes(moe, TOP)


def store(moe, budget, most=0):
    return ExpertStore.open(moe, bits=8, budget_bytes=budget, most_bytes=most, verify=True)


@pytest.mark.parametrize("experts", [1, 2.5, 6, 11.3])
def test_slots_never_take_more_than_the_books_say(moe, top, experts):
    cache = store(moe, int(experts * top)).cache
    rng = np.random.default_rng(int(experts))
    fullest = 0
    for _ in range(200):
        n, m = int(rng.integers(1, 6)), int(rng.integers(0, 5))
        begin(cache, rng.permutation(N)[:n], rng.integers(1, TOP + 1, n),
              rng.permutation(N)[:m], rng.integers(1, TOP + 1, m))  # fmt: skip
        while cache.next():
            assert resident_bytes(cache) <= cache.stats["committed_bytes"]
        if rng.random() < 0.3:
            cache.shrink(int(rng.integers(N)), int(rng.integers(TOP)))
        stats = cache.stats
        taken = resident_bytes(cache)
        assert taken <= stats["committed_bytes"] <= stats["budget_bytes"] <= experts * top
        fullest = max(fullest, taken)
    assert fullest > 0.9 * int(experts * top) - top  # the budget is used up, too


def test_pages_of_a_lower_level_go_back_to_the_system(moe, top):
    cache = store(moe, 4 * top).cache
    run(cache, [0, 1, 2, 3], [TOP] * 4)
    assert resident_bytes(cache) == cache.stats["committed_bytes"] == 4 * top
    for expert in range(4):
        assert cache.shrink(expert, 1)
    assert resident_bytes(cache) == cache.stats["committed_bytes"] == 4 * cache.slot_bytes(1)
    # A small expert in the slot of a large one leaves the other pages to others.
    for expert in range(4):
        assert cache.shrink(expert, 0)
    run(cache, [8, 9, 10, 11], [1] * 4)
    run(cache, [12, 13, 14], [TOP] * 3)
    assert resident_bytes(cache) <= cache.stats["committed_bytes"] <= 4 * top


def test_a_smaller_budget_gives_pages_back_before_it_returns(moe, top):
    cache = store(moe, 2 * top, most=6 * top).cache
    run(cache, range(6), [TOP] * 6)
    assert (cache.residency > 0).sum() == 2
    cache.set_budget(6 * top)
    for _ in range(4):  # the most used ones stay
        run(cache, [4, 5], [TOP] * 2)
    run(cache, range(6), [TOP] * 6)
    assert np.flatnonzero(cache.residency).tolist() == [0, 1, 2, 3, 4, 5]
    assert resident_bytes(cache) == 6 * top
    cache.set_budget(2 * top + 4096)
    cache.check_integrity()
    assert resident_bytes(cache) == cache.stats["committed_bytes"] == 2 * top
    assert np.flatnonzero(cache.residency).tolist() == [4, 5]
    with pytest.raises(OutOfBudget, match="one expert takes"):
        cache.set_budget(top - 4096)
    assert cache.stats["budget_bytes"] == 2 * top + 4096
    cache.set_budget(100 * top)  # limited to what slots were made for
    assert cache.stats["budget_bytes"] == 6 * top
    run(cache, range(8), [TOP] * 8)
    assert resident_bytes(cache) == cache.stats["committed_bytes"] == 6 * top


def test_the_budget_changes_between_requests_only(moe, top):
    cache = store(moe, 4 * top).cache
    begin(cache, [0, 1], [TOP] * 2)
    with pytest.raises(RuntimeError, match="a request is open"):
        cache.set_budget(2 * top)
    cache.close()
    assert cache.stats["budget_bytes"] == 4 * top


def test_a_smaller_budget_waits_for_reads_ahead(moe, top):
    cache = store(moe, 8 * top).cache
    for _ in range(50):
        cache.set_budget(8 * top)
        run(cache, [0], [TOP], range(8, 16), [TOP] * 8)
        cache.set_budget(top)
        cache.check_integrity()
        assert resident_bytes(cache) <= cache.stats["committed_bytes"] <= top


@pytest.mark.parametrize(
    ("capacity", "resident", "share"), [(512, False, 0), (512, True, 1), (40_000, False, 1)]
)
def test_keys_and_values_that_do_not_grow_are_there_from_the_start(capacity, resident, share):
    kv = _core.KvLayer(
        key_type="f16", value_type="q8_0", num_heads=2, capacity=capacity, head_dim=32, resident=resident
    )  # fmt: skip
    pages = -(-kv.content.size // mmap.PAGESIZE) * mmap.PAGESIZE
    assert resident_bytes(kv) == share * pages

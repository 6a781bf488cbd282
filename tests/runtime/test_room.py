"""Experts get the memory that nothing else uses yet, and never more than the budget leaves."""

from __future__ import annotations

import dataclasses
import mmap

import numpy as np
import pytest

import edgemoe
from edgemoe import OutOfBudget, hardware
from edgemoe.model import Batch, SequenceState
from edgemoe.runtime.budget import Budget
from edgemoe.runtime.context import KV_STEP
from edgemoe.runtime.room import Room
from edgemoe.store import ExpertStore

KIB, MIB = 1 << 10, 1 << 20
EXPERT, EXPERTS = 64 * KIB, 64
STEP = 96 * KIB  # of keys and values
EDGES = 8 * KIB
ROW = 4 * KIB


def budget(**changes):
    """Returns a budget with 1 MiB for experts, and 16 MiB reserved for a sequence and a chunk."""
    parts = {
        "process": 10 * MIB, "growth": 5 * MIB, "tables": 0, "dense": 2 * MIB, "kv": 12 * MIB,
        "scratch": 5 * MIB,
    }  # fmt: skip
    return Budget(**{
        "ram": sum(parts.values()) + MIB, **parts, "active_dense": 0, "sequences": 1, "kv_at_once": 0,
        "kv_step": STEP, "kv_edges": EDGES, "row": ROW, "expert": EXPERT, "experts": EXPERTS * EXPERT,
        "context": 4096, "chunk": 512, "slack": MIB, **changes,
    })  # fmt: skip


def room(budget, *, is_measured=False, is_steady=False):
    """Returns a room, and the cache whose slots it sizes."""
    cache = ExpertStore.dry(
        num_layers=1, num_experts=EXPERTS, level_bits=(8,), level_bytes=(EXPERT,),
        budget_bytes=budget.slots, most_bytes=budget.most_slots,
    ).cache  # fmt: skip
    return Room(budget, cache, is_measured=is_measured, is_steady=is_steady), cache


def sequence(room, length=0):
    state = SequenceState([], 4096)
    state.ids = [0] * length
    room.states.add(state)
    return state


def run(room, state, count):
    """Runs a pass of `count` tokens."""
    batch = Batch.of((state, np.zeros(count, np.int32)))
    room.fit(batch)
    state.ids.extend([0] * count)


def expected(b, positions, tokens, sequences=1):
    taken = b.fixed - b.kv - b.chunk * ROW + tokens * ROW
    taken += sequences * (-(-positions // KV_STEP) * STEP + EDGES)
    return max(min(b.ram - taken, b.experts), b.expert)


def test_what_a_sequence_does_not_use_yet_holds_experts():
    b = budget(experts=1000 * EXPERT)
    r, cache = room(b)
    state = sequence(r)
    assert cache.stats["budget_bytes"] == r.size == b.slots == MIB
    run(r, state, 5)
    assert r.size == expected(b, 5, 5) > 8 * MIB
    assert cache.stats["budget_bytes"] == r.size // 4096 * 4096
    for _ in range(27):  # up to the step's end nothing changes
        run(r, state, 1)
        assert r.size == expected(b, 32, 5)
    run(r, state, 1)
    assert r.size == expected(b, 33, 5) == expected(b, 32, 5) - STEP
    run(r, state, 512)
    assert r.size == expected(b, 33 + 512, 512)
    while state.length < 4096:
        run(r, state, min(512, 4096 - state.length))
    # Everything reserved is in use: experts have their guaranteed part, less partly used pages.
    assert r.size == b.slots - EDGES


def test_going_back_takes_no_room_twice():
    b = budget(experts=1000 * EXPERT)
    r, _ = room(b)
    state = sequence(r)
    run(r, state, 100)
    before = r.size
    del state.ids[10:]
    for _ in range(90):
        run(r, state, 1)
        assert r.size == before


def test_each_sequence_takes_its_own_and_gives_it_back():
    b = budget(experts=1000 * EXPERT, sequences=2)
    r, _ = room(b)
    first, second = sequence(r), sequence(r)
    run(r, first, 40)
    run(r, second, 40)
    assert r.size == expected(b, 40, 40, sequences=2)
    del first
    run(r, second, 60)  # wider than before, so that sizes are updated
    assert r.size == expected(b, 100, 60)


def test_all_experts_are_enough_and_one_the_least():
    r, _ = room(budget())
    run(r, sequence(r), 1)
    assert r.size == EXPERTS * EXPERT
    b = budget(ram=35 * MIB - MIB, expert=EXPERT)
    r, cache = room(budget(fixed_slots=2 * EXPERT, ram=b.ram))
    run(r, sequence(r), 4000)
    assert r.size == EXPERT
    assert cache.stats["budget_bytes"] == EXPERT


def test_large_layers_are_taken_at_once():
    b = budget(experts=1000 * EXPERT, kv_at_once=12 * MIB, kv_step=0, kv_edges=0)
    r, _ = room(b)
    state = sequence(r)
    run(r, state, 1)
    assert r.size == b.ram - (b.fixed - b.chunk * ROW + ROW)
    run(r, state, 512)
    assert r.size == b.ram - b.fixed


def test_steady_slots_stay_and_held_ones_go_back():
    b = budget(experts=1000 * EXPERT)
    r, cache = room(b, is_steady=True)
    run(r, sequence(r), 100)
    assert r.size == b.slots == cache.stats["budget_bytes"]
    r, cache = room(b)
    run(r, sequence(r), 1)
    assert r.size > b.slots
    r.hold()
    assert r.size == b.slots == cache.stats["budget_bytes"]
    run(r, sequence(r), 1)
    assert r.size == b.slots


def test_a_process_that_grows_gives_up_slots_and_gets_them_back():
    hardware.trim()  # as measuring does where it grows
    taken = hardware.exact_process_bytes()
    b = budget(
        ram=taken + 64 * MIB, process=taken, growth=40 * MIB, dense=0, kv=12 * MIB, experts=1000 * EXPERT
    )  # fmt: skip
    r, _ = room(b, is_measured=True)
    state = sequence(r)

    def measured():
        r._next_s = 0.0
        run(r, state, 1)
        return r.size

    for _ in range(3):  # the reserve stays until warm
        assert measured() == expected(b, 1, 1)
    # Now experts get the reserve too: everything except the measured memory, the slack and growth to come.
    first = measured()
    assert first == pytest.approx(64 * MIB - MIB - 2 * (STEP + EDGES) - ROW, abs=4 * MIB)
    assert first > expected(b, 1, 1) + 30 * MIB
    ballast = touched(30 * MIB)
    assert measured() == pytest.approx(first - 30 * MIB, abs=2 * MIB)
    del ballast
    assert measured() == pytest.approx(first, abs=2 * MIB)


def touched(size):
    """Returns newly mapped memory, as malloc could return memory that the process already had."""
    pages = mmap.mmap(-1, size)
    np.frombuffer(pages, np.uint8)[:] = 1
    return pages


def test_what_is_lent_comes_back_with_the_next_pass():
    taken = hardware.exact_process_bytes()
    b = budget(ram=taken + 64 * MIB, process=taken, dense=0, kv=12 * MIB, experts=4000 * EXPERT)
    r, cache = room(b, is_measured=True)
    state = sequence(r)
    r.lend(b.growth)  # the reserve covers it
    assert r.size == b.slots
    for _ in range(5):
        run(r, state, 1)
    before = r.size
    r._next_s = float("inf")
    r.lend(8 * MIB)
    assert r.size == before - 8 * MIB
    assert cache.stats["budget_bytes"] == r.size // 4096 * 4096
    run(r, state, 1)
    assert r.size == pytest.approx(before, abs=2 * MIB)
    # Memory that the borrower kept is noticed at once.
    r.lend(8 * MIB)
    kept = touched(8 * MIB)
    run(r, state, 1)
    assert r.size == pytest.approx(before - len(kept), abs=2 * MIB)


def test_no_more_is_lent_than_there_is():
    hardware.trim()  # as lending does
    taken = hardware.exact_process_bytes()
    b = budget(ram=taken + 64 * MIB, process=taken, dense=0, kv=12 * MIB, experts=4000 * EXPERT)
    r, _ = room(b, is_measured=True)
    state = sequence(r)
    r.lend(b.growth + 8 * MIB)  # only what is beyond the reserve
    assert r.size == r._left() - 8 * MIB
    with pytest.raises(OutOfBudget, match=r"takes 105 MiB of memory .* leaves 60\.\d MiB"):
        r.lend(b.growth + 100 * MIB)
    for _ in range(5):
        run(r, state, 1)
    r._next_s = float("inf")
    ballast = touched(16 * MIB)
    before = r.size
    with pytest.raises(OutOfBudget, match=r"takes 100 MiB of memory .* leaves [34]\d(\.\d)? MiB"):
        r.lend(100 * MIB)
    assert r.size == before
    with pytest.raises(OutOfBudget):
        r.lend(before - EXPERT)  # the process was measured again, and has grown
    r.lend(before - EXPERT - len(ballast) - 2 * MIB)
    assert r.size <= EXPERT + 4 * MIB


def test_memory_that_was_given_back_is_lent():
    blocks = [bytearray(b"x") * 100_000 for _ in range(400)]  # too small to be mapped one by one
    kept = blocks[::40]
    taken = hardware.exact_process_bytes()
    b = budget(ram=taken + 64 * MIB, process=taken, dense=0, kv=12 * MIB, experts=4000 * EXPERT)
    r, _ = room(b, is_measured=True)
    state = sequence(r)
    for _ in range(5):
        run(r, state, 1)
    r._next_s = float("inf")
    before = r.size
    blocks.clear()  # the allocator keeps it
    r.lend(before + 16 * MIB)  # or it would raise
    assert r.size < before
    assert len(kept) == 10


def test_slots_that_keep_their_size_lend_what_nothing_needs():
    taken = hardware.exact_process_bytes()
    for spare in (0, 8 * MIB):
        b = budget(process=taken, ram=taken + 27 * MIB + spare, dense=0, fixed_slots=MIB)
        assert b.room == 5 * MIB + spare
        spare += 4 * MIB - EDGES
        r, cache = room(b, is_measured=True, is_steady=True)
        for _ in range(5):
            run(r, sequence(r), 1)
            assert r.borrow(spare + 1) == 1
            assert r.borrow(spare) == 0
            with pytest.raises(OutOfBudget):
                r.lend(b.growth + 1)
            r.lend(b.growth)
            assert r.borrow(0) == 0
            r.lend(b.growth + spare)
            with pytest.raises(OutOfBudget):
                r.lend(b.growth + spare + 1)
            assert r.size == MIB == cache.stats["budget_bytes"]


def test_what_is_borrowed_comes_back_when_it_is_returned():
    taken = hardware.exact_process_bytes()
    b = budget(ram=taken + 64 * MIB, process=taken, dense=0, kv=12 * MIB, experts=4000 * EXPERT)
    r, cache = room(b, is_measured=True)
    state = sequence(r)
    run(r, state, 1)
    first = r.size
    assert r.borrow(MIB) == 0  # before the first reply too: what is lent then is less
    assert r.size == first - MIB
    r.borrow(0)
    for _ in range(5):
        run(r, state, 1)
    before = r.size
    r.borrow(4 * MIB)
    r.borrow(8 * MIB)
    assert r.size == before - 8 * MIB
    used = touched(8 * MIB)
    for _ in range(3):
        r._next_s = 0.0
        run(r, state, 1)
        assert r.size == pytest.approx(before - 8 * MIB, abs=MIB)  # however often it is measured
    assert 900 * MIB < r.borrow(1000 * MIB) < 1000 * MIB
    r.rest()
    r.borrow(9 * MIB)
    assert r.size == EXPERT
    del used
    r.borrow(0)
    run(r, state, 1)
    assert r.size == pytest.approx(before, abs=2 * MIB)
    assert cache.stats["budget_bytes"] == r.size // 4096 * 4096
    r.borrow(8 * MIB)
    grown = touched(24 * MIB)
    r._next_s = 0.0
    run(r, state, 1)
    assert r.size == pytest.approx(before - len(grown), abs=2 * MIB)  # more than was borrowed


def test_memory_that_came_back_costs_no_measurement(monkeypatch):
    taken = hardware.exact_process_bytes()
    b = budget(ram=taken + 64 * MIB, process=taken, dense=0, experts=4000 * EXPERT)
    r, _ = room(b, is_measured=True)
    state = sequence(r)
    for _ in range(5):
        run(r, state, 1)
    before, r._next_s = r.size, float("inf")
    with monkeypatch.context() as patch:
        patch.setattr(
            hardware, "process_bytes", hardware.exact_process_bytes
        )  # for kernels that count late
        patch.delattr(hardware, "exact_process_bytes")
        for _ in range(2):
            r.borrow(8 * MIB)
            used = touched(6 * MIB)
            del used
            r.borrow(0)
            run(r, state, 1)
            assert r.size == before
    r.borrow(8 * MIB)
    kept = touched(8 * MIB)
    r.borrow(0)
    run(r, state, 1)
    assert r.size == pytest.approx(before - len(kept), abs=2 * MIB)


def test_what_was_reserved_beside_the_budget_is_not_counted_twice():
    taken = hardware.exact_process_bytes()
    b = budget(ram=taken + 64 * MIB, process=taken, dense=0, kv=12 * MIB, experts=4000 * EXPERT)
    r, _ = room(b, is_measured=True)
    state = sequence(r)
    for _ in range(5):
        run(r, state, 1)
    before = r.size
    kept = touched(16 * MIB)
    r._next_s = float("inf")
    assert r.borrow(MIB) == 0
    r.take_in(len(kept))
    run(r, state, 1)  # not measured, as how much of what is borrowed is in use is not known
    assert r.size == pytest.approx(before - MIB, abs=MIB / 4)
    r.borrow(0)
    run(r, state, 1)
    assert r.size == pytest.approx(before, abs=2 * MIB)
    r._next_s = 0
    run(r, state, 1)
    assert r.size == pytest.approx(before, abs=2 * MIB)


def test_what_is_taken_in_while_it_is_measured_counts_from_the_next_measurement(monkeypatch):
    r, _ = room(budget(experts=1000 * EXPERT), is_measured=True)
    state = sequence(r)
    run(r, state, 5)
    measured = hardware.exact_process_bytes

    def measure():
        found = measured()
        r.take_in(MIB)  # another thread has made what the measurement has not counted
        return found

    monkeypatch.setattr(hardware, "exact_process_bytes", measure)
    for _ in range(4):
        r._next_s = 0
        run(r, state, 1)
    assert r._ram == r._budget.ram
    monkeypatch.undo()
    run(r, state, 1)
    assert r._ram > r._budget.ram


def test_what_is_reserved_is_not_lent():
    b = budget(experts=1000 * EXPERT)
    r, _ = room(b, is_measured=True)
    state = sequence(r)
    run(r, state, 5)
    assert r.size > 8 * MIB
    most = b.room - EDGES - EXPERT  # passes may take the rest before it comes back
    assert r.borrow(14 * MIB) == 14 * MIB - most
    assert r.borrow(most) == 0
    while state.length < 4096:
        run(r, state, min(512, 4096 - state.length))
        assert r.size == expected(b, state.length, 512) - most
    assert r.size == EXPERT
    assert r.keep(1) == 1
    r.borrow(0)
    assert r.keep(MIB // 2) == 0
    assert r.borrow(most) == MIB // 2
    assert r.keep(most + 1) == 1
    assert r.keep(most) == 0
    assert r.size == EXPERT
    assert r.borrow(1) == 1


def test_measuring_takes_little_time():
    b = budget(ram=1 << 40, experts=1000 * EXPERT)
    r, _ = room(b, is_measured=True)
    state = sequence(r)
    for _ in range(5):
        run(r, state, 1)
    first = r._next_s
    for _ in range(20):
        run(r, state, 1)
    assert r._next_s == first > 0  # measuring walks page tables, so it waits 200 times as long


def test_slots_that_change_do_not_change_an_answer(tiny_moe, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 256, 200).tolist()
    with edgemoe.load(tiny_moe, context=256) as engine:
        expected_logits = [engine.logits(ids[:100], last_only=True).copy()]
        expected_logits += [engine.extend([i]).copy() for i in ids[100:]]
    real = Budget.divide.__func__

    def divide(cls, moe, **arguments):  # all of the room is used in the end
        b = real(cls, moe, **arguments)
        b = dataclasses.replace(b, kv=8 * b.expert, kv_step=b.expert, kv_edges=0, growth=0, row=0)
        return dataclasses.replace(b, ram=b.fixed + 2 * b.expert)

    monkeypatch.setattr(Budget, "divide", classmethod(divide))
    with edgemoe.load(tiny_moe, context=256) as engine:
        sizes = {engine.model.room.size}
        got = [engine.logits(ids[:100], last_only=True).copy()]
        for i in ids[100:]:
            got.append(engine.extend([i]).copy())
            sizes.add(engine.model.room.size)
            engine.model.store.cache.check_integrity()
    assert len(sizes) > 4
    np.testing.assert_array_equal(got, expected_logits)


def test_a_trace_holds_the_slots(tiny_moe, tmp_path, monkeypatch):
    real = Budget.divide.__func__

    def divide(cls, moe, **arguments):
        b = real(cls, moe, **arguments)
        return dataclasses.replace(b, ram=b.fixed + 2 * b.expert)

    monkeypatch.setattr(Budget, "divide", classmethod(divide))
    with edgemoe.load(tiny_moe, context=256) as engine:
        engine.logits([1, 2, 3])
        assert engine.model.room.size > engine.budget.slots
    with edgemoe.load(tiny_moe, context=256, trace=tmp_path / "x.trace") as engine:
        engine.logits([1, 2, 3])
        assert engine.model.room.size == engine.budget.slots == engine.model.setting.slots_bytes


def test_some_slack_stays_free_however_exactly_it_is_measured():
    taken = hardware.exact_process_bytes()
    sizes = []
    for slack in (MIB, 33 * MIB):
        b = budget(
            ram=taken + 128 * MIB, process=taken, dense=0, experts=4000 * EXPERT, slack=slack
        )
        r, _ = room(b, is_measured=True)
        state = sequence(r)
        for _ in range(5):
            run(r, state, 1)
        sizes.append(r.size)
    assert sizes[0] - sizes[1] == pytest.approx(32 * MIB, abs=2 * MIB)

"""On a CPU, work between choices of experts is recorded once and repeated without Python, and layers whose experts are
all in memory run without a plan. Bits and counters are the same, whatever moves meanwhile."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
from engines import logits_in_turn

import edgemoe
from edgemoe import _core
from edgemoe.errors import FormatError
from edgemoe.experts import Experts
from edgemoe.file.reader import open_moe
from edgemoe.ops import notes
from edgemoe.ops.cpu import CpuOps
from edgemoe.ops.notes import CpuNotes, Notes
from edgemoe.runtime.trace import read

IDS = np.random.default_rng(7).integers(0, 250, 300).tolist()
STAGES = {"none": (False, False), "repeated": (True, False), "ahead": (True, True)}


def params(count, **more):
    return edgemoe.SamplingParams(**{"temperature": 0, **more}, max_tokens=count, ignore_eos=True)


def told(engine, ids, how):
    """Returns a reply, the hash of its last logits, and all counters."""
    reply = list(engine.generate(ids, how))
    store, stats = engine.model.store, engine.stats
    books = store.runs.tolist(), store.reads.tolist(), store.lacks.tolist(), store.uses.tolist()
    counted = stats.hits, stats.misses, stats.average_bits, engine.model.counters[1:]
    return reply, stats.logits_hash, books, counted


@pytest.fixture
def stage(monkeypatch):
    """Returns a function that sets how much runs without Python; it returns the list of notes repeated since."""
    real, found = Notes.of, []

    def of(self, key, work):
        note = real(self, key, work)
        if note is not None:
            found.append(note)
        return note

    monkeypatch.setattr(Notes, "of", of)

    def choose(name):
        repeats, ahead = STAGES[name]
        monkeypatch.setattr(CpuOps, "repeats", repeats)
        monkeypatch.setattr(CpuOps, "runs_ahead", ahead)
        found.clear()
        return found

    return choose


def test_each_stage_has_the_same_bits_and_books(tiny_moe, stage):
    all_told, times = {}, {}
    for name in STAGES:
        found = stage(name)
        with edgemoe.load(tiny_moe, context=64) as engine:
            all_told[name] = [told(engine, IDS[:n], params(12)) for n in (5, 9)]
            layers = engine.config.num_layers
        times[name] = len(found)
    assert all_told["none"] == all_told["repeated"] == all_told["ahead"]
    tokens = 2 * 11  # the first of each reply is from the prompt's logits
    assert times["none"] == 0
    assert (tokens - 4) * (layers + 1) <= times["repeated"] <= tokens * (layers + 1)
    # Some tokens come while experts are still missing.
    assert tokens // 2 < times["ahead"] < times["repeated"]


@pytest.fixture
def ahead(monkeypatch):
    """The layers that were ahead, for each token with some."""
    real, found = Experts.count, []

    def count(self, layers):
        found.append(tuple(layers))
        real(self, layers)

    monkeypatch.setattr(Experts, "count", count)
    return found


@pytest.mark.parametrize("experts", [9, 13, 15])
@pytest.mark.parametrize("policy", ["lru", "lfu", "next-use"])
def test_while_experts_come_and_go(tiny_moe, stage, ahead, experts, policy):
    """There is no room for all 16 experts. With room for 15, some tokens find all experts of one layer in memory, which
    is then ahead. An eviction that learns from plans, such as next-use, sees all of them: no layer is ahead."""
    how, out = params(30, temperature=2.0, seed=3), []
    for name in ("none", "ahead"):
        stage(name)
        options = {"options": {"eviction": policy, "look_ahead": False}}
        with edgemoe.load(tiny_moe, context=64, **options) as engine:
            cache = engine.model.store.cache
            cache.set_budget(experts * cache.slot_bytes(5))
            out.append(told(engine, IDS[:5], how))
            cache.check_integrity()
    assert out[0] == out[1]
    assert sum(map(sum, out[0][2][1])) > 16  # reads
    if experts == 15 and policy != "next-use":
        assert set(ahead) == {(0,), (1,)}
        assert len(ahead) > 10
    else:
        assert not ahead


@pytest.mark.parametrize("most", [2, notes.MOST_NOTED])
def test_sequences_in_turn(tiny_moe, monkeypatch, stage, most):
    """Each sequence has its own keys and values, and so its own notes; the oldest are forgotten."""
    monkeypatch.setattr(notes, "MOST_NOTED", most)
    monkeypatch.setattr(notes, "MOST_STEPS", 8 * most)
    found = []
    for name in ("none", "ahead"):
        stage(name)
        with edgemoe.load(tiny_moe, context=64, sequences=3) as engine:
            found.append(logits_in_turn(engine, IDS))
    assert found[0] == found[1]


def test_what_is_noted_is_bounded_however_it_comes(monkeypatch):
    """Many keys come once, and then all come again."""
    monkeypatch.setattr(notes, "MOST_NOTED", 6)
    monkeypatch.setattr(notes, "MOST_STEPS", 5)
    ws = _core.Workspace(1, 4, 64, 64, 64, 16)
    x, out = np.ones((1, 64), np.float32), np.zeros((1, 64), np.float32)
    mine = CpuNotes(ws)

    def work():
        _core.add_rows(ws, x, 1.0, None, None, out)
        _core.add_rows(ws, x, 1.0, None, None, out)

    for key in range(8):
        assert mine.of(key, work) is None
    assert [key for key in range(8) if key in mine._made] == [2, 3, 4, 5, 6, 7]
    for key in range(2, 8):
        ws.repeat(mine.of(key, work))  # a note just made is there
        assert ws.noted <= 5 + 1
    assert out[0, 0] == 12
    again = mine.of(7, work)
    assert again == mine.of(7, work)  # and stays


def test_fewer_experts_and_bits_are_other_work(tiny_moe, stage):
    found = []
    for name in ("none", "ahead"):
        stage(name)
        out = []
        with edgemoe.load(tiny_moe, context=64) as engine:
            for more in ({}, {"experts": 1}, {"bits": 3}, {"experts": 2}):
                engine.change(**more)
                out.append(told(engine, IDS[:6], params(6)))
        found.append(out)
    assert found[0] == found[1]


def test_levels_that_change_in_place_are_other_work(tiny_moe, stage):
    found = []
    for name in ("none", "ahead"):
        stage(name)
        bits, out = np.full((2, 8), 8, np.int8), []
        with edgemoe.load(tiny_moe, context=64, options={"bits": bits}) as engine:
            for lower in (8, 3, 6):
                bits[:] = lower
                engine.model.experts.look_again()
                out.append(told(engine, IDS[:6], params(6)))
        found.append(out)
    assert found[0] == found[1]
    assert len({logits_hash for _, logits_hash, *_ in found[0]}) == 3


def test_a_layer_that_loses_an_expert_in_the_middle_is_not_ahead_any_more(tiny_moe, stage, ahead):
    """All experts of the second layer are in memory at the start, and the first layer's reads evict one of them."""
    found, lost = [], 0
    options = {"options": {"eviction": "lru", "look_ahead": False}}
    for name in ("none", "ahead"):
        stage(name)
        out, lost = [], 0
        with edgemoe.load(tiny_moe, context=64, **options) as engine:
            store = engine.model.store
            store.cache.set_budget(15 * store.cache.slot_bytes(5))
            engine.logits(IDS[:2])
            for token in IDS[2:40]:
                store.lower(np.zeros(16, np.int8))
                store.load(np.r_[8:16, 0:7].astype(np.int32), np.full(15, 8, np.int8))
                out.append(engine.extend([token]).copy())
                lost += not (store.residency[1] == 5).all()
        found.append(out)
    assert np.array_equal(*found)
    assert 0 < lost < 38
    assert ahead == [(1,)] * (38 - lost)


def test_where_blocks_of_positions_end(tiny_moe, stage):
    ids, found = [i % 90 for i in IDS[: _core.KEY_BLOCK - 5]], []
    for name in ("none", "ahead"):
        stage(name)
        with edgemoe.load(tiny_moe, context=300, bits=2, cache_type_k="q8_0") as engine:
            found.append(told(engine, ids, params(12)))
    assert found[0] == found[1]


@pytest.mark.parametrize("fails", [1, 5, 9, 11])
def test_what_fails_while_it_is_noted_is_not_repeated(tiny_moe, monkeypatch, stage, fails):
    """It fails in the prompt, in the first tokens, and in the token whose work is recorded; the next run is right."""
    real, calls, how = _core.add_norm, [], params(9)

    def add_norm(*args):
        calls.append(args)
        if len(calls) == fails:
            raise KeyboardInterrupt
        return real(*args)

    stage("none")
    with edgemoe.load(tiny_moe, context=64) as engine:
        expected = told(engine, IDS[:5], how)[:2]
    stage("ahead")
    with edgemoe.load(tiny_moe, context=64) as engine:
        monkeypatch.setattr(_core, "add_norm", add_norm)
        with contextlib.suppress(KeyboardInterrupt):
            told(engine, IDS[:5], how)
        assert told(engine, IDS[:5], how)[:2] == expected
    assert len(calls) > fails


def test_a_token_that_fails_half_way_counts_as_far_as_it_came(tiny_moe, tmp_path, stage):
    """Its first layer runs, without Python if enabled; then an expert of the second layer is damaged."""
    path, moe = tmp_path / "x.moe", open_moe(tiny_moe)
    first = int(moe.experts.offsets[8:].min())
    found = []
    for name in STAGES:
        stage(name)
        path.write_bytes(tiny_moe.read_bytes())
        with edgemoe.load(path, context=64) as engine, path.open("r+b") as file:
            told(engine, IDS[:5], params(30))
            store, before = engine.model.store, engine.model.counters
            assert (store.residency == 5).all()
            bits = np.repeat(np.array([8, 0], np.int8), 8)
            store.lower(bits)
            file.seek(first)
            file.write(bytes(os.path.getsize(path) - first))
            file.flush()
            with pytest.raises(FormatError, match="checksum"):
                engine.extend([3])
            now = engine.model.counters
        change = [now.store[n] - before.store[n] for n in ("hits", "misses")]
        found.append((change, now.routed - before.routed, store.runs.tolist()))
    assert found[0] == found[1] == found[2]
    assert found[0][0][0] == 2  # of the first layer
    assert found[0][1] == 4
    assert sum(found[0][0]) == 4


def test_a_request_that_was_left_open_is_closed(tiny_moe):
    """A request is left open, as by Ctrl-C, before a token that makes none."""
    with edgemoe.load(tiny_moe, context=64) as engine:
        expected = told(engine, IDS[:5], params(30))[:2]
        cache = engine.model.store.cache
        assert (cache.residency >= 5).all()
        cache.begin(np.array([3], np.int32), np.array([5], np.int8), np.array([0, 1], np.int32), 1)
        assert told(engine, IDS[:5], params(30))[:2] == expected
        cache.check_integrity()


def test_somebody_who_looks_sees_every_plan(tiny_moe, tmp_path, stage):
    rows = []
    for name in ("none", "ahead"):
        stage(name)
        path = tmp_path / f"{name}.trace"
        with edgemoe.load(tiny_moe, context=64, trace=path) as engine:
            told(engine, IDS[:5], params(8))
        rows.append(read(path).rows)
    np.testing.assert_array_equal(rows[0]["experts"], rows[1]["experts"])
    assert len(rows[0]) == len(rows[1])


def test_what_computes_is_not_lost_while_work_is_noted():
    ws = _core.Workspace(2, 4, 64, 64, 64, 16)
    x, out = np.ones((2, 64), np.float32), np.zeros((2, 64), np.float32)
    rows, gates = np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32)
    ws.begin_noting()
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        _core.combine(ws, x, rows, gates, out)  # is never part of recorded work
    _core.add_rows(ws, x, 2.0, None, None, out)
    note = ws.end_noting()
    assert not out.any()
    for times in (2, 4):
        ws.repeat(note)
        np.testing.assert_array_equal(out, times)
    ws.forget(note)
    with pytest.raises(ValueError, match="expected the number of a finished recording"):
        ws.repeat(note)

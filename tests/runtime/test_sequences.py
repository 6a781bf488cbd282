"""Several sequences run in one forward pass, and each has the same bits as alone."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest
from engines import with_slots

import edgemoe
from edgemoe.file.reader import open_moe
from edgemoe.model import Batch
from edgemoe.scheduler import SCHEDULERS
from edgemoe.store import all_expert_bytes, expert_bytes

RNG = np.random.default_rng(3)
TEXTS = [RNG.integers(0, 264, n).astype(np.int32) for n in (40, 33, 21)]
EXACT = [name for name in SCHEDULERS if name not in ("hobbit", "d2moe", "mc")]


@pytest.fixture(scope="module")
def alone(tiny_moe):
    """The logits after every token of each text, with each text computed by itself."""
    with edgemoe.load(tiny_moe) as engine:
        return [engine.logits(text) for text in TEXTS]


def slots(path, share):
    moe = open_moe(path)
    level = len(moe.ladder)
    return max(int(share * all_expert_bytes(moe, level)), 2 * expert_bytes(moe, level))


def run(model, parts):
    """Runs the next tokens of several sequences together; returns the logits of each."""
    batch = Batch.of(*parts)
    hidden = model.forward(batch)
    out = np.empty((len(batch), model.config.vocab_size), np.float32)
    model.logits(hidden, out, parts[0][0])
    return [out[s.start : s.stop] for s in batch.slices]


def play(model):
    """Runs three texts in steps: prompts apart and together, replies beside a prompt, at last all token by token."""
    states = [model.make_state() for _ in TEXTS]
    got = [[] for _ in TEXTS]
    steps = [
        {0: 12},
        {1: 9, 2: 3},
        {0: 1, 1: 7, 2: 1},  # a chunk of a prompt between replies
        {0: 1, 1: 1},
        {2: 5, 0: 4},
        *[{0: 1, 1: 1, 2: 1}] * 12,
        {1: 4, 0: 10},
    ]
    for step in steps:
        parts = [(states[i], TEXTS[i][states[i].length :][:n]) for i, n in step.items()]
        for i, rows in zip(step, run(model, parts), strict=True):
            got[i].append(rows)
    for state, text in zip(states, TEXTS, strict=True):
        assert state.ids == text[: state.length].tolist()
        assert state.length == len(text)
    return [np.concatenate(rows) for rows in got]


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("scheduler", EXACT)
def test_each_sequence_has_the_same_bits_as_alone(tiny_moe, alone, monkeypatch, share, scheduler):
    with_slots(monkeypatch, slots(tiny_moe, share))
    with edgemoe.load(tiny_moe, sequences=3, scheduler=scheduler) as engine:
        del engine._held.sequence  # the engine's own is one of three
        engine._held.sequence = None
        gc.collect()
        for mine, expected in zip(play(engine.model), alone, strict=True):
            assert np.array_equal(mine, expected)
        stats = engine.model.store.stats
        assert (stats["evictions"] > 0) == (share < 1)
        engine.model.store.cache.check_integrity()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("eviction", ["next-use", "lru", "hobbit"])
def test_neither_threads_nor_evictions_matter(tiny_moe, alone, monkeypatch, threads, eviction):
    with_slots(monkeypatch, slots(tiny_moe, 0.25))
    options = {"eviction": eviction}
    with edgemoe.load(tiny_moe, sequences=4, threads=threads, options=options) as engine:
        for mine, expected in zip(play(engine.model), alone, strict=True):
            assert np.array_equal(mine, expected)


@pytest.mark.parametrize("scheduler", ["hobbit", "d2moe", "mc"])
def test_lossy_schedulers_run_batches_too(tiny_moe, monkeypatch, scheduler):
    with_slots(monkeypatch, slots(tiny_moe, 0.25))
    with edgemoe.load(tiny_moe, sequences=4, scheduler=scheduler) as engine:
        assert all(np.isfinite(rows).all() for rows in play(engine.model))
        engine.model.store.cache.check_integrity()


@pytest.mark.parametrize(
    "lever", [{"cache_prior": 0.5}, {"cache_prior": 1, "admit": True}, {"miss_bits": 2}]
)
def test_levers_run_batches_too(tiny_moe, monkeypatch, lever):
    with_slots(monkeypatch, slots(tiny_moe, 0.25))
    with edgemoe.load(tiny_moe, sequences=4, options=lever) as engine:
        assert all(np.isfinite(rows).all() for rows in play(engine.model))


def test_there_are_as_many_sequences_as_the_memory_was_divided_for(tiny_moe):
    with edgemoe.load(tiny_moe) as one, edgemoe.load(tiny_moe, sequences=3) as three:
        assert three.budget.kv == 3 * one.budget.kv
        assert three.stats.kv_bytes == one.stats.kv_bytes == one.budget.kv
        with pytest.raises(edgemoe.OutOfBudget, match="for 3 times 256 tokens of context"):
            edgemoe.load(tiny_moe, sequences=3, ram="1MiB")
        states = [three.model.make_state() for _ in range(2)]
        with pytest.raises(ValueError, match="opened for 3 at once"):
            three.model.make_state()
        del states[0]
        gc.collect()
        states.append(three.model.make_state())  # a state without references is free again


def test_a_batch_is_no_longer_than_a_chunk(tiny_moe, monkeypatch):
    with_slots(monkeypatch, 1 << 20, chunk=16)
    with edgemoe.load(tiny_moe) as engine:
        state = engine._held.sequence.state
        with pytest.raises(ValueError, match="batch: expected at most 16 tokens, got 17"):
            engine.model.forward(Batch.of((state, TEXTS[0][:17])))
        assert not state.is_dirty


class Broken:
    """A file whose reads fail for a while, on the disk and not in a mock: it is truncated, and then restored."""

    def __init__(self, path):
        self.path, self.size = path, os.path.getsize(path)
        self.rest = b""

    def cut(self, at):
        with open(self.path, "r+b") as file:
            file.seek(at)
            self.rest = file.read()
            file.truncate(at)
        self.at = at

    def mend(self):
        with open(self.path, "r+b") as file:
            file.seek(self.at)
            file.write(self.rest)


@pytest.fixture
def broken(tmp_path):
    """The file of a model of eight layers; tests make its last experts unreadable with `Broken`."""
    from tiny import tiny_checkpoint

    from edgemoe.convert.convert import convert

    path = tmp_path / "deep.moe"
    convert(tiny_checkpoint(layers=8), path)
    return path


def test_a_read_that_fails_in_a_late_layer_leaves_every_sequence_as_it_was(broken, monkeypatch):
    moe = open_moe(broken)
    with edgemoe.load(broken) as whole:
        expected = [whole.logits(text) for text in TEXTS]
    with_slots(monkeypatch, slots(broken, 0.25))
    offsets = moe.experts.offsets.reshape(8, -1)
    file = Broken(broken)
    with edgemoe.load(broken, sequences=4, options={"look_ahead": False}) as engine:
        model = engine.model
        states = [model.make_state() for _ in TEXTS]
        run(model, [(state, text[:9]) for state, text in zip(states, TEXTS, strict=True)])
        seen = []

        class Layers(edgemoe.experts.Observer):
            def planned(self, routing, plan, residency):
                seen.append(routing.layer)

        model.experts.observer = Layers()
        model.store.load(
            np.arange(8, dtype=np.int32), np.full(8, 8, np.int8)
        )  # layer 7 is not in memory
        file.cut(int(offsets[7].min()))
        for parts in ([0], [0, 1, 2], [2, 1]):
            seen.clear()
            with pytest.raises(edgemoe.ReadError):
                run(model, [(states[i], TEXTS[i][9:14]) for i in parts])
            assert seen == list(range(8))  # the others had computed and stored
            assert [state.length for state in states] == [9, 9, 9]
        with pytest.raises(edgemoe.ReadError):
            engine.logits(TEXTS[0])
        assert engine._held.sequence.state.length == 0
        file.mend()
        model.experts.observer = None
        for i, (state, text) in enumerate(zip(states, TEXTS, strict=True)):
            got = run(model, [(state, text[9:])])[0]
            assert np.array_equal(got, expected[i][9:])
        assert np.array_equal(engine.logits(TEXTS[1]), expected[1])
        model.store.cache.check_integrity()

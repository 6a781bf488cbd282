"""While one thread computes, others may ask for statistics and wait for the end; anything else is refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from engines import GREEDY

import edgemoe
from edgemoe.experts import Observer

IDS = np.random.default_rng(1).integers(0, 256, 60)


class Gate(Observer):
    """An observer that holds the engine in a layer until it is opened."""

    def __init__(self) -> None:
        self.is_inside, self.open = threading.Event(), threading.Event()

    def planned(self, routing, plan, residency):
        self.is_inside.set()
        assert self.open.wait(30)


def started(target):
    """Runs a function on another thread; returns the thread and a list of what it raises."""
    raised = []

    def run():
        try:
            target()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def test_statistics_may_be_polled_while_a_reply_is_made(tiny_moe):
    with edgemoe.load(tiny_moe, bits=4) as engine:
        list(engine.generate(IDS.tolist(), GREEDY))
        expected = engine.stats
    with edgemoe.load(tiny_moe, bits=4) as engine:
        polled, done = [], threading.Event()

        def poll():
            while not done.is_set():
                polled.append(engine.stats)

        thread, raised = started(poll)
        hashes = []
        for _ in engine.generate(IDS.tolist(), GREEDY):
            hashes.append(engine.stats.logits_hash)
        last = engine.stats
        done.set()
        thread.join()
        assert not raised
        assert last.new_tokens == 24
        for name in ("hits", "misses", "bytes_read", "new_tokens", "logits_hash"):
            assert getattr(last, name) == getattr(expected, name)
        assert {s.logits_hash for s in polled} <= {"", *hashes}  # never of half-written logits
        for name in ("hits", "misses", "new_tokens", "bytes_read"):
            values = [getattr(s, name) for s in polled]
            assert values == sorted(values)
            assert values[-1] <= getattr(last, name)


def test_statistics_do_not_wait_for_a_pass(tiny_moe):
    gate = Gate()
    with edgemoe.load(tiny_moe, observer=gate) as engine:
        thread, raised = started(lambda: engine.logits(IDS))
        assert gate.is_inside.wait(30)
        assert engine.stats.prompt_tokens == 0
        gate.open.set()
        thread.join()
        assert not raised
        assert engine.stats.prompt_tokens == len(IDS)


def test_what_would_disturb_a_pass_is_refused_and_closing_waits_for_it(tiny_moe, tmp_path):
    gate = Gate()
    engine = edgemoe.load(tiny_moe, observer=gate, profile=tmp_path / "p")
    results = []
    thread, raised = started(lambda: results.append(engine.logits(IDS)))
    assert gate.is_inside.wait(30)
    for call in (lambda: engine.record(tmp_path / "t"), engine.warm, lambda: engine.logits([1])):
        with pytest.raises(RuntimeError, match="in use by another thread"):
            call()
    closing, not_closed = started(engine.close)
    closing.join(0.05)
    assert closing.is_alive()
    gate.open.set()
    thread.join()
    closing.join()
    assert not raised
    assert not not_closed
    with edgemoe.load(tiny_moe) as other:
        assert np.array_equal(results[0], other.logits(IDS))
    assert (tmp_path / "p").is_file()
    assert engine.stats.prompt_tokens == len(IDS)
    with pytest.raises(ValueError, match="closed"):
        engine.logits([1])


def test_a_reply_finds_the_engine_closed(tiny_moe):
    engine = edgemoe.load(tiny_moe)
    reply = engine.generate(IDS.tolist(), GREEDY)
    next(reply)
    closing, not_closed = started(engine.close)
    closing.join()
    assert not not_closed
    with pytest.raises(ValueError, match="the engine is closed"):
        next(reply)


def test_what_the_engine_calls_cannot_close_it(tiny_moe):
    class Closing(Observer):
        def planned(self, *_):
            engine.close()

    engine = edgemoe.load(tiny_moe, observer=Closing())
    with pytest.raises(RuntimeError, match="closed by what it calls"):
        engine.logits([1])
    engine.model.experts.observer = None
    assert engine.logits([1]).shape == (1, 264)
    engine.close()

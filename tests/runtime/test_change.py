"""A model whose options are changed while it runs is the same as one opened with them."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from engines import with_slots
from test_batching import PARAMS, PROMPTS, Asked, opened, run
from test_sequences import slots

import edgemoe
from edgemoe.text.sampler import SamplingParams

IDS = PROMPTS[1]
STEPS = [
    {"bits": 2}, {"bits": 4}, {"bits": None}, {"experts": 1}, {"experts": None},
    {"scheduler": "expertflow"}, {"scheduler": "on-demand", "bits": 3, "experts": 1},
    {"options": {"eviction": "lru"}}, {"options": {"look_ahead": False}, "bits": 8},
]  # fmt: skip


def logits_of(path, options):
    names = ("bits", "experts", "scheduler", "options")
    with edgemoe.load(path, **{name: getattr(options, name) for name in names}) as engine:
        return engine.logits(IDS).tobytes(), engine.notes


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_it_is_the_model_that_is_opened_so(tiny_moe, monkeypatch, share):
    with_slots(monkeypatch, slots(tiny_moe, share), chunk=16)
    with edgemoe.load(tiny_moe) as engine:
        model = engine.model
        for step in STEPS:
            engine.change(**step)
            found = engine.logits(IDS).tobytes()
            model.store.cache.check_integrity()
            expected, notes = logits_of(tiny_moe, model.options)
            assert found == expected, step
            assert engine.notes == notes
            assert engine.options is model.options


def test_fewer_bits_give_memory_back_and_more_are_read_in_part(tiny_moe):
    with edgemoe.load(tiny_moe) as engine:
        store, whole = engine.model.store, engine.logits(IDS).tobytes()
        full, read = store.stats["resident_bytes"], store.stats["bytes_read"]
        engine.change(bits=4)
        less = store.stats["resident_bytes"]
        assert less < 0.7 * full
        engine.logits(IDS)
        assert store.stats["bytes_read"] == read  # all was in memory
        engine.change(bits=None)
        assert engine.logits(IDS).tobytes() == whole
        assert store.stats["resident_bytes"] == full
        assert store.stats["bytes_read"] - read < 0.7 * read  # what was missing


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"bits": 5}, "bits: expected one of"), ({"bits": 8}, "opened for at most 4"), ({"experts": 9}, "experts"),
        ({"experts": 3}, "opened for at most 2"), ({"context": 9}, "context: cannot be changed"),
        ({"scheduler": "x"}, "scheduler: expected"), ({"options": {"nope": 1}}, "option nope"),
        ({"bits": "auto"}, "auto"),
    ],
)  # fmt: skip
def test_what_cannot_be_changed_is_refused_and_nothing_is(tiny_moe, wanted, words):
    with edgemoe.load(tiny_moe, bits=4) as engine:
        before, options = engine.logits(IDS).tobytes(), engine.model.options
        with pytest.raises(ValueError, match=words):
            engine.change(**wanted)
        assert engine.model.options is options
        assert engine.logits(IDS).tobytes() == before


def test_what_changes_no_answer_costs_nothing(tiny_moe, monkeypatch):
    with_slots(monkeypatch, slots(tiny_moe, 0.25), chunk=16)
    with edgemoe.load(tiny_moe) as engine:
        engine.generate(IDS, PARAMS[0])
        first = list(engine.generate(IDS, PARAMS[0]))
        for step in ({"scheduler": "expertflow"}, {"scheduler": "on-demand"}, {"bits": 8}, {}):
            engine.change(**step)
            assert list(engine.generate(IDS, PARAMS[0])) == first
            assert engine.stats.cached_tokens == len(IDS) - 1
        engine.change(bits=4)
        list(engine.generate(IDS, PARAMS[0]))
        assert engine.stats.cached_tokens == 0


def test_a_reply_of_an_engine_ends(tiny_moe):
    with edgemoe.load(tiny_moe) as engine:
        reply = engine.generate(IDS, PARAMS[0])
        next(reply)
        engine.change(bits=4)
        with pytest.raises(RuntimeError, match="meanwhile"):
            next(reply)
        with edgemoe.load(tiny_moe, bits=4) as other:
            assert list(engine.generate(IDS, PARAMS[0])) == list(other.generate(IDS, PARAMS[0]))


def test_a_recorded_model_stays_as_it_is(tiny_moe, tmp_path):
    with edgemoe.load(tiny_moe, trace=tmp_path / "t") as engine:
        with pytest.raises(ValueError, match="trace"):
            engine.change(bits=2)
        engine.logits(IDS)


def test_replies_go_on_with_the_changed_model(tiny_moe):
    """Each token is the one that the model as it was at that moment gives for the text before it."""
    batcher, model = opened(tiny_moe)
    params = [replace(p, max_tokens=20, temperature=0.0) for p in PARAMS[:4]]
    asked = [Asked(ids, p) for ids, p in zip(PROMPTS, params, strict=False)]
    for one in asked:
        batcher.submit(one.request)
    done, at = [], {}
    for step in range(1000):
        if step == 7:
            done = [batcher.change(bits=2), batcher.change(bits=9), batcher.change(experts=1)]
            at = {id(one): len(one.tokens) for one in asked}
        if not batcher.step():
            break
    assert done[0].result() is None
    with pytest.raises(ValueError, match="bits"):
        done[1].result()
    assert any(0 < n < 20 for n in at.values())
    with edgemoe.load(tiny_moe) as first, edgemoe.load(tiny_moe, bits=2, experts=1) as second:
        for one, ids, p in zip(asked, PROMPTS, params, strict=False):
            n = at[id(one)]
            assert len(one.tokens) == 20
            if n:
                assert one.tokens[:n] == list(first.generate(ids, replace(p, max_tokens=n)))
            rest = list(second.generate([*ids, *one.tokens[:n]], replace(p, max_tokens=20 - n)))
            assert one.tokens[n:] == rest
            assert one.outcome.figures.changed == 2
            assert one.outcome.figures.logits_hash == second.stats.logits_hash
    assert model.options.bits == 2


def test_a_scored_prompt_is_of_one_model(tiny_moe, monkeypatch):
    said = [], [], []
    for i in range(3):
        with_slots(monkeypatch, slots(tiny_moe, 1.0), chunk=16 if i else 128)
        batcher, _ = opened(tiny_moe)
        one = Asked(PROMPTS[3], SamplingParams(max_tokens=0), top=1, prompt_logprobs=said[i].extend)
        batcher.submit(one.request)
        batcher.step()
        done = batcher.change(bits=2) if i == 2 else None
        while batcher.step():
            pass
        assert done is None or done.result(1) is None
    assert len(said[0]) == len(PROMPTS[3]) - 1
    assert said[0] == said[1] == said[2]


def test_who_waits_is_woken_and_an_ended_batcher_refuses(tiny_moe):
    batcher, model = opened(tiny_moe)
    is_over = threading.Event()

    def serve():
        while not is_over.is_set():
            if not batcher.step():
                batcher.wait(10)

    thread = threading.Thread(target=serve)
    thread.start()
    batcher.change(bits=3).result(5)
    is_over.set()
    batcher.wake()
    thread.join()
    assert model.options.bits == 3
    left = batcher.change(bits=2)
    batcher.end(RuntimeError("over"))
    with pytest.raises(RuntimeError):
        left.result(1)
    with pytest.raises(RuntimeError):
        batcher.change(bits=2)
    assert run(opened(tiny_moe)[0], Asked(PROMPTS[0], PARAMS[0]))
    assert not np.isnan(model.store.uses).any()

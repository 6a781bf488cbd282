"""Offloading never changes the answer: it has the same bits for every budget, chunk, thread count and order."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from engines import GREEDY, with_slots

import edgemoe
import edgemoe.experts
from edgemoe import _core
from edgemoe.model import Batch

IDS = np.random.default_rng(1).integers(0, 256, 150)


@pytest.fixture(scope="module")
def expected(tiny_moe):
    out = {}
    for bits in (2, 3, 4, 6, 8):
        with edgemoe.load(tiny_moe, bits=bits) as engine:
            out[bits] = engine.logits(IDS), list(engine.generate(list(IDS[:20]), GREEDY))
    return out


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("num_experts", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("threads", [1, 3])
def test_logits_do_not_depend_on_the_budget(
    tiny_moe, expected, monkeypatch, bits, num_experts, threads
):
    from edgemoe.file.reader import open_moe
    from edgemoe.store import expert_bytes

    moe = open_moe(tiny_moe)
    slots = num_experts * expert_bytes(moe, moe.level(bits))
    with_slots(monkeypatch, slots)
    with edgemoe.load(tiny_moe, bits=bits, threads=threads) as engine:
        assert np.array_equal(engine.logits(IDS), expected[bits][0])
        assert list(engine.generate(list(IDS[:20]), GREEDY)) == expected[bits][1]
        stats = engine.model.store.stats
        engine.model.store.cache.check_integrity()
        assert stats["peak_bytes"] <= slots
        assert (stats["evictions"] > 0) == (num_experts < 16)
        # A token needs two experts. With two slots, it depends on the disk whether one is free for reading ahead.
        if num_experts != 2:
            assert (stats["ahead_reads"] > 0) == (2 < num_experts < 16)
        assert stats["bytes_read"] >= 16 * expert_bytes(moe, moe.level(bits))


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 149, 150])
def test_logits_do_not_depend_on_the_chunk(tiny_moe, expected, monkeypatch, chunk):
    with_slots(monkeypatch, 1 << 20, chunk)
    with edgemoe.load(tiny_moe) as engine:
        assert engine.budget.chunk == chunk
        assert np.array_equal(engine.logits(IDS), expected[8][0])
        assert np.array_equal(engine.logits(IDS, last_only=True)[0], expected[8][0][-1])


@pytest.mark.parametrize("isa", _core.usable_isas().split())
def test_logits_do_not_depend_on_the_instruction_set(tiny_moe, expected, isa):
    before = _core.isa()
    _core.use_isa(isa)
    try:
        with edgemoe.load(tiny_moe, bits=4) as engine:
            assert np.array_equal(engine.logits(IDS), expected[4][0])
    finally:
        _core.use_isa(before)


def test_a_kept_prefix_changes_nothing(tiny_moe, expected):
    with edgemoe.load(tiny_moe) as engine:
        ids = list(IDS[:20])
        first = list(engine.generate(ids, GREEDY))
        assert first == expected[8][1]
        whole = ids + first + list(IDS[20:30])
        continued = list(engine.generate(whole, GREEDY))
        assert engine.stats.cached_tokens >= len(ids + first) - 1
        with edgemoe.load(tiny_moe) as fresh:
            assert list(fresh.generate(whole, GREEDY)) == continued
            assert fresh.stats.logits_hash == engine.stats.logits_hash
        assert list(engine.generate(ids, GREEDY)) == first


def test_two_engines_do_not_disturb_each_other(tiny_moe, expected):
    with edgemoe.load(tiny_moe, bits=8) as a, edgemoe.load(tiny_moe, bits=2) as b:
        for x, y in zip(
            a.generate(list(IDS[:20]), GREEDY), b.generate(list(IDS[:20]), GREEDY), strict=True
        ):
            assert expected[8][1].count(x)
            assert expected[2][1].count(y)
        assert np.array_equal(a.logits(IDS), expected[8][0])
        assert np.array_equal(b.logits(IDS), expected[2][0])


def test_fewer_experts_is_another_model_and_every_one_is_reported(tiny_moe, expected):
    with edgemoe.load(tiny_moe, experts=1) as engine:
        assert not np.array_equal(engine.logits(IDS), expected[8][0])
    with edgemoe.load(tiny_moe, experts=2) as engine:
        assert np.array_equal(engine.logits(IDS), expected[8][0])


def test_stats_add_up(tiny_moe):
    with edgemoe.load(tiny_moe, bits=4) as engine:
        tokens = list(engine.generate(list(IDS[:10]), GREEDY))
        stats = engine.stats
        assert (stats.prompt_tokens, stats.cached_tokens, stats.new_tokens) == (10, 0, len(tokens))
        # In each of two layers, a prompt counts one use per expert, and a token counts two uses.
        assert stats.hits + stats.misses >= 2 * 2 * (len(tokens) - 1)
        assert stats.misses <= 16
        assert stats.evictions == 0
        assert stats.average_bits == 4
        assert stats.bytes_read == stats.resident_bytes > 0
        assert 0 < stats.first_token_s < stats.first_token_s + stats.decode_s
        assert len(stats.logits_hash) == 8
    assert engine.stats == stats or engine.stats.peak_bytes >= stats.peak_bytes


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"bits": 5}, "bits: expected one of 2, 3, 4, 6, 8"),
        ({"dense_bits": 1}, "dense_bits"),
        ({"experts": 0}, "experts: expected 1 to 8"),
        ({"experts": 9}, "experts: expected 1 to 8"),
        ({"context": 0}, "context"),
        ({"context": 513}, "context: expected 1 to 512"),
        ({"threads": 0}, "threads"),
        ({"scheduler": "magic"}, "on-demand"),
        ({"ram": "lots"}, "size"),
        ({"ram": 0}, "size"),
    ],
)
def test_wrong_arguments_get_one_clear_line(tiny_moe, arguments, match):
    with pytest.raises(ValueError, match=match) as error:
        edgemoe.load(tiny_moe, **arguments)
    assert "\n" not in str(error.value)


def test_a_budget_that_is_too_small_names_the_smallest(tiny_moe):
    with pytest.raises(edgemoe.OutOfBudget, match="smallest that works is .* for one expert"):
        edgemoe.load(tiny_moe, ram="1MB")
    with pytest.raises(edgemoe.OutOfBudget, match="for the process"):
        edgemoe.load(tiny_moe, ram="1MB", whole_process=True)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([], "at least one"),
        ([264], "tokens from 0 to 263"),
        ([-1], "tokens from 0"),
        ([0] * 65, "context of 64"),
        ([0.5], "list of at least one token"),
    ],
)
def test_wrong_tokens_get_one_clear_line(tiny_moe, ids, match):
    with edgemoe.load(tiny_moe, context=64) as engine:
        with pytest.raises(ValueError, match=match):
            engine.logits(ids)
        with pytest.raises(ValueError, match=match):
            engine.generate(ids)
        assert engine.logits([1, 2]).shape == (2, 264)


def test_generation_ends_with_the_context(tiny_moe):
    with edgemoe.load(tiny_moe, context=32) as engine:
        params = edgemoe.SamplingParams(temperature=0, ignore_eos=True)
        assert len(list(engine.generate(list(IDS[:20]), params))) == 12
        with pytest.raises(ValueError, match="with a reply"):
            engine.generate(list(IDS[:32]), params)


def test_a_closed_or_reused_engine_says_so(tiny_moe):
    engine = edgemoe.load(tiny_moe)
    stream = engine.generate(list(IDS[:4]), GREEDY)
    next(stream)
    engine.logits([1])
    with pytest.raises(RuntimeError, match="meanwhile"):
        next(stream)
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.logits([1])


def test_tokens_may_be_added_one_by_one(tiny_moe, expected):
    with edgemoe.load(tiny_moe) as engine:
        rows = [engine.logits(IDS[:1])[0]]
        rows += [engine.extend(IDS[i : i + 1])[0].copy() for i in range(1, 20)]
        assert np.array_equal(np.array(rows), expected[8][0][:20])
        some = engine.extend(IDS[20:40], last_only=False)
        assert np.array_equal(some, expected[8][0][20:40])
        assert np.array_equal(engine.extend(IDS[40:150])[0], expected[8][0][-1])
        with pytest.raises(ValueError, match=r"400 tokens do not fit .* with 150 tokens in it"):
            engine.extend([0] * 400)


def test_an_interrupt_between_request_and_groups_is_forgotten(tiny_moe, expected):
    with edgemoe.load(tiny_moe) as engine:
        plans = []
        plan = engine.model.experts.scheduler.plan

        def remember(*args):
            plans.append(plan(*args))
            return plans[-1]

        engine.model.experts.scheduler.plan = remember
        engine.logits(IDS[:9])
        engine.model.store.request(plans[0])  # as if Ctrl-C came here
        assert np.array_equal(engine.logits(IDS), expected[8][0])


def test_a_generator_of_an_earlier_call_refuses_to_go_on(tiny_moe):
    with edgemoe.load(tiny_moe) as engine:
        a, b = list(IDS[:6]), list(IDS[6:20])
        expected = list(engine.generate(b, GREEDY))
        first, second = engine.generate(a, GREEDY), engine.generate(b, GREEDY)
        assert list(second) == expected
        with pytest.raises(RuntimeError, match="meanwhile"):
            next(first)
        stream = engine.generate(a, GREEDY)
        engine.logits(b)
        with pytest.raises(RuntimeError, match="meanwhile"):
            next(stream)
        last = engine.generate(a, GREEDY)
    with pytest.raises(ValueError, match="closed"):
        next(last)


def test_a_second_thread_and_a_child_process_are_kept_out(tiny_moe):
    import threading

    with edgemoe.load(tiny_moe) as engine:
        refused = []
        running, done = threading.Event(), threading.Event()

        class Slow(edgemoe.experts.Observer):
            def planned(self, *_):
                running.set()
                done.wait(10)

        engine.model.experts.observer = Slow()
        thread = threading.Thread(target=lambda: engine.logits(IDS[:4]))
        thread.start()
        running.wait(10)
        for call in (
            lambda: engine.logits([1]),
            lambda: engine.generate([1]),
            lambda: engine.extend([1]),
        ):
            with pytest.raises(RuntimeError, match="another thread"):
                call()
            refused.append(1)
        done.set()
        thread.join()
        engine.model.experts.observer = None
        assert len(refused) == 3


def run_alone(code, *arguments):
    """Runs Python code in a separate process."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_a_child_process_may_drop_the_engine(tiny_moe):
    """In a separate process, so that there are no other threads when it forks."""
    code = """
import os, sys
import edgemoe
engine = edgemoe.load(sys.argv[1], threads=2)
logits = engine.logits([1, 2, 3])
child = os.fork()
if child == 0:
    try:
        engine.logits([1])
    except RuntimeError as error:
        assert "process that opened it" in str(error), error
    else:
        sys.exit(8)
    engine.close()
    sys.exit(7)
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 7, status
assert (engine.logits([1, 2, 3]) == logits).all()
"""
    run_alone(code, tiny_moe)


def test_the_smallest_budget_works_and_its_logits_are_the_same(tiny_moe, expected, tmp_path):
    """In a separate process, as memory of earlier tests might be given back while this one measures."""
    code = """
import re, sys
import numpy as np
import edgemoe
path, out, *ids = sys.argv[1:]
try:
    edgemoe.load(path, ram="1MB", context=160)
except edgemoe.OutOfBudget as error:
    smallest = int(re.search(r"works is (\\d+) MiB", str(error))[1])
with edgemoe.load(path, ram=f"{smallest + 1}MiB", context=160) as engine:
    np.save(out, engine.logits([int(i) for i in ids]))
"""
    out = tmp_path / "logits.npy"
    run_alone(code, tiny_moe, out, *IDS)
    assert np.array_equal(np.load(out), expected[8][0])


def test_logits_are_the_callers_own(tiny_moe):
    with edgemoe.load(tiny_moe) as engine:
        out = engine.logits(IDS[:3])
        before = engine.stats.logits_hash
        out[:] = 0
        assert engine.stats.logits_hash == before


def test_a_models_own_sampling_is_the_default(tmp_path):
    from tiny import tiny_checkpoint

    from edgemoe.convert.convert import convert

    source = tiny_checkpoint()
    source.files["generation_config.json"] = b'{"temperature": 0, "top_k": 7}'
    convert(source, tmp_path / "x.moe")
    with edgemoe.load(tmp_path / "x.moe") as engine:
        assert engine.sampling == edgemoe.SamplingParams(temperature=0, top_k=7)
        assert engine.chat().params == engine.sampling
        stream, greedy = engine.generate(list(IDS[:9])), []
        for token in stream:
            greedy.append(token)
            if len(greedy) == 5:
                break
        given = edgemoe.SamplingParams(temperature=0, max_tokens=5)
        assert list(engine.generate(list(IDS[:9]), given)) == greedy


def test_an_interrupt_between_computing_and_counting_is_forgotten(tiny_moe, expected):
    with edgemoe.load(tiny_moe) as engine:
        engine.logits(IDS[:149])
        state = engine._held.sequence.state
        state.begin(3)
        # As if Ctrl-C came after the layers have run.
        engine.model.decoder.forward(Batch.of((state, IDS[:3].astype(np.int32))))
        assert np.array_equal(engine.extend(IDS[149:150])[0], expected[8][0][-1])


@pytest.mark.parametrize(
    ("ids", "got"),
    [([], "[]"), ([1.0], "[1.0]"), ("abc", "'abc'"), ([[1]], "[[1]]"), (None, "None"), (3, "3"),
     ([True], "[True]"), ([[1], [2, 3]], "[[1], [2, 3]]"), ([2**70], str(2**70)), ([-1], "-1"), ([264], "264"),
     ([0.5] * 9999, "[0.5, ")],
)  # fmt: skip
def test_tokens_of_a_wrong_kind_are_said(tiny_moe, ids, got):
    with edgemoe.load(tiny_moe) as engine:
        for call in (engine.logits, engine.extend, engine.generate):
            with pytest.raises(ValueError, match=r"^ids: expected [^\n]{1,250}$") as refused:
                call(ids)
            assert got in str(refused.value).partition("got ")[2]


def test_tokens_may_come_from_any_list(tiny_moe):
    with edgemoe.load(tiny_moe) as engine:
        expected = engine.logits([1, 2, 3])
        for ids in (
            (1, 2, 3),
            range(1, 4),
            np.arange(1, 4, dtype=np.uint8),
            [np.int64(1), 2, np.int8(3)],
        ):
            assert (engine.logits(ids) == expected).all()


def test_a_prompt_is_cancelled_between_its_layers(tiny_moe, monkeypatch):
    ids = np.random.default_rng(1).integers(0, 256, 70).tolist()
    with_slots(monkeypatch, 1 << 20, chunk=16)
    with edgemoe.load(tiny_moe) as engine:
        expected = list(engine.generate(ids, GREEDY)), engine.stats.logits_hash
        layers = engine.config.num_layers
        for wanted in (1, 3 * layers + 2, 5 * layers):  # of 5 chunks
            asked = []
            engine.logits([7])
            reply = engine.generate(
                ids, GREEDY, is_cancelled=lambda n=wanted, a=asked: a.append(0) or len(a) == n
            )
            with pytest.raises(edgemoe.Cancelled):
                next(reply)
            assert len(asked) == wanted
            assert engine._held.sequence.state.length == (wanted - 1) // layers * 16
            # What was computed is kept, and the next call does not use the old callback.
            assert (list(engine.generate(ids, GREEDY)), engine.stats.logits_hash) == expected
            assert engine.stats.cached_tokens == (wanted - 1) // layers * 16
            assert len(asked) == wanted


def test_a_reply_is_cancelled_from_another_thread(tiny_moe):
    with edgemoe.load(tiny_moe) as engine:
        expected = list(engine.generate([1, 2, 3], GREEDY))
        event, made = threading.Event(), []
        with pytest.raises(edgemoe.Cancelled):
            for token in engine.generate([1, 2, 3], GREEDY, is_cancelled=event.is_set):
                made.append(token)
                if len(made) == 5:
                    thread = threading.Thread(target=event.set)
                    thread.start()
                    thread.join()
        assert made == expected[:5]
        assert list(engine.generate([1, 2, 3], GREEDY)) == expected

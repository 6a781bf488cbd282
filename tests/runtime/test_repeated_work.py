"""On a device, work between choices of experts is recorded and repeated, and layers whose experts are all there run
without the host. Both give the CPU's bits, whatever moves meanwhile."""

from __future__ import annotations

import contextlib
import ctypes

import families
import numpy as np
import pytest
from engines import logits_in_turn
from simulated import on_device, plug_in, small_moe, with_vram

import edgemoe
from edgemoe import _core
from edgemoe.experts import Experts
from edgemoe.file.reader import open_moe
from edgemoe.ops import notes
from edgemoe.ops.cpu import CpuOps
from edgemoe.ops.cuda import CudaOps
from edgemoe.runtime.trace import read
from edgemoe.store import tiers

IDS = np.random.default_rng(7).integers(0, 250, 300).tolist()


def params(count, **more):
    return edgemoe.SamplingParams(**{"temperature": 0, **more}, max_tokens=count, ignore_eos=True)


def told(engine, ids, how):
    """Returns a reply, the hash of its last logits, and how often experts ran."""
    reply = list(engine.generate(ids, how))
    return reply, engine.stats.logits_hash, engine.model.store.runs.tolist()


def graphs():
    """Returns how often work was repeated; None for a real device, which does not count it."""
    library = ctypes.CDLL(plug_in())
    simulated = hasattr(library, "cudasim_configure")
    return library.cudasim_configure(b"graphs", 0) if simulated else None


@pytest.fixture(params=["none", "repeated", "ahead"])
def stage(request, monkeypatch):
    """How much runs without the host."""
    monkeypatch.setattr(CudaOps, "repeats", request.param != "none")
    monkeypatch.setattr(CudaOps, "runs_ahead", request.param == "ahead")
    return request.param


def test_each_stage_is_the_processors_and_does_what_it_says(tiny_moe, stage):
    how = params(12)
    with edgemoe.load(tiny_moe, context=64) as engine:
        expected = told(engine, IDS[:5], how)
        counted, routed = engine.stats, engine.model.counters.routed
    with edgemoe.load(tiny_moe, context=64, **on_device()) as engine:
        before = graphs()
        assert told(engine, IDS[:5], how) == expected
        layers, tokens = engine.config.num_layers, 11  # the first is from the prompt's logits
        after, stats = graphs(), engine.stats
        assert engine.model.counters.routed == routed
    assert stats.hits + stats.misses == counted.hits + counted.misses
    assert stats.device_hits == stats.hits  # all fit
    if before is not None:
        each = {"none": 0, "repeated": layers + 1, "ahead": 1}[stage]
        assert each * (tokens - 4) <= after - before <= each * tokens


def test_nothing_is_recorded_where_work_is_not_to_be_repeated(tiny_moe, monkeypatch):
    """A model of recurrent layers alone has keys of its own, whatever the device says of positions."""
    monkeypatch.setattr(CudaOps, "repeats", False)
    calls = []
    with edgemoe.load(tiny_moe, context=64, **on_device()) as engine:
        for _ in range(3):
            engine.model.decoder._ops.repeat("key", lambda: calls.append(1))
    assert len(calls) == 3


@pytest.mark.parametrize("slots", [5, 13, 15])
def test_while_experts_come_and_go(tiny_moe, monkeypatch, slots):
    """There is no room for all 16 experts, and some tokens find all experts of one layer on the device."""
    how = params(40, temperature=2.0, seed=3)
    with edgemoe.load(tiny_moe, context=64) as engine:
        expected = told(engine, IDS[:5], how)
    with_vram(monkeypatch, slots, tiny_moe)
    with edgemoe.load(tiny_moe, context=64, **on_device()) as engine:
        assert told(engine, IDS[:5], how) == expected
        engine.model.store.cache.check_integrity()


@pytest.mark.parametrize(
    ("name", "experts"),
    [("qwen2_moe-window", 2), ("qwen3_next", 2), ("qwen2_moe-window", 1000), ("gpt_oss", 1000), ("gemma4_text", 1000),
     ("deepseek_v3", 1000), ("nemotron_h", 1000), ("llama4_text", 1000), ("lfm2_moe", 1000)],
)  # fmt: skip
def test_families_that_go_back_and_on(tmp_path, monkeypatch, name, experts):
    """Turns that continue, that branch off in the middle, and that begin with something else."""
    path = small_moe(name, tmp_path)
    ids = families.random_ids(40)
    turns = ids[:12], ids[:20], ids[:6] + ids[30:34], ids[25:30]

    def play(**options):
        with edgemoe.load(path, context=64, **options) as engine:
            return [told(engine, turn, params(7)) for turn in turns]

    with monkeypatch.context() as one_by_one:
        one_by_one.setattr(CpuOps, "repeats", False)
        expected = play()
    assert play() == expected
    with_vram(monkeypatch, experts, path)
    before = graphs()
    assert play(**on_device()) == expected
    grows = any(getattr(mixer, "growth", 0) for mixer in open_moe(path).config.mixers)
    assert before is None or (graphs() > before) == (not grows)  # the host computes logarithms


@pytest.mark.parametrize("name", ["tiny", "qwen2_moe-window", "deepseek_v3"])
def test_where_a_block_of_positions_ends(tiny_moe, tmp_path, name):
    longer = {"max_position_embeddings": 512}
    path = tiny_moe if name == "tiny" else small_moe(name, tmp_path, changes=longer)
    ids = [i % 90 for i in IDS[: _core.KEY_BLOCK - 5]]
    with edgemoe.load(path, context=300, bits=2) as engine:
        expected = told(engine, ids, params(12))
    with edgemoe.load(path, context=300, bits=2, **on_device()) as engine:
        assert told(engine, ids, params(12)) == expected


@pytest.mark.parametrize("most", [2, notes.MOST_NOTED])
def test_sequences_in_turn(tiny_moe, monkeypatch, most):
    """Each sequence has its own keys and values, and so its own notes; the oldest are forgotten."""
    monkeypatch.setattr(notes, "MOST_NOTED", most)

    def play(**options):
        with edgemoe.load(tiny_moe, context=64, sequences=3, **options) as engine:
            return logits_in_turn(engine, IDS)

    assert play(**on_device()) == play()


def test_fewer_experts_and_bits_are_other_work(tiny_moe):
    def play(**options):
        out = []
        with edgemoe.load(tiny_moe, context=64, **options) as engine:
            for more in ({}, {"experts": 1}, {"bits": 3}, {"experts": 2}):
                engine.change(**more)
                out.append(told(engine, IDS[:6], params(6)))
        return out

    assert play(**on_device()) == play()


@pytest.mark.parametrize("fails", [1, 4, 5, 6])
def test_what_fails_while_it_is_noted_is_not_repeated(tiny_moe, monkeypatch, fails):
    """It fails in the prompt, in the first token, and in the second, whose work is recorded; the next run is right."""
    real, calls = _core.device_post, []

    def post(ws, arrays):
        calls.append(arrays)
        if len(calls) == fails:
            raise KeyboardInterrupt
        return real(ws, arrays)

    how = params(9)
    with edgemoe.load(tiny_moe, context=64) as engine:
        expected = told(engine, IDS[:5], how)[:2]
    monkeypatch.setattr(CudaOps, "runs_ahead", False)
    with edgemoe.load(tiny_moe, context=64, **on_device()) as engine:
        monkeypatch.setattr(_core, "device_post", post)
        with contextlib.suppress(KeyboardInterrupt):
            told(engine, IDS[:5], how)
        assert told(engine, IDS[:5], how)[:2] == expected


def moved(cache, experts):
    """Makes experts leave a device and come back in this order, and so to other slots."""
    for e in sorted(experts):
        assert cache.device.shrink(e, 0)
    for e in experts:
        for one in (cache.host, cache.device):
            one.begin(np.array([e], np.int32), np.array([5], np.int8), np.zeros(2, np.int32), 0)
            while one.next():
                pass
            one.close()


def test_experts_that_have_moved_are_found(tiny_moe):
    how = params(9)
    with edgemoe.load(tiny_moe, context=64) as engine:
        expected = told(engine, IDS[:5], how)[:2]
    with edgemoe.load(tiny_moe, context=64, **on_device()) as engine:
        for order in (range(8), range(7, -1, -1), range(8)):
            assert told(engine, IDS[:5], how)[:2] == expected
            moved(engine.model.store.cache, list(order))
        assert told(engine, IDS[:5], how)[:2] == expected


@pytest.mark.parametrize("order", [range(8, 16), range(15, 7, -1)])
def test_experts_may_move_while_a_pass_is_under_way(tiny_moe, monkeypatch, order):
    """The host runs the first layer, as the device lacks one of its experts; meanwhile those of the second move."""
    real, ran, moves = Experts.__call__, [], []

    def run(self, routing, *rest):
        out = real(self, routing, *rest)
        ran.append(routing.layer)
        if ran[-3:] == [0, 0, 0]:  # the second was ahead twice
            moved(self.store.cache, list(order))
            moves.append(len(ran))
            ran.clear()
        return out

    how = params(40, temperature=2.0, seed=3)
    with edgemoe.load(tiny_moe, context=64) as engine:
        expected = told(engine, IDS[:5], how)[:2]
    monkeypatch.setattr(tiers, "_PROMOTED", 0)
    with edgemoe.load(tiny_moe, context=64, **on_device()) as engine:
        assert engine.model.store.cache.device.shrink(0, 0)
        monkeypatch.setattr(Experts, "__call__", run)
        assert told(engine, IDS[:5], how)[:2] == expected
    assert len(moves) > 4


def test_somebody_who_looks_sees_every_plan(tiny_moe, tmp_path):
    """So no layer runs ahead then."""
    rows = []
    for options in (on_device(), {}):
        path = tmp_path / f"{len(rows)}.trace"
        with edgemoe.load(tiny_moe, context=64, trace=path, **options) as engine:
            told(engine, IDS[:5], params(6))
        rows.append(read(path).rows)
    for field in ("token", "layer", "experts", "gates", "bits"):
        np.testing.assert_array_equal(rows[0][field], rows[1][field])

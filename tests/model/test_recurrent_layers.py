"""Models with recurrent layers, whose states cannot go back token by token, in a real file and engine."""

from __future__ import annotations

import os

import numpy as np
import pytest
import reference
from decoded import Decoded
from engines import with_slots

import edgemoe
from edgemoe import _core
from edgemoe.config import ModelConfig, dense_tensors
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.file.writer import Writer
from edgemoe.model import Batch, KvTypes, state_bytes
from edgemoe.specs import AttentionSpec, ConvSpec, DeltaSpec, MambaSpec, MlaSpec, RopeSpec

GATED = AttentionSpec(
    num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, rope=RopeSpec(dim=8), qk_norm="head",
    gate="sigmoid",
)  # fmt: skip
BY_HEAD = AttentionSpec(
    num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, rope=RopeSpec(dim=8), gate="softplus_head"
)
DELTA = DeltaSpec(key_heads=2, value_heads=4, key_dim=24, value_dim=16, taps=4, norm_eps=1e-2)
MIXERS = {"delta": (DELTA, GATED), "delta, sigmoid": (DeltaSpec(
    key_heads=1, value_heads=3, key_dim=16, value_dim=32, taps=2, norm_eps=1e-2, gate="sigmoid"
), BY_HEAD)}  # fmt: skip
CONV = ConvSpec(width=48, taps=3)
MIXERS["conv"] = (CONV, BY_HEAD)
NOWHERE = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, rope=None)
MIXERS["mamba"] = (MambaSpec(
    num_heads=6, head_dim=16, groups=2, state_dim=20, taps=4, norm_eps=1e-2
), NOWHERE)  # fmt: skip
MIXERS["kda"] = (DeltaSpec(
    key_heads=2, value_heads=2, key_dim=20, value_dim=16, taps=4, norm_eps=1e-2, gate="sigmoid",
    channel_decay=True, decay_rank=8, gate_rank=24,
), MlaSpec(
    num_heads=4, q_rank=0, latent_dim=32, nope_dim=24, rope_dim=16, value_dim=16, scale=0.2, rope=None,
    gate="sigmoid_head",
))  # fmt: skip
MIXERS["kda, bounded"] = (DeltaSpec(
    key_heads=3, value_heads=3, key_dim=16, value_dim=16, taps=3, norm_eps=1e-2, gate="sigmoid",
    channel_decay=True, bounded=True,
), NOWHERE)  # fmt: skip
LAYERS = 4
IDS = np.random.default_rng(3).integers(0, 80, 120).tolist()
GREEDY = edgemoe.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def config(name: str) -> ModelConfig:
    return ModelConfig(
        family="recurrent", vocab_size=80, hidden_size=64, num_layers=LAYERS, context_length=256,
        norm_eps=1e-5, tied=True, num_experts=4, experts_per_token=2, expert_hidden=32,
        moe_layers=tuple(range(LAYERS)), mixers=MIXERS[name], layer_mixers=(0, 1, 0, 0),
    )  # fmt: skip


def write(path, name: str) -> None:
    rng, model = np.random.default_rng(5), config(name)
    with Writer(path, model, sections={}, source={}) as writer:
        for tensor, spec in dense_tensors(model).items():
            value = rng.standard_normal(spec.shape).astype(np.float32) / np.sqrt(spec.shape[-1])
            if tensor.startswith("rope"):
                value = (100.0 ** -np.linspace(0, 1, spec.shape[0])).astype(np.float32)
            elif tensor == "embed":
                value *= 8
            elif "norm" in tensor:
                value = 1 + value
            elif "rate" in tensor:
                value = np.exp(value)
            elif "conv" in tensor:
                value *= 4
            writer.add(tensor, value)
        for layer in range(LAYERS):
            for e in range(4):
                shapes = ((32, 64), (32, 64), (64, 32))
                parts = [rng.standard_normal(s).astype(np.float32) * 0.2 for s in shapes]
                writer.add_expert(layer, e, *parts)
        writer.finish()


@pytest.fixture(scope="module", params=MIXERS)
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("recurrent") / "x.moe"
    write(path, request.param)
    return path


@pytest.fixture(scope="module")
def whole(model):
    """The logits of all positions, computed at once."""
    with edgemoe.load(model) as engine:
        return engine.logits(IDS)


def test_equals_the_reference(model, whole):
    decoded = Decoded(model)
    expected, _ = reference.logits(decoded.config, decoded.tensors, decoded.expert, IDS[:40])
    errors = np.abs(whole[:40] - expected).max(1) / expected.std()
    assert np.median(errors) < 0.15  # inputs of matrices are rounded to 8 bits
    scale = (whole[:40] * expected).sum() / (expected * expected).sum()
    assert abs(scale - 1) < 0.03


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", _core.usable_isas().split())
def test_chunks_threads_and_instruction_sets_do_not_matter(model, whole, threads, isa):
    before = _core.isa()
    _core.use_isa(isa)
    try:
        with edgemoe.load(model, threads=threads) as engine:
            engine.logits(IDS[:1])
            for first, last in ((1, 9), (9, 10), (10, 11), (11, 60), (60, 120)):
                got = engine.extend(IDS[first:last], last_only=False)
                assert np.array_equal(got, whole[first:last])
    finally:
        _core.use_isa(before)


def test_several_sequences_run_together(model, whole):
    with edgemoe.load(model, sequences=3) as engine:
        states = [engine.model.make_state() for _ in range(2)]
        for step in ({0: 9, 1: 5}, {0: 1, 1: 1}, {1: 7, 0: 1}, {0: 4}, {1: 1, 0: 1}):
            parts = [
                (states[i], np.array(IDS[states[i].length :][:n], np.int32))
                for i, n in step.items()
            ]
            batch = Batch.of(*parts)
            hidden = engine.model.forward(batch)
            out = np.empty((len(batch), 80), np.float32)
            engine.model.logits(hidden, out, states[0])
            for s in batch.slices:
                got = out[s.start : s.stop]
                assert np.array_equal(got, whole[s.state.length - s.count : s.state.length])


def reply(engine, ids):
    """Returns a reply, a hash of its last logits, and how many tokens of the prompt were cached."""
    tokens = list(engine.generate(ids, GREEDY))
    return tokens, engine.stats.logits_hash, engine.stats.cached_tokens


def fresh(model, ids):
    with edgemoe.load(model) as engine:
        return reply(engine, ids)[:2]


def test_a_conversation_goes_on_where_it_was(model):
    with edgemoe.load(model) as engine:
        made, _, known = reply(engine, IDS[:50])
        assert known == 0
        # The last token of the reply was never computed.
        longer = IDS[:50] + made + IDS[50:60]
        *got, known = reply(engine, longer)
        assert known == 50 + len(made) - 1
        assert tuple(got) == fresh(model, longer)


def test_a_turn_that_is_edited_or_answered_again_goes_back_to_a_snapshot(model):
    first, second = IDS[:50], IDS[60:90]
    with edgemoe.load(model) as engine:
        made = reply(engine, first)[0]
        turn = first + made + second
        *expected, _ = reply(engine, turn)
        # The same turn again goes on from where its reply begins.
        *again, known = reply(engine, turn)
        assert (again, known) == (expected, len(turn) - 16)
        # An edited turn goes on from where the turn begins.
        edited = first + made + [7, *second]
        *got, known = reply(engine, edited)
        assert known == 50 + len(made) - 1
        assert tuple(got) == fresh(model, edited)
        # An earlier turn begins at the start, as only the last turn has snapshots.
        other = [*IDS[:20], 5, *IDS[21:70]]
        *got, known = reply(engine, other)
        assert known == 0
        assert tuple(got) == fresh(model, other)


def test_a_reply_that_its_template_tells_otherwise_later(model):
    """Templates of reasoning models leave the reasoning out once the conversation goes on."""
    prompt = IDS[:50]
    later = [*prompt[:46], *IDS[70:100]]
    with edgemoe.load(model) as engine:
        reply(engine, prompt)
        *got, known = reply(engine, later)
        assert known == 50 - 16
        assert tuple(got) == fresh(model, later)


def test_a_read_that_fails_leaves_the_state(model, whole, tmp_path, monkeypatch):
    path = tmp_path / "y.moe"
    path.write_bytes(model.read_bytes())
    moe = open_moe(path)
    last = int(moe.experts.offsets.reshape(LAYERS, -1)[-1].min())
    with_slots(monkeypatch, 3 * int(moe.experts.sizes(len(moe.ladder)).max()) + (1 << 14))
    with edgemoe.load(path) as engine:
        engine.logits(IDS[:9])
        engine.model.store.load(np.arange(3, dtype=np.int32), np.full(3, 8, np.int8))
        content = path.read_bytes()
        os.truncate(path, last)
        for ids in (IDS[9:10], IDS[9:30]):
            with pytest.raises(edgemoe.ReadError):
                engine.extend(ids)
            assert engine.model.counters.routed > 0
        with open(path, "r+b") as file:
            file.write(content)
        assert np.array_equal(engine.extend(IDS[9:30], last_only=False), whole[9:30])


def test_the_budget_counts_every_byte_of_the_state(model):
    with edgemoe.load(model, context=100, sequences=2) as engine:
        state = engine.model.make_state()
        recurrent = [s for s in state.layers if not s.can_rewind_anywhere]
        assert len(recurrent) == 3
        arrays = [a for s in recurrent for group in s._free for a in group]
        is_latent = any(isinstance(m, MlaSpec) for m in engine.config.mixers)

        def grown(positions):
            if is_latent:
                return _core.KvLayer.bytes("f16", 1, positions, 32 + 16)
            return 2 * _core.KvLayer.bytes("f16", 2, positions, 16)

        attention = grown(100)
        assert sum(a.nbytes for a in arrays) + attention == engine.budget.kv // 2
        assert state_bytes(engine.config, 100, KvTypes()) == engine.budget.kv // 2
        read = sum(a.nbytes for s in recurrent for a in s._free[0])
        assert engine.kv_bytes(0) == read
        assert engine.kv_bytes(32) == read + grown(32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_heads": 3}, "value_heads 3 is not a multiple of key_heads 2"),
        ({"value_dim": 24}, "value_dim must be a multiple of 16, got 24"),
        ({"taps": 9}, "a convolution of 9 taps is not supported"),
        ({"gate": "relu"}, "unknown gate 'relu'"),
        ({"key_dim": 0}, "key_dim must be a whole number from 1"),
        ({"key_dim": 1 << 22}, "channels must be a whole number"),
        ({"key_dim": 1 << 18, "value_dim": 4096}, "state is too large"),
        ({"norm_eps": 0.0}, "norm_eps must be a positive number"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(FormatError, match=message):
        DeltaSpec(
            **{
                "key_heads": 2, "value_heads": 4, "key_dim": 24, "value_dim": 16, "taps": 4,
                "norm_eps": 1e-2, **changes,
            }
        )  # fmt: skip

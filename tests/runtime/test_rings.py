"""Layers with a window keep only a ring of positions: bits are the same however a conversation goes back and on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engines import with_slots
from test_batching import Asked, opened, run
from tiny import tiny_checkpoint

import edgemoe
from edgemoe.convert.convert import convert
from edgemoe.errors import Cancelled
from edgemoe.model import Batch, KvTypes, kv, state_bytes
from edgemoe.runtime.model import Model

RNG = np.random.default_rng(4)
IDS = RNG.integers(0, 256, 700).tolist()
LONG = edgemoe.SamplingParams(temperature=0, max_tokens=240, ignore_eos=True)
SHORT = replace(LONG, max_tokens=3)
WINDOW, CONTEXT, RING, KEPT = 32, 900, 256, 64
"""In positions; the ring is for chunks of 16 tokens."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of three layers, of which one sees all positions."""
    source = tiny_checkpoint(layers=3)
    source.config |= {
        "use_sliding_window": True, "sliding_window": WINDOW, "max_position_embeddings": 2048,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    }  # fmt: skip
    path = tmp_path_factory.mktemp("rings") / "model.moe"
    convert(source, path)
    return path


@pytest.fixture
def rings(monkeypatch):
    """Gives engines chunks of 16 tokens, and memory for all experts."""
    with_slots(monkeypatch, 1 << 24, chunk=16)


@pytest.fixture(scope="module")
def plain(model):
    """An engine whose layers keep all positions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "_positions", lambda spec, capacity, types, chunk: (capacity, 0))
        engine = edgemoe.load(model, context=CONTEXT)
    with engine:
        assert not engine._held.sequence.state.needs_snapshots
        yield engine


def reply(engine, ids, params=SHORT):
    """Returns a reply, the hash of its last logits, and how many tokens of the prompt were cached."""
    tokens = list(engine.generate(ids, params))
    return tokens, engine.stats.logits_hash, engine.stats.cached_tokens


def fresh(plain, ids, params=SHORT):
    plain.logits([0])
    return reply(plain, ids, params)[:2]


@pytest.mark.parametrize(
    "types", [("f16", "f16"), ("q8_0", "q8_0"), ("f32", "q8_0"), ("q4_0", "q3_0")], ids="-".join
)
def test_bits_are_those_of_layers_that_keep_all(model, rings, types):
    options = {"cache_type_k": types[0], "cache_type_v": types[1]}
    with edgemoe.load(model, context=300, **options) as engine:  # too short for a ring
        assert not engine.model.decoder.make_state().needs_snapshots
        expected = engine.logits(IDS[:300])
    with edgemoe.load(model, context=CONTEXT, **options) as engine:
        assert engine.model.decoder.make_state().needs_snapshots
        assert np.array_equal(engine.logits(IDS[:300]), expected)
        engine.logits(IDS[:1])
        rows = [engine.extend([token])[0].copy() for token in IDS[1:300]]
        assert np.array_equal(rows, expected[1:])


@pytest.mark.parametrize("sequences", [1, 2])
def test_the_budget_counts_every_byte(model, sequences):
    with edgemoe.load(model, context=2000, sequences=sequences) as engine:
        budget, state = engine.budget, engine.model.decoder.make_state()
        # With chunks of 512 tokens, a ring has 32 + 511 positions, rounded up to blocks of 256.
        rings = [layer for layer in state.layers if not layer.can_rewind_anywhere]
        taken = [sum(len(k.content) for k in (layer.layer, *layer._free)) for layer in rings]
        positions = 768 + 2 * KEPT
        assert taken == 2 * [2 * edgemoe._core.KvLayer.bytes("f16", 2, positions, 24)]
        full = len(state.layers[0].layer.content)
        assert budget.kv == sequences * (full + sum(taken)) < sequences * 3 * full
        each = budget.kv // sequences
        assert state_bytes(engine.config, budget.context, KvTypes(), budget.chunk) == each
        assert budget.kv_at_once == sum(taken)  # rings from the start; the other layer grows


def test_a_chunk_takes_with_its_rings_an_eighth_of_what_is_spare(model, monkeypatch):
    def divided(mib):
        with edgemoe.load(model, context=2000, ram=mib << 20) as engine:
            return engine.budget

    budgets = [divided(mib) for mib in range(25, 45)]
    assert {128, 256} <= {b.chunk for b in budgets}
    monkeypatch.setattr("edgemoe.runtime.budget.CHUNKS", (16,))
    small = divided(25)
    assert max(b.kv for b in budgets) > small.kv  # rings of 256 and more tokens are longer
    for b in budgets:
        more = b.kv + b.scratch - small.kv - small.scratch
        assert more <= (b.room + more - b.expert) // 8


def test_a_conversation_goes_on_where_it_was(model, rings, plain):
    with edgemoe.load(model, context=CONTEXT) as engine:
        made, *_ = reply(engine, IDS[:50], LONG)
        longer = IDS[:50] + made + IDS[50:60]
        *got, known = reply(engine, longer)
        assert known == 50 + len(made) - 1  # the last token was never computed
        assert tuple(got) == fresh(plain, longer)


def test_a_little_is_taken_back_without_a_snapshot(model, rings, plain):
    with edgemoe.load(model, context=CONTEXT) as engine:
        state = engine._held.sequence.state
        for length in (450, 300, 275):  # 275 + 1 - 32 = 500 - 256
            engine.logits(IDS[:500])
            assert state.rewind(length) == length
            got = engine.extend([3, 5])
            assert np.array_equal(got, plain.logits([*IDS[:length], 3, 5], last_only=True))
        engine.logits(IDS[:500])
        assert state.rewind(274) == 0  # a part of its window was overwritten
        assert np.array_equal(engine.logits(IDS[:40]), plain.logits(IDS[:40]))


def test_a_snapshot_is_saved_as_soon_as_one_position_of_it_goes(model, rings, plain):
    with edgemoe.load(model, context=CONTEXT) as engine:
        state = engine._held.sequence.state
        engine.logits(IDS[:274])
        state.snapshot()
        engine.extend(IDS[274:500])  # overwrites 274 + 1 - 32 = 243 of its window
        assert state.rewind(274) == 274
        got = engine.extend([3, 5])
        assert np.array_equal(got, plain.logits([*IDS[:274], 3, 5], last_only=True))


def test_a_turn_that_is_edited_or_answered_again_goes_back_to_a_snapshot(model, rings, plain):
    first, second = IDS[:50], IDS[60:90]
    with edgemoe.load(model, context=CONTEXT) as engine:
        made = reply(engine, first, LONG)[0]
        turn = first + made + second
        *expected, _ = reply(engine, turn, LONG)
        for _ in range(2):  # again, from where its reply begins
            *again, known = reply(engine, turn, LONG)
            assert (again, known) == (expected, len(turn) - 16)
        # An edited turn goes on from where the turn begins.
        edited = first + made + [7, *second]
        *got, known = reply(engine, edited)
        assert known == 50 + len(made) - 1
        assert tuple(got) == fresh(plain, edited)
        # An earlier turn begins at the start, as only the last turn has snapshots.
        other = [*IDS[:20], 5, *IDS[21:70]]
        *got, known = reply(engine, other)
        assert known == 0
        assert tuple(got) == fresh(plain, other)


def test_a_snapshot_needs_no_pass_of_its_own(model, monkeypatch, plain):
    """Unlike in recurrent layers, a snapshot may be of any length that the last pass went over."""
    passes = []
    forward = Model.forward
    monkeypatch.setattr(
        Model, "forward", lambda self, batch: passes.append(len(batch)) or forward(self, batch)
    )
    with_slots(monkeypatch, 1 << 24, chunk=64)
    with edgemoe.load(model, context=CONTEXT) as engine:
        reply(engine, IDS[:60])
        assert passes[0] == 60
        engine.extend(IDS[:300])
        *got, known = reply(engine, [*IDS[:50], 9, 9])
        assert known == 60 - 16
        assert tuple(got) == fresh(plain, [*IDS[:50], 9, 9])


def test_a_pass_that_is_broken_off_leaves_the_rings(model, rings, plain):
    with edgemoe.load(model, context=CONTEXT) as engine:
        state = engine._held.sequence.state
        engine.logits(IDS[:500])
        calls = []
        for _ in range(4):
            batch = Batch.of((state, np.array(IDS[600:616], np.int32)))
            batch.is_cancelled = lambda: calls.append(0) or len(calls) % 3 == 0  # the last layer
            with pytest.raises(Cancelled):
                engine.model.forward(batch)
        got = engine.extend(IDS[500:520], last_only=False)
        assert np.array_equal(got, plain.logits(IDS[:520])[500:])


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_done_in_whatever_order(model, rings, plain, seed):
    """A random walk of passes, rewinds and snapshots gives the bits of a sequence that keeps all positions."""
    rng = np.random.default_rng(seed)
    reached_snapshots = 0
    with edgemoe.load(model, context=CONTEXT) as engine:
        state, other = engine._held.sequence.state, plain._held.sequence.state
        state.rewind(0)
        other.rewind(0)
        for _ in range(100):
            if state.length > 750 or rng.random() < 0.15:
                asked = int(
                    rng.integers(
                        max(state.length - int(rng.choice([40, 300, 400])), 0), state.length + 1
                    )
                )
                reached = state.rewind(asked)
                assert 0 <= reached <= asked
                reached_snapshots += 0 < reached < asked
                other.rewind(reached)
            if rng.random() < 0.06:
                state.snapshot()
            ids = rng.integers(0, 256, int(rng.choice([1, 5, 16]))).astype(np.int32)
            for _ in range(int(rng.choice([1, 8]))):
                both = [
                    e.model.forward(Batch.of((s, ids)))
                    for e, s in ((engine, state), (plain, other))
                ]
                assert np.array_equal(*both)
        assert state.ids == other.ids
    assert reached_snapshots > 0


def test_requests_have_the_replies_that_they_have_alone(model, rings, plain):
    """Also if a sequence serves several conversations in turn, and goes back in them."""
    talks = [IDS[:90], IDS[100:140], IDS[200:203]]
    batcher, _ = opened(model, 2, context=CONTEXT)
    for _ in range(3):
        asked = [Asked(talk, replace(LONG, max_tokens=110)) for talk in talks]
        run(batcher, *asked)
        for i, one in enumerate(asked):
            assert one.tokens == fresh(plain, talks[i], replace(LONG, max_tokens=110))[0]
            # The next prompt leaves out the second half of the reply.
            talks[i] = [*talks[i], *one.tokens[:60], *IDS[300 + 10 * i : 305 + 10 * i]]
    again = Asked(talks[0], SHORT)
    run(batcher, again)
    assert again.tokens == fresh(plain, talks[0])[0]


def test_a_chat_takes_turns_back(model, rings, plain):
    params = replace(LONG, max_tokens=120)
    talks = []
    with edgemoe.load(model, context=CONTEXT) as engine:
        for e in (engine, plain):
            chat = e.chat(params=params)
            said = ["".join(chat.say("Hello"))]
            said += ["".join(chat.say("And you?"))]
            chat.undo()
            said += ["".join(chat.say("And they?"))]
            talks.append((said, chat.messages, e.stats.logits_hash))
    assert talks[0] == talks[1]


def test_a_ring_is_saved_whole_and_brought_back(model, rings, plain):
    expected = plain.logits(IDS[:420])
    with edgemoe.load(model, context=CONTEXT, sequences=2) as engine:
        state, other = engine._held.sequence.state, engine.model.make_state()
        engine.logits(IDS[:400])
        saved = [[part.copy() for part in layer.parts(400)] for layer in state.layers]
        state.rewind(0)
        other.begin(400)
        for layer, parts in zip(other.layers, saved, strict=True):
            for target, part in zip(layer.make_parts(400), parts, strict=True):
                target[...] = part
        other.commit(IDS[:400])
        engine._held.sequence.state = other
        assert np.array_equal(engine.extend(IDS[400:420], last_only=False), expected[400:])
        assert other.rewind(401) == 401
        assert other.rewind(399) == 0  # a saved ring does not say which older positions it holds
        assert np.array_equal(engine.extend(IDS[:30], last_only=False), expected[:30])

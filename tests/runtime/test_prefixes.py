"""Prefixes on disk are restored exactly as computed, or computed again, and that is logged."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from dataclasses import replace

import families
import numpy as np
import pytest
from test_batching import Asked, run

from edgemoe import hardware
from edgemoe.convert.convert import convert
from edgemoe.convert.open import open_checkpoint
from edgemoe.errors import FormatError
from edgemoe.file.append import add_sections
from edgemoe.file.reader import open_moe
from edgemoe.file.summed import SummedFile, write_summed
from edgemoe.quant import Allocation, BitRouters
from edgemoe.runtime.batching import Batcher
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.runtime.pool import PrefixPool
from edgemoe.runtime.prefix_store import PrefixStore, identity
from edgemoe.text.sampler import SamplingParams

RNG = np.random.default_rng(5)
LONG, OTHER = RNG.integers(3, 150, 150).tolist(), RNG.integers(3, 150, 90).tolist()
PARAMS = SamplingParams(temperature=1, seed=3, max_tokens=6, ignore_eos=True)


def batcher(path, folder, *, sequences=1, most=1 << 30, **options):
    """Returns a batcher that saves to a folder, and its store, as after a new start."""
    found = open_model(path, EngineOptions(sequences=sequences, **options))
    store = PrefixStore(folder, found.model, most_bytes=most)
    return Batcher(found.model, found.text.eos_ids, prefixes=store), store


def asked(to, ids, params=PARAMS):
    one = Asked(ids, params)
    run(to, one)
    assert one.outcome.error is None
    return one.tokens, one.outcome.figures


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v2", "qwen3_next", "gpt_oss"])
def model(request, tmp_path_factory):
    """Models with keys and values, latents, recurrent layers, and windows."""
    folder = tmp_path_factory.mktemp(request.param)
    families.make(request.param, folder / "source", changes={"max_position_embeddings": 256})
    convert(open_checkpoint(folder / "source"), folder / "model.moe")
    return folder / "model.moe"


@pytest.mark.parametrize(
    "kinds",
    [
        {},
        {"cache_type_k": "q8_0", "cache_type_v": "f32"},
        {"cache_type_k": "q3_0", "cache_type_v": "q4_0"},
    ],
)
def test_what_another_start_finds_is_what_it_would_compute(model, tmp_path, kinds):
    first, _ = batcher(model, tmp_path, **kinds)
    tokens, _ = asked(first, LONG)
    asked(first, OTHER)  # takes over the only sequence, whose state is saved
    first.save()
    again, store = batcher(model, tmp_path, **kinds)
    assert len(store) == 2
    go_on = [*LONG, *tokens]
    alone, _ = batcher(model, tmp_path / "none", **kinds)
    expected, right = asked(alone, go_on)
    got, came = asked(again, go_on)
    assert (got, came.logits_hash) == (expected, right.logits_hash)
    assert came.cached_tokens == len(go_on) - 1
    assert not list((tmp_path / "none").glob("*.prefix"))


def test_only_the_same_model_computed_alike_is_taken(tiny_moe, tmp_path):
    one, store = batcher(tiny_moe, tmp_path)
    asked(one, LONG)
    one.save()
    assert len(store) == 1
    assert os.stat(next(tmp_path.iterdir())).st_mode & 0o077 == 0
    for other in ({"bits": 4}, {"cache_type_k": "f32"}, {"dense_bits": 4}):
        found, _ = batcher(tiny_moe, tmp_path, **other)
        assert asked(found, LONG)[1].cached_tokens == 0
    found, _ = batcher(tiny_moe, tmp_path)
    assert asked(found, LONG)[1].cached_tokens == len(LONG) - 1
    found, _ = batcher(tiny_moe, tmp_path)  # a part of it is a prefix too
    assert asked(found, [*LONG[:100], *OTHER])[1].cached_tokens == 100


def test_a_changed_model_takes_and_saves_its_own_alone(tiny_moe, tmp_path):
    plain, _ = batcher(tiny_moe, tmp_path / "none", bits=4)
    expected, right = asked(plain, LONG)
    one, _ = batcher(tiny_moe, tmp_path / "x")
    first, _ = asked(one, LONG)
    one.save()
    one.change(bits=4)
    tokens, figures = asked(one, LONG)
    assert (tokens, figures.logits_hash) == (expected, right.logits_hash)
    assert figures.cached_tokens == 0
    one.save()
    for bits, answer in ((8, first), (4, expected)):
        one.change(bits=bits)
        tokens, figures = asked(one, LONG)
        assert tokens == answer
        assert figures.cached_tokens == len(LONG) - 1


@pytest.mark.parametrize("at", [100, -5000, -3])
def test_a_damaged_prefix_is_computed_again_and_said(tiny_moe, tmp_path, caplog, at):
    one, _ = batcher(tiny_moe, tmp_path)
    expected, _ = asked(one, LONG)
    one.save()
    again, _ = batcher(tiny_moe, tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        tokens, figures = asked(again, LONG)
    assert tokens == expected
    assert figures.cached_tokens == 0
    assert "computed again" in caplog.text
    assert not path.exists()
    path.write_bytes(data[:50])
    with caplog.at_level(logging.WARNING):
        _, store = batcher(tiny_moe, tmp_path)
    assert "is removed" in caplog.text
    assert len(store) == 0


@pytest.mark.parametrize(
    "ids", [np.full(80, 264), np.full(80, -1), np.zeros((80, 2), np.int64), np.zeros(80, np.float32)],
    ids=["above", "below", "pairs", "floats"],
)  # fmt: skip
def test_what_are_no_tokens_of_the_model_is_no_prefix(tiny_moe, tmp_path, caplog, ids):
    one, store = batcher(tiny_moe, tmp_path)
    meta = {"edgemoe_prefix": "2", "identity": identity(store._model), "turned": "0"}
    write_summed(tmp_path / f"{'0' * 16}.prefix", {"ids": ids}, meta)
    write_summed(tmp_path / "named", {"ids": ids}, meta)
    with pytest.raises(FormatError, match="holds no tokens of the model"):
        store.restore_from(one._slots[0].state, "named")
    with caplog.at_level(logging.WARNING):
        one, store = batcher(tiny_moe, tmp_path)
    assert "holds no tokens of the model" in caplog.text
    assert len(store) == 0
    asked(one, LONG)


def test_a_prefix_of_another_version_is_not_used(tiny_moe, tmp_path):
    one, _ = batcher(tiny_moe, tmp_path)
    expected, _ = asked(one, LONG)
    one.save()
    (path,) = tmp_path.iterdir()
    file = SummedFile(path, "a saved prefix")
    tensors = {name: file.tensor(name) for name in file.shapes}
    for version, cached in (("2", len(LONG) - 1), ("1", 0)):
        meta = {"edgemoe_prefix": version, "identity": file.meta["identity"], "turned": "0"}
        write_summed(path, tensors, meta)
        again, store = batcher(tiny_moe, tmp_path)
        tokens, figures = asked(again, LONG)
        assert (tokens, figures.cached_tokens) == (expected, cached)
    write_summed(tmp_path / "named", tensors, meta)
    with pytest.raises(
        FormatError, match="named: of another model, other settings or another version"
    ):
        store.restore_from(again._slots[0].state, "named")


def test_bits_of_single_matrices_decide_what_is_held(tiny_moe, tmp_path):
    moe, found = open_moe(tiny_moe), []
    names = [name for name, t in moe.tensors.items() if t.spec.kind == "nested"]
    for bits in (2, 2, 8):
        dense = {**dict.fromkeys(names, 6), "layers.1.q": bits}
        allocation = Allocation(
            method="search", layers=moe.config.moe_layers, bits=moe.expert_bits, dense=dense
        )
        (tmp_path / "a.json").write_bytes(allocation.to_json())
        options = EngineOptions(dense_bits="auto", allocation=tmp_path / "a.json")
        found.append(identity(open_model(tiny_moe, options).model))
    assert found[0] == found[1] != found[2]


def test_what_schedulers_are_trained_to_decides_what_is_held(tiny_moe, tmp_path):
    found = []
    for seed in (1, 1, 2):
        rng, path = np.random.default_rng(seed), tmp_path / "x.moe"
        arrays = [rng.random(shape, np.float32) for shape in ((2, 8, 2, 96), (2, 8, 2), (2, 8, 2))]
        weight, gate_weight, bias = arrays
        routers = BitRouters(levels=(2, 4), weight=weight, gate_weight=gate_weight, bias=bias)
        shutil.copy(tiny_moe, path)
        add_sections(path, {"bit-routers": routers.to_bytes()})
        opened = open_model(path, EngineOptions(scheduler="d2moe", bits=4))
        assert opened.model.scheduler.bit_routers is not None
        found.append(identity(opened.model))
    assert found[0] == found[1] != found[2]


def test_what_is_not_ours_stays(tiny_moe, tmp_path):
    other = tmp_path / "thesis.prefix"
    other.write_text("mine")
    _, store = batcher(tiny_moe, tmp_path)
    assert len(store) == 0
    assert other.read_text() == "mine"


def test_a_full_disk_costs_the_prefix_alone(tiny_moe, tmp_path, caplog, monkeypatch):
    import edgemoe.runtime.prefix_store as prefix_store

    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    one, store = batcher(tiny_moe, tmp_path)
    expected, _ = asked(one, LONG)
    monkeypatch.setattr(prefix_store, "write_summed", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            asked(one, OTHER)
            assert asked(one, LONG)[0] == expected
    assert caplog.text.count("No space left on device") == 1  # once
    assert len(store) == 0


def test_old_ones_make_room(tiny_moe, tmp_path):
    one, _ = batcher(tiny_moe, tmp_path)
    asked(one, LONG)
    one.save()
    size = sum(p.stat().st_size for p in tmp_path.iterdir())
    two, store = batcher(tiny_moe, tmp_path, most=size + 1000)
    asked(two, OTHER)
    two.save()
    assert len(store) == len(list(tmp_path.iterdir())) == 1
    three, _ = batcher(tiny_moe, tmp_path)
    assert asked(three, OTHER)[1].cached_tokens == len(OTHER) - 1


def test_a_turn_that_goes_on_is_saved_once(tiny_moe, tmp_path):
    one, store = batcher(tiny_moe, tmp_path)
    tokens, _ = asked(one, LONG)
    one.save()
    one.save()
    assert len(store) == 1
    asked(one, [*LONG, *tokens, *OTHER])
    one.save()
    assert len(store) == len(list(tmp_path.iterdir())) == 1  # the longer one covers both


BEGINNING = replace(PARAMS, max_tokens=0)
"""Computes a prompt that others begin with, such as a system message, and no reply."""


def test_a_beginning_is_kept_beside_what_goes_on_from_it(model, tmp_path):
    one, _ = batcher(model, tmp_path)
    first, rest, other = LONG[:80], LONG[80:], OTHER[:70]
    asked(one, first, BEGINNING)
    asked(one, other)
    assert asked(one, [*first, *rest])[1].cached_tokens == len(first)
    asked(one, other)
    alone, _ = batcher(model, tmp_path / "none")
    expected, right = asked(alone, [*first, *other])
    got, came = asked(one, [*first, *other])
    assert (got, came.logits_hash) == (expected, right.logits_hash)
    assert came.cached_tokens == len(first)


@pytest.mark.parametrize("is_pool", [False, True])
def test_a_beginning_is_taken_where_a_sequence_cannot_go_back_to_it(model, tmp_path, is_pool):
    one = pooled(model, folder=tmp_path)[0] if is_pool else batcher(model, tmp_path)[0]
    first, other = LONG[:80], OTHER[:70]
    asked(one, first, BEGINNING)
    asked(one, other)
    one.save()
    talk = [*first, *LONG[80:100]]
    for _ in range(3):  # turns, until recurrent layers no longer have a snapshot of its beginning
        talk = [*talk, *asked(one, talk)[0], *LONG[100:110]]
    assert asked(one, [*first, *other])[1].cached_tokens == len(first)


def test_a_beginning_is_kept_beside_a_longer_one_in_memory(model):
    one, _, _ = pooled(model)
    first, other = LONG[:80], OTHER[:70]
    for ids, params in ((LONG, PARAMS), (other, PARAMS), (first, BEGINNING), (other, PARAMS)):
        asked(one, ids, params)
    assert asked(one, [*first, *other])[1].cached_tokens == len(first)


def test_a_short_text_is_kept_beside_a_longer_one_of_other_frequencies(tmp_path):
    """With LongRoPE a short prompt takes nothing from a long text."""
    ropes = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128, "factor": 2.0,
        "short_factor": [1.0] * 8, "long_factor": [3.0] * 8,
    }  # fmt: skip
    changes = {"head_dim": 16, "max_position_embeddings": 256, "rope_parameters": ropes}
    families.make("mixtral", tmp_path / "source", changes=changes)
    convert(open_checkpoint(tmp_path / "source"), tmp_path / "x.moe")
    for is_pool in (False, True):
        if is_pool:
            one, _, _ = pooled(tmp_path / "x.moe")
        else:
            one, _ = batcher(tmp_path / "x.moe", tmp_path / "kept")
        for ids in (LONG[:80], OTHER, LONG, OTHER):
            asked(one, ids, BEGINNING)
        assert asked(one, LONG[:100])[1].cached_tokens == 80, is_pool


def pooled(path, *, folder=None, most=1 << 20, sequences=1):
    """Returns a batcher that keeps prefixes in memory."""
    found = open_model(path, EngineOptions(sequences=sequences))
    store = None if folder is None else PrefixStore(folder, found.model, most_bytes=1 << 30)
    pool = PrefixPool(found.model, most_bytes=most, below=store)
    return Batcher(found.model, found.text.eos_ids, prefixes=pool), pool, found.model.room


def test_what_a_sequence_loses_is_kept_in_memory(model, tmp_path):
    one, pool, room = pooled(model)
    alone, _ = batcher(model, tmp_path)
    size = room.size
    tokens, _ = asked(one, LONG)
    others, _ = asked(one, OTHER)
    assert len(pool) == 1
    assert pool.size > 0
    assert room.size <= size
    go_on = [*LONG, *tokens]
    expected, right = asked(alone, go_on)
    got, came = asked(one, go_on)
    assert (got, came.logits_hash) == (expected, right.logits_hash)
    assert came.cached_tokens == len(go_on) - 1
    assert len(pool) == 1  # the other one has replaced it
    assert asked(one, [*OTHER, *others])[1].cached_tokens == len(OTHER) + 5


def test_memory_for_prefixes_is_bounded_and_experts_give_it(tiny_moe, tmp_path):
    third = RNG.integers(3, 150, 120).tolist()
    one, pool, room = pooled(tiny_moe, folder=tmp_path)
    asked(one, LONG)
    asked(one, OTHER)
    each = pool.size
    assert room._beside == each
    few, pool, room = pooled(tiny_moe, folder=tmp_path / "few", most=each)
    asked(few, LONG)
    asked(few, third)
    asked(few, OTHER)  # the second takes the memory, and the first goes to disk
    assert pool.size <= each
    assert len(list((tmp_path / "few").glob("*.prefix"))) == 1
    assert asked(few, LONG)[1].cached_tokens == len(LONG) - 1
    few.change(bits=4)
    assert asked(few, third)[1].cached_tokens == 0
    assert room._beside == pool.size


def test_prefixes_in_memory_leave_room_for_an_expert_and_for_contexts(tiny_moe, tmp_path):
    texts = RNG.integers(3, 150, (4, 100)).tolist()
    one, pool, room = pooled(tiny_moe)
    asked(one, texts[0])
    asked(one, texts[1])
    each = pool.size
    for fit in (0, 1, 2):
        one, pool, room = pooled(tiny_moe, folder=tmp_path / str(fit))
        room._base += room.spare - fit * each - each // 2
        for ids in texts:
            asked(one, ids)
            assert room._beside == pool.size
            assert room.spare >= 0
        assert len(pool) == fit
        assert asked(one, texts[0])[1].cached_tokens == len(texts[0]) - 1  # from the disk


def test_a_prefix_that_there_is_no_room_for_costs_time_alone(model, tmp_path, caplog, monkeypatch):
    one, store = batcher(model, tmp_path)
    go_on = [*LONG, *asked(one, LONG)[0]]
    other = [*OTHER, *asked(one, OTHER)[0]]
    assert len(store) == 1
    room = one._model.room
    with monkeypatch.context() as patch:
        patch.setattr(room, "_is_measured", True)
        patch.setattr(room, "_singles", 100)
        patch.setattr(room, "_base", room._budget.ram)
        patch.setattr(hardware, "exact_process_bytes", lambda: room._budget.ram)
        assert asked(one, go_on)[1].cached_tokens == 0
    assert len(store) == 1
    assert "is not saved: this takes" in caplog.text
    assert "is computed again: this takes" in caplog.text
    assert asked(one, other)[1].cached_tokens == 0
    assert asked(one, go_on)[1].cached_tokens >= len(go_on) - 1


def test_a_prefix_larger_than_its_folder_is_named_once(tiny_moe, tmp_path, caplog):
    one, store = batcher(tiny_moe, tmp_path, most=1000)
    for text in (LONG, OTHER, LONG):
        asked(one, text)
    assert len(store) == 0
    assert caplog.text.count("is not saved: ") == 1
    assert "more than the folder may hold" in caplog.text


def test_at_the_end_all_that_is_kept_goes_to_disk(tiny_moe, tmp_path):
    one, _, _ = pooled(tiny_moe, folder=tmp_path)
    asked(one, LONG)
    asked(one, OTHER)
    assert not list(tmp_path.iterdir())
    one.save()
    again, store = batcher(tiny_moe, tmp_path)
    assert len(store) == 2
    assert asked(again, LONG)[1].cached_tokens == len(LONG) - 1


def test_experts_that_keep_their_size_give_no_memory(tiny_moe):
    found = open_model(tiny_moe, EngineOptions(steady=True))
    with pytest.raises(ValueError, match="keep their size"):
        PrefixPool(found.model, most_bytes=1, below=None)


@pytest.mark.parametrize("change", [{}, {"reuses": False}])
def test_a_request_takes_the_sequence_that_it_names(tiny_moe, change):
    found = open_model(tiny_moe, EngineOptions(sequences=3))
    one = Batcher(found.model, found.text.eos_ids)
    first = Asked(LONG, PARAMS, slot=2)
    second = Asked(LONG, PARAMS, slot=2, **change)
    other = Asked(OTHER, PARAMS)
    run(one, first, second, other)
    assert [view.length > 0 for view in one.views].count(True) == 2
    assert one.views[2].length >= len(LONG)
    assert second.tokens == first.tokens
    assert second.outcome.figures.cached_tokens == (0 if change else len(LONG) - 1)
    assert second.outcome.figures.queue_s > first.outcome.figures.queue_s


def test_a_sequence_is_looked_into_when_no_request_has_it(tiny_moe):
    found = open_model(tiny_moe, EngineOptions(sequences=2))
    one = Batcher(found.model, found.text.eos_ids)
    first = Asked(LONG, PARAMS, slot=1)
    one.submit(first.request)
    one.step()
    lengths = [one.with_slot(i, lambda state: state.length) for i in (0, 1)]
    one.step()
    assert lengths[0].result(0) == 0
    assert not lengths[1].done()
    run(one)
    assert first.outcome is not None
    assert lengths[1].result(0) == len(LONG) + len(first.tokens) - 1

    def fails(_):
        raise ValueError("no")

    failed = one.with_slot(0, fails)
    run(one)
    assert isinstance(failed.exception(0), ValueError)
    left = one.with_slot(0, fails)
    one.end(RuntimeError("over"))
    assert isinstance(left.exception(0), RuntimeError)
    with pytest.raises(RuntimeError, match="has ended"):
        one.with_slot(0, fails)

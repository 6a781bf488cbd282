"""Files with low-rank corrections: what they mean, and that runs give the same bits with all options."""

from __future__ import annotations

import json

import numpy as np
import pytest
import reference
from corrected import RANKS, convert_corrected
from decoded import Decoded
from edited import edit, setter
from engines import GREEDY, with_slots
from simulated import plug_in
from tiny import tiny_checkpoint

import edgemoe
from edgemoe import _core
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.quant import Allocation
from edgemoe.runtime.trace import read
from edgemoe.store import ExpertStore, dense_bytes, expert_bytes, tensors_bytes
from edgemoe.store.floats import dense_floats, expert_floats

IDS = np.random.default_rng(1).integers(0, 256, 60)
BITS = np.array([[2, 3, 4, 8, 6, 2, 3, 4], [3, 2, 2, 8, 4, 4, 6, 2]], np.int8)


def make(path, **options):
    return convert_corrected(tiny_checkpoint(), path, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("corrected") / "x.moe")


@pytest.fixture(scope="module")
def expected(model):
    out = {}
    for bits in (2, 3, 4, 8):
        with edgemoe.load(model, bits=bits) as engine:
            out[bits] = engine.logits(IDS), list(engine.generate(list(IDS[:20]), GREEDY))
    return out


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_arithmetic_is_that_of_the_corrected_weights(tmp_path, bits):
    path = make(tmp_path / "x.moe", bits=bits)
    moe, decoded = open_moe(path), Decoded(path)
    level = moe.level(bits)
    assert moe.scheme.ranks("layers.1.o")[-1] == moe.scheme.ranks("o")[-1] == 16
    assert moe.scheme.ranks("experts.1.3.up")[-1] == RANKS["experts.up"][level - 1]
    mine, _ = reference.logits(decoded.config, decoded.tensors, decoded.expert, list(IDS))
    with edgemoe.load(path) as engine:
        got = engine.logits(IDS)
    errors = np.abs(got - mine).max(1) / mine.std()
    assert np.median(errors) < 0.06
    assert abs(float((got * mine).sum() / (mine * mine).sum()) - 1) < 0.003
    if bits != 2:
        return
    # Each kind of matrix matters: without its corrections the reference gives other logits.
    for kind in RANKS:
        bare = Decoded(path, without=kind)
        other, _ = reference.logits(bare.config, bare.tensors, bare.expert, list(IDS))
        apart = np.median(np.abs(other - mine).max(1) / mine.std())
        assert apart > 0.02, kind


def test_weights_are_read_as_the_reference_reads_them(model):
    moe, decoded = open_moe(model), Decoded(model)
    for name, weight in dense_floats(moe).items():
        np.testing.assert_allclose(weight, decoded.tensors[name], rtol=1e-5, atol=1e-6)
    for level in range(1, 6):
        for mine, theirs in zip(
            expert_floats(moe, 8 + 3, level), decoded.expert(1, 3, level), strict=True
        ):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_an_upgrade_brings_the_next_level_s_correction(model):
    moe, decoded = open_moe(model), Decoded(model)
    cache = ExpertStore.open(moe, bits=8, budget_bytes=1 << 22, verify=True).cache
    for level in (1, 2, 5, 3):
        for mine, theirs in zip(
            cache.decode(8 + 5, level, moe.bases[1]), decoded.expert(1, 5, level), strict=True
        ):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert cache.stats["reads"] == 3  # 1, 2, and what was missing up to 5


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("num_experts", [2, 16])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_logits_do_not_depend_on_budget_and_chunk(
    model, expected, monkeypatch, bits, num_experts, chunk
):
    moe = open_moe(model)
    with_slots(monkeypatch, num_experts * expert_bytes(moe, moe.level(bits)), chunk)
    with edgemoe.load(model, bits=bits, threads=3 if chunk is None else 1) as engine:
        assert np.array_equal(engine.logits(IDS), expected[bits][0])
        assert list(engine.generate(list(IDS[:20]), GREEDY)) == expected[bits][1]


@pytest.mark.parametrize("isa", _core.usable_isas().split())
def test_logits_do_not_depend_on_the_instruction_set(model, expected, isa):
    before = _core.isa()
    _core.use_isa(isa)
    try:
        for bits in (2, 3):
            with edgemoe.load(model, bits=bits) as engine:
                assert np.array_equal(engine.logits(IDS), expected[bits][0])
    finally:
        _core.use_isa(before)


def test_experts_of_an_allocation_have_the_corrections_of_their_last_level(model, tmp_path):
    allocation = Allocation(method="test", layers=(0, 1), bits=BITS, settings={})
    path = make(tmp_path / "x.moe", allocation=allocation)
    decoded = Decoded(path)
    mine, _ = reference.logits(decoded.config, decoded.tensors, decoded.expert, list(IDS))
    with edgemoe.load(path) as engine:
        got = engine.logits(IDS)
    assert np.median(np.abs(got - mine).max(1) / mine.std()) < 0.06
    (tmp_path / "bits.json").write_bytes(allocation.to_json())
    whole = Decoded(model)
    with edgemoe.load(model, bits="auto", allocation=tmp_path / "bits.json") as engine:
        again = engine.logits(IDS)
    assert np.isfinite(again).all()
    assert whole.expert(0, 0, 1)[0].shape == decoded.expert(0, 0)[0].shape


def test_bases_count_as_dense_weights(model, tiny_moe):
    moe = open_moe(model)
    assert moe.bases.shape == (2, 16, 128)
    assert moe.basis_bytes == moe.bases.nbytes == 2 * 16 * 128
    assert dense_bytes(moe, 5) - tensors_bytes(moe, moe.tensors, 5) == 2 * 16 * 128
    assert expert_bytes(moe, 1) >= expert_bytes(open_moe(tiny_moe), 1)


def test_a_trace_is_replayed_with_the_sizes_of_such_experts(model, tmp_path):
    with edgemoe.load(model, bits=3, trace=tmp_path / "x.trace") as engine:
        list(engine.generate(list(IDS[:20]), GREEDY))
        sizes = engine.model.setting.level_bytes
    header = read(tmp_path / "x.trace").header
    page = _core.system_page()
    ends = open_moe(model).experts.ends
    assert header.level_bytes[:2] == sizes == tuple(-(-end // page) * page for end in ends[:2])


def test_a_device_has_them_too(model):
    for bits in (2, 4, None):
        hashes = []
        for more in ({}, {"device": "cuda", "plug_in": plug_in()}):
            with edgemoe.load(model, context=64, bits=bits, **more) as engine:
                hashes.append(engine.logits(IDS).tobytes())
        assert hashes[0] == hashes[1]


def broken(model, tmp_path, change):
    path = tmp_path / "broken.moe"
    path.write_bytes(edit(model.read_bytes(), change))
    return path


def without(section):
    def change(index):
        del index["sections"][section]

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without("basis"), "the section basis is missing; experts have corrections"),
        (setter("correction", []), "correction must be an object"),
        (setter("correction", "router", [8] * 5), r"correction: the model has no matrices of kind 'router'"),
        (setter("correction", "q", [8, 8]), r"correction of q: ranks \[8, 8\]; expected one for each of 5"),
        (setter("correction", "q", [4, 8, 8, 0, 0]), "0, 8, 16, 24 or 32"),
        (setter("correction", "q", [40, 8, 8, 0, 0]), "0, 8, 16, 24 or 32"),
        (setter("correction", "q", [True, 8, 8, 0, 0]), "0, 8, 16, 24 or 32"),
        (setter("correction", "q", [0, 0, 0, 0, 0]), "not all 0"),
        (setter("correction", "q", [16, 8, 8, 0, 0]), "tensor layers.0.q has rungs"),
        (setter("correction", "experts.up", [24, 8, 8, 0, 0]), "section basis is of another model: expected 6144"),
        (setter("correction", "experts.down", [24, 8, 8, 0, 0]), "expert record .* has rungs of another size"),
        (setter("scheme", "mwq"), "."),
    ],
)  # fmt: skip
def test_a_correction_that_does_not_fit_is_named(model, tmp_path, change, match):
    with pytest.raises(FormatError, match=match) as error:
        open_moe(broken(model, tmp_path, change))
    assert "\n" not in str(error.value)


def test_a_basis_that_nothing_needs_is_refused(tiny_moe, model, tmp_path):
    def change(index):
        for part in ("gate", "up"):
            del index["correction"][f"experts.{part}"]

    with pytest.raises(
        FormatError, match="section basis: the index has no correction that it is for"
    ):
        open_moe(broken(model, tmp_path, change))


def test_files_without_corrections_have_no_word_of_them(tiny_moe):
    data = tiny_moe.read_bytes()
    assert b'"correction"' not in data[-200_000:]
    assert open_moe(tiny_moe).scheme.correction == {}
    assert json.dumps(open_moe(tiny_moe).scheme.correction) == "{}"

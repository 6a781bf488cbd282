"""The corrections that a conversion writes: those asked for, or those worth their bytes; others are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from corrected import calibrated
from decoded import Decoded
from tiny import tiny_checkpoint

from edgemoe.config import dense_tensors
from edgemoe.convert.convert import convert
from edgemoe.convert.ranks import choose_ranks
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.quant import SCHEMES, Allocation
from edgemoe.quant.columns import COLUMN_SCALES, ColumnScales
from edgemoe.quant.ranks import best_ranks, gains, same_rank

EIGHT = (8, 8, 8, 0, 0)
KINDS = {
    "embed", "head", "q", "k", "v", "o", "shared.gate", "shared.up", "shared.down",
    "experts.gate", "experts.up", "experts.down",
}  # fmt: skip


@pytest.fixture(scope="module")
def source():
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def config(source):
    return SourceModel(source).config


@pytest.fixture(scope="module")
def calibration(config, tmp_path_factory):
    return calibrated(tmp_path_factory.mktemp("ranks") / "x.calib", config)


def ranks_of(path, source, **options):
    convert(source, path, **options)
    return open_moe(path).scheme.correction


def test_what_pays_is_what_holds_much_in_few_directions():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((512, 256)).astype(np.float32)
    x = rng.standard_normal((2000, 256))
    alike = (x.T @ x).astype(np.float32)
    found = gains(w, alike, None)
    assert best_ranks(found, [1] * 5) == ()
    x[:, :8] *= 100
    few = (x.T @ x).astype(np.float32)
    found = gains(w, few, None)
    assert best_ranks(found, [1] * 5) == EIGHT
    assert best_ranks(gains(w, few, None, 3), [0, 0, 1], 3) == same_rank(8, 2, 3)
    assert best_ranks(found, [0, 0, 0, 1, 1]) == ()
    # The rank of a matrix is at most its number of rows.
    assert best_ranks(gains(w[:7], few, None), [1] * 5) == ()


def test_a_rank_is_that_of_all_that_can_have_it(tmp_path, source, calibration):
    found = ranks_of(tmp_path / "x.moe", source, calibration=calibration, correction=8)
    assert found == dict.fromkeys(KINDS, EIGHT)
    assert ranks_of(tmp_path / "0.moe", source, calibration=calibration, correction=0) == {}
    found = ranks_of(tmp_path / "2.moe", source, calibration=calibration, correction=8, bits=2)
    assert found == dict.fromkeys(KINDS, (8,))


@pytest.mark.parametrize("rank", [0, 8])
def test_tells_how_far_the_calibration_is_read(tmp_path, source, calibration, rank):
    told = []
    convert(
        source, tmp_path / "x.moe", calibration=calibration, correction=rank,
        reading=lambda *at: told.append(("read", *at)), progress=lambda *at: told.append(("written", *at)),
    )  # fmt: skip
    kinds, shares = [kind for kind, *_ in told], [done for kind, done, _ in told if kind == "read"]
    assert kinds == sorted(kinds)  # all is read before anything is written
    assert shares == sorted(shares)
    assert {total for kind, _, total in told if kind == "read"} == {1000}
    assert shares[-1] == 1000
    assert 333 in shares  # all is checked
    assert 400 in shares  # one norm of five, for scales of columns
    assert (833 in shares) == bool(rank)  # one layer of two, for directions


def test_a_kind_of_which_one_matrix_is_unknown_has_none(tmp_path, source, config):
    missing = ["dense.layers.1.o.products", "experts.0.hidden.products", "dense.head.products"]
    partly = calibrated(tmp_path / "x.calib", config, leaving=missing)
    found = ranks_of(tmp_path / "x.moe", source, calibration=partly, correction=8)
    assert set(found) == KINDS - {"o", "experts.down", "head"}


def test_by_itself_a_conversion_has_what_is_worth_it(tmp_path):
    source = tiny_checkpoint(layers=1, experts=2)
    model = SourceModel(source)
    few = calibrated(tmp_path / "x.calib", model.config, few=True)
    found = ranks_of(tmp_path / "x.moe", source, calibration=few)
    assert found.keys() >= {"experts.gate", "experts.up"}  # their shared V costs little
    assert found == choose_ranks(model, few)
    # A favoured level or an allocation decides what counts, and higher levels have no corrections.
    assert choose_ranks(model, few, favour=8) == {}
    bits = np.full((1, 2), 8, np.int8)
    allocation = Allocation(method="test", layers=(0,), bits=bits, settings={})
    of_eight = choose_ranks(model, few, allocation=allocation)
    assert not any(kind.startswith("experts.") for kind in of_eight)


def test_one_matrix_of_a_layer_is_enough_for_its_gates_and_ups(tmp_path, source, config):
    layers = {f"layers.{i}.experts": config.hidden_size for i in config.moe_layers}
    own = [f"experts.{i}.{port}.products" for i in config.moe_layers for port in ("in", "hidden")]
    calibration = calibrated(tmp_path / "x.calib", config, leaving=own, more=layers)
    found = ranks_of(tmp_path / "x.moe", source, calibration=calibration, correction=8)
    assert set(found) == KINDS - {"experts.down"}
    plain = tmp_path / "plain.moe"
    convert(source, plain)
    mine = error(tmp_path / "x.moe", source, calibration, 3, ("gate", "up"))
    assert mine < 0.3 * error(plain, source, calibration, 3, ("gate", "up"))
    downs = [Decoded(path).expert(1, 3, 2)[2] for path in (plain, tmp_path / "x.moe")]
    assert np.array_equal(*downs)


@pytest.mark.parametrize("favour", [2, 4])
def test_a_favoured_level_gains_most(tmp_path, source, calibration, favour):
    levels = {}
    for rank in (0, 8):
        path = tmp_path / f"{rank}.moe"
        convert(source, path, calibration=calibration, correction=rank, favour=favour)
        levels[rank] = error(path, source, calibration, favour)
    assert levels[8] < 0.7 * levels[0]


def error(path, source, calibration, bits, parts=("gate", "up", "down")):
    level = (2, 3, 4, 6, 8).index(bits) + 1
    mine, float_ = Decoded(path).expert(1, 3, level), SourceModel(source).expert(1, 3)
    moe = open_moe(path)
    section = moe.sections.get(COLUMN_SCALES)
    scales = section and ColumnScales.from_section(moe.config, section)
    total = 0.0
    for part, a, b in zip(parts, mine, float_, strict=False):
        if scales:
            a = scales.unfolded(f"experts.1.3.{part}", a)
        moments = calibration.matrix(f"experts.1.3.{part}")
        total += np.einsum("rc,cd,rd->", a - b, moments, a - b)
    return total


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"correction": 12}, "correction: expected 0, 8, 16, 24 or 32, got 12"),
        ({"correction": 40}, "correction: expected 0, 8, 16, 24 or 32, got 40"),
        ({"correction": 8, "calibration": None}, "correction: expected a calibration that was made with --full or"),
        ({"correction": 8, "scheme": SCHEMES["mwq"]}, "correction: not for the scheme mwq"),
        ({"favour": 5}, "favour: expected one of 2, 3, 4, 6, 8, got 5"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, source, calibration, options, match):
    with pytest.raises(ValueError, match=match):
        convert(source, tmp_path / "x.moe", **{"calibration": calibration, **options})
    assert not list(tmp_path.iterdir())


def test_a_model_too_narrow_for_a_rank_is_refused(tmp_path):
    source = tiny_checkpoint(width=16)
    config = SourceModel(source).config
    dense = [f"dense.{name}.products" for name in dense_tensors(config)]
    calibration = calibrated(tmp_path / "x.calib", config, leaving=dense)
    with pytest.raises(ValueError, match="correction: no matrix of this model can have rank 24"):
        convert(source, tmp_path / "x.moe", calibration=calibration, correction=24)


def test_a_writer_needs_products_for_corrections(tmp_path, source, config):
    scheme = replace(SCHEMES["nested"], correction={"o": EIGHT})
    with pytest.raises(FormatError, match="layers.0.o: has a correction, but no products of its"):
        convert(source, tmp_path / "x.moe", scheme=scheme)
    scheme = replace(SCHEMES["nested"], correction={"experts.up": EIGHT})
    with pytest.raises(FormatError, match="corrections are fitted to a calibration"):
        convert(source, tmp_path / "x.moe", scheme=scheme)

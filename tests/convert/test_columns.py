"""Column scales are chosen where they reduce the error, and undone wherever the checkpoint's columns are meant."""

from __future__ import annotations

import numpy as np
import pytest
from corrected import calibrated
from decoded import Decoded
from tiny import tiny_checkpoint

import edgemoe
from edgemoe.convert.columns import choose_scales
from edgemoe.convert.convert import convert
from edgemoe.convert.export.hf import export_hf
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.lab.bits.calibrate import calibrate
from edgemoe.quant import Calibration
from edgemoe.quant.columns import COLUMN_SCALES, ColumnScales, strength

TEXT = "".join(f"line {i}: the quick brown fox, {i * i} times. " for i in range(12))


@pytest.fixture(scope="module")
def source():
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def calibration(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("uneven") / "x.calib"
    return calibrated(path, SourceModel(source).config, uneven=True)


@pytest.fixture(scope="module")
def paths(source, calibration, tmp_path_factory):
    """Two files of the same model, with column scales and without."""
    folder = tmp_path_factory.mktemp("columns")
    for name, scale_columns in (("scaled", True), ("plain", False)):
        convert(
            source, folder / f"{name}.moe", calibration=calibration, scale_columns=scale_columns,
            correction=0,
        )  # fmt: skip
    return folder / "scaled.moe", folder / "plain.moe"


def scales_of(path):
    moe = open_moe(path)
    return ColumnScales.from_section(moe.config, moe.sections[COLUMN_SCALES])


def errors(path, source, calibration, scales=None):
    """Returns the mean logarithm of the output error of some experts' up matrices, at each level."""
    decoded, model, out = Decoded(path), SourceModel(source), np.zeros(5)
    for layer, index in ((0, 3), (1, 5), (1, 6)):
        name = f"experts.{layer}.{index}.up"
        moments = calibration.matrix(name).astype(np.float64)
        for level in range(1, 6):
            mine = decoded.expert(layer, index, level)[1]
            if scales is not None:
                mine = scales.unfolded(name, mine)
            lost = mine - model.expert(layer, index)[1]
            out[level - 1] += np.log(np.einsum("rc,cd,rd->", lost, moments, lost)) / 3
    return out


def test_strong_columns_are_made_alike(paths, source, calibration):
    scaled, plain = paths
    assert COLUMN_SCALES not in open_moe(plain).sections
    mine = errors(scaled, source, calibration, scales_of(scaled))
    assert (mine - errors(plain, source, calibration)).max() < np.log(0.9)
    with edgemoe.load(scaled) as a, edgemoe.load(plain) as b:
        got, expected = (engine.logits(list(range(40, 64))) for engine in (a, b))
    assert np.abs(got - expected).mean() < 0.1 * expected.std()


def test_nothing_is_scaled_where_columns_are_alike(source, tmp_path):
    config = SourceModel(source).config
    path = calibrated(tmp_path / "x.calib", config).path
    alike = Calibration(path)
    alike.matrix = lambda name: np.eye(48 if name.endswith("down") else 96, dtype=np.float32)
    alike.layer_diagonal = lambda layer: np.ones(96, np.float32)
    found = choose_scales(SourceModel(source), alike)
    assert found.section() == b""


@pytest.mark.parametrize("kind", ["full", "layers"])
def test_a_calibration_is_of_the_checkpoints_inputs(paths, tmp_path, kind):
    found = []
    for i, path in enumerate(paths):
        calibrate(
            path, TEXT, tmp_path / f"{i}.calib", window=48, count=3, threads=1, **{kind: True}
        )
        found.append(Calibration(tmp_path / f"{i}.calib"))
    mine, plain = found
    names = [
        "layers.0.q",
        "layers.1.q",
        "layers.1.o",
        "layers.0.shared.gate",
        "layers.1.shared.down",
        "head",
    ]
    experts = [f"experts.{layer}.{index}" for layer in (0, 1) for index in range(8)]
    for name in names + [f"{e}.{part}" for e in experts for part in ("gate", "up", "down")]:
        for read in (Calibration.diagonal, Calibration.matrix):
            got, expected = read(mine, name), read(plain, name)
            assert (got is None) == (expected is None)
            if expected is not None and mine.count(name) == plain.count(
                name
            ):  # otherwise another scale was chosen
                assert np.linalg.norm(got - expected) < 0.1 * np.linalg.norm(expected), name
    scales = scales_of(paths[0])
    assert scales.of("layers.0.q").max() > 1.5
    seen = plain.with_scales(scales)
    s = scales.of("experts.1.2.gate")
    assert np.allclose(
        seen.diagonal("experts.1.2.gate") * s * s, plain.diagonal("experts.1.2.gate")
    )
    assert np.allclose(seen.layer_matrix(1) * np.outer(s, s), plain.layer_matrix(1))
    assert np.allclose(seen.layer_diagonal(1) * s * s, plain.layer_diagonal(1))


def test_an_export_has_the_checkpoints_columns(paths, source, tmp_path):
    export_hf(open_moe(paths[0]), tmp_path / "out")
    back, model = SourceModel(HFCheckpoint(tmp_path / "out")), SourceModel(source)
    for name in ("norm", "layers.0.attn_norm", "layers.1.ffn_norm"):
        assert np.array_equal(back.tensor(name), model.tensor(name))
    pairs = [
        (back.tensor(n), model.tensor(n))
        for n in ("head", "layers.1.k", "layers.0.router", "layers.0.o")
    ]
    pairs += zip(back.expert(1, 2), model.expert(1, 2), strict=True)
    for got, expected in pairs:
        assert np.linalg.norm(got - expected) < 0.05 * np.linalg.norm(expected)


def test_narrower_experts_have_them_too(source, calibration, tmp_path):
    convert(source, tmp_path / "x.moe", calibration=calibration, prune=0.34, correction=8)
    assert COLUMN_SCALES in open_moe(tmp_path / "x.moe").sections
    with edgemoe.load(tmp_path / "x.moe") as engine:
        assert np.isfinite(engine.logits([1, 2, 3])).all()


def test_columns_through_which_nothing_came_are_left_alone(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "corrected.products", lambda rng, cols, count=(), **_: np.zeros((*count, cols, cols), "f4")
    )
    model = SourceModel(source)
    scales = choose_scales(model, calibrated(tmp_path / "x.calib", model.config))
    assert (scales.values == 1).all()


def test_powers_of_strength_have_mean_one():
    found = strength(np.array([16.0, 1, 1, 0], np.float32), 0.25)
    assert found[0] == pytest.approx(2 * found[1])
    assert 0 < found[3] < found[1]
    assert np.log(found).sum() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda content: content[:-4], "expected 1920 bytes, got 1916"),
        (lambda content: content[:-4] + b"\0\0\0\0", "expected finite numbers above 0"),
        (lambda content: content[:-4] + b"\xff\xff\xff\x7f", "expected finite numbers above 0"),
    ],
)
def test_what_are_no_scales_is_refused(paths, change, match):
    moe = open_moe(paths[0])
    with pytest.raises(FormatError, match=f"section column_scales: {match}"):
        ColumnScales.from_section(moe.config, change(moe.sections[COLUMN_SCALES]))

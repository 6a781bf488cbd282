"""Pruning in conversion removes the neurons of experts that matter least; the others keep their weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import families
import numpy as np
import pytest
from corrected import calibrated
from decoded import Decoded
from tiny import tiny_checkpoint

import edgemoe
from edgemoe.cli.main import main
from edgemoe.convert import prune
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.prune import PrunedCalibration, PrunedModel, kept_width, made_up, needed
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.quant import Calibration, write_calibration

H, KEPT = 48, 32
DEAD = 16


@pytest.fixture(scope="module")
def source():
    """A checkpoint in which a third of each expert's neurons, different ones in each, add nothing."""
    checkpoint = tiny_checkpoint()
    rng = np.random.default_rng(0)
    for name in [name for name in checkpoint.shapes if name.endswith("down_proj.weight")]:
        if ".experts." in name:
            checkpoint.tensor(name)[:, rng.permutation(H)[:DEAD]] = 0
    return checkpoint


@pytest.fixture(scope="module")
def calibration(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("prune") / "x.calib"
    return calibrated(path, SourceModel(source).config)


@pytest.mark.parametrize(
    ("width", "share", "expected"),
    [(1024, 0.1, 896), (1024, 0.25, 768), (1408, 0.1, 1280), (768, 0.5, 384), (256, 0.1, 224), (48, 0.99, 16)],
)  # fmt: skip
def test_widths_are_whole_tiles(width, share, expected):
    assert kept_width(width, share) == expected


@pytest.fixture(scope="module")
def squares(source, calibration, tmp_path_factory):
    """The same calibration without products."""
    path = tmp_path_factory.mktemp("prune") / "squares.calib"
    tensors = {}
    for layer in (0, 1):
        tensors[f"experts.{layer}.count"] = calibration.layer(layer, "count")
        tensors[f"experts.{layer}.hidden.squares"] = np.stack(
            [400 * calibration.matrix(f"experts.{layer}.{e}.down").diagonal() for e in range(8)]
        )
    write_calibration(path, tensors, dict.fromkeys(("source", "model", "bits"), ""))
    return Calibration(path)


def test_those_of_least_energy_go_where_no_more_is_known(source, squares):
    model = PrunedModel(source, 1 / 3, squares)
    whole = SourceModel(source)
    assert model.notes[-1].endswith("with a calibration of --full they make up for the others")
    assert model.config.expert_hidden == KEPT
    for layer in (0, 1):
        for e in range(8):
            gate, up, down = whole.expert(layer, e)
            means = squares.diagonal(f"experts.{layer}.{e}.down")
            energy = [means[k] * sum(float(x) ** 2 for x in down[:, k]) for k in range(H)]
            kept = sorted(sorted(range(H), key=lambda k: -energy[k])[:KEPT])
            assert model.kept(layer, e).tolist() == kept
            assert not set(np.flatnonzero(~down.any(0)).tolist()) & set(kept)
            for got, expected in zip(
                model.expert(layer, e), (gate[kept], up[kept], down[:, kept]), strict=True
            ):
                np.testing.assert_array_equal(got, expected)


def nearest(down, inputs, kept):
    """Returns the w_down of the neurons `kept` whose output is nearest to the original, and its squared error.

    It is found by least squares over the inputs themselves; damping is added as one further input for each neuron.
    """
    damping = np.sqrt(0.01 * np.square(inputs).mean() * len(inputs)) * np.eye(inputs.shape[1])
    x = np.concatenate([inputs, damping])
    found = np.linalg.lstsq(x[:, kept], x @ down.T, rcond=None)[0]
    return found.T, np.square(x[:, kept] @ found - x @ down.T).sum()


def inputs_of(rng, count, cols):
    """Returns random inputs whose columns are mostly mixtures of half as many."""
    few = rng.standard_normal((count, cols // 2)) @ rng.standard_normal((cols // 2, cols))
    return few + 0.3 * rng.standard_normal((count, cols))


def test_others_make_up_for_what_is_left_out():
    """The choice is that of trying each neuron in turn, with least squares over all inputs."""
    rng = np.random.default_rng(1)
    inputs = inputs_of(rng, 200, 12)
    down = rng.standard_normal((7, 12)).astype(np.float32)
    moments = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    left = list(range(12))
    for count in range(11, 3, -1):
        left = min(
            ([k for k in left if k != gone] for gone in left),
            key=lambda kept: nearest(down, inputs, kept)[1],
        )
        assert needed(down, moments, count).tolist() == left
        np.testing.assert_allclose(
            made_up(down, moments, np.array(left)), nearest(down, inputs, left)[0], atol=1e-4
        )


def test_of_wide_experts_several_go_at_once(monkeypatch):
    rng = np.random.default_rng(2)
    inputs = inputs_of(rng, 200, 64)
    down = rng.standard_normal((5, 64)).astype(np.float32)
    moments = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    monkeypatch.setattr(prune, "_AT_ONCE", 8)
    kept = needed(down, moments, 33)  # removes 31, four at a time
    assert len(kept) == 33
    assert (np.diff(kept) > 0).all()
    drawn = np.sort(rng.permutation(64)[:33])
    strong = np.sort(np.argsort(-np.square(down).sum(0) * moments.diagonal())[:33])
    ours, chance, energy = (nearest(down, inputs, k)[1] for k in (kept, drawn, strong))
    assert ours < 0.9 * min(energy, chance)


def test_experts_are_what_they_are_made_up_to(source, calibration):
    model, whole = PrunedModel(source, 1 / 3, calibration), SourceModel(source)
    gate, up, down = whole.expert(1, 5)
    moments = calibration.matrix("experts.1.5.down")
    kept = needed(down, moments, KEPT)
    assert not set(np.flatnonzero(~down.any(0)).tolist()) & set(kept.tolist())
    for _ in range(2):
        for got, expected in zip(
            model.expert(1, 5), (gate[kept], up[kept], made_up(down, moments, kept)), strict=True
        ):
            np.testing.assert_array_equal(got, expected)


def test_the_calibration_is_of_what_is_left(source, calibration):
    model = PrunedModel(source, 1 / 3, calibration)
    pruned = PrunedCalibration(calibration, model)
    kept = model.kept(1, 5)
    name = "experts.1.5.down"
    np.testing.assert_array_equal(pruned.matrix(name), calibration.matrix(name)[kept][:, kept])
    for name in ("experts.1.5.up", "layers.1.q"):
        np.testing.assert_array_equal(pruned.matrix(name), calibration.matrix(name))


def test_the_calibration_that_was_checked_is_read_to_the_end(source, calibration, tmp_path):
    """With its own number of tokens that are enough, and though another file has got its name."""
    path = Path(shutil.copy(calibration.path, tmp_path / "x.calib"))
    least = 1 + max(calibration.count(f"experts.1.{e}.down") for e in range(8))
    own = Calibration(path, min_tokens=least)
    model = PrunedModel(source, 1 / 3, own)
    path.unlink()
    pruned, name = PrunedCalibration(own, model), "experts.1.5.down"
    kept, down = model.kept(1, 5), SourceModel(source).expert(1, 5)[2]
    np.testing.assert_array_equal(model.expert(1, 5)[2], down[:, kept])  # few tokens: none make up
    np.testing.assert_array_equal(pruned.matrix(name), own.matrix(name)[kept][:, kept])
    assert not np.array_equal(own.matrix(name), calibration.matrix(name))


@pytest.mark.parametrize("correction", [0, 8])
def test_without_neurons_that_add_nothing_answers_stay(source, calibration, correction, tmp_path):
    whole, pruned = tmp_path / "whole.moe", tmp_path / "pruned.moe"
    said = []
    # With other neurons, column scales could differ, then codes, and then the choice of experts.
    options = {"calibration": calibration, "correction": correction, "scale_columns": False}
    convert(source, whole, **options)
    convert(source, pruned, prune=0.33, say=said.append, **options)
    (line,) = said
    assert line == f"{KEPT} of {H} neurons of every expert are kept, and make up for the others"
    assert open_moe(pruned).source["pruned"] == 0.33
    assert Decoded(pruned).expert(0, 0)[0].shape == (KEPT, 96)
    assert pruned.stat().st_size < whole.stat().st_size
    ids = families.random_ids(24)
    rows = []
    for path in (whole, pruned):
        with edgemoe.load(path, ram="1GiB") as engine:
            rows.append(engine.logits(ids))
            first = engine.stats.logits_hash
        with edgemoe.load(path, ram="1GiB", threads=1) as engine:  # in other chunks
            for i in ids:
                engine.extend([i])
            assert engine.stats.logits_hash == first
    np.testing.assert_allclose(*rows, atol=0.15)  # codes of other groups
    assert np.abs(rows[0]).max() > 3


def test_biases_go_with_their_neurons(tmp_path):
    checkpoint = HFCheckpoint(families.make("gpt_oss", tmp_path / "source"))
    whole = SourceModel(checkpoint)
    model = PrunedModel(checkpoint, 0.5, calibrated(tmp_path / "x.calib", whole.config))
    for part in ("gate", "up", "down"):
        name = f"layers.1.expert_bias.{part}"
        expected = whole.tensor(name)
        if part != "down":
            expected = np.stack([row[model.kept(1, e)] for e, row in enumerate(expected)])
        np.testing.assert_array_equal(model.tensor(name), expected)


def changed(path, found, change):
    """Writes a copy of the calibration `found` whose tensors `change` has changed."""
    tensors = {name: found._file.tensor(name).copy() for name in found._file.shapes}
    change(tensors)
    meta = {key: value for key, value in found.meta.items() if key != "edgemoe_calibration"}
    write_calibration(path, tensors, meta)
    return Calibration(path)


def test_an_expert_that_saw_few_tokens_keeps_what_it_has(source, calibration, tmp_path):
    def change(tensors):
        tensors["experts.1.count"][5] = 63

    few = changed(tmp_path / "x.calib", calibration, change)
    model, whole = PrunedModel(source, 2 / 3, few), SourceModel(source)
    down = whole.expert(1, 5)[2]
    energy = np.square(down).sum(0) * few.matrix("experts.1.5.down").diagonal()
    kept = np.sort(np.argsort(-energy)[: model.config.expert_hidden])
    assert model.kept(1, 5).tolist() == kept.tolist()
    np.testing.assert_array_equal(model.expert(1, 5)[2], down[:, kept])
    assert not np.array_equal(model.expert(1, 4)[2], whole.expert(1, 4)[2][:, model.kept(1, 4)])


def test_products_that_can_be_none_are_refused_by_name(source, calibration, tmp_path):
    def change(tensors):
        tensors["experts.1.hidden.products"][5] *= -1

    found = changed(tmp_path / "x.calib", calibration, change)
    model = PrunedModel(source, 0.5, found)
    model.expert(1, 4)
    with pytest.raises(FormatError, match=r"x.calib: experts\.1\.5\.down: expected products"):
        model.expert(1, 5)


def test_what_cannot_be_pruned_is_said_and_nothing_written(source, calibration, tmp_path):
    out = tmp_path / "x.moe"
    for share, words in (
        (0, "more than 0%"),
        (1, "less than 100%"),
        (0.05, "5% of 48 neurons is less than 16"),
    ):
        with pytest.raises(ValueError, match=f"^prune: .*{words}"):
            convert(source, out, calibration=calibration, prune=share)
    with pytest.raises(
        ValueError, match=r"^prune: takes a calibration; edgemoe calibrate makes it$"
    ):
        convert(source, out, prune=0.5)
    config = SourceModel(tiny_checkpoint()).config
    names = [f"experts.{layer}.hidden.products" for layer in config.moe_layers]
    poor = calibrated(tmp_path / "z.calib", config, leaving=names)
    with pytest.raises(
        FormatError, match=r"no squares of what w_down takes; edgemoe calibrate sums"
    ):
        convert(source, out, calibration=poor, prune=0.5)
    other = calibrated(tmp_path / "y.calib", SourceModel(tiny_checkpoint(experts=4)).config)
    with pytest.raises(FormatError, match="is of layers"):
        convert(source, out, calibration=other, prune=0.5)
    assert {path.name for path in tmp_path.iterdir()} == {"y.calib", "z.calib"}


def test_the_command_takes_shares(tmp_path, capsys):
    path = families.make("mixtral", tmp_path / "source")
    for text in ("ten", "-1%", "nan"):
        with pytest.raises(SystemExit):
            main(["convert", str(path), str(tmp_path / "x.moe"), f"--prune={text}"])
        assert f"expected a share like 10% or 0.1, got {text!r}" in capsys.readouterr().err
    assert main(["convert", str(path), str(tmp_path / "x.moe"), "--prune", "50%"]) == 2
    assert "prune: takes a calibration" in capsys.readouterr().err
    config = SourceModel(HFCheckpoint(path)).config
    calibrated(tmp_path / "x.calib", config)
    arguments = ["convert", str(path), str(tmp_path / "x.moe"), "--prune", "50%", "--calibration"]
    assert main([*arguments, str(tmp_path / "x.calib")]) == 0
    assert open_moe(tmp_path / "x.moe").config.expert_hidden == kept_width(
        config.expert_hidden, 0.5
    )
    capsys.readouterr()
    assert main(["export", str(tmp_path / "x.moe"), str(tmp_path / "hf")]) == 1
    assert "its experts were pruned" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()

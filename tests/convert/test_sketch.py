"""A sketch of a calibration preserves its squares, its strongest directions and what it says about experts."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe.convert.carve.sketch import expand_sketch, write_sketch
from edgemoe.errors import FormatError
from edgemoe.quant import Calibration, write_calibration

TOKENS = 400
WIDTHS = {"embed": 48, "layers.0.q": 48, "layers.0.shared.gate": 48, "layers.0.shared.down": 32}


@pytest.fixture
def calibration(tmp_path):
    """Sums, in the form of `edgemoe calibrate --layers`, of inputs with ten strong directions and some noise."""
    rng = np.random.default_rng(4)
    tensors = {}
    for name, cols in WIDTHS.items():
        x = rng.normal(0, 1, (TOKENS, 10)) @ rng.normal(0, 3, (10, cols))
        x += rng.normal(0, 0.1, x.shape)
        for place in (name, "layers.0.experts") if name.endswith("gate") else (name,):
            tensors[f"dense.{place}.count"] = np.array([TOKENS])
            tensors[f"dense.{place}.products"] = (x.T @ x).astype(np.float32)
    tensors["experts.0.count"] = np.array([300, 0, 100])
    tensors["experts.0.hidden.squares"] = rng.exponential(50, (3, 16)).astype(np.float32)
    tensors["experts.0.hidden.squares"][1] = 0
    path = tmp_path / "whole.calib"
    write_calibration(path, tensors, {"model": "m", "tokens": "400", "window": "100", "bits": ""})
    return path


def test_gives_back_what_matters(tmp_path, calibration):
    sketch, out = tmp_path / "sketch.safetensors", tmp_path / "out.calib"
    write_sketch(calibration, sketch)
    expand_sketch(sketch, out)
    assert sketch.stat().st_size < out.stat().st_size / 3
    whole, found = Calibration(calibration), Calibration(out)
    found.verify()
    for name in (*WIDTHS, "experts.0.0.up", "experts.0.1.gate"):
        m, like = whole.matrix(name), found.matrix(name)
        scale = m.diagonal().mean()
        np.testing.assert_allclose(like.diagonal(), m.diagonal() / scale, rtol=0.02)
        assert np.linalg.norm(like - m / scale) < 0.01 * np.linalg.norm(m / scale)
    assert found.layer(0, "count").tolist() == [300, 0, 100]
    both = [f"experts.0.{e}.down" for e in (0, 2)]  # in proportion to each other
    m, like = (np.concatenate([c.diagonal(name) for name in both]) for c in (whole, found))
    np.testing.assert_allclose(like / like.mean(), m / m.mean(), rtol=2e-3)
    assert found.meta["tokens"] == "400"


def test_squares_are_there_where_directions_do_not_suffice(tmp_path):
    x = np.random.default_rng(5).normal(0, 1, (TOKENS, 48)) * np.geomspace(1, 9, 48)
    tensors = {"dense.embed.count": np.array([TOKENS])}
    tensors["dense.embed.products"] = (x.T @ x).astype(np.float32)
    meta = {"model": "m", "tokens": "400", "window": "100", "bits": ""}
    write_calibration(tmp_path / "whole", tensors, meta)
    write_sketch(tmp_path / "whole", tmp_path / "sketch")
    expand_sketch(tmp_path / "sketch", tmp_path / "out")
    squares = np.square(x).sum(0)
    found = Calibration(tmp_path / "out").matrix("embed").diagonal()
    np.testing.assert_allclose(found, squares / squares.mean(), rtol=0.02)


def test_is_the_same_every_time(tmp_path, calibration):
    write_sketch(calibration, tmp_path / "s")
    made = []
    for name in ("a", "b"):
        expand_sketch(tmp_path / "s", tmp_path / name)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]


def test_a_file_that_is_none_is_named(tmp_path):
    (tmp_path / "s").write_bytes(b"nothing of the kind")
    with pytest.raises(FormatError, match="s: not a sketch of a calibration"):
        expand_sketch(tmp_path / "s", tmp_path / "out")

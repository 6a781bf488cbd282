"""Activations and biases of FFNs, and the soft cap: near float64, and the same bits on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from reference_nested import decode_rungs, quantize_rows

from edgemoe import _core
from edgemoe.quant import plane_widths, quantize

D, H, T = 100, 75, 40
ACTIVATIONS = ("swiglu", "geglu", "clamped_swiglu", "relu2")
WIDTHS = plane_widths((2, 3, 4, 6, 8))


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def activated(kind, gate, up):
    """Returns the activation by the formulas of transformers, in float64."""
    if kind == "swiglu":
        return gate * sigmoid(gate) * up
    if kind == "geglu":
        inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + np.tanh(inner)) * up
    if kind == "clamped_swiglu":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return (up + 1) * gate * sigmoid(1.702 * gate)
    return np.maximum(up, 0) ** 2


class Ffn:
    """An FFN with random matrices whose gates and ups go far beyond every clamp."""

    def __init__(self, kind):
        rng = np.random.default_rng(0)
        self.kind = kind
        shapes = {"gate": (H, D), "up": (H, D), "down": (D, H)}
        if kind == "relu2":
            del shapes["gate"]
        self.nested, self.decoded = {"gate": None}, {"gate": np.zeros((H, D))}
        for name, shape in shapes.items():
            rungs = quantize((0.6 * rng.standard_normal(shape)).astype(np.float32))
            self.nested[name] = _core.Nested.from_rungs(rungs, *shape, WIDTHS)
            self.decoded[name] = decode_rungs(rungs, WIDTHS, *shape)
        self.x = rng.standard_normal((T, D)).astype(np.float32)

    def run(self, x, threads=2):
        ws = _core.Workspace(threads, T, 128, 128, 1, 16)
        out, hidden = np.empty((len(x), D), np.float32), np.empty((len(x), H), np.float32)
        _core.ffn(ws, x, *self.nested.values(), out, hidden, self.kind)
        return out, hidden


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_ffn_is_its_formula(isa, kind):
    ffn = Ffn(kind)
    out, hidden = ffn.run(ffn.x)
    x = quantize_rows(ffn.x)
    gate, up = x @ ffn.decoded["gate"].T, x @ ffn.decoded["up"].T
    assert np.abs(up).max() > 14
    expected = activated(kind, gate, up)
    np.testing.assert_allclose(hidden, expected, rtol=2e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(
        out, quantize_rows(hidden) @ ffn.decoded["down"].T, rtol=2e-4, atol=2e-3
    )
    again, _ = ffn.run(ffn.x, threads=1)
    assert np.array_equal(again, out)
    for t in (0, T - 1):  # single rows are computed by other code
        assert np.array_equal(ffn.run(ffn.x[t : t + 1])[0][0], out[t])
    _core.use_isa("scalar")
    for a, b in zip(ffn.run(ffn.x), (out, hidden), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_what_is_not_a_number_is_seen_behind_every_clamp(isa, kind):
    ffn = Ffn(kind)
    x = ffn.x.copy()
    x[0, 3] = np.nan
    out, _ = ffn.run(x)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1:]).all()


def test_matrices_must_be_those_of_the_activation():
    gated, other = Ffn("swiglu"), Ffn("relu2")
    for ffn, kind in ((gated, "relu2"), (other, "geglu")):
        ffn.kind = kind
        with pytest.raises(ValueError, match="do not fit each other or the activation"):
            ffn.run(ffn.x)
    gated.kind = "gelu"
    with pytest.raises(ValueError, match="activation: expected swiglu, geglu, clamped_swiglu or"):
        gated.run(gated.x)


def test_a_soft_cap_is_a_tangent(isa):
    ws = _core.Workspace(2, 1, 16, 16, 1, 16)
    x = np.concatenate([np.linspace(-300, 300, 9001), [0, 1e-6, 1e30, -1e30]]).astype(np.float32)
    out = np.array([x, x])
    _core.soft_cap(ws, 30.0, out)
    np.testing.assert_allclose(out[1], 30 * np.tanh(x.astype(float) / 30), atol=8e-6)
    assert np.array_equal(out[0], out[1])
    _core.use_isa("scalar")
    again = np.array([x, x])
    _core.soft_cap(ws, 30.0, again)
    assert np.array_equal(again, out)
    _core.soft_cap(ws, 30.0, bad := np.array([np.nan, np.inf, 1], np.float32))
    assert np.isnan(bad[:2]).all()
    assert bad[2] < 1

"""Recurrent mixers agree with plain float64 loops, and give the same bits however tokens are split into passes."""

from __future__ import annotations

import numpy as np
import pytest
import reference_recurrent as reference

from edgemoe import _core

RNG = np.random.default_rng
F = np.float32


def workspace(threads=1):
    return _core.Workspace(threads, 64, 256, 256, 64, 32, 4)


def rows(a, start, stop):
    return np.ascontiguousarray(a[start:stop])


class Conv:
    """A random short convolution, with `silu` and a bias or with neither."""

    def __init__(self, T, taps, C, silu, seed=0):
        rng = RNG(seed)
        self.silu = silu
        self.inputs = (rng.standard_normal((T, C)).astype(F),)
        self.weight = rng.standard_normal((taps, C)).astype(F)
        self.bias = rng.standard_normal(C).astype(F) if silu else None
        self.start = rng.standard_normal((taps - 1, C)).astype(F)

    def run(self, ws, before, state, x):
        out = np.empty_like(x)
        _core.short_conv(ws, x, self.weight, self.bias, before, state, self.silu, out)
        return out

    def expected(self):
        bias = 0 if self.bias is None else self.bias.astype(float)
        return reference.short_conv(
            self.inputs[0].astype(float), self.weight, bias, self.start, with_silu=self.silu
        )


class Delta:
    """A random gated delta rule; `channel`: with a decay per key channel; `bounded`: with bounded decays."""

    def __init__(self, T, Hk, Hv, dk, dv, *, channel=False, bounded=False, seed=0):
        rng = RNG(seed)
        n = Hv * dk if channel else Hv
        self.Hk, self.bounded = Hk, bounded
        self.inputs = (
            rng.standard_normal((T, 2 * Hk * dk + Hv * dv)).astype(F),
            rng.standard_normal((T, n)).astype(F),
            (2 * rng.standard_normal((T, Hv))).astype(F),
        )
        self.rate = np.exp(rng.uniform(-3, 2, Hv)).astype(F)
        self.bias = (0.5 * rng.standard_normal(n)).astype(F)
        self.start = rng.standard_normal((Hv, dk, dv)).astype(F)

    def run(self, ws, before, state, qkv, decay, beta):
        out = np.empty((len(qkv), state.shape[0] * state.shape[2]), F)
        _core.delta_rule(
            ws,
            qkv.copy(),
            decay.copy(),
            beta.copy(),
            self.rate,
            self.bias,
            self.Hk,
            self.bounded,
            before,
            state,
            out,
        )
        return out

    def expected(self):
        args = (a.astype(float) for a in (*self.inputs, self.rate, self.bias))
        return reference.delta_rule(*args, self.Hk, self.start.astype(float), bounded=self.bounded)


class Mamba:
    def __init__(self, T, H, G, N, P, seed=0):
        rng = RNG(seed)
        self.G = G
        self.inputs = (
            rng.standard_normal((T, H * P + 2 * G * N)).astype(F),
            rng.standard_normal((T, H)).astype(F),
        )
        self.rate = np.exp(rng.uniform(-3, 2, H)).astype(F)
        self.bias = rng.standard_normal(H).astype(F)
        self.skip = rng.standard_normal(H).astype(F)
        self.start = rng.standard_normal((H, N, P)).astype(F)

    def run(self, ws, before, state, xbc, step):
        out = np.empty((len(xbc), state.shape[0] * state.shape[2]), F)
        _core.mamba2(
            ws,
            xbc,
            step.copy(),
            np.empty_like(step),
            self.rate,
            self.bias,
            self.skip,
            self.G,
            before,
            state,
            out,
        )
        return out

    def expected(self):
        args = (a.astype(float) for a in (*self.inputs, self.rate, self.bias, self.skip))
        return reference.mamba2(*args, self.G, self.start.astype(float))


CASES = {
    "conv of 4, silu, bias": lambda T: Conv(T, 4, 300, True),
    "conv of 3": lambda T: Conv(T, 3, 37, False),
    "delta rule": lambda T: Delta(T, 2, 4, 24, 80),
    "delta rule, a head of one vector": lambda T: Delta(T, 1, 1, 5, 16),
    "decay per channel": lambda T: Delta(T, 3, 3, 16, 64, channel=True),
    "bounded decay per channel": lambda T: Delta(T, 2, 2, 16, 32, channel=True, bounded=True),
    "mamba": lambda T: Mamba(T, 6, 2, 20, 80),
}


@pytest.mark.parametrize("T", [1, 2, 3, 4, 33])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_plain_loop(case, T):
    mixer = CASES[case](T)
    state = mixer.start.copy()
    out = mixer.run(workspace(), state, state, *mixer.inputs)
    expected, after = mixer.expected()
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(state, after, rtol=2e-5, atol=2e-5 * np.abs(after).max())


@pytest.mark.parametrize("case", CASES)
def test_chunks_threads_and_instruction_sets_do_not_change_a_bit(case):
    T = 21
    mixer = CASES[case](T)
    whole = mixer.start.copy()
    expected = mixer.run(workspace(), whole, whole, *mixer.inputs)
    before = _core.isa()
    try:
        for isa in _core.usable_isas().split():
            _core.use_isa(isa)
            for threads, chunk in ((1, 1), (3, 4), (2, 21)):
                ws, state = workspace(threads), mixer.start.copy()
                parts = [
                    mixer.run(ws, state, state, *(rows(a, at, at + chunk) for a in mixer.inputs))
                    for at in range(0, T, chunk)
                ]
                np.testing.assert_array_equal(np.concatenate(parts), expected)
                np.testing.assert_array_equal(state, whole)
    finally:
        _core.use_isa(before)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_the_state_before_stays_where_another_takes_what_comes_after(case, T):
    mixer = CASES[case](T)
    before, state = mixer.start.copy(), np.full_like(mixer.start, np.nan)
    in_place = mixer.start.copy()
    out = mixer.run(workspace(2), before, state, *mixer.inputs)
    np.testing.assert_array_equal(out, mixer.run(workspace(), in_place, in_place, *mixer.inputs))
    np.testing.assert_array_equal(before, mixer.start)
    np.testing.assert_array_equal(state, in_place)
    start = np.zeros_like(mixer.start)
    out = mixer.run(workspace(), start, start, *mixer.inputs)
    state[:] = np.nan
    np.testing.assert_array_equal(out, mixer.run(workspace(2), None, state, *mixer.inputs))
    np.testing.assert_array_equal(state, start)


def test_small_matrices_are_float32():
    rng = RNG(4)
    x, w = rng.standard_normal((5, 70)).astype(F), rng.standard_normal((9, 70)).astype(F)
    out = np.empty((5, 9), F)
    _core.linear_f32(workspace(2), x, w, out)
    np.testing.assert_allclose(out, x.astype(float) @ w.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["silu", "sigmoid", "silu_first"])
@pytest.mark.parametrize("per_group", [False, True])
def test_gated_norm(kind, per_group):
    rng = RNG(1)
    x, gate = rng.standard_normal((2, 5, 4 * 24)).astype(F)
    weight = rng.standard_normal(4 * 24 if per_group else 24).astype(F)
    expected = reference.gated_norm(x.astype(float), gate, weight, 1e-3, 4, kind)
    _core.gated_norm(workspace(2), x, gate, weight, 1e-3, 4, kind)
    np.testing.assert_allclose(x, expected, rtol=2e-5, atol=1e-5)


def test_gates_of_attention():
    rng = RNG(2)
    x, gate = rng.standard_normal((2, 5, 3 * 40)).astype(F)
    by_head = (20 * rng.standard_normal((5, 3))).astype(F)
    for kind, g, factor in (
        ("sigmoid", gate, reference.sigmoid(gate.astype(float))),
        ("sigmoid_head", by_head, np.repeat(reference.sigmoid(by_head.astype(float)), 40, axis=1)),
        (
            "softplus_head",
            by_head,
            np.repeat(reference.softplus(by_head.astype(float)), 40, axis=1),
        ),
    ):
        y = x.copy()
        _core.gate_attention(workspace(2), y, g, kind)
        np.testing.assert_allclose(y, x * factor, rtol=1e-5, atol=1e-7)


def test_extreme_gates_stay_finite():
    mixer = Delta(3, 1, 2, 8, 16)
    mixer.inputs[1][:] = np.array([[1e4, -1e4]] * 3, F)
    mixer.inputs[2][:] = np.array([[-1e4, 1e4]] * 3, F)
    state = mixer.start.copy()
    out = mixer.run(workspace(), state, state, *mixer.inputs)
    expected, after = mixer.expected()
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, after, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    ws, state = workspace(), np.zeros((4, 8, 24), F)
    with pytest.raises(ValueError, match="multiple of 16"):
        _core.delta_rule(
            ws, np.zeros((1, 2 * 16 + 96), F), np.zeros((1, 4), F), np.zeros((1, 4), F),
            np.zeros(4, F), np.zeros(4, F), 2, False, None, state, np.zeros((1, 96), F),
        )  # fmt: skip
    with pytest.raises(ValueError, match="multiple of the groups"):
        _core.mamba2(
            ws, np.zeros((1, 4 * 16 + 2 * 3 * 8), F), np.zeros((1, 4), F), np.zeros((1, 4), F),
            np.zeros(4, F), np.zeros(4, F), np.zeros(4, F), 3, None, np.zeros((4, 8, 16), F), np.zeros((1, 64), F),
        )  # fmt: skip
    with pytest.raises(ValueError, match="taps"):
        x, nine, eight = (np.zeros((n, 4), F) for n in (1, 9, 8))
        _core.short_conv(ws, x, nine, None, None, eight, False, x)


def run_delta(qkv, decay, beta, state):
    """Runs one head of 16 by 16 with decays exp(-softplus(decay)); returns the output and the state."""
    out = np.empty((len(qkv), 16), F)
    _core.delta_rule(
        workspace(), qkv.astype(F), np.full((len(qkv), 1), decay, F), np.full((len(qkv), 1), beta, F),
        np.ones(1, F), np.zeros(1, F), 1, False, None, state, out,
    )  # fmt: skip
    return out


def test_delta_rule_decays_before_it_reads_and_reads_after_it_writes():
    rng, state = RNG(6), np.empty((1, 16, 16), F)
    q, k, v = rng.standard_normal((3, 1, 16))
    written = run_delta(
        np.concatenate([q, k, v], 1), -30.0, 30.0, state
    )  # no decay, all is written
    unit = k / np.sqrt((k * k).sum() + 1e-6)
    np.testing.assert_allclose(state[0], unit.T @ v, rtol=1e-5, atol=1e-6)
    query = q / np.sqrt((q * q).sum() + 1e-6) / 4
    np.testing.assert_allclose(written, query @ state[0], rtol=1e-4, atol=1e-6)
    # Writing the same value again changes nothing.
    both = np.concatenate([np.concatenate([q, k, v], 1)] * 2)
    run_delta(both, -30.0, 30.0, state)
    np.testing.assert_allclose(state[0], unit.T @ v, rtol=1e-4, atol=1e-5)
    run_delta(both, 0.0, -30.0, state)  # nothing is written
    assert np.abs(state).max() < 1e-12


def test_lengths_of_queries_and_keys_have_eps_inside_the_root_of_a_sum_and_not_of_a_mean():
    state, k = np.empty((1, 16, 16), F), np.full((1, 16), 1e-3 / 4)  # a length of 0.001
    v = np.ones((1, 16))
    run_delta(np.concatenate([k, k, v], 1), -30.0, 30.0, state)
    np.testing.assert_allclose(state[0], (k / np.sqrt(2e-6)).T @ v, rtol=1e-4)

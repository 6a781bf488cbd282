"""A device's mixers, gates, activations and corrections give the CPU's bits; on a simulated device."""

from __future__ import annotations

import numpy as np
import pytest
from simulated import plug_in

from edgemoe import _core
from edgemoe.errors import RangeError
from edgemoe.quant import plane_widths, quantize
from edgemoe.quant.correction import basis_codes, factor_codes, with_correction

ROOM = 1 << 26
KINDS = ("swiglu", "geglu", "clamped_swiglu", "relu2")
WEIRD = np.array([np.nan, np.inf, -np.inf, 1e-38, -0.0, 100.0, -100.0, 7.5], np.float32)


class Sides:
    """Workspaces of a device and of the CPU."""

    def __init__(self, rows=70, cols=640, context=640, head_dim=80, heads=8):
        shape = rows, cols, cols, context, head_dim, heads
        self.cpu = _core.Workspace(2, *shape)
        self.device = _core.Device(plug_in(), 0, ROOM)
        self.ws = _core.DeviceWorkspace(self.device, *shape, rows * 4, True)

    def put(self, array):
        if array is None:
            return None
        out = _core.DeviceArray(self.device, array.shape)
        out.upload(np.ascontiguousarray(array))
        return out

    def matrix(self, nested):
        return _core.DeviceMatrix(self.device, nested)


@pytest.fixture(scope="module")
def sides():
    return Sides()


def normal(*shape, seed=0, gain=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * gain).astype(np.float32)


def same(mine, theirs):
    """Checks that two arrays have the same bits; NaNs may differ in theirs."""
    mine = mine.numpy()
    nan = np.isnan(theirs)
    assert np.array_equal(np.isnan(mine), nan)
    assert np.array_equal(mine[~nan].view(np.uint32), theirs[~nan].view(np.uint32))


def nested(rows, cols, seed=0, level=3):
    ladder = (2, 3, 4)
    rungs = quantize(normal(rows, cols, seed=seed), ladder)
    return _core.Nested.from_rungs(rungs[:level], rows, cols, plane_widths(ladder)[:level])


def corrected(rows, cols, rank, seed=0, *, basis=None):
    """Returns a matrix with a random correction; V is its own, or the shared `basis`."""
    ladder, rng = (2, 4), np.random.default_rng(seed)
    rungs = quantize(normal(rows, cols, seed=seed), ladder)
    v = basis_codes(rng.standard_normal((rank, cols))) if basis is None else basis
    factors = factor_codes(rng.standard_normal((rows, rank)) * 0.1, np.full(rows, 0.01))
    rungs = with_correction(rungs, {1: factors}, v if basis is None else None)
    kept = {} if basis is None else {"basis": basis}
    return _core.Nested.from_rungs(
        rungs, rows, cols, plane_widths(ladder), row_scales=(1,), ranks=(0, rank), **kept
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 5])
def test_every_activation(sides, kind, T):
    h, d = 50, 90
    gate = None if kind == "relu2" else nested(h, d, 1)
    host = gate, nested(h, d, 2), nested(d, h, 3)
    x, out = normal(T, d, seed=9, gain=4), np.empty((T, d), np.float32)
    x[-1, 3] = np.nan if T > 1 else 3
    _core.ffn(sides.cpu, x, *host, out, None, kind)
    there = sides.put(out)
    moved = [None if m is None else sides.matrix(m) for m in host]
    _core.device_ffn(sides.ws, sides.put(x), *moved, there, kind)
    same(there, out)


def test_small_gates_whose_rounding_shows(sides):
    """The scale of 32 columns is that of the largest. With many small gates, the cubic term of gelu shows in it."""
    T, h, d = 64, 512, 32
    host = nested(h, d, 1), nested(h, d, 2), nested(d, h, 3)
    x, out = normal(T, d, seed=9, gain=0.2), np.empty((T, d), np.float32)
    _core.ffn(sides.cpu, x, *host, out, None, "geglu")
    there = sides.put(out)
    _core.device_ffn(sides.ws, sides.put(x), *map(sides.matrix, host), there, "geglu")
    same(there, out)


@pytest.mark.parametrize("rank", [8, 24, 32])
@pytest.mark.parametrize(("rows", "cols"), [(33, 70), (16, 448)])
def test_corrections(sides, rank, rows, cols):
    x = normal(5, cols, seed=3)
    x[1] = 0
    x[2, 5] = np.inf
    x[3] *= np.float32(1e-33)
    matrices = [corrected(rows, cols, rank, 1), nested(rows, cols, 2), corrected(rows, cols, 8, 3)]
    outs = [np.empty((5, rows), np.float32) for _ in matrices]
    _core.linear(sides.cpu, x, matrices, outs)
    there = [sides.put(out) for out in outs]
    _core.device_linear(sides.ws, sides.put(x), [sides.matrix(m) for m in matrices], there)
    for mine, theirs in zip(there, outs, strict=True):
        same(mine, theirs)
    without = np.empty((5, rows), np.float32)
    _core.linear(sides.cpu, x, [nested(rows, cols, 2)], [without])
    assert not np.array_equal(outs[0][0], without[0])


def test_scales_beyond_a_rank_count_for_nothing(sides):
    """A correction stores 32 scales, whatever its rank; those beyond the rank have no effect."""
    rows, cols, rank, rng = 33, 70, 8, np.random.default_rng(4)
    v = basis_codes(rng.standard_normal((rank, cols)))
    u, codes = factor_codes(rng.standard_normal((rows, rank)) * 0.1, np.full(rows, 0.01))
    plain = quantize(normal(rows, cols), (2, 4))
    x, outs = normal(3, cols, seed=3), []
    for beyond in (0, 1000):
        rungs = with_correction(plain, {1: (u, codes)}, v)
        rungs[1][len(plain[1]) :][: 2 * 32].view("<f2")[rank:] = beyond
        w = _core.Nested.from_rungs(
            rungs, rows, cols, plane_widths((2, 4)), row_scales=(1,), ranks=(0, rank)
        )
        out = np.empty((3, rows), np.float32)
        _core.linear(sides.cpu, x, [w], [out])
        there = sides.put(out)
        _core.device_linear(sides.ws, sides.put(x), [sides.matrix(w)], [there])
        same(there, out)
        outs.append(out)
    assert np.array_equal(*outs)


@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
def test_corrections_of_an_ffn(sides, kind):
    h, d, T = 50, 90, 3
    host = (
        None if kind == "relu2" else corrected(h, d, 8, 1),
        corrected(h, d, 16, 2),
        corrected(d, h, 24, 3),
    )
    x, out = normal(T, d, seed=9), np.empty((T, d), np.float32)
    _core.ffn(sides.cpu, x, *host, out, None, kind)
    there = sides.put(out)
    moved = [None if m is None else sides.matrix(m) for m in host]
    _core.device_ffn(sides.ws, sides.put(x), *moved, there, kind)
    same(there, out)


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("with_ranks", [False, True])
def test_each_head_has_its_matrix(sides, T, with_ranks):
    heads, rows, cols, stride_in, stride_out = 3, 32, 40, 44, 48
    w = corrected(heads * rows, cols, 16) if with_ranks else nested(heads * rows, cols)
    x, out = normal(T, heads * stride_in, seed=1), normal(T, heads * stride_out, seed=2)
    dx, there = sides.put(x), sides.put(out)
    _core.linear_heads(sides.cpu, x, w, heads, out)
    _core.device_linear_heads(sides.ws, dx, sides.matrix(w), heads, there)
    same(there, out)


def test_a_large_chunk_has_more_rows_of_heads_than_a_grid_has_on_most_axes():
    """The largest chunk of a model of 128 heads: 65536 rows."""
    T, heads, rows, cols = 512, 128, 16, 8
    shape = T, 64 * heads, 64, 64, 16, heads
    device = _core.Device(plug_in(), 0, ROOM)
    cpu, ws = _core.Workspace(2, *shape), _core.DeviceWorkspace(device, *shape, 4 * T)
    w, x = nested(heads * rows, cols), normal(T, heads * cols, seed=1)
    out = np.empty((T, heads * rows), np.float32)
    _core.linear_heads(cpu, x, w, heads, out)
    dx, there = _core.DeviceArray(device, x.shape), _core.DeviceArray(device, out.shape)
    dx.upload(x)
    _core.device_linear_heads(ws, dx, _core.DeviceMatrix(device, w), heads, there)
    same(there, out)


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_head", "softplus_head"])
def test_gates_of_attention(sides, kind):
    x = normal(5, 6 * 20)
    gate = normal(5, 120 if kind == "sigmoid" else 6, seed=1, gain=8)
    gate[0, : len(WEIRD)][: gate.shape[1]] = WEIRD[: gate.shape[1]]
    there = sides.put(x)
    _core.device_gate_attention(sides.ws, there, sides.put(gate), kind)
    _core.gate_attention(sides.cpu, x, gate, kind)
    same(there, x)


def test_the_last_term_of_softplus_counts(sides):
    """It changes one in a hundred of the values near 0."""
    gate = np.linspace(-0.5, 0.5, 64 * 60, dtype=np.float32).reshape(64, 60)
    x = np.ones((64, 60), np.float32)
    there = sides.put(x)
    _core.device_gate_attention(sides.ws, there, sides.put(gate), "softplus_head")
    _core.gate_attention(sides.cpu, x, gate, "softplus_head")
    same(there, x)


@pytest.mark.parametrize("kind", ["silu", "sigmoid", "silu_first"])
@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("width", [16, 37])
def test_gated_norms(sides, kind, per_group, width):
    groups = 3
    x, gate = normal(4, groups * width), normal(4, groups * width, seed=1, gain=5)
    weight = normal(groups * width if per_group else width, seed=2)
    there = sides.put(x)
    _core.device_gated_norm(sides.ws, there, sides.put(gate), sides.put(weight), 1e-3, groups, kind)
    _core.gated_norm(sides.cpu, x, gate, weight, 1e-3, groups, kind)
    same(there, x)


@pytest.mark.parametrize("taps", [1, 2, 4, 8])
@pytest.mark.parametrize("silu", [False, True])
def test_short_convolutions_in_pieces_and_in_place(sides, taps, silu):
    C = 300
    weight, bias = normal(taps, C, seed=1), None if silu else normal(C, seed=2)
    before = there_before = None
    for i, T in enumerate((3, 1, 12)):
        x, tail = normal(T, C, seed=i), np.empty((taps - 1, C), np.float32)
        x[T // 3, 7] = np.inf  # taps beyond the last would make NaN of it
        there, there_tail = sides.put(x), sides.put(tail)
        moved = sides.put(weight), sides.put(bias), there_before, there_tail
        _core.device_short_conv(sides.ws, there, *moved, silu, there)
        _core.short_conv(sides.cpu, x, weight, bias, before, tail, silu, x)
        same(there, x)
        same(there_tail, tail)
        before, there_before = tail, there_tail


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("dv", [16, 144])
def test_delta_rule_in_pieces(sides, bounded, channels, dv):
    Hk, Hv, dk = 2, 4, 24
    rate, bias = np.abs(normal(Hv)), normal(Hv * dk if channels else Hv, seed=1)
    state = there_state = None
    for i, T in enumerate((5, 1, 3)):
        qkv = normal(T, 2 * Hk * dk + Hv * dv, seed=i)
        qkv[0, : Hk * dk] *= 0 if i == 2 else 1  # a query and key of length 0
        decay, beta = normal(T, len(bias), seed=8, gain=3), normal(T, Hv, seed=9, gain=3)
        after, out = np.empty((Hv, dk, dv), np.float32), np.empty((T, Hv * dv), np.float32)
        moved = [sides.put(a) for a in (qkv, decay, beta, rate, bias)]
        there_after, there = sides.put(after), sides.put(out)
        _core.device_delta_rule(sides.ws, *moved, Hk, bounded, there_state, there_after, there)
        _core.delta_rule(sides.cpu, qkv, decay, beta, rate, bias, Hk, bounded, state, after, out)
        same(there, out)
        same(there_after, after)
        for mine, theirs in zip(moved, (qkv, decay, beta), strict=False):
            same(mine, theirs)
        state, there_state = after, there_after


@pytest.mark.parametrize("P", [16, 144])
def test_mamba2_in_pieces(sides, P):
    H, N, groups = 4, 20, 2
    rate, step_bias, skip = np.abs(normal(H)), normal(H, seed=1), normal(H, seed=2)
    state = there_state = None
    for i, T in enumerate((5, 1, 3)):
        xbc, step = normal(T, H * P + 2 * groups * N, seed=i), normal(T, H, seed=9, gain=4)
        decay, out = np.empty((T, H), np.float32), np.empty((T, H * P), np.float32)
        after = np.empty((H, N, P), np.float32)
        moved = [sides.put(a) for a in (xbc, step, decay, rate, step_bias, skip)]
        there_after, there = sides.put(after), sides.put(out)
        _core.device_mamba2(sides.ws, *moved, groups, there_state, there_after, there)
        _core.mamba2(sides.cpu, xbc, step, decay, rate, step_bias, skip, groups, state, after, out)
        same(there, out)
        same(there_after, after)
        state, there_state = after, there_after


@pytest.mark.parametrize("shape", [(4, 60), (60,), (1,)], ids=str)
def test_factors_and_gates_of_rows(sides, shape):
    x, factors, gates = normal(4, 60), normal(*shape, seed=1), normal(4, 1, seed=2)
    there, out = sides.put(x), sides.put(x)
    _core.device_multiply(sides.ws, sides.put(factors), there)
    same(there, x * factors)
    _core.device_weigh(sides.ws, there, gates, out)
    same(out, x * factors * gates)


@pytest.mark.parametrize("kind", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize(("latent", "rope", "heads"), [(32, 16, 3), (512, 64, 4), (16, 0, 9)])
@pytest.mark.parametrize("rotates", [False, True])
def test_latent_attention(kind, latent, rope, heads, rotates):
    width, nope, context = latent + rope, 12, 290
    sides = Sides(270, 640, context, width, heads)
    rotates = rotates and rope > 0
    given = {
        "index": 2, "num_heads": heads, "nope_dim": nope, "rope_dim": rope, "latent_dim": latent, "scale": 0.1,
        "rotates": rotates, "grow_every": 5 if rotates else 0, "growth": 0.3 if rotates else 0.0, "norm_eps": 1e-5,
    }  # fmt: skip
    norm = normal(latent, seed=4)
    layer, there_layer = (
        _core.LatentLayer(norm=norm, **given),
        _core.DeviceLatents(norm=sides.put(norm), **given),
    )
    sizes = {"type": kind, "capacity": context, "head_dim": width, "value_dim": latent}
    kv = _core.KvLayer.latents(**sizes)
    there_kv = _core.DeviceKvLayer.latents(device=sides.device, **sizes)
    far = (
        ((240, 33), (273, 1)) if latent < 100 else ()
    )  # positions in between stay as in a new cache
    for pos, T in ((0, 3), (3, 1), *far):
        q, absorbed = normal(T, heads * (nope + rope), seed=T), normal(T, heads * width, seed=5)
        keys, out = normal(T, width, seed=pos), np.empty((T, heads * latent), np.float32)
        turns = [normal(T, rope // 2, seed=6 + i) for i in range(2)] if rotates else [None, None]
        moved = [sides.put(a) for a in (q, absorbed, keys)]
        there, there_turns = sides.put(out), [sides.put(t) for t in turns]
        _core.device_latent_attention(
            sides.ws, there_layer, *moved, pos, *there_turns, there_kv, there
        )
        _core.latent_attention(sides.cpu, layer, q, absorbed, keys, pos, *turns, kv, out)
        same(there, out)
        for mine, theirs in zip(moved, (q, absorbed, keys), strict=True):
            same(mine, theirs)
    assert np.array_equal(there_kv.content, kv.content)


def test_a_latent_that_does_not_fit_is_said_as_the_cpu_says_it():
    sides = Sides(4, 640, 8, 48, 2)
    given = {
        "index": 2, "num_heads": 2, "nope_dim": 4, "rope_dim": 16, "latent_dim": 32, "scale": 0.1,
        "rotates": False, "grow_every": 0, "growth": 0.0, "norm_eps": 1e-5,
    }  # fmt: skip
    norm, keys, out = np.ones(32, np.float32), normal(3, 48), np.empty((3, 64), np.float32)
    keys[1, 40] = 1e9
    q, absorbed = normal(3, 40), normal(3, 96)
    sizes = {"type": "f16", "capacity": 8, "head_dim": 48, "value_dim": 32}
    layer = _core.DeviceLatents(norm=sides.put(norm), **given)
    kv = _core.DeviceKvLayer.latents(device=sides.device, **sizes)
    there = sides.put(out)
    moved = [sides.put(a) for a in (q, absorbed, keys)]
    _core.device_latent_attention(sides.ws, layer, *moved, 0, None, None, kv, there)
    with pytest.raises(RangeError) as mine:
        _core.device_download(sides.ws, [there], [out])
    host = _core.LatentLayer(norm=norm, **given)
    with pytest.raises(RangeError) as theirs:
        _core.latent_attention(
            sides.cpu, host, q, absorbed, keys, 0, None, None, _core.KvLayer.latents(**sizes), out
        )
    assert str(mine.value) == str(theirs.value)


def test_what_does_not_fit_is_refused(sides):
    x, w = sides.put(normal(2, 40)), sides.matrix(nested(48, 20))
    with pytest.raises(ValueError, match="linear_heads: expected whole heads"):
        _core.device_linear_heads(sides.ws, x, w, 2, sides.put(normal(2, 48)))
    with pytest.raises(ValueError, match="multiply: expected factors"):
        _core.device_multiply(sides.ws, sides.put(normal(3)), x)
    with pytest.raises(
        ValueError, match="gated_norm: expected silu, sigmoid or silu_first, got no"
    ):
        _core.device_gated_norm(sides.ws, x, x, sides.put(normal(40)), 1e-3, 1, "no")
    with pytest.raises(ValueError, match="activation"):
        _core.device_ffn(sides.ws, sides.put(normal(2, 20)), None, w, w, sides.put(normal(2, 48)))

"""Kernels of every instruction set are near numpy, and have the bits of the scalar ones."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
from reference_nested import decode_rungs, quantize_rows, unpack

from edgemoe import _core
from edgemoe.quant import plane_widths, quantize, rung_bytes

LADDERS = [(2, 3, 4, 6, 8), (1, 2, 3, 4, 5, 6, 7, 8), (3, 8), (4, 8), (8,), (5, 7), (6,)]


ROW_SCALES = [(1,), (1, 1, 0, 0, 0), (1, 0, 1, 1)]
"""Which rungs begin with scales of rows."""


def matrix(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, cols)) * rng.uniform(0.01, 2, (rows, 1))).astype(np.float32)


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(16, 64), (5, 7), (33, 130), (48, 320)])
def test_matmul_agrees_with_numpy(isa, ladder, rows, cols):
    row_scales = ROW_SCALES[cols % len(ROW_SCALES)]
    w, x = matrix(rows, cols), matrix(70, cols, seed=1)
    rungs = quantize(w, ladder, row_scales=row_scales)
    assert [len(r) for r in rungs] == rung_bytes(rows, cols, ladder, row_scales)
    widths = plane_widths(ladder)
    ws = _core.Workspace(2, 70, cols, 64, 1, 16)
    for level in range(1, len(ladder) + 1):
        form = rungs[:level], rows, cols, widths[:level], "nested", row_scales
        nested = _core.Nested.from_rungs(*form)
        assert nested.bits == ladder[level - 1]
        decoded = decode_rungs(rungs[:level], widths[:level], rows, cols, row_scales)
        expected = quantize_rows(x) @ decoded.T
        back = np.empty((rows, cols), np.float32)
        nested.decode_rows(np.arange(rows, dtype=np.int32), back)
        np.testing.assert_allclose(back, decoded, rtol=1e-6)
        out = np.empty((70, rows), np.float32)
        _core.linear(ws, x, [nested], [out])
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        one = np.empty((1, rows), np.float32)
        for t in (0, 69):  # a row's bits do not depend on its batch
            _core.linear(ws, x[t : t + 1], [nested], [one])
            assert np.array_equal(one[0], out[t])


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_a_prefix_is_a_model(ladder):
    w = matrix(40, 200)
    rungs, widths = quantize(w, ladder), plane_widths(ladder)
    full, scales, middles = unpack(rungs, widths, 40, 200)
    last = np.inf
    for level in range(1, len(ladder) + 1):
        codes, s, m = unpack(rungs[:level], widths[:level], 40, 200)
        assert np.array_equal(codes, full >> (ladder[-1] - ladder[level - 1]))
        assert np.array_equal(s, scales)
        assert np.array_equal(m, middles)
        error = np.square(decode_rungs(rungs[:level], widths[:level], 40, 200) - w).sum()
        assert error < last
        last = error


def test_fewer_bits_store_a_prefix_of_the_same_code():
    w = matrix(20, 100)
    for mine, theirs in zip(quantize(w, (2, 3, 4)), quantize(w, (2, 3, 4, 6, 8)), strict=False):
        assert np.array_equal(mine, theirs)


def test_error_at_eight_bits_is_a_fraction_of_the_step():
    w = matrix(64, 512)
    error = decode_rungs(quantize(w), plane_widths((2, 3, 4, 6, 8)), 64, 512) - w
    assert np.sqrt(np.square(error).sum() / np.square(w).sum()) < 0.008


@pytest.mark.parametrize("value", [0.0, 3.25, -1e-7, 1e4])
def test_constant_groups_are_kept(value):
    w = np.full((3, 70), value, np.float32)
    out = decode_rungs(quantize(w), plane_widths((2, 3, 4, 6, 8)), 3, 70)
    np.testing.assert_allclose(out, w, rtol=3e-3, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_weights_that_no_scale_can_hold_are_refused(bad):
    w = matrix(4, 64)
    w[2, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(w)


def every_op(seed=3):
    """Runs each operation once and returns all results."""
    rng = np.random.default_rng(seed)
    out = []
    D, H, heads, kv_heads, hd, T = 100, 75, 6, 2, 18, 9
    ws = _core.Workspace(2, T, 128, 128, 16, hd, heads)
    x = rng.standard_normal((T, D)).astype(np.float32)
    nested = {}
    for name, shape in {"gate": (H, D), "up": (H, D), "down": (D, H)}.items():
        w = rng.standard_normal(shape).astype(np.float32)
        rungs = quantize(w, row_scales=ROW_SCALES[1])
        out += rungs
        nested[name] = _core.Nested.from_rungs(
            rungs[:3], *shape, [2, 1, 1], row_scales=ROW_SCALES[1]
        )
    y = np.empty((T, D), np.float32)
    _core.ffn(ws, x, nested["gate"], nested["up"], nested["down"], y)
    out.append(y.copy())
    _core.rms_norm(ws, x, np.linspace(0.5, 2, D, dtype=np.float32), 1e-5, y)
    out.append(y.copy())
    experts, gates = np.empty((T, 3), np.int32), np.empty((T, 3), np.float32)
    scores = np.empty((T, 21), np.float32)
    router = rng.standard_normal((21, D)).astype(np.float32)
    bias = rng.standard_normal(21).astype(np.float32)
    for scoring, renormalise, of, groups in [
        ("softmax", False, None, 1), ("softmax", True, bias, 1), ("softmax_topk", False, None, 1),
        ("sparsemixer", False, None, 1), ("sigmoid", True, None, 7), ("sigmoid", False, bias, 3),
    ]:  # fmt: skip
        rule = _core.RouteRule(
            num_experts=21, top_k=3, scoring=scoring, renormalise=renormalise, gate_scale=1.7,
            groups=groups, used_groups=min(groups, 2), group_by_two=groups == 3,
        )  # fmt: skip
        _core.route(ws, x, router, router[:, 0].copy(), of, rule, scores, experts, gates)
        out += [experts.copy(), gates.copy(), scores.copy()]
    layer = _core.AttentionLayer(
        index=0, num_heads=heads, num_kv_heads=kv_heads, head_dim=hd, window=0, scale=hd**-0.5,
        q_bias=None, k_bias=None, v_bias=rng.standard_normal(kv_heads * hd).astype(np.float32),
        q_norm=np.ones(hd, np.float32), k_norm=np.ones(hd, np.float32),
        norm_per_head=True, norm_eps=1e-6, clip=2.0,
    )  # fmt: skip
    kv = _core.KvLayer(
        key_type="f16", value_type="f16", num_heads=kv_heads, capacity=16, head_dim=hd
    )
    cos, sin = np.empty((T, hd // 2), np.float32), np.empty((T, hd // 2), np.float32)
    _core.Rope(np.linspace(1, 0.01, hd // 2, dtype=np.float32), 1.0).angles(3, cos, sin)
    q, k, v = (
        rng.standard_normal((T, n * hd)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
    )
    a = np.empty((T, heads * hd), np.float32)
    _core.attention(ws, layer, q, k, v, 3, cos, sin, None, kv, a)
    out += [a.copy(), kv.content.copy(), cos, sin]
    _core.add_rows(ws, x, 0.3, router[0], x, y)
    out.append(y.copy())
    return out


def test_instruction_sets_are_bit_identical(isa):
    mine = every_op()
    _core.use_isa("scalar")
    for a, b in zip(mine, every_op(), strict=True):
        assert np.array_equal(a, b)


def test_values_that_are_not_finite_are_seen(isa):
    ws = _core.Workspace(1, 3, 128, 64, 1, 16)
    nested = _core.Nested.from_rungs(quantize(matrix(16, 128)), 16, 128, [2, 1, 1, 2, 2])
    x = matrix(3, 128, seed=2)
    x[0, 70], x[1, 3] = np.nan, np.inf
    out = np.empty((3, 16), np.float32)
    _core.linear(ws, x, [nested], [out])
    assert np.isnan(out[:2]).all()
    assert np.isfinite(out[2]).all()


def test_tiny_values_are_zero_on_every_instruction_set(isa):
    ws = _core.Workspace(1, 1, 64, 64, 1, 16)
    nested = _core.Nested.from_rungs(quantize(matrix(16, 64)), 16, 64, [2, 1, 1, 2, 2])
    out = np.ones((1, 16), np.float32)
    _core.linear(ws, np.full((1, 64), 1e-37, np.float32), [nested], [out])
    assert not out.any()


def test_wrong_arrays_are_refused_and_never_converted():
    w = matrix(16, 64)
    nested = _core.Nested.from_rungs(quantize(w), 16, 64, [2, 1, 1, 2, 2])
    ws = _core.Workspace(1, 4, 64, 8, 1, 16)
    out = np.empty((4, 16), np.float32)
    for x in (
        np.zeros((4, 64)),
        np.zeros((4, 128), np.float32)[:, ::2],
        np.zeros((4, 64), np.float16),
    ):
        with pytest.raises(TypeError):
            _core.linear(ws, x, [nested], [out])
    with pytest.raises(ValueError, match="does not fit a matrix of 64 columns"):
        _core.linear(ws, np.zeros((4, 65), np.float32), [nested], [out])
    with pytest.raises(ValueError, match="at most 8 hidden values, got 16"):
        down = _core.Nested.from_rungs(quantize(matrix(64, 16)), 64, 16, [2, 1, 1, 2, 2])
        _core.ffn(ws, w[:4], nested, nested, down, np.empty((4, 64), np.float32))
    with pytest.raises(TypeError, match="gate_weight: expected a contiguous float32"):
        _core.add_rows(ws, w, 1.0, np.zeros(64), w, w.copy())
    with pytest.raises(ValueError, match="contiguous"):
        _core.crc32c(np.zeros(8, np.uint8)[::2])
    with pytest.raises(ValueError, match="use_isa: expected one of"):
        _core.use_isa("sse9")


def test_crc32c_is_the_published_one():
    assert _core.crc32c(b"123456789") == 0xE3069283
    data = np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes()
    assert _core.crc32c(data[301:], _core.crc32c(data[:301])) == _core.crc32c(data)
    long = np.random.default_rng(0).bytes(60_001)  # long enough for three parts at a time
    piecewise = 0
    for at in range(0, len(long), 1000):
        piecewise = _core.crc32c(long[at : at + 1000], piecewise)
    assert _core.crc32c(long) == piecewise


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64")
def test_what_the_processor_can_do_is_used():
    """Kernels are chosen by what the system lists, even if the compiler's library knows fewer instruction sets."""
    (flags, *_) = [
        set(line.split(":")[1].split())
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("flags")
    ]
    expected = ["scalar"]
    if flags >= {"avx2", "fma", "f16c"}:
        expected.insert(0, "avx2")
        if flags >= {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}:
            expected.insert(0, "avx512")
    assert _core.usable_isas().split() == expected

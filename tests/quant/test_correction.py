"""Low-rank corrections: their bytes, what these mean, and the products of every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import reference_correction as reference
import reference_nested

from edgemoe import _core
from edgemoe.quant import correction, plane_widths, quantize

LADDER = (2, 3, 4, 6, 8)
WIDTHS = plane_widths(LADDER)
ROW_SCALES = (1, 1, 0, 0, 0)


def corrected(rows, cols, ranks, seed=0, *, has_basis=True):
    """Returns a matrix's rungs, its rungs with corrections fitted by least squares, and the basis."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((rows, cols)) * rng.uniform(0.01, 2, (rows, 1))).astype(np.float32)
    rungs = quantize(w, LADDER, row_scales=ROW_SCALES)
    v = correction.basis_codes(np.linalg.qr(rng.standard_normal((cols, max(ranks))))[0].T)
    plain = list(rungs)
    factors = {}
    for level, rank in enumerate(ranks):
        if not rank:
            continue
        below = plain[: level + 1], WIDTHS[: level + 1]
        units = reference.units_of(*below, rows, ROW_SCALES)
        lost = w - reference_nested.decode_rungs(*below, rows, cols, ROW_SCALES)
        a = np.linalg.lstsq(v[:rank].T.astype(float), lost.T, rcond=None)[0].T
        factors[level] = correction.factor_codes(a, units)
    return rungs, correction.with_correction(rungs, factors, v if has_basis else None), v


def nested(rungs, rows, cols, ranks, basis=None):
    n = len(rungs)
    return _core.Nested.from_rungs(
        rungs, rows, cols, WIDTHS[:n], row_scales=ROW_SCALES, ranks=ranks, basis=basis
    )


def padded(v):
    return np.pad(v, ((0, 0), (0, -v.shape[1] % 64)))


SHAPES = [(16, 64), (5, 37), (33, 130), (48, 320)]
RANKS = [(8, 8, 8, 0, 0), (32, 16, 8, 0, 0), (0, 24, 0, 8, 8)]


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_products_and_rows_agree_with_numpy(isa, rows, cols, ranks):
    plain, rungs, v = corrected(rows, cols, ranks)
    x = np.random.default_rng(1).standard_normal((70, cols)).astype(np.float32)
    ws = _core.Workspace(2, 70, cols, 64, 1, 16)
    for level in range(1, 6):
        matrix = nested(rungs[:level], rows, cols, ranks)
        assert matrix.rank == ranks[level - 1]
        whole = reference.decode_rungs(rungs[:level], WIDTHS[:level], rows, cols, ranks, ROW_SCALES)
        out = np.empty((rows, cols), np.float32)
        matrix.decode_rows(np.arange(rows, dtype=np.int32), out)
        np.testing.assert_allclose(out, whole, rtol=1e-5, atol=1e-6 * np.abs(whole).max())
        base = reference_nested.decode_rungs(plain[:level], WIDTHS[:level], rows, cols, ROW_SCALES)
        # W is applied to rounded activations, and V to unrounded ones; V x is then rounded to 8 bits itself.
        expected = reference_nested.quantize_rows(x) @ base.T + x.astype(float) @ (whole - base).T
        y = np.empty((70, rows), np.float32)
        _core.linear(ws, x, [matrix], [y])
        close = (
            1e-4 * np.abs(expected).max() + np.abs(x.astype(float) @ (whole - base).T).max() / 60
        )
        np.testing.assert_allclose(y, expected, atol=close)
        one = np.empty((1, rows), np.float32)
        for t in (0, 69):  # a row's bits do not depend on its batch
            _core.linear(ws, x[t : t + 1], [matrix], [one])
            assert np.array_equal(one[0], y[t])
    # The same with a basis that is not in the first rung.
    _, bare, _ = corrected(rows, cols, ranks, has_basis=False)
    shared = nested(bare[:2], rows, cols, ranks, padded(v))
    again = np.empty_like(y)
    _core.linear(ws, x, [shared], [again])
    _core.linear(ws, x, [nested(rungs[:2], rows, cols, ranks)], [y])
    assert np.array_equal(again, y)


@pytest.mark.parametrize("rank", [8, 16, 24, 32])
def test_a_product_is_exact_where_nothing_is_rounded(isa, rank):
    """All values are integers, so that any wrong lane, half or scale changes the sums."""
    rows, cols = 35, 70
    rng = np.random.default_rng(rank)
    rungs = quantize(np.zeros((rows, cols), np.float32), (2,))  # row scales are 0, and set next
    rungs[0][: 2 * rows] = np.full(rows, 64.0, "<f2").view(np.uint8)  # a code's step at 2 bits is 1
    codes = rng.integers(0, 16, (rows, rank), np.uint8)
    u = np.full(rank, 2.0, np.float16)
    v = np.zeros((rank, cols), np.int8)
    v[np.arange(rank), rng.permutation(cols)[:rank]] = 1
    whole = correction.with_correction(rungs, {0: (u, codes)}, v)
    with_it = _core.Nested.from_rungs(whole, rows, cols, [2], ranks=[rank])
    without = _core.Nested.from_rungs(rungs, rows, cols, [2])
    x = rng.integers(-63, 64, (9, cols)).astype(np.float32)
    x[:, np.flatnonzero(v.any(axis=0))[0]] = 63.5  # so that z's scale is 1
    ws = _core.Workspace(1, 9, cols, 64, 1, 16)
    y, base = np.empty((9, rows), np.float32), np.empty((9, rows), np.float32)
    _core.linear(ws, x, [with_it], [y])
    _core.linear(ws, x, [without], [base])
    expected = (x @ v.T.astype(np.float32) * 2) @ (codes - 7.5).T
    np.testing.assert_allclose(y - base, expected, rtol=1e-4, atol=0.01)


def test_each_head_of_a_stacked_matrix_has_its_own_rows_corrected(isa):
    heads, rows, cols = 3, 32, 40
    ranks = (8, 16, 0, 0, 0)
    _, rungs, _ = corrected(heads * rows, cols, ranks)
    x = np.random.default_rng(4).standard_normal((5, heads * 48)).astype(np.float32)
    ws = _core.Workspace(2, 5 * heads, 64, 64, 1, 16)
    for level in (1, 2):
        whole = nested(rungs[:level], heads * rows, cols, ranks)
        got, y = np.zeros((5, heads * rows), np.float32), np.empty((5, heads * rows), np.float32)
        _core.linear_heads(ws, x, whole, heads, got)
        for h in range(heads):
            mine = np.ascontiguousarray(x[:, 48 * h : 48 * h + cols])
            _core.linear(ws, mine, [whole], [y])
            part = slice(rows * h, rows * (h + 1))
            assert np.array_equal(got[:, part], y[:, part])


def test_matrices_of_one_call_are_as_those_of_several(isa):
    rows, cols, x = 20, 70, np.random.default_rng(5).standard_normal((9, 70)).astype(np.float32)
    matrices = [
        nested(corrected(rows, cols, ranks, seed)[1][:2], rows, cols, ranks)
        for seed, ranks in enumerate([(8, 0, 0, 0, 0), (8, 8, 8, 0, 0), (0, 16, 0, 0, 0)])
    ]
    ws = _core.Workspace(2, 9, cols, 64, 1, 16)
    outs = [np.empty((9, rows), np.float32) for _ in matrices]
    _core.linear(ws, x, matrices, outs)
    alone = np.empty((9, rows), np.float32)
    for matrix, out in zip(matrices, outs, strict=True):
        _core.linear(ws, x, [matrix], [alone])
        assert np.array_equal(alone, out)


def test_instruction_sets_are_bit_identical(isa):
    def everything():
        _, rungs, v = corrected(35, 100, (32, 16, 8, 0, 0))
        _, down, _ = corrected(100, 35, (8, 8, 8, 0, 0), seed=1)
        x = np.random.default_rng(2).standard_normal((70, 100)).astype(np.float32)
        ws = _core.Workspace(2, 70, 100, 64, 1, 16)
        out = []
        z = np.empty((70, 32), np.float32)
        _core.project(ws, x, padded(v), z)
        out.append(z.copy())
        for level in (1, 2, 3):
            up = nested(rungs[:level], 35, 100, (32, 16, 8, 0, 0))
            back = nested(down[:level], 100, 35, (8, 8, 8, 0, 0))
            y, hidden, all_rows = (
                np.empty(s, np.float32) for s in ((70, 100), (70, 35), (35, 100))
            )
            _core.linear(ws, x, [up], [hidden])
            up.decode_rows(np.arange(35, dtype=np.int32), all_rows)
            _core.ffn(ws, x, up, up, back, y)
            out += [y, hidden, all_rows]
        return out

    mine = everything()
    _core.use_isa("scalar")
    for a, b in zip(mine, everything(), strict=True):
        assert np.array_equal(a, b)


def test_what_is_not_finite_is_seen(isa):
    _, rungs, _ = corrected(16, 64, (8, 8, 8, 0, 0))
    x = np.ones((2, 64), np.float32)
    x[0, 3] = np.inf
    y = np.empty((2, 16), np.float32)
    ws = _core.Workspace(1, 2, 64, 64, 1, 16)
    _core.linear(ws, x, [nested(rungs[:1], 16, 64, (8, 8, 8, 0, 0))], [y])
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


def test_rounding_a_factor_loses_what_four_bits_lose():
    rng = np.random.default_rng(0)
    units = rng.uniform(0.001, 0.1, 400)
    a = rng.standard_normal((400, 8)) * units[:, None] * np.array([9, 5, 3, 2, 1, 1, 0.5, 0])
    u, codes = correction.factor_codes(a, units)
    stored = correction.factor(u, codes, units)
    for j in range(7):
        lost = np.square((stored - a)[:, j] / units).sum() / np.square(a[:, j] / units).sum()
        assert 0.005 < lost < 0.02  # 0.0115 for a normal distribution
    assert u[7] == 0
    assert not stored[:, 7].any()
    assert np.array_equal(codes.max(axis=0)[:7], np.full(7, 15))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_factors_that_no_scale_can_hold_are_refused(bad):
    a = np.ones((4, 8))
    a[2, 5] = bad
    with pytest.raises(ValueError, match="a factor is not finite, or too large"):
        correction.factor_codes(a, np.ones(4))


def test_rows_without_a_scale_have_no_correction():
    u, codes = correction.factor_codes(np.ones((3, 8)), np.array([0, 1.0, 0]))
    assert not correction.factor(u, codes, np.array([0, 1.0, 0]))[[0, 2]].any()


def test_a_basis_is_rows_of_signed_bytes():
    v = np.array([[0.5, -1, 0.25], [0, 0, 0], [1e-9, 4e-9, -1e-9]])
    np.testing.assert_array_equal(
        correction.basis_codes(v), [[64, -127, 32], [0, 0, 0], [32, 127, -32]]
    )
    layers = [np.arange(8 * 70, dtype=np.int16).reshape(8, 70).astype(np.int8)] * 3
    section = correction.pack_basis(layers)
    assert len(section) == 3 * correction.basis_bytes(70, 8) == 3 * 8 * 128
    read = correction.unpack_basis(section, 3, 8, 70)
    np.testing.assert_array_equal(read[1, :, :70], layers[0])
    assert not read[:, :, 70:].any()
    with pytest.raises(ValueError, match=r"expected 2048 bytes \(2 layers, rank 8, 70 columns\)"):
        correction.unpack_basis(section, 2, 8, 70)


def test_what_does_not_fit_is_refused():
    _, rungs, v = corrected(16, 64, (8, 8, 8, 0, 0))
    for ranks in ((4,), (40,), (8, 12)):
        with pytest.raises(ValueError, match="ranks: expected 0, 8, 16, 24 or 32"):
            nested(rungs, 16, 64, ranks)
    with pytest.raises(ValueError, match="nested rung: expected shape"):
        nested(rungs, 16, 64, (8, 8, 0, 0, 0))
    with pytest.raises(ValueError, match="basis: expected 8 rows, got 7"):
        nested(rungs, 16, 64, (8, 8, 8, 0, 0), v[:7].copy())
    with pytest.raises(ValueError, match="basis: expected shape"):
        nested(rungs, 16, 64, (8, 8, 8, 0, 0), np.zeros((8, 60), np.int8))
    with pytest.raises(ValueError, match="ranks"):
        _core.Nested.from_rungs([rungs[0]], 16, 64, [2], "mwq", ranks=[8])
    with pytest.raises(ValueError, match="rank 16 of a basis of 8"):
        correction.with_correction(
            rungs, {0: (np.zeros(16, np.float16), np.zeros((16, 16), np.uint8))}, v
        )

"""What schedulers have the core work out of all experts of a layer, against the same in numpy and plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe import _core

E, K = 70, 5
ROUND, PENALTY = 6.0, 4.0


def experts(rng, count=K):
    return rng.permutation(E)[:count].astype(np.int32)


def likely(odds, count):
    return sorted(range(E), key=lambda e: (odds[e], e))[:count]


def test_a_path_is_followed_and_foreseen():
    rng = np.random.default_rng(0)
    scores, late, path = np.zeros(E), np.zeros(E), np.zeros(K, np.int32)
    expected, wait = np.zeros(E), np.zeros(E)
    for step in range(1, 30):
        chosen, odds = experts(rng), rng.integers(1, 30, E).astype(float)  # with equals
        right = _core.follow_path(scores, late, chosen, odds, path, step, ROUND, PENALTY)
        assert right == np.count_nonzero(wait[chosen])
        wait[chosen] = 0
        expected = -(odds + wait) * ROUND - step - 2 * ROUND
        best = likely(odds, K)
        expected[best] = -ROUND - step
        wait = np.where(np.isin(np.arange(E), best), PENALTY, 0)
        assert path.tolist() == best
        np.testing.assert_array_equal(scores, expected)
        np.testing.assert_array_equal(late, wait)
        if step % 3 == 0:
            odds = rng.normal(size=(1, E))
            _core.foresee_paths(scores[None], late[None], odds, path[None], step, PENALTY)
            expected -= np.where(wait > 0, 2.0, 0)  # a round of one layer
            best = likely(odds[0], K)
            expected[best] = -1.0 - step
            wait = np.where(np.isin(np.arange(E), best), PENALTY, 0)
            assert path.tolist() == best
            np.testing.assert_array_equal(scores, expected)
            np.testing.assert_array_equal(late, wait)


def test_layers_run_one_after_the_other():
    scores, late = np.zeros((3, 2)), np.zeros((3, 2))
    odds = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    paths = np.zeros((3, 1), np.int32)
    _core.foresee_paths(scores, late, odds, paths, 10.0, PENALTY)
    assert scores.tolist() == [[0, -11], [-12, 0], [0, -13]]
    assert paths[:, 0].tolist() == [1, 0, 1]


def test_rows_are_added_by_their_weights():
    rng = np.random.default_rng(0)
    rows = rng.random((E, 33)).astype(np.float32)
    out = np.full(33, 9, np.float32)
    which, weights = experts(rng), rng.random(K).astype(np.float32)
    assert _core.weigh_rows(rows, which, weights, out)
    np.testing.assert_allclose(out, weights @ rows[which], rtol=1e-6)
    assert not _core.weigh_rows(0 * rows, which, weights, out)
    assert not out.any()


@pytest.mark.parametrize("most", [0, 1, 3, E])
def test_the_likeliest_lack_something(most):
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 9, E).astype(np.float32)
    has, wanted = (rng.integers(0, 5, E).astype(np.int8) for _ in range(2))
    among = [e for e in range(E) if scores[e] > 0 and has[e] < wanted[e]]
    expected = sorted(among, key=lambda e: (-scores[e], e))[:most]
    assert _core.likeliest(scores, has, wanted, most).tolist() == expected


def test_records_and_uses():
    rng = np.random.default_rng(0)
    records, last = rng.random(E), rng.random(E)
    worth = rng.random(9)
    chosen, bits = experts(rng), rng.integers(0, 9, K).astype(np.int8)
    expected = records.copy()
    expected[chosen] += worth[bits] - last[chosen]
    _core.renew_records(records, last, chosen, bits, worth, 7.0)
    np.testing.assert_array_equal(records, expected)
    assert (last[chosen] == 7).all()
    assert (last == 7).sum() == K

    uses = rng.random(E)
    expected = uses * 0.75
    expected[chosen] += 0.25
    _core.decay_uses(uses, chosen, 0.75)
    np.testing.assert_array_equal(uses, expected)


@pytest.mark.parametrize("bad", [[-1], [E]])
def test_there_is_no_such_expert(bad):
    bad = np.array(bad, np.int32)
    row, path, one = np.zeros(E), np.zeros(K, np.int32), np.zeros(1, np.int8)
    singles = np.zeros(E, np.float32)
    with pytest.raises(ValueError, match="chosen"):
        _core.decay_uses(row, bad, 0.5)
    with pytest.raises(ValueError, match="chosen"):
        _core.renew_records(row, row.copy(), bad, one, np.zeros(9), 0.0)
    with pytest.raises(ValueError, match="chosen"):
        _core.follow_path(row, row.copy(), bad, row, path, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="which"):
        _core.weigh_rows(singles[None].repeat(E, 0), bad, np.ones(1, np.float32), singles)
    with pytest.raises(ValueError, match="path"):
        _core.follow_path(row, row.copy(), bad[:0], row, np.zeros(E + 1, np.int32), 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="bits"):
        _core.renew_records(row, row.copy(), bad[:1] * 0, np.array([9], np.int8), np.zeros(9), 0.0)


def test_a_path_is_counted():
    rng = np.random.default_rng(0)
    layers = np.arange(3)[:, None]
    pairs, totals, uses = (np.zeros(shape, np.float32) for shape in ((3, E, E), (3, E), (3, E)))
    uses += 1
    expected = pairs.copy()
    runs = np.zeros((3, E))
    for _ in range(20):
        path = np.array([experts(rng) for _ in range(3)])
        _core.count_path(pairs, totals, uses, path)
        expected[layers[1:, :, None], path[:-1, :, None], path[1:, None, :]] += 1
        runs[layers, path] += 1
        np.testing.assert_array_equal(pairs, expected)
        np.testing.assert_array_equal(totals, runs)
        np.testing.assert_array_equal(uses, np.maximum(runs, 1))
    path[1, 2] = E
    with pytest.raises(ValueError, match="path"):
        _core.count_path(pairs, totals, uses, path)


@pytest.mark.parametrize(("rows", "cols"), [(70, 48), (32, 64), (1, 1), (33, 129)])
def test_rounded_rows_are_their_matrix_in_8_bits(rows, cols):
    rng = np.random.default_rng(rows)
    matrix = rng.normal(size=(rows, cols)).astype(np.float32)
    matrix *= np.float32(10.0) ** rng.integers(-6, 6, (rows, 1))  # each row has a scale of its own
    matrix[rows // 2] = 0
    bias, x = rng.normal(size=(2, max(rows, cols))).astype(np.float32)
    bias, x = bias[:rows].copy(), x[:cols].copy()
    out = np.full(rows, np.nan, np.float32)
    _core.RoundedRows(matrix, bias).dot(x, out)
    scale = np.abs(matrix).max(axis=1, keepdims=True).astype(float) / 127
    codes = np.rint(np.divide(matrix, scale, out=np.zeros((rows, cols)), where=scale > 0))
    np.testing.assert_allclose(out, codes * scale @ x + bias, rtol=1e-5, atol=1e-5 * scale.max())
    exact = matrix.astype(float) @ x + bias
    assert (np.abs(out - exact) <= 0.51 * scale[:, 0] * np.abs(x).sum() + 1e-6).all()
    assert out[rows // 2] == bias[rows // 2]


def test_a_small_matrix_times_a_vector():
    rng = np.random.default_rng(1)
    matrix, x = rng.normal(size=(37, 29)).astype(np.float32), rng.normal(size=29).astype(np.float32)
    out = np.empty(37, np.float32)
    _core.times(matrix, x, out)
    np.testing.assert_allclose(out, matrix.astype(float) @ x, rtol=1e-4, atol=1e-5)


def test_products_that_do_not_fit_are_refused():
    matrix, bias, out = np.ones((3, 4), np.float32), np.ones(3, np.float32), np.ones(3, np.float32)
    rounded = _core.RoundedRows(matrix, bias)
    with pytest.raises(ValueError, match=r"x: expected shape \[4\]"):
        rounded.dot(np.ones(5, np.float32), out)
    with pytest.raises(ValueError, match=r"out: expected shape \[3\]"):
        rounded.dot(np.ones(4, np.float32), np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"bias: expected shape \[3\]"):
        _core.RoundedRows(matrix, np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"x: expected shape \[4\]"):
        _core.times(matrix, np.ones(3, np.float32), out)

"""What the core computes for schedulers over all experts of a layer agrees with numpy and plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe import _core

E, K = 70, 5
PENALTY = 4.0


def experts(rng, count=K):
    return rng.permutation(E)[:count].astype(np.int32)


def likely(odds, count):
    return sorted(range(E), key=lambda e: (odds[e], e))[:count]


def path_rows(layers=1, n=E, count=K):
    """Returns a `PathRows`, and its arrays: scores, late penalties, paths, and versions."""
    arrays = {
        "scores": np.zeros((layers, n)), "late": np.zeros((layers, n)),
        "paths": np.zeros((layers, count), np.int32), "version": np.zeros(layers, np.uint32),
    }  # fmt: skip
    return _core.PathRows(**arrays, penalty=PENALTY), *arrays.values()


def test_a_path_is_followed_and_foreseen():
    rng = np.random.default_rng(0)
    rows, (scores, _), (late, _), (path, _), version = path_rows(2)
    has = np.zeros((2, E), np.int8)
    expected, wait = np.zeros(E), np.zeros(E)
    for step in range(1, 30):
        chosen = np.stack([experts(rng), experts(rng)])  # the last of two tokens counts
        odds = rng.integers(1, 30, E).astype(float)  # with ties
        right, ahead = rows.follow(0, chosen, odds, step, 1, has, 1)
        ran = chosen[1]
        assert right == np.count_nonzero(wait[ran])
        assert len(ahead) == 0
        wait[ran] = 0
        expected = -(odds + wait) * 2 - step - 2 * 2
        best = likely(odds, K)
        expected[best] = -2 - step
        wait = np.where(np.isin(np.arange(E), best), PENALTY, 0)
        assert path.tolist() == best
        np.testing.assert_array_equal(scores, expected)
        np.testing.assert_array_equal(late, wait)
        if step % 3 == 0:
            odds = rng.normal(size=(2, E))
            rows.foresee(odds, step)
            expected -= np.where(wait > 0, 2 * 2.0, 0)  # two rounds of two layers
            best = likely(odds[0], K)
            expected[best] = -1.0 - step
            wait = np.where(np.isin(np.arange(E), best), PENALTY, 0)
            assert path.tolist() == best
            np.testing.assert_array_equal(scores, expected)
            np.testing.assert_array_equal(late, wait)
    assert version.tolist() == [29 + 9, 9]


def test_layers_run_one_after_the_other():
    rows, scores, _, paths, _ = path_rows(3, 2, 1)
    rows.foresee(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), 10.0)
    assert scores.tolist() == [[0, -11], [-12, 0], [0, -13]]
    assert paths[:, 0].tolist() == [1, 0, 1]


def test_what_layers_to_come_lack_is_told():
    rows, *_ = path_rows(4, 6, 2)
    odds = np.array(
        [[0.0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [1, 0, 3, 2, 5, 4], [0, 1, 2, 3, 4, 5]]
    )
    rows.foresee(odds, 0.0)
    has = np.zeros((4, 6), np.int8)
    has[1, 4], has[2, 0] = 2, 1
    for stop, ahead in [(1, []), (2, [6 + 5]), (3, [6 + 5, 12 + 1, 12 + 0]), (0, [])]:
        _, found = rows.follow(0, np.array([[3]], np.int32), odds[0], 1.0, stop, has, 2)
        assert found.tolist() == ahead


def test_path_rows_refuse_what_they_cannot_index():
    rows, scores, late, paths, version = path_rows(2)
    has, chosen = np.zeros((2, E), np.int8), np.zeros((1, 1), np.int32)
    for bad in ([[-1]], [[E]]):
        with pytest.raises(ValueError, match="chosen"):
            rows.follow(0, np.array(bad, np.int32), scores[0], 0.0, 1, has, 1)
    with pytest.raises(ValueError, match="chosen: expected shape"):
        rows.follow(0, chosen[0], scores[0], 0.0, 1, has, 1)
    with pytest.raises(ValueError, match="chosen"):
        rows.follow(0, chosen[:0], scores[0], 0.0, 1, has, 1)
    for layer, stop, what in [(2, 2, "layer"), (-1, 1, "layer"), (0, 3, "stop")]:
        with pytest.raises(ValueError, match=what):
            rows.follow(layer, chosen, scores[0], 0.0, stop, has, 1)
    with pytest.raises(ValueError, match="has"):
        rows.follow(0, chosen, scores[0], 0.0, 1, has[:1], 1)
    with pytest.raises(ValueError, match="odds"):
        rows.foresee(scores[:1], 0.0)
    for name, wrong in [
        ("late", late[:1]), ("version", version[:1]), ("paths", paths + E),
        ("paths", np.zeros((2, E + 1), np.int32)), ("scores", scores[:0]),
    ]:  # fmt: skip
        arrays = {"scores": scores, "late": late, "paths": paths, "version": version, name: wrong}
        with pytest.raises(ValueError, match="layers" if name == "scores" else name):
            _core.PathRows(**arrays, penalty=1.0)


def test_arrays_that_change_in_place_are_not_trusted():
    rows, scores, _, paths, version = path_rows(2)
    has, chosen, odds = np.zeros((2, E), np.int8), np.zeros((1, 1), np.int32), np.zeros((2, E))
    for layer in (0, 1):  # the layer that runs, and one ahead of it
        for wrong in (-1, E, 2**31 - 1):
            paths[layer, K - 1] = wrong
            with pytest.raises(ValueError, match="paths"):
                rows.follow(0, chosen, odds[0], 0.0, 2, has, 1)
            with pytest.raises(ValueError, match="paths"):
                rows.foresee(odds, 0.0)
            paths[layer] = 0
    for array in (scores, paths, version):
        array.resize((array.size, 1), refcheck=False)  # in place, and no smaller
    with pytest.raises(ValueError, match="layer: "):
        rows.follow(2, chosen, odds[0], 0.0, 2, has, 1)
    with pytest.raises(ValueError, match="odds: "):
        rows.foresee(np.zeros((2 * E, 1)), 0.0)
    rows.foresee(odds, 0.0)

    t = tables(2)
    table = _core.PathTable(**t)
    t["totals"].resize((2 * E, 1), refcheck=False)
    with pytest.raises(ValueError, match="layer: "):
        table.follow(2, chosen[0], None, np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="path: "):
        table.count(np.zeros((2 * E, 1), np.int32))
    table.count(np.zeros((2, 1), np.int32))


def tables(layers):
    """Returns the tables before anything has run: pairs, pairs two layers apart, totals, and uses."""
    pairs, far = np.zeros((2, layers, E, E), np.float32)
    totals, uses = np.zeros((2, layers, E), np.float32)
    uses += 1
    return {"pairs": pairs, "far": far, "totals": totals, "uses": uses}


@pytest.mark.parametrize("is_deep", [True, False])
def test_what_followed_is_added_by_its_shares(is_deep):
    rng = np.random.default_rng(0)
    t = tables(3)
    table = _core.PathTable(**{**t, "far": t["far"] if is_deep else None})
    out = np.full(E, 9, np.float32)
    last, before = experts(rng), experts(rng, 3)
    assert not table.follow(1, last, None, out)
    assert not out.any()
    t["pairs"][:], t["far"][:] = rng.integers(0, 9, (2, 3, E, E))
    t["uses"][:] = rng.integers(1, 9, (3, E))
    assert table.follow(2, last, before if is_deep else None, out)
    expected = (t["pairs"][2][last] / t["uses"][1][last, None]).sum(0, dtype=float)
    if is_deep:
        expected += (t["far"][2][before] / t["uses"][0][before, None]).sum(0)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="layer"):
        table.follow(1 if is_deep else 3, last, before if is_deep else None, out)
    with pytest.raises(ValueError, match="last"):
        table.follow(1, np.array([E], np.int32), None, out)
    with pytest.raises(ValueError, match="out: expected shape"):
        table.follow(1, last, None, out[:-1])
    if not is_deep:
        with pytest.raises(ValueError, match="two layers apart"):
            table.follow(2, last, before, out)


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
    row, one = np.zeros(E), np.zeros(1, np.int8)
    with pytest.raises(ValueError, match="chosen"):
        _core.decay_uses(row, bad, 0.5)
    with pytest.raises(ValueError, match="chosen"):
        _core.renew_records(row, row.copy(), bad, one, np.zeros(9), 0.0)
    rule = _core.PrecisionRule(level_bits=[4, 8], low=4, high=8, strict=True)
    with pytest.raises(ValueError, match="experts"):
        rule.token(np.ones(1, np.float32), bad, one.repeat(E))
    with pytest.raises(ValueError, match="experts"):
        rule.ahead(None, bad, one.repeat(E), 0)
    with pytest.raises(ValueError, match="bits"):
        _core.renew_records(row, row.copy(), bad[:1] * 0, np.array([9], np.int8), np.zeros(9), 0.0)


def test_a_path_is_counted():
    rng = np.random.default_rng(0)
    layers = np.arange(3)[:, None]
    t = tables(3)
    table = _core.PathTable(**t)
    pairs, far = t["pairs"].copy(), t["far"].copy()
    runs = np.zeros((3, E))
    for _ in range(20):
        path = np.array([experts(rng) for _ in range(3)])
        table.count(path)
        pairs[layers[1:, :, None], path[:-1, :, None], path[1:, None, :]] += 1
        far[layers[2:, :, None], path[:-2, :, None], path[2:, None, :]] += 1
        runs[layers, path] += 1
        np.testing.assert_array_equal(t["pairs"], pairs)
        np.testing.assert_array_equal(t["far"], far)
        np.testing.assert_array_equal(t["totals"], runs)
        np.testing.assert_array_equal(t["uses"], np.maximum(runs, 1))
    path[1, 2] = E
    with pytest.raises(ValueError, match="path"):
        table.count(path)
    with pytest.raises(ValueError, match="far: expected shape"):
        _core.PathTable(**{**t, "far": t["far"][:2].copy()})


def test_odds_are_mixed_and_uses_expected():
    rng = np.random.default_rng(0)
    habit, text = 10 * rng.normal(size=(2, 3, 41)), rng.normal(size=(3, 41)).astype(np.float32)
    weights, out = rng.normal(size=3), np.empty((3, 41))
    _core.mix_odds(habit[0], text, weights, out)
    expected = weights[0] + weights[1] * habit[0] + weights[2] * text
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="text: expected as many"):
        _core.mix_odds(habit[0], text[:2].copy(), weights, out)
    row, odds = np.zeros(E), rng.random(E)
    _core.expect_uses(row, odds, 7.0, 6.0)
    np.testing.assert_allclose(row, -7 - 6 - 6 * odds, rtol=1e-14)


def precision(gates, levels, *, strict, t1=0.4, t2=0.7, low=4, high=8, bits_of=(0, 2, 4, 8)):
    """Returns the precisions of HOBBIT, section 3.2, in plain Python."""
    out, before = [], 0.0
    for gate, level in zip(gates, levels, strict=False):
        score = before / sum(gates)
        wanted = high if score <= t1 else low if score <= t2 else 0
        here = bits_of[level]
        enough = wanted if strict or wanted < low else low
        out.append(here if here and here >= enough else wanted)
        before += gate
    return out


@pytest.mark.parametrize("strict", [True, False])
def test_precisions_follow_the_gates_before(strict):
    rng = np.random.default_rng(0)
    rule = _core.PrecisionRule(level_bits=[2, 4, 8], low=4, high=8, strict=strict)
    rule.t1, rule.t2 = 0.4, 0.7
    seen = set()
    for _ in range(200):
        gates = np.sort(rng.random(K).astype(np.float32))[::-1].copy()
        has, some = rng.integers(0, 4, E).astype(np.int8), experts(rng)
        expected = precision(gates.tolist(), has[some].tolist(), strict=strict)
        assert rule.token(gates, some, has).tolist() == expected
        n = int(rng.integers(0, K + 1))
        ids, bits, lacks = rule.ahead(gates, some[:n], has, 1000)
        kept = [i for i in range(n) if expected[i]]
        assert ids.tolist() == (some[kept] + 1000).tolist()
        assert bits.tolist() == [expected[i] for i in kept]
        assert lacks == any(expected[i] > (0, 2, 4, 8)[has[some[i]]] for i in range(n))
        ids, bits, lacks = rule.ahead(None, some, has, 0)
        assert (ids == some).all()
        assert (bits == 8).all()
        assert lacks == (has[some] < 3).any()
        seen |= set(expected)
    assert seen == {0, 2, 4, 8} if not strict else {0, 4, 8} <= seen


@pytest.mark.parametrize(("rows", "cols"), [(70, 48), (32, 64), (1, 1), (33, 129)])
def test_rounded_rows_are_their_matrix_in_4_bits(rows, cols):
    rng = np.random.default_rng(rows)
    matrix = rng.normal(size=(rows, cols)).astype(np.float32)
    matrix *= np.float32(10.0) ** rng.integers(-6, 6, (rows, 1))  # each row has a scale of its own
    matrix[rows // 2] = 0
    bias, x = rng.normal(size=(2, max(rows, cols))).astype(np.float32)
    bias, x = bias[:rows].copy(), x[:cols].copy()
    out = np.full(rows, np.nan, np.float32)
    _core.RoundedRows(matrix, bias).dot(x, out)
    scale = np.abs(matrix).max(axis=1, keepdims=True).astype(float) / 7.5
    codes = np.floor(np.divide(matrix, scale, out=np.zeros((rows, cols)), where=scale > 0))
    unit = np.abs(x).max() / np.float32(127)
    near = (np.clip(codes, -8, 7) + 0.5) * scale @ (np.rint(x / unit) * float(unit)) + bias
    np.testing.assert_allclose(out, near, rtol=1e-4, atol=1e-4 * scale.max())
    assert out[rows // 2] == bias[rows // 2]
    before = out.copy()
    for isa in _core.usable_isas().split():
        _core.use_isa(isa)
        _core.RoundedRows(matrix, bias).dot(x, out)
        np.testing.assert_array_equal(out, before)
    _core.use_isa(_core.usable_isas().split()[0])


def test_products_that_do_not_fit_are_refused():
    matrix, bias, out = np.ones((3, 4), np.float32), np.ones(3, np.float32), np.ones(3, np.float32)
    rounded = _core.RoundedRows(matrix, bias)
    with pytest.raises(ValueError, match=r"x: expected shape \[4\]"):
        rounded.dot(np.ones(5, np.float32), out)
    with pytest.raises(ValueError, match=r"out: expected shape \[3\]"):
        rounded.dot(np.ones(4, np.float32), np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"bias: expected shape \[3\]"):
        _core.RoundedRows(matrix, np.ones(4, np.float32))

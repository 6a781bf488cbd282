"""The fit of low-rank corrections: what they gain, compared with plain least squares."""

from __future__ import annotations

import numpy as np
import pytest
from test_quantize import WIDTHS, inputs, weights

from edgemoe import _core
from edgemoe.quant import DEFAULT_LADDER, ROW_SCALES, quantize
from edgemoe.quant.lowrank import Directions, directions

RANKS = (8, 8, 8, 0, 0)


def basis(moments, ranks=RANKS, *, is_shared=False):
    rank = max(ranks)
    return Directions(directions(moments, rank), ranks, stored=0 if is_shared else rank)


def products(x):
    return (x.T @ x / len(x)).astype(np.float32)


def decoded(w, rungs, ranks, level):
    matrix = _core.Nested.from_rungs(
        rungs[:level], *w.shape, WIDTHS[:level], "nested", ROW_SCALES, ranks
    )
    out = np.empty_like(w)
    matrix.decode_rows(np.arange(len(w), dtype=np.int32), out)
    return out


def errors(w, rungs, ranks, moments):
    out = []
    for level in range(1, len(DEFAULT_LADDER) + 1):
        e = decoded(w, rungs, ranks, level) - w
        out.append(np.einsum("rc,cd,rd->", e, moments, e, optimize=True))
    return np.array(out)


def test_directions_are_the_first_eigenvectors():
    moments = products(inputs(4096, 96))
    exact = np.linalg.eigh(moments.astype(float))[1][:, ::-1][:, :8].T
    v = basis(moments).basis.astype(float)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    energy = np.einsum("rc,cd,rd->", v, moments, v)
    assert energy > 0.995 * np.einsum("rc,cd,rd->", exact, moments, exact)


def test_what_is_left_is_what_the_directions_do_not_tell():
    """E M' E^T is the error that remains with the best factor, up to the damping in M'."""
    moments = products(inputs(2048, 64))
    moments /= np.diagonal(moments).mean()
    v = basis(moments)
    rest, rows = v.rest(moments), v.basis.astype(float)
    error = weights(5, 64)
    root = np.linalg.cholesky(moments.astype(float) + 1e-9 * np.eye(64))
    best = np.linalg.lstsq((rows @ root).T, (error @ root).T, rcond=None)[0].T
    left = error - best @ rows
    exact = np.einsum("rc,cd,rd->r", left, moments, left)
    mine = np.einsum("rc,cd,rd->r", error, rest, error)
    np.testing.assert_allclose(mine, exact, rtol=0.02)


def test_every_level_gains():
    """Levels with a correction gain much. The others do not lose, as those no longer bend their codes."""
    w, moments = weights(64, 128), products(inputs(4096, 128))
    plain = errors(w, quantize(w, second_moments=moments, row_scales=ROW_SCALES), (), moments)
    v = basis(moments)
    rungs = quantize(w, second_moments=moments, row_scales=ROW_SCALES, directions=v)
    mine = errors(w, rungs, RANKS, moments)
    assert (mine[:3] < 0.8 * plain[:3]).all()
    assert (mine[3:] < 1.02 * plain[3:]).all()


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_shorter_ladder_has_the_same_codes_and_corrections(is_shared):
    w, moments = weights(33, 70), products(inputs(512, 70))
    v = basis(moments, is_shared=is_shared)
    whole = quantize(w, second_moments=moments, row_scales=ROW_SCALES, directions=v)
    for n in (1, 2, 4):
        rungs = quantize(
            w, DEFAULT_LADDER[:n], second_moments=moments, row_scales=ROW_SCALES, directions=v
        )
        assert [r.tobytes() for r in rungs] == [r.tobytes() for r in whole[:n]]


def test_directions_without_products_are_refused():
    w, moments = weights(16, 64), products(inputs(512, 64))
    v = basis(moments)
    with pytest.raises(ValueError, match="expected second moments .cols, cols. with them"):
        quantize(w, second_moments=np.diagonal(moments).copy(), directions=v)


def test_inputs_that_were_all_zeros_and_rows_of_zeros_are_coded():
    w = weights(20, 70)
    w[3] = 0
    for moments in (np.zeros((70, 70), np.float32), products(inputs(512, 70))):
        rungs = quantize(
            w, second_moments=moments, row_scales=ROW_SCALES, directions=basis(moments)
        )
        for level in (1, 3, 5):
            coded = decoded(w, rungs, RANKS, level)
            assert np.abs(coded - w).max() < 2 * np.abs(w).max()
            assert not coded[3].any()


def test_a_rung_of_another_rank_has_the_best_factor_of_its_own():
    """Levels with 16, 8 and no directions are each near least squares in the metric of the products."""
    w, moments = weights(32, 96), products(inputs(2048, 96))
    ranks = (16, 8, 0, 0, 0)
    rungs = quantize(
        w, second_moments=moments, row_scales=ROW_SCALES, directions=basis(moments, ranks)
    )
    v = basis(moments, ranks).basis.astype(float)
    root = np.linalg.cholesky(moments.astype(float) + 1e-9 * np.eye(96))
    plain = list(rungs)
    plain[0] = rungs[0][: len(rungs[0]) - 16 * 128 - 64 - 2 * 128]
    plain[1] = rungs[1][: len(rungs[1]) - 64 - 2 * 64]
    for level, rank in ((1, 16), (2, 8)):
        left = w - decoded(w, plain, (), level)
        best = np.linalg.lstsq((v[:rank] @ root).T, (left @ root).T, rcond=None)[0].T
        mine = w - decoded(w, rungs, ranks, level)
        exact = left - best @ v[:rank]
        ratio = np.einsum("rc,cd,rd->", mine, moments, mine) / np.einsum(
            "rc,cd,rd->", exact, moments, exact
        )
        assert 1 - 1e-6 < ratio < 1.1, level  # what four bits of A lose

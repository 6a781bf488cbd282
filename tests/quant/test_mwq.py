"""MWQ, the second scheme: kernels, quantiser and files agree with slow, obvious versions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import reference
import reference_mwq
from decoded import Decoded
from edited import edit, setter
from engines import with_slots
from reference_nested import quantize_rows
from tiny import tiny_checkpoint

import edgemoe
from edgemoe import _core
from edgemoe.cli import main as edgemoe_cli
from edgemoe.convert.convert import convert
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.file.verify import verify
from edgemoe.file.writer import Writer
from edgemoe.quant import SCHEMES
from edgemoe.quant.mwq import LADDERS, fit, is_ladder, quantize, rung_bytes
from edgemoe.store import expert_bytes

IDS = list(range(1, 60))


def weights(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_t(5, (rows, cols)) * rng.uniform(0.01, 2, (rows, 1))).astype(np.float32)


def products(cols, seed=1):
    """Returns mean products of correlated inputs, in which some columns are much larger than others."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((cols, cols)) * np.exp(rng.normal(0, 1, cols))
    x = rng.standard_normal((2 * cols, cols)) @ mixing
    return (x.T @ x / len(x)).astype(np.float32)


def held(rungs, ladder, level, rows, cols):
    widths = [ladder[0], *[1] * (level - 1)]
    return _core.Nested.from_rungs(rungs[:level], rows, cols, widths, "mwq")


def decoded(matrix):
    out = np.empty((matrix.rows, matrix.cols), np.float32)
    matrix.decode_rows(np.arange(matrix.rows, dtype=np.int32), out)
    return out


def products_of(matrix, x):
    """Returns the products of all rows of x [T, cols] at once, and of each row alone."""
    ws = _core.Workspace(2, len(x), matrix.cols, 64, 1, 16)
    out = np.empty((len(x), matrix.rows), np.float32)
    alone = np.empty_like(out)
    _core.linear(ws, x, [matrix], [out])
    for t in range(len(x)):
        _core.linear(ws, x[t : t + 1], [matrix], [alone[t : t + 1]])
    return out, alone


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(16, 64), (5, 7), (33, 130), (20, 320)])
def test_kernels_agree_with_numpy_and_with_each_other(isas, ladder, rows, cols):
    w, x = weights(rows, cols), weights(66, cols, seed=1)
    rungs = quantize(w, ladder, second_moments=products(cols))
    assert [len(r) for r in rungs] == rung_bytes(rows, cols, ladder)
    for level in range(1, len(ladder) + 1):
        matrix = held(rungs, ladder, level, rows, cols)
        assert matrix.bits == ladder[level - 1]
        widths = [ladder[0], *[1] * (level - 1)]
        true = reference_mwq.decode_rungs(rungs[:level], widths, rows, cols)
        expected = quantize_rows(x) @ true.T
        results = []
        for isa in isas:
            _core.use_isa(isa)
            out, alone = products_of(matrix, x)
            assert np.array_equal(out, alone)  # a row's bits do not depend on its batch
            results.append((decoded(matrix), out))
        np.testing.assert_allclose(results[0][0], true, rtol=0, atol=1e-6 * np.abs(true).max())
        np.testing.assert_allclose(
            results[0][1], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
        )
        for others in results[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_values_that_are_not_finite_are_seen(isas):
    matrix = held(quantize(weights(16, 128)), (2, 3, 4), 3, 16, 128)
    x = weights(3, 128, seed=2)
    x[0, 70], x[1, 3] = np.nan, np.inf
    for isa in isas:
        _core.use_isa(isa)
        for out in products_of(matrix, x):
            assert np.isnan(out[:2]).all()
            assert np.isfinite(out[2]).all()


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_a_prefix_is_a_model(ladder):
    w = weights(24, 200)
    rungs, m = quantize(w, ladder), fit(w, ladder)
    errors = []
    for level in range(1, len(ladder) + 1):
        part = decoded(held(rungs, ladder, level, 24, 200))
        np.testing.assert_allclose(part, m.decode(level), rtol=0, atol=1e-6 * np.abs(w).max())
        errors.append(np.square(part - w).sum())
        shorter = quantize(w, ladder[:level])
        assert all(np.array_equal(a, b) for a, b in zip(shorter, rungs, strict=False))
    assert all(b < 0.4 * a for a, b in pairwise(errors))


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("compensated", [-1, 0, None])
@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_codes_are_those_of_the_slow_algorithm(ladder, compensated, calibrated):
    w = weights(4, 300)
    moments = products(300) if calibrated else None
    m = fit(w, ladder, moments, compensated=compensated)
    slow = reference_mwq.levels(w, ladder, moments, compensated)
    fast = np.stack([m.decode(n + 1) for n in range(len(ladder))])
    step = np.abs(slow[0] - w).mean()
    # Where float32 decides a tie otherwise, later codes change a little.
    assert (np.abs(fast - slow) < 1e-3 * step).mean() > (0.9 if calibrated else 0.999)
    seen = np.eye(300) if moments is None else moments
    errors = [np.einsum("lrc,cd,lrd->l", e, seen, e) for e in (fast - w, slow - w)]
    np.testing.assert_allclose(errors[0], errors[1], rtol=0.03)


def test_a_planes_scale_is_the_mean_of_what_is_left():
    w = weights(8, 100)
    m = fit(w, (2, 3, 4))
    rest = w - m.decode(1)
    np.testing.assert_allclose(m.scales[1][:, 0], np.abs(rest).mean(1), rtol=1e-3)
    assert np.array_equal(m.codes[1], rest >= 0)


def test_calibration_gains_where_its_error_is_made_up_for():
    w, moments = weights(64, 384), products(384)

    def errors(m):
        return np.array(
            [
                np.einsum("rc,cd,rd->", e, moments, e)
                for e in (m.decode(n + 1) - w for n in range(3))
            ]
        )

    plain = errors(fit(w, (2, 3, 4)))
    squares = errors(fit(w, (2, 3, 4), np.diagonal(moments).copy()))
    published = errors(fit(w, (2, 3, 4), moments))
    full = errors(fit(w, (2, 3, 4), moments, compensated=-1))
    base = errors(fit(w, (2, 3, 4), moments, compensated=0))
    assert (squares < plain).all()
    assert (full < squares).all()
    assert full[2] < 0.7 * squares[2]
    assert base[0] < full[0]
    assert full[2] < base[2]
    np.testing.assert_allclose(base[0], published[0], rtol=1e-6)  # the base comes first in both
    assert full[2] < published[2]
    assert published[0] < squares[0]


@pytest.mark.parametrize("value", [0.0, 3.25, -1e-4, 1e4])
def test_constant_groups_are_kept(value):
    w = np.full((3, 70), value, np.float32)
    for moments in (None, products(70)):
        out = fit(w, (2, 3, 4), moments).decode(3)
        np.testing.assert_allclose(out, w, rtol=1e-3, atol=1e-7)


def test_an_input_that_calibration_never_saw_still_counts():
    w = weights(8, 64)
    spread = np.diag(np.r_[np.ones(32), np.zeros(32)]).astype(np.float32)
    for moments in (np.zeros(64, np.float32), spread):
        out = fit(w, (5, 6, 7, 8), moments).decode(4)
        assert np.abs(out - w).max() < 0.3 * np.abs(w).max()


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (np.ones(63, np.float32), r"expected \[64\] or \[64, 64\], got \[63\]"),
        (np.full(64, np.nan, np.float32), "finite"),
        (np.full(64, -1, np.float32), "not negative"),
        (1 - np.eye(64, dtype=np.float32) * 0.5, "products of inputs"),
    ],
)
def test_wrong_moments_are_refused(moments, message):
    with pytest.raises(ValueError, match=message):
        quantize(weights(4, 64), second_moments=moments)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_weights_that_no_scale_can_hold_are_refused(bad):
    w = weights(4, 64)
    w[2, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(w)


def test_ladders_are_those_of_the_paper():
    assert all(map(is_ladder, [(2, 3), (2, 3, 4), (5, 6, 7, 8)]))
    assert not any(map(is_ladder, [(2, 4), (3, 4), (2, 3, 4, 5)]))
    assert SCHEMES["mwq"].ladder(None) == (2, 3, 4)
    assert SCHEMES["mwq"].ladder(3) == (2, 3)
    assert SCHEMES["mwq"].ladder(6) == (5, 6)
    with pytest.raises(ValueError, match="base of 2 or 5 bits"):
        _core.Nested.from_rungs([np.zeros(64 + 384, np.uint8)], 16, 64, [3], "mwq")
    with pytest.raises(ValueError, match="scheme: expected nested, mwq, mxfp4 or nvfp4, got other"):
        _core.Nested.from_rungs([np.zeros(64 + 384, np.uint8)], 16, 64, [3], "other")


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module", params=[4, 8], ids=["version 1", "version 2"])
def path(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("mwq") / "x.moe"
    convert(tiny_checkpoint(width=40), out, bits=request.param, scheme=SCHEMES["mwq"])
    return out


@pytest.fixture(scope="module")
def files(path):
    return open_moe(path), Decoded(path)


def test_a_file_holds_what_was_quantised(files):
    moe, read = files
    assert moe.scheme.name == "mwq"
    assert moe.ladder == tuple((b, b, b) for b in moe.dense_ladder)
    assert verify(moe) == []
    source = tiny_checkpoint(width=40).tensor("model.layers.1.mlp.experts.3.down_proj.weight")
    np.testing.assert_allclose(
        read.expert(1, 3)[2],
        fit(source, moe.dense_ladder).decode(len(moe.dense_ladder)),
        rtol=0, atol=1e-6 * np.abs(source).max(),
    )  # fmt: skip


def test_the_engine_computes_with_the_decoded_weights(path, files):
    _, read = files
    expected, _ = reference.logits(read.config, read.tensors, read.expert, IDS)
    with edgemoe.load(path) as engine:
        got = engine.logits(IDS)
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    assert np.median((got * expected).sum(1) / norms) > 0.9998


def test_logits_do_not_depend_on_the_budget(path, files, monkeypatch):
    moe, _ = files
    for bits in moe.dense_ladder:
        with edgemoe.load(path, bits=bits) as engine:
            everything = engine.logits(IDS)
        slots = 3 * expert_bytes(moe, moe.level(bits))
        with monkeypatch.context() as patched:
            with_slots(patched, slots, 16)
            with edgemoe.load(path, bits=bits) as engine:
                assert np.array_equal(engine.logits(IDS), everything)
                assert engine.model.store.stats["evictions"] > 0
                assert engine.model.store.stats["peak_bytes"] <= slots


def test_an_upgrade_reads_the_rungs_that_are_missing(path, files):
    moe, read = files
    with edgemoe.load(path) as engine:
        cache = engine.model.store.cache
        low = cache.decode(3, 1)
        before = cache.stats["bytes_read"]
        high = cache.decode(3, len(moe.ladder))
        assert cache.stats["bytes_read"] - before < expert_bytes(moe, len(moe.ladder))
    for a, b, true in zip(low, high, read.expert(0, 3), strict=True):
        np.testing.assert_allclose(b, true, rtol=0, atol=1e-6 * np.abs(true).max())
        assert np.abs(a - true).mean() > 2 * np.abs(b - true).mean()


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("scheme", "other", "scheme 'other' is not known"),
        ("scheme", ["mwq"], "is not known"),
        ("scheme", "nested", "groups of 128; expected 16"),
        ("group", 64, "groups of 64; expected 128"),
        ("ladder", [[2, 2, 2], [4, 4, 4]], "is not one of scheme mwq"),
        ("dense_ladder", [3, 4], "is not one of scheme mwq"),
        ("dense_ladder", [2], "has rungs"),
    ],
)
def test_a_wrong_index_is_refused(path, tmp_path, key, value, match):
    out = edit(path.read_bytes(), setter(key, value))
    (tmp_path / "x.moe").write_bytes(out)
    with pytest.raises(FormatError, match=match) as error:
        open_moe(tmp_path / "x.moe")
    assert "\n" not in str(error.value)


def test_the_writer_names_a_weight_that_no_scale_can_hold(tmp_path, files):
    scheme = SCHEMES["mwq"]
    with (
        Writer(
            tmp_path / "x.moe", files[0].config, scheme=scheme, sections={}, source={}
        ) as writer,
        pytest.raises(FormatError, match="embed: quantize: a weight is not finite"),
    ):
        writer.add("embed", np.full((264, 96), np.nan, np.float32))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--scheme", "other"), "--scheme: expected one of nested, mwq, mxfp4, nvfp4, got other"),
        (("--scheme", "mwq", "--bits", "9"), "--bits: expected one of 2, 3, 4, 5, 6, 7, 8, got 9"),
        (("--bits", "5"), "--bits: expected one of 2, 3, 4, 6, 8, got 5"),
        (("--scheme", "mwq", "--favour", "3"), "--favour: not for the scheme mwq"),
    ],
)
def test_convert_refuses_in_one_line(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert edgemoe_cli.main(["convert", "absent", "x.moe", *argv]) == 2
    output = capsys.readouterr()
    assert output.err == f"edgemoe convert: {message}\n"


def test_inspect_names_the_scheme(path, capsys):
    assert edgemoe_cli.main(["inspect", str(path), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "D2MoE's MWQ" in out
    assert "for each 128 columns of a row" in out

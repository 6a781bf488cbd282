"""The quantiser agrees with a slow, obvious search, and gains from calibration."""

from __future__ import annotations

import numpy as np
import pytest
from decoded import Decoded
from reference_nested import decode, decode_rungs, unpack
from tiny import tiny_checkpoint

from edgemoe import _core
from edgemoe.convert.convert import convert
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.quant import (
    LEVEL_WEIGHTS,
    ROUNDING_WEIGHTS,
    ROW_SCALES,
    SCHEMES,
    Calibration,
    plane_widths,
    quantize,
    write_calibration,
)
from edgemoe.quant.lowrank import Directions, directions

LADDER = (2, 3, 4, 6, 8)
WIDTHS = plane_widths(LADDER)
LEVELS = [(bits, float(ROUNDING_WEIGHTS[bits - 1])) for bits in LADDER]


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_matrix_without_weights_is_refused_by_every_scheme(scheme, shape):
    w = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"expected (a matrix of weights|1 to \d+), got"):
        scheme.quantize(w, scheme.ladders[0], second_moments=None, threads=1)


def weights(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    columns = np.exp(rng.normal(0, 0.4, cols))
    return (rng.standard_t(5, (rows, cols)) * columns * 0.02).astype(np.float32)


def inputs(tokens, cols, seed=1):
    """Returns correlated inputs, in which some columns are much larger than others."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((cols, cols)) * np.exp(rng.normal(0, 1, cols))
    return (rng.standard_normal((tokens, cols)) * 0.3) @ mixing.astype(np.float32)


def level_errors(w, rungs, moments):
    """Returns tr(E M E^T) at each level, for the error E."""
    errors = []
    for n in range(1, len(LADDER) + 1):
        e = decode_rungs(rungs[:n], WIDTHS[:n], *w.shape) - w
        errors.append(np.einsum("rc,cd,rd->", e, moments, e))
    return np.array(errors)


def exact_weights(rows, cols):
    """Returns weights that are the same on every machine, to the last bit."""
    x = (np.arange(rows * cols, dtype=np.uint32) * np.uint32(2654435761)) >> np.uint32(8)
    u = x.astype(np.float32) / np.float32(2**24) - np.float32(0.5)
    return (u * np.abs(u)).reshape(rows, cols)


def decaying(cols):
    """Returns products of inputs that are exact: 2^-d for columns that are d apart."""
    return np.exp2(-np.abs(np.subtract.outer(np.arange(cols), np.arange(cols)))).astype(np.float32)


def objective(w, codes, steps, middles, importance):
    """Returns the squared error of each weight, summed over levels with their weights."""
    return importance * sum(
        weight * np.square(decode(codes >> (8 - bits), steps, middles, bits) - w)
        for bits, weight in LEVELS
    )


@pytest.mark.parametrize("thorough", [False, True])
def test_codes_are_the_best_of_all_256(thorough):
    w = weights(16, 96)
    codes, steps, middles = unpack(quantize(w, thorough=thorough), WIDTHS, *w.shape)
    chosen = objective(w, codes, steps, middles, 1)
    every = np.min(
        [objective(w, np.full_like(codes, c), steps, middles, 1) for c in range(256)], axis=0
    )
    np.testing.assert_allclose(chosen, every, rtol=1e-3, atol=1e-3 * every.mean())


@pytest.mark.parametrize("thorough", [False, True])
def test_scales_and_middles_are_near_the_best_of_all_256(thorough):
    w = weights(4, 64)
    importance = np.linspace(0.5, 2, 64)
    rungs = quantize(w, second_moments=importance.astype(np.float32), thorough=thorough)
    codes, steps, middles = unpack(rungs, WIDTHS, 4, 64)
    # The step of each row's code at relative scale 1.
    units = rungs[0][:8].view(np.float16).astype(np.float64)[:, None] / 4096
    groups = lambda x: x.reshape(4, 4, 16).sum(-1)  # noqa: E731
    chosen = groups(objective(w, codes, steps, middles, importance))
    best = np.full((4, 4), np.inf)
    for low in range(16):
        for high in range(16):
            s = np.repeat(units * (4 + low % 4) * 2.0 ** (low // 4), 4, axis=1)
            m = np.full((4, 4), 12.0 * (high - 8) - 128)
            u = w / np.repeat(s, 16, axis=1) - np.repeat(m, 16, axis=1)
            q = np.clip(np.floor(u), 0, 255).astype(np.uint8)
            best = np.minimum(best, groups(objective(w, q, s, m, importance)))
    assert (chosen <= best * 1.001).mean() > 0.9
    assert (chosen <= best * 1.2).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "2d06a158 82185244 e220fea8 861831f9 e2184654"),
        ({"ladder": (2, 3, 4)}, "2d06a158 82185244 e220fea8"),
        (
            {"second_moments": np.linspace(0.5, 2, 200).astype(np.float32), "favour": 2},
            "ae4f572f 2a23c9c3 56a8d3eb 13b630e5 7ab9a714",
        ),
    ],
    ids=["plain", "short", "favoured"],
)
def test_the_full_search_makes_the_bytes_that_it_always_made(options, expected):
    rungs = quantize(exact_weights(40, 200), thorough=True, **options)
    assert " ".join(f"{_core.crc32c(rung):08x}" for rung in rungs) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"thorough": True}, "9d16ae93 8216e503 5428edd9 12c33aee 03437d47"),
        (
            {
                "second_moments": np.exp2(np.arange(200) % 16 - 8).astype(np.float32),
                "favour": 1,
                "thorough": True,
            },
            "9cd4d275 553fb255 867fab85 778f548c 7ec0769a",
        ),
        (
            {"second_moments": decaying(200), "favour": 1, "row_scales": ROW_SCALES},
            "38e90a37 f60c0072 cbe93d3e 1a7aab05 80fa51c3",
        ),
    ],
    ids=["plain", "favoured", "moments"],
)
def test_weights_far_from_zero_get_the_bytes_that_they_always_got(options, expected):
    """No middle reaches them, so only the last few are worth trying."""
    rungs = quantize(exact_weights(40, 200) + np.float32(0.5), **options)
    assert " ".join(f"{_core.crc32c(rung):08x}" for rung in rungs) == expected


@pytest.mark.parametrize(
    ("corrected", "expected"),
    [
        (0, "6f93489a ba3f6a62 32e5bde8 6f6f8733 96cab629"),
        (0b111, "0f5e4e00 8994feec 890b4a5a a8ba381b d0545b66"),
    ],
)
def test_the_descent_makes_the_bytes_that_it_always_made(corrected, expected):
    moments = decaying(200)
    rest = np.where(np.eye(200) > 0, moments, -moments / 4) if corrected else None
    rungs = _core.quantize(
        exact_weights(40, 200), WIDTHS, ROW_SCALES, LEVEL_WEIGHTS, np.ones(200, np.float32),
        moments, 3, False, 2, rest, corrected,
    )  # fmt: skip
    assert " ".join(f"{_core.crc32c(rung):08x}" for rung in rungs) == expected


@pytest.mark.parametrize("shape", [(64, 256), (32, 512), (40, 200)], ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_quick_search_loses_little_at_any_level(shape, calibrated):
    w, squares = weights(*shape), np.linspace(0.2, 1.8, shape[1]).astype(np.float32)
    moments, importance = (squares, squares) if calibrated else (None, 1)

    def errors(rungs):
        decoded = [decode_rungs(rungs[:n], WIDTHS[:n], *shape) for n in range(1, len(LADDER) + 1)]
        return np.array([(importance * np.square(d - w)).sum() for d in decoded])

    quick, full = (errors(quantize(w, second_moments=moments, thorough=t)) for t in (False, True))
    assert (quick < 1.03 * full).all()
    weight = ROUNDING_WEIGHTS[np.array(LADDER) - 1]
    assert quick @ weight < 1.012 * (full @ weight)


@pytest.mark.parametrize("thorough", [False, True])
def test_padding_is_zero(thorough):
    w = weights(17, 70)
    codes, _, _ = unpack(quantize(w, thorough=thorough), WIDTHS, 32, 128)
    assert not codes[:, 70:].any()


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 65503.0])
def test_rows_of_any_size_and_of_nothing_are_met(scale, thorough):
    w = np.linspace(-1, 1, 16 * 48, dtype=np.float32).reshape(16, 48) * np.float32(scale)
    w[3] = 0
    w[5, 16:] = 0
    w[7] = np.float32(scale)
    decoded = decode_rungs(quantize(w, thorough=thorough), WIDTHS, *w.shape)
    assert (decoded[3] == 0).all()
    # Scales in float16 have steps of 2^-24 near zero.
    np.testing.assert_allclose(decoded, w, rtol=0, atol=scale / 64 + 2**-23)


@pytest.mark.parametrize("shape", [(64, 128), (40, 200)], ids=str)
def test_calibration_gains_at_every_level(shape):
    w = weights(*shape)
    x = inputs(4096, shape[1])
    moments = (x.T @ x / len(x)).astype(np.float32)
    weight = LEVEL_WEIGHTS[np.array(LADDER) - 1]
    plain = level_errors(w, quantize(w), moments)
    squares = level_errors(w, quantize(w, second_moments=np.diagonal(moments).copy()), moments)
    full = level_errors(w, quantize(w, second_moments=moments), moments)
    assert (full < plain).all()
    assert full @ weight < 0.9 * plain @ weight
    assert squares @ weight < plain @ weight
    assert (np.diff(full) < 0).all()


def test_refining_is_coordinate_descent():
    """Every code is the best of 256, given all others: a fixed point of the slow, obvious version."""
    w = weights(16, 48)
    x = inputs(512, 48)
    moments = (x.T @ x / len(x)).astype(np.float32)
    moments /= np.diagonal(moments).mean()
    squares = np.diagonal(moments).copy()
    rungs = _core.quantize(w, WIDTHS, [1], ROUNDING_WEIGHTS, squares, moments, 100, False, 1)
    codes, steps, middles = unpack(rungs, WIDTHS, *w.shape)

    def total(codes):
        out = 0.0
        for bits, weight in LEVELS:
            e = decode(codes >> (8 - bits), steps, middles, bits) - w
            out = out + weight * np.einsum("rc,cd,rd->r", e, moments.astype(np.float64), e)
        return out

    here = total(codes)
    for column in range(0, 48, 5):
        for code in range(0, 256, 3):
            moved = codes.copy()
            moved[:, column] = code
            assert (total(moved) >= here * (1 - 1e-5)).all()


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("row_scales", [(1,), ROW_SCALES], ids=str)
def test_a_shorter_ladder_stores_a_prefix_of_the_same_code(calibrated, row_scales):
    """So levels that a file leaves out still count in the choice of codes."""
    w = weights(48, 128)
    x = inputs(512, 128)
    moments = (x.T @ x / len(x)).astype(np.float32) if calibrated else None
    whole = quantize(w, second_moments=moments, row_scales=row_scales)
    for n in (1, 2, 3, 4):
        rungs = quantize(w, LADDER[:n], second_moments=moments, row_scales=row_scales)
        assert [r.tobytes() for r in rungs] == [r.tobytes() for r in whole[:n]]
    # Codes made for level 3 alone are different, as higher levels do not count.
    alone = quantize(w, LADDER[:3], second_moments=moments, favour=3)
    assert alone[0].tobytes() != whole[0].tobytes()


def test_row_scales_of_their_own_are_the_best_of_all():
    """At 2 bits: the row's error is least at its own scale, and less than with one scale for all levels."""
    w, x = weights(32, 128), inputs(2048, 128)
    moments = (x.T @ x / len(x)).astype(np.float32)
    rungs = quantize(w, second_moments=moments, row_scales=ROW_SCALES)
    low = decode_rungs(rungs[:1], WIDTHS[:1], *w.shape, ROW_SCALES)

    def errors(decoded):
        return np.einsum("rc,cd,rd->r", decoded - w, moments, decoded - w)

    here = errors(low)
    for gain in (0.98, 1.02):
        assert (errors(gain * low) > here).mean() > 0.9  # codes were refined once more after it
        assert errors(gain * low).sum() > here.sum()
    one = decode_rungs(quantize(w, LADDER[:1], second_moments=moments), WIDTHS[:1], *w.shape)
    assert here.sum() < errors(one).sum()
    fine = decode_rungs(rungs, WIDTHS, *w.shape, ROW_SCALES)
    assert np.square(fine - w).sum() < 1e-3 * np.square(w).sum()


@pytest.mark.parametrize("squares", [None, np.linspace(0.5, 2, 128, dtype=np.float32)])
def test_without_products_row_scales_are_alike(squares):
    """Codes are then those of a single scale. Scales fitted to weights alone shorten rows, and models get worse."""
    w = weights(40, 128)
    one = quantize(w, second_moments=squares)
    two = quantize(w, second_moments=squares, row_scales=ROW_SCALES)
    header = 2 * 64
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(two[1][:header], one[0][:header])
    assert np.array_equal(two[1][header:], one[1])
    assert all(np.array_equal(a, b) for a, b in zip(one[2:], two[2:], strict=True))


@pytest.mark.parametrize("calibrated", [False, True])
def test_fitted_scales_stay_within_float16(calibrated):
    """Also for a row of zeros, of one value, or with values nearly too large for its scale."""
    w = np.stack([np.zeros(64), np.full(64, 3.0), np.full(64, 6.5e4), np.eye(64)[3] * 6.5e4])
    w, x = w.astype(np.float32), inputs(256, 64)
    rungs = quantize(w, second_moments=x.T @ x if calibrated else None, row_scales=ROW_SCALES)
    for level in range(1, 6):
        out = decode_rungs(rungs[:level], WIDTHS[:level], *w.shape, ROW_SCALES)
        assert np.isfinite(out).all()
        assert not out[0].any()
    assert np.abs(out - w).max() < 0.01 * 6.5e4


def searches(rows, cols):
    """Yields options of `quantize` for every way to find the codes of a matrix."""
    x = inputs(300, cols)
    moments = x.T @ x
    yield {}
    yield {"second_moments": np.diagonal(moments).copy()}
    yield {"thorough": True}
    yield {"second_moments": moments, "row_scales": ROW_SCALES}
    corrections = Directions(directions(moments, 8), (8, 8, 8, 0, 0), stored=8)
    yield {"second_moments": moments, "row_scales": ROW_SCALES, "directions": corrections}


def test_threads_do_not_change_the_codes():
    w = weights(150, 130)
    for options in searches(*w.shape):
        one = quantize(w, threads=1, **options)
        for a, b in zip(one, quantize(w, threads=3, **options), strict=True):
            assert np.array_equal(a, b)


def test_instruction_sets_choose_the_same_codes():
    w = weights(33, 70)
    w[1] = 0
    w[2] *= 1e-6
    before = _core.isa()
    for options in searches(*w.shape):
        first = None
        for isa in _core.usable_isas().split():
            _core.use_isa(isa)
            rungs = quantize(w, **options)
            first = first or rungs
            assert all(np.array_equal(a, b) for a, b in zip(first, rungs, strict=True))
    _core.use_isa(before)


def test_an_input_that_calibration_never_saw_still_counts():
    w = weights(32, 64)
    for moments in (
        np.zeros(64, np.float32),
        np.diag(np.r_[np.ones(32), np.zeros(32)]).astype(np.float32),
    ):
        out = decode_rungs(quantize(w, second_moments=moments), WIDTHS, 32, 64)
        assert np.abs(out - w).max() < 0.02 * np.abs(w).max()


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (np.ones(63, np.float32), r"expected \[64\] or \[64, 64\], got \[63\]"),
        (np.full(64, np.nan, np.float32), "finite"),
        (np.full(64, -1, np.float32), "not negative"),
        (np.r_[-1, np.ones(63)].astype(np.float32), "not negative"),
        (np.where(np.arange(64)[:, None] == np.arange(64) + 1, np.nan, np.eye(64)), "finite"),
    ],
)
def test_wrong_moments_are_refused(moments, message):
    with pytest.raises(ValueError, match=message):
        quantize(weights(4, 64), second_moments=moments)


def write_products(path, config, layers, seed=2):
    """Writes a calibration that has only the experts' inputs; returns it."""
    d, h, n = config.hidden_size, config.expert_hidden, config.num_experts
    tensors = {}
    for layer in layers:
        tensors[f"experts.{layer}.count"] = np.full(n, 1000)
        for port, cols in (("in", d), ("hidden", h)):
            x = np.stack([inputs(300, cols, seed + e) for e in range(n)])
            tensors[f"experts.{layer}.{port}.products"] = (x.transpose(0, 2, 1) @ x).astype(
                np.float32
            )
    meta = {"source": "test", "model": "tiny", "tokens": "1000", "window": "1", "bits": ""}
    write_calibration(path, tensors, meta)
    return Calibration(path)


def test_convert_uses_a_calibration(tmp_path):
    source = tiny_checkpoint()
    convert(source, tmp_path / "plain.moe")
    config = open_moe(tmp_path / "plain.moe").config
    calibration = write_products(tmp_path / "x.calib", config, config.moe_layers)
    convert(source, tmp_path / "calibrated.moe", calibration=calibration, scale_columns=False)
    plain, calibrated = (Decoded(tmp_path / f"{name}.moe") for name in ("plain", "calibrated"))
    assert open_moe(tmp_path / "calibrated.moe").source["calibration"]["tokens"] == "1000"
    weights = SourceModel(source)
    layer = config.moe_layers[-1]
    for part, name in enumerate(("gate", "up", "down")):
        moments = calibration.matrix(f"experts.{layer}.3.{name}")
        errors = [
            np.einsum("rc,cd,rd->", e, moments, e)
            for e in (
                file.expert(layer, 3)[part] - weights.expert(layer, 3)[part]
                for file in (plain, calibrated)
            )
        ]
        assert errors[1] < 0.9 * errors[0]
    for name in plain.tensors:  # none of which are in this calibration
        assert np.array_equal(plain.tensors[name], calibrated.tensors[name])
    assert open_moe(tmp_path / "plain.moe").scheme.row_scales == (1,)
    assert open_moe(tmp_path / "calibrated.moe").scheme.row_scales == ROW_SCALES
    wrong = write_products(tmp_path / "y.calib", config, [*config.moe_layers, 7])
    with pytest.raises(FormatError, match="the model has"):
        convert(source, tmp_path / "wrong.moe", calibration=wrong)

"""4-bit floats, stored as released: kernels, encoder and files agree with slow, obvious versions and transformers."""

from __future__ import annotations

import families
import numpy as np
import pytest
import reference
import reference_float4
from decoded import Decoded
from edited import edit, setter
from engines import with_slots
from gpt_oss import release
from reference_float4 import HALVES, e4m3
from reference_nested import quantize_rows

import edgemoe
from edgemoe import _core
from edgemoe.cli import main as edgemoe_cli
from edgemoe.convert.convert import convert
from edgemoe.convert.open import open_checkpoint
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.file.verify import verify
from edgemoe.ops.cuda.placement import unsupported
from edgemoe.quant import SCHEMES
from edgemoe.quant.float4 import mxfp4, nvfp4, rung_bytes
from edgemoe.store import expert_bytes
from edgemoe.store.floats import expert_floats

IDS = list(range(1, 60))
FORMS = {
    "mxfp4": (mxfp4, reference_float4.MXFP4),
    "nvfp4": (nvfp4, reference_float4.NVFP4),
}
SHAPES = [(16, 64), (5, 7), (33, 130), (20, 320)]


def released(scheme, rows, cols, seed=0):
    """Returns weights that the scheme can represent, as in a model released in it, decoded to float32."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (rows, cols))
    group = FORMS[scheme][1].group
    shape = rows, -(-cols // group)
    if scheme == "mxfp4":
        scales = np.ldexp(np.float32(1), rng.integers(-20, 3, shape))
    else:
        table = np.array([e4m3(b) for b in range(127)], np.float32)
        scales = table[rng.integers(1, 127, shape)] * np.float32(rng.uniform(1e-5, 1e-3))
    values = np.array(HALVES, np.float32)[codes] / 2
    return values * np.repeat(scales, group, axis=1)[:, :cols]


def held(scheme, w):
    return _core.Nested.from_rungs([FORMS[scheme][0](w)], *w.shape, [4], scheme)


def decoded(matrix):
    out = np.empty((matrix.rows, matrix.cols), np.float32)
    matrix.decode_rows(np.arange(matrix.rows, dtype=np.int32), out)
    return out


@pytest.fixture
def isas():
    before = _core.isa()
    yield _core.usable_isas().split()
    _core.use_isa(before)


@pytest.mark.parametrize("scheme", FORMS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_kernels_agree_with_numpy_and_with_each_other(isas, scheme, rows, cols):
    w = released(scheme, rows, cols)
    x = np.random.default_rng(1).standard_t(5, (66, cols)).astype(np.float32)
    encode, slow = FORMS[scheme]
    rung = encode(w)
    assert len(rung) == slow.rung_bytes(rows, cols) == rung_bytes(rows, cols, slow.group)
    true = slow.decode_rungs([rung], [4], rows, cols)
    matrix, results = held(scheme, w), []
    assert matrix.bits == 4
    ws = _core.Workspace(2, len(x), cols, 64, 1, 16)
    for isa in isas:
        _core.use_isa(isa)
        out = np.empty((len(x), rows), np.float32)
        alone = np.empty_like(out)
        _core.linear(ws, x, [matrix], [out])
        for t in range(len(x)):
            _core.linear(ws, x[t : t + 1], [matrix], [alone[t : t + 1]])
        assert np.array_equal(out, alone)  # a row's bits do not depend on its batch
        results.append((decoded(matrix), out))
    np.testing.assert_array_equal(results[0][0], true.astype(np.float32))
    expected = quantize_rows(x) @ true.T
    np.testing.assert_allclose(
        results[0][1], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )
    for others in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("scheme", FORMS)
def test_values_that_are_not_finite_are_seen(isa, scheme):
    matrix = held(scheme, released(scheme, 16, 128))
    x = np.ones((3, 128), np.float32)
    x[0, 70], x[1, 3] = np.nan, np.inf
    out = np.empty((3, 16), np.float32)
    _core.linear(_core.Workspace(1, 3, 128, 64, 1, 16), x, [matrix], [out])
    assert np.isnan(out[:2]).all()
    assert np.isfinite(out[2]).all()


def test_mxfp4_is_exact_at_any_scale():
    for top in (-125, -30, 0, 100):
        w = np.ldexp(released("mxfp4", 16, 96, seed=top + 200), top // 2).astype(np.float32)
        np.testing.assert_array_equal(decoded(held("mxfp4", w)), w)
    # The smallest and the largest scale, groups of zeros, and groups that use half of their range.
    w = np.zeros((6, 64), np.float32)
    w[0, :3] = np.ldexp([0.5, 3, -6], -127)
    w[1, :3] = np.ldexp([0.5, 3, -6], 125)
    w[2, 33], w[3, 1], w[4, 2] = 0.5, -1.5, 3
    np.testing.assert_array_equal(decoded(held("mxfp4", w)), w)


@pytest.mark.parametrize("seed", range(8))
def test_nvfp4_is_met_whatever_the_matrix_scale(seed):
    """Codes and scales are the same. Weights are products of three factors, whose order decides the last bit."""
    w = released("nvfp4", 32, 200, seed)
    w[3] = 0
    np.testing.assert_allclose(decoded(held("nvfp4", w)), w, rtol=2**-22, atol=0)
    assert not np.any(decoded(held("nvfp4", 0 * w)))


@pytest.mark.parametrize("scheme", FORMS)
@pytest.mark.parametrize("bad", [0.7, np.nan, np.inf, 1e30])
def test_weights_of_another_kind_are_refused(scheme, bad):
    w = released(scheme, 16, 64)
    w[2, 5] = bad if bad != 0.7 else w[2].max() * 0.7
    with pytest.raises(ValueError, match=f"not numbers of {scheme.upper()}: 4-bit floats with a"):
        FORMS[scheme][0](w)


def test_other_ladders_are_refused():
    with pytest.raises(ValueError, match="a ladder of mxfp4 or nvfp4 has one rung of 4 bits"):
        _core.Nested.from_rungs([np.zeros(64 + 384, np.uint8)], 16, 64, [3], "mxfp4")
    with pytest.raises(ValueError, match="expected shape"):
        _core.Nested.from_rungs([np.zeros(64 + 512, np.uint8)], 16, 65, [4], "mxfp4")


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A gpt-oss checkpoint in its released form, and its experts as transformers decodes them."""
    folder = tmp_path_factory.mktemp("oss")
    path = folder / "oss"
    return path, release(path)


@pytest.fixture(scope="module")
def path(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("float4") / "x.moe"
    convert(open_checkpoint(checkpoint[0]), out, scheme=SCHEMES["mxfp4"])
    return out


def test_experts_are_what_transformers_decodes(checkpoint, path):
    moe = open_moe(path)
    assert verify(moe) == []
    assert moe.ladder == ((4, 4, 4),)
    assert moe.dense_ladder == (2, 3, 4, 6, 8)
    for layer in moe.config.moe_layers:
        both = checkpoint[1][f"model.layers.{layer}.mlp.experts.gate_up_proj"].float().numpy()
        down = checkpoint[1][f"model.layers.{layer}.mlp.experts.down_proj"].float().numpy()
        for i in range(moe.config.num_experts):
            expected = both[i, :, 0::2].T, both[i, :, 1::2].T, down[i].T
            row = moe.config.moe_layers.index(layer) * moe.config.num_experts + i
            for ours, theirs in zip(expert_floats(moe, row, 1), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_other_matrices_are_nested_as_ever(checkpoint, path, tmp_path):
    convert(open_checkpoint(checkpoint[0]), tmp_path / "n.moe")
    ours, nested = open_moe(path), open_moe(tmp_path / "n.moe")
    for name, tensor in nested.tensors.items():
        assert ours.tensors[name].crcs == tensor.crcs
    assert ours.experts.ends[-1] < 0.6 * nested.experts.ends[-1]


def test_the_engine_computes_with_the_decoded_weights(path):
    read = Decoded(path)
    expected, _ = reference.logits(read.config, read.tensors, read.expert, IDS)
    with edgemoe.load(path) as engine:
        got = engine.logits(IDS)
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    assert np.median((got * expected).sum(1) / norms) > 0.9998


def test_logits_do_not_depend_on_the_budget(path, monkeypatch):
    moe = open_moe(path)
    with edgemoe.load(path) as engine:
        everything = engine.logits(IDS)
    slots = 3 * expert_bytes(moe, 1)
    with_slots(monkeypatch, slots, 16)
    with edgemoe.load(path, dense_bits=8) as engine:
        assert np.array_equal(engine.logits(IDS), everything)
        assert engine.model.store.stats["evictions"] > 0


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("scheme", "nvfp4", "groups of 32; expected 16"),
        ("group", 16, "groups of 16; expected 32"),
        ("ladder", [[3, 3, 3]], "is not one of scheme mxfp4"),
        ("ladder", [[2, 2, 2], [4, 4, 4]], "is not one of scheme mxfp4"),
        ("row_scales", [1, 1], "for each rung of nested codes"),
    ],
)
def test_a_wrong_index_is_refused(path, tmp_path, key, value, match):
    out = edit(path.read_bytes(), setter(key, value))
    (tmp_path / "x.moe").write_bytes(out)
    with pytest.raises(FormatError, match=match) as error:
        open_moe(tmp_path / "x.moe")
    assert "\n" not in str(error.value)


def test_a_device_does_not_take_it(path):
    assert unsupported(open_moe(path)) is not None


def test_convert_takes_it_and_names_what_it_cannot(checkpoint, tmp_path, capsys):
    out = tmp_path / "x.moe"
    argv = ["convert", str(checkpoint[0]), str(out), "--scheme", "mxfp4"]
    assert edgemoe_cli.main([*argv, "--bits", "4", "--thorough"]) == 0
    assert open_moe(out).dense_ladder == (2, 3, 4)
    capsys.readouterr()
    assert edgemoe_cli.main(["inspect", str(out)]) == 0
    assert "experts as they were released, 4-bit floats" in capsys.readouterr().out
    assert edgemoe_cli.main([*argv, "--overwrite", "--favour", "4"]) == 2
    assert "--favour: not for the scheme mxfp4" in capsys.readouterr().err
    other = families.make("olmoe", tmp_path / "olmoe")
    argv[1:3] = [str(other), str(tmp_path / "y.moe")]
    assert edgemoe_cli.main(argv) == 1
    said = capsys.readouterr().err
    assert "experts.0.0.gate: not numbers of MXFP4: 4-bit floats with a power of two" in said
    assert not (tmp_path / "y.moe").exists()

"""Stand-ins: their fit agrees with plain algebra; their stored form, what the verb adds, and runs that use them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import families
import numpy as np
import pytest
from safetensors.numpy import save

import edgemoe
from edgemoe import _core
from edgemoe.cli.main import main
from edgemoe.errors import FormatError
from edgemoe.file.append import add_sections
from edgemoe.file.reader import open_moe
from edgemoe.lab.bits.calibrate import default_text, windows_of
from edgemoe.lab.bits.stand_ins import fit_stand_in
from edgemoe.ops import OpsShape
from edgemoe.ops.cpu import CpuOps
from edgemoe.plan import Routing
from edgemoe.quant import StandIns
from edgemoe.scheduler import SCHEDULERS, Setting
from edgemoe.scheduler.levers import without_misses
from edgemoe.scheduler.plans import plan_slots

L, E, K, D = 2, 8, 2, 96  # of the tiny model


def maps(*, shape=(L, E, 3, D), seed=0) -> StandIns:
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((2, *shape)).astype(np.float32)
    return StandIns(up=up, bias=rng.standard_normal(shape[:3]).astype(np.float32), down=down)


@pytest.fixture(scope="module")
def fitted(tiny_moe, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fitted") / "tiny.moe"
    path.write_bytes(tiny_moe.read_bytes())
    assert (
        main(["stand-ins", str(path), "--window", "64", "--chunks", "8", "--rank", "32", "-t", "1"])
        == 0
    )
    return path


# --- the fit


def moments(x, y):
    x = np.pad(x, ((0, 0), (0, 1)), constant_values=1)
    return x.T @ x, x.T @ y


def applied(x, found):
    up, bias, down = (a.astype(np.float64) for a in found)
    return (x @ up.T + bias) @ down


def test_a_map_of_low_rank_is_found():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 12))
    y = (x @ rng.standard_normal((12, 3)) + rng.standard_normal(3)) @ rng.standard_normal((3, 12))
    off = applied(x, fit_stand_in(*moments(x, y), 3)) - y
    assert np.square(off).mean() < 1e-3 * np.square(y).mean()  # the effect of the ridge


def test_of_all_maps_of_its_rank_it_is_the_nearest():
    """It agrees with the singular vectors of the whitened fit, and more ranks have less error."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((500, 10)) * np.linspace(0.2, 3, 10)
    y = np.tanh(x @ rng.standard_normal((10, 10))) + 0.3
    a, b = moments(x, y)
    a_ridge = a + 0.02 * np.trace(a) / len(a) * np.eye(len(a))
    chol = np.linalg.cholesky(a_ridge)
    full = np.linalg.solve(a_ridge, b)
    _, _, vt = np.linalg.svd(chol.T @ full)
    expected = np.pad(x, ((0, 0), (0, 1)), constant_values=1) @ full @ vt[:4].T @ vt[:4]
    np.testing.assert_allclose(applied(x, fit_stand_in(a, b, 4)), expected, atol=1e-4)
    loss = [np.square(applied(x, fit_stand_in(a, b, r)) - y).sum() for r in range(1, 11)]
    assert all(more < less for less, more in pairwise(loss))


def test_an_expert_without_tokens_is_nothing():
    for part in fit_stand_in(np.zeros((5, 5)), np.zeros((5, 4)), 2):
        assert not part.any()


# --- bytes


def test_bytes_are_read_again():
    one = maps()
    two = StandIns.from_bytes(one.to_bytes(), "x")
    for name in ("up", "bias", "down"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def _bad():
    good = maps(shape=(L, E, 2, D))
    parts = {"up": good.up, "bias": good.bias, "down": good.down}
    meta = {"edgemoe_stand_ins": "1", "settings": "{}"}
    yield "no safetensors", b"12345678", "not stand-ins"
    yield "version", save(parts, meta | {"edgemoe_stand_ins": "2"}), "version '2'"
    yield (
        "no number",
        save(parts | {"bias": np.full_like(good.bias, np.nan)}, meta),
        "not stand-ins",
    )
    yield "shapes", save(parts | {"down": good.down[:, :, :1].copy()}, meta), "not stand-ins"
    yield "experts", maps(shape=(L, E + 1, 2, D)).to_bytes(), "the model has 2 of 8"
    yield "width", maps(shape=(L, E, 2, D + 1)).to_bytes(), "the model has 96"


@pytest.mark.parametrize(
    ("content", "words"), [pytest.param(*row[1:], id=row[0]) for row in _bad()]
)
def test_a_bad_section_is_one_line(content, words, tiny_moe, tmp_path):
    path = tmp_path / "tiny.moe"
    path.write_bytes(tiny_moe.read_bytes())
    add_sections(path, {"stand-ins": content})
    with pytest.raises(FormatError, match=f"^section stand-ins: .*{words}") as error:
        edgemoe.load(path, options={"top_p": 0.5}, ram="1GiB")
    assert "\n" not in str(error.value)
    edgemoe.load(path, ram="1GiB").close()  # an exact run does not read it


def test_what_cannot_be_fitted_is_said(tiny_moe, capsys):
    before = tiny_moe.read_bytes()
    for rank in ("0", "97"):
        assert main(["stand-ins", str(tiny_moe), "--rank", rank, "--chunks", "1"]) == 2
        assert f"rank: expected 1 to 64, got {rank}" in capsys.readouterr().err
    assert tiny_moe.read_bytes() == before


# --- the verb


@pytest.mark.parametrize("isa", _core.usable_isas().split())
def test_stand_ins_are_added_token_by_token_in_the_same_bits(isa):
    rng = np.random.default_rng(0)
    T, cols = 19, 70
    found = maps(shape=(1, 6, 3, cols))
    layer = found.up[0], found.bias[0], found.down[0]
    experts = np.array([rng.permutation(6)[:3] for _ in range(T)], np.int32)
    gates = rng.random((T, 3)).astype(np.float32)
    bits = rng.choice([0, 8], (T, 3)).astype(np.int8)
    bits[:, 0] = 8
    x, start = rng.standard_normal((2, T, cols)).astype(np.float32)
    shape = OpsShape(
        threads=2, max_tokens=T, max_cols=cols, max_hidden=16, max_context=1, head_dim=2, num_heads=1
    )  # fmt: skip
    before = _core.isa()
    try:
        _core.use_isa("scalar")
        ops = CpuOps(shape)
        scalar = start.copy()
        ops.stand_in(x, layer, experts, plan_slots(Routing(0, experts, gates), bits), scalar)
        _core.use_isa(isa)
        out = start.copy()
        ops.stand_in(x, layer, experts, plan_slots(Routing(0, experts, gates), bits), out)
        np.testing.assert_array_equal(out, scalar)
        expected = start.astype(np.float64)
        for t, k in np.argwhere(bits == 0):
            expected[t] += gates[t, k] * applied(x[t], [m[experts[t, k]] for m in layer])
        np.testing.assert_allclose(out, expected, atol=1e-3)
        for t in range(T):
            one = start[t : t + 1].copy()
            routing = Routing(0, experts[t : t + 1], gates[t : t + 1])
            ops.stand_in(
                x[t : t + 1], layer, routing.experts, plan_slots(routing, bits[t : t + 1]), one
            )
            np.testing.assert_array_equal(one[0], out[t])
    finally:
        _core.use_isa(before)


# --- runs


def logits(path, ids, *, step=None, **options):
    with edgemoe.load(path, ram="1GiB", context=64, **options) as engine:
        first = engine.logits(ids[:step])
        for i in ids[len(first) :]:
            engine.extend([i])
        return first, engine.stats.logits_hash, engine.notes


def test_what_is_left_out_is_nearer_with_stand_ins(fitted):
    ids = windows_of(open_moe(fitted), default_text(), window=48, count=1)[0].tolist()
    exact, _, notes = logits(fitted, ids)
    assert not notes
    skipped, _, notes = logits(fitted, ids, options={"top_p": 0.1, "stand_ins": "none"})
    assert not any("stand in" in note for note in notes)
    stood, _, notes = logits(fitted, ids, options={"top_p": 0.1})
    assert "maps of rank 32 stand in for experts that are left out" in notes
    assert np.square(stood - exact).sum() < 0.9 * np.square(skipped - exact).sum()


def test_chunks_and_threads_change_no_bit(fitted):
    ids = families.random_ids(24)
    options = {"top_p": 0.1}
    hashes = {
        logits(fitted, ids, step=step, options=options, threads=threads)[1]
        for step, threads in ((None, 1), (None, 2), (7, 2), (1, 1))
    }
    assert len(hashes) == 1


def test_who_leaves_nothing_out_keeps_nothing_of_them(fitted):
    section = open_moe(fitted).sections["stand-ins"]
    setting = Setting(
        num_layers=L, num_experts=E, experts_per_token=K, bits=8, level_bits=(4, 8), level_bytes=(4096, 8192),
        slots_bytes=3 * 8192, sections={"stand-ins": section},
    )  # fmt: skip

    def rank(name, **options):
        found = SCHEDULERS[name](setting, **options).stand_ins
        return None if found is None else found.bias.shape[2]

    assert rank("hobbit") == rank("mc") == rank("on-demand", skip_below=0.1) == 32
    assert rank("auto", lossy=True) == rank("on-demand", stand_in_below=0.2) == 32
    for name in ("on-demand", "d2moe", "expertwise", "expertflow", "auto"):
        assert rank(name) is None
    assert (
        rank("hobbit", skip=0)
        is rank("mc", prune=False)
        is rank("hobbit", stand_ins="none")
        is None
    )
    assert rank("on-demand", top_p=0.5, cache_prior=0.1) is None
    with pytest.raises(ValueError, match="stand_in_below: the file has no stand-ins"):
        SCHEDULERS["on-demand"](setting, stand_in_below=0.2, stand_ins="none")


def test_weak_misses_are_not_waited_for():
    gates = np.array([[0.5, 0.3, 0.15, 0.05], [0.4, 0.3, 0.2, 0.1]], np.float32)
    experts = np.array([[0, 1, 2, 3], [4, 3, 2, 1]], np.int32)
    r = Routing(0, experts, gates, sequences=2)
    plan = plan_slots(r, np.full((2, 4), 8, np.int8))
    residency = np.array([0, 0, 1, 0, 0, 0], np.int8)  # expert 2 is resident
    out = without_misses(plan, r, residency, 0.2)
    assert (out.rows >= 0).tolist() == [[True, True, True, False], [True, True, True, False]]
    assert without_misses(plan, r, residency, 0.01) is plan

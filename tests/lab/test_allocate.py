"""Bits per expert: the rules agree with brute force and worked examples; the allocation file, and running with it."""

from __future__ import annotations

import errno
import itertools
import json
import os

import numpy as np
import pytest
from engines import GREEDY, with_slots
from safetensors.numpy import load_file

import edgemoe
from edgemoe.cli.main import main
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.lab.bits import rules
from edgemoe.lab.bits.allocate import METHODS, Settings, allocate
from edgemoe.lab.bits.calibrate import calibrate, windows_of
from edgemoe.lab.quality.loss import Loss
from edgemoe.quant import Allocation, Calibration, write_calibration
from edgemoe.store import expert_bytes

TEXT = "".join(f"line {i}: the quick brown fox, {i * i} times. " for i in range(12))


# ---------------------------------------------------------------- rules


def brute_force(cost, bits, total, need):
    """Returns the least cost of any valid choice, by trying all."""
    best = np.inf
    for choice in itertools.product(range(len(bits)), repeat=len(cost)):
        if sum(bits[c] for c in choice) <= total and set(need) <= set(choice):
            best = min(best, sum(row[c] for row, c in zip(cost, choice, strict=True)))
    return best


@pytest.mark.parametrize("bits", [(2, 3, 4), (2, 4, 8), (1, 2, 3), (3, 8)])
@pytest.mark.parametrize("need", [(), (1,), (0, 1)])
def test_the_programme_is_solved_exactly(bits, need):
    rng = np.random.default_rng(len(bits) * 10 + len(need))
    solved = 0
    for n in (1, 2, 5):
        for total in range(n * bits[0], n * bits[-1] + 3):
            cost = rng.random((n, len(bits)))
            cost[rng.random(cost.shape) < 0.1] = np.inf
            expected = brute_force(cost, bits, total, need)
            if expected == np.inf:
                with pytest.raises(ValueError, match="does not suffice"):
                    rules.cheapest(cost, bits, total, at_least_one=need)
                continue
            choice = rules.cheapest(cost, bits, total, at_least_one=need)
            assert sum(bits[c] for c in choice) <= total
            assert set(need) <= set(choice.tolist())
            assert cost[np.arange(n), choice].sum() == pytest.approx(expected)
            solved += 1
    assert solved > 5


def test_too_few_bits_are_refused(tiny_moe, calibrated):
    # Of bits or of bytes, for experts or for keys and values.
    with pytest.raises(
        ValueError, match="total: expected at least 8, which the lowest levels take, got 7"
    ):
        rules.cheapest(np.ones((4, 2)), (2, 3), 7)
    for method in ("error", "pmq", "frequency"):
        with pytest.raises(ValueError, match=r"average bits: expected (at least )?2.*, got 1\.9"):
            allocate(
                tiny_moe, method, Settings(average_bits=1.9), calibration=Calibration(calibrated)
            )


def test_pmq_cost():
    count, gates = np.array([3.0, 1, 0]), np.array([1.5, 0.5, 0])
    error = np.array([[4.0, 2], [8, 4], [6, 3]])
    cost = rules.pmq_cost(count, gates, error, (1, 1, 2))
    np.testing.assert_allclose(cost, [[0.75 * 0.75 * 16, 0.75 * 0.75 * 4], [4, 1], [0, 0]])
    released = rules.pmq_cost(count, gates, error, (1, 1.5, 1))
    np.testing.assert_allclose(released[0], 0.75 * 0.75**1.5 * np.array([4, 2]))


def test_ranks():
    scores = np.array([[5.0, 1, 7, 3], [8, 2, 6, 4]])
    per_layer = rules.by_rank(scores, (2, 3), 2.5, per_layer=True)
    assert per_layer.tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]
    overall = rules.by_rank(scores, (2, 4), 2.75, per_layer=False)
    assert overall.tolist() == [[0, 0, 1, 0], [1, 0, 1, 0]]
    equal = rules.by_rank(np.zeros((1, 30)), (2, 3), 2.1, per_layer=False)
    assert equal.sum() == 3
    assert equal[0, :3].all()
    with pytest.raises(ValueError, match="expected 2 to 3, got 3.5"):
        rules.by_rank(scores, (2, 3), 3.5, per_layer=False)


def test_outlier_score():
    w = np.array([[1, -4], [1, 0], [-1, 2]], np.float32)
    assert rules.outlier_score(w) == 2.0  # 4 / mean(4, 0, 2)


def test_super_experts():
    quiet = np.linspace(1, 2, 8 * 64).reshape(8, 64)
    loud = quiet.copy()
    loud[1, 7], loud[3, 0] = 300, 500
    loud[7, 7] = 9000  # in the last quarter of layers, where it is ordinary
    assert rules.super_experts(loud) == [(1, 7), (3, 0)]
    loud[1, 7] = 49  # above the percentile, but not above a tenth of the largest
    assert rules.super_experts(loud) == [(3, 0)]


# ---------------------------------------------------------------- the file


def allocation(**changes):
    return Allocation(
        **{
            "method": "pmq", "settings": {"exponents": [1, 1, 2]}, "layers": (0, 1),
            "bits": np.array([[2, 3, 2, 2, 4, 2, 2, 2]] * 2, np.int8), "protected": ((0, 4),), **changes,
        }
    )  # fmt: skip


def test_json_round_trip(tiny_moe):
    a = allocation()
    b = Allocation.from_json(a.to_json(), "x")
    assert (b.method, b.settings, b.layers, b.protected) == (
        a.method,
        a.settings,
        a.layers,
        a.protected,
    )
    assert np.array_equal(a.bits, b.bits)
    assert b.average == 2.375
    config = open_moe(tiny_moe).config
    b.check(config, (2, 3, 4, 6, 8), "x")
    with pytest.raises(FormatError, match="x: asks for 3 bits; the file has 2, 4"):
        b.check(config, (2, 4), "x")
    with pytest.raises(FormatError, match="is for 2 layers of 3 experts; the model has 2 of 8"):
        allocation(bits=np.full((2, 3), 2, np.int8)).check(config, (2,), "x")


@pytest.mark.parametrize(
    "change",
    [
        {"bits": [[2, 3], [2]]}, {"bits": [2, 3]}, {"bits": [[2, 9]] * 2}, {"bits": [["x", 2]] * 2},
        {"layers": [0]}, {"layers": None}, {"edgemoe_allocation": 2}, {"protected": [[1]]},
        {"settings": 3}, {"bits": None}, {"layers": [0.2, 1]}, {"edgemoe_allocation": 2, "dense": {"head": 2.5}},
    ],
)  # fmt: skip
def test_broken_allocations_are_refused(change):
    value = json.loads(allocation().to_json()) | change
    with pytest.raises(FormatError, match="^there: "):
        Allocation.from_json(json.dumps(value).encode(), "there")
    for content in (b"", b"[]", b"{}", b"\xff", b"1", b"[" * 100_000):
        with pytest.raises(FormatError, match="there: not an allocation"):
            Allocation.from_json(content, "there")


# ---------------------------------------------------------------- running with it


def test_a_map_of_one_level_is_that_level(tiny_moe, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(allocation(bits=np.full((2, 8), 3, np.int8)).to_json())
    ids = [1, 2, 3, 4, 5]
    with edgemoe.load(tiny_moe, bits=3) as plain:
        expected = plain.logits(ids)
        one = plain.extend([7]).copy()
    with edgemoe.load(tiny_moe, bits="auto", allocation=path) as engine:
        assert np.array_equal(engine.logits(ids), expected)
        assert np.array_equal(engine.extend([7]), one)
        assert engine.notes == ("lossy: experts at 3.00 bits on average, 3 to 3",)


def test_every_expert_runs_at_its_own_bits(tiny_moe, tmp_path):
    bits = np.full((2, 8), 8, np.int8)
    ids = list(range(40))
    seen = []

    class Watch(edgemoe.experts.Observer):
        def planned(self, routing, plan, residency):
            seen.append((plan.layer, plan.experts.tolist(), plan.bits.tolist()))

    bits[0], bits[1, :4] = [2, 3, 4, 6, 8, 2, 3, 4], 2
    path = tmp_path / "a.json"
    path.write_bytes(allocation(bits=bits).to_json())
    with edgemoe.load(tiny_moe, bits="auto", allocation=path, observer=Watch()) as engine:
        engine.logits(ids)
        engine.extend([9])
        used = sum(len(b) for _, _, b in seen)
        assert 2 < engine.stats.average_bits < 8
    assert used > 16
    for layer, experts, planned in seen:
        assert planned == bits[layer, experts].tolist()


@pytest.mark.parametrize("num_experts", [1, 3])
def test_mixed_bits_do_not_depend_on_the_budget(tiny_moe, tmp_path, monkeypatch, num_experts):
    path = tmp_path / "a.json"
    bits = np.random.default_rng(0).choice([2, 3, 4], (2, 8)).astype(np.int8)
    path.write_bytes(allocation(bits=bits).to_json())

    def run():
        with edgemoe.load(tiny_moe, bits="auto", allocation=path) as engine:
            out = list(engine.generate(list(range(20)), GREEDY))
            return out, engine.stats.logits_hash, engine.stats.evictions

    plenty = run()
    with_slots(monkeypatch, num_experts * expert_bytes(open_moe(tiny_moe), 3))
    scarce = run()
    assert scarce[:2] == plenty[:2]
    assert scarce[2] > 0 == plenty[2]


def test_wrong_use_is_one_line(tiny_moe, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(allocation().to_json())
    with pytest.raises(ValueError, match="has none; edgemoe allocate makes it"):
        edgemoe.load(tiny_moe, bits="auto")
    with pytest.raises(ValueError, match="expected bits or dense bits to be auto"):
        edgemoe.load(tiny_moe, bits=3, allocation=path)
    with pytest.raises(ValueError, match=r"bits: expected \[2, 8\] of \(2, 3, 4, 6, 8\)"):
        edgemoe.load(tiny_moe, options={"bits": np.full((2, 8), 5, np.int8)})


# ---------------------------------------------------------------- methods


@pytest.fixture(scope="module")
def calibrated(tiny_moe, tmp_path_factory):
    path = tmp_path_factory.mktemp("calib") / "tiny.calib"
    calibrate(tiny_moe, TEXT, path, window=96, threads=1)
    return path


@pytest.fixture(scope="module")
def windows(tiny_moe):
    return windows_of(open_moe(tiny_moe), TEXT, window=64, count=2)


@pytest.mark.parametrize(
    ("method", "per_layer"),
    [
        (name, how)
        for name in METHODS
        for how in (False, True)
        if (name, how) != ("first-blocks", True)
    ],
)
def test_methods_keep_the_average(tiny_moe, calibrated, windows, method, per_layer):
    settings = Settings(average_bits=2.75, per_layer=per_layer)
    found = allocate(
        tiny_moe, method, settings, calibration=Calibration(calibrated), windows=windows
    )
    assert found.bits.shape == (2, 8)
    assert 2.25 <= found.average <= 2.75
    if per_layer:
        assert (found.bits.mean(1) <= 2.75).all()
    assert len(found.protected) == 1  # of 8 experts in the first of two layers
    layer, expert = found.protected[0]
    assert found.bits[layer, expert] == max(found.settings["levels"])
    again = allocate(
        tiny_moe, method, settings, calibration=Calibration(calibrated), windows=windows
    )
    assert np.array_equal(found.bits, again.bits)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("first-blocks", {"average_bits": 2.75}), ("expertwise", {"max_loss": 0.1})],
)
def test_methods_that_tell_layers_apart_take_no_average_of_a_layer(
    tiny_moe, windows, method, settings
):
    with pytest.raises(ValueError, match="^per layer: "):
        allocate(tiny_moe, method, Settings(per_layer=True, **settings), windows=windows)


def test_error_is_the_least_that_is_predicted(tiny_moe, calibrated):
    c = Calibration(calibrated)
    table = np.stack([c.layer(i, "error2") for i in c.layers])

    def predicted(method, **settings):
        given = Settings(average_bits=2.5, levels=(2, 3), protect=False, **settings)
        bits = allocate(tiny_moe, method, given, calibration=c).bits
        return np.take_along_axis(table, (bits - 2)[..., None].astype(np.int64), axis=2).sum()

    best = predicted("error")
    assert best < predicted("random")
    for method in ("pmq", "frequency"):
        assert best <= predicted(method)
    assert best <= predicted("error", per_layer=True)


def test_expertwise_ends_at_the_loss_that_is_allowed(tiny_moe, windows):
    with Loss(tiny_moe, windows, reference=8) as loss:
        at_two, at_four = (loss(np.full((2, 8), b, np.int8)) for b in (2, 4))
        assert 0 < at_four < at_two
        assert loss(np.full((2, 8), 8, np.int8)) == 0
        allowed = (at_two + at_four) / 2
        found = allocate(tiny_moe, "expertwise", Settings(max_loss=allowed), windows=windows)
        assert loss(found.bits) <= allowed
    assert found.settings["levels"] == [2, 4]
    assert set(found.bits.reshape(-1).tolist()) == {2, 4}


def test_what_is_missing_is_said(tiny_moe, calibrated):
    def refused(message, method="error", calibration=None, **settings):
        with pytest.raises(ValueError, match=message):
            allocate(tiny_moe, method, Settings(**settings), calibration=calibration)

    c = Calibration(calibrated)
    refused("method: expected one of error, pmq", method="magic", average_bits=3)
    refused("calibration: this method needs one", average_bits=3)
    refused("expected a text", method="expertwise", average_bits=3)
    refused("levels: expected some of 2, 3, 4, 6, 8", calibration=c, average_bits=3, levels=(2, 5))
    refused("levels: expected 2, got 3", "random", average_bits=3, levels=(2, 3, 4))
    refused("average bits: expected at least 2, got 1.5", calibration=c, average_bits=1.5)
    refused("average bits: missing", calibration=c)


# ---------------------------------------------------------------- the command


def test_store(tiny_moe, calibrated, tmp_path):
    model = tmp_path / "stored.moe"
    model.write_bytes(tiny_moe.read_bytes())
    run = ["allocate", str(model), "--calibration", str(calibrated), "--avg-bits", "3", "--store"]
    assert main(run) == 0
    assert list(tmp_path.iterdir()) == [model]
    with edgemoe.load(model, bits="auto") as engine:
        engine.logits([1, 2, 3])
        assert engine.notes[0].startswith("lossy: experts at 3.00 bits on average")
        first = engine.stats.logits_hash
    run[run.index("3")] = "2.5"
    assert main(run) == 0  # replaces the stored allocation
    with edgemoe.load(model, bits="auto") as engine:
        engine.logits([1, 2, 3])
        assert engine.stats.logits_hash != first


def test_command(tiny_moe, calibrated, tmp_path, capsys):
    out = tmp_path / "a.json"
    run = ["allocate", str(tiny_moe), "--calibration", str(calibrated), "-o", str(out)]
    assert main([*run, "--avg-bits", "2.5"]) == 0
    assert "| all | 2.50 |" in capsys.readouterr().out
    found = Allocation.from_json(out.read_bytes(), "x")
    assert found.method == "error"
    assert main([*run, "--avg-bits", "2.5", "--method", "pmq", "--exponents", "1,1.5,1"]) == 0
    assert Allocation.from_json(out.read_bytes(), "x").settings["exponents"] == [1, 1.5, 1]
    for target in (tiny_moe, calibrated):
        assert main([*run, "--avg-bits", "2.5", "-o", str(target)]) == 1
        assert "expected another file to write" in capsys.readouterr().err
    for flags, what in (
        (["--levels", "2,x"], "expected a whole number from 1, got 'x'"),
        (["--exponents", "1,2"], "expected three numbers"),
        (["--exponents", "1,2,x"], "expected three numbers"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*run, *flags])
        assert end.value.code == 2
        assert what in capsys.readouterr().err
    assert main(run) == 2
    assert "expected either --avg-bits or --max-loss" in capsys.readouterr().err
    assert main([*run, "--max-loss", "0.1"]) == 2
    assert main([*run, "--avg-bits", "3", "--seed", "1"]) == 2
    assert "--seed: for --method random or search only" in capsys.readouterr().err
    for flags, what in [
        (["--avg-bits", "nan"], "average bits: expected at least 1, got nan"),
        (["--avg-bits", "3", "--method", "expertwise", "--window", "0"], "window: expected 1 to"),
        (
            ["--avg-bits", "3", "--method", "expertwise", "--chunks", "0"],
            "chunks: expected at least 1",
        ),
    ]:
        assert main([*run, *flags]) == 2
        assert what in capsys.readouterr().err
    wrong = ["allocate", str(tiny_moe), "--calibration", str(tmp_path / "no"), "--avg-bits", "3"]
    assert main(wrong) == 1
    assert "no such file" in capsys.readouterr().err


def test_a_full_disk_leaves_an_earlier_result(tiny_moe, calibrated, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.json"
    out.write_bytes(b"earlier")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    common = ["allocate", str(tiny_moe), "--calibration", str(calibrated), "--avg-bits", "3"]
    assert main([*common, "-o", str(out)]) == 1
    assert capsys.readouterr().err == f"edgemoe allocate: {out}: No space left on device\n"
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"earlier"


def test_a_damaged_calibration_is_named(tiny_moe, calibrated, tmp_path, capsys):
    tensors, path = load_file(calibrated), tmp_path / "x.calib"
    del tensors["checksums"]
    tensors["experts.0.error2"][0, 0] = np.nan
    meta = {k: v for k, v in Calibration(calibrated).meta.items() if k != "edgemoe_calibration"}
    write_calibration(path, tensors, meta)
    command = ["allocate", str(tiny_moe), "--calibration", str(path), "--avg-bits", "3"]
    assert main(command) == 1
    assert f"{path}: experts.0.error2: holds NaN or infinity" in capsys.readouterr().err
    write_calibration(path, tensors, {**meta, "bits": "a b"})
    assert main(command) == 1
    assert f"{path}: a calibration file with damaged levels" in capsys.readouterr().err

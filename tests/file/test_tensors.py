"""Safetensors in memory are read in place, without copies."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load, save

from edgemoe.file.append import add_sections
from edgemoe.file.tensors import is_finite, view
from edgemoe.quant import BitRouters
from edgemoe.scheduler.paths import PathPredictor

GOOD = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.array(2.5, np.float16),
    "empty": np.zeros((0, 7), np.float32), "ids": np.arange(3),
}  # fmt: skip


def test_they_are_what_the_library_reads():
    content = save(GOOD, {"of": "ours"})
    found, meta = view(content)
    theirs = load(content)
    assert meta == {"of": "ours"}
    assert set(found) == set(theirs) - {"ids"}  # the others are left alone
    for name, array in found.items():
        assert array.dtype == theirs[name].dtype
        assert array.flags.aligned
        np.testing.assert_array_equal(array, theirs[name])


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_a_value_error_or_other_numbers(seed):
    rng = np.random.default_rng(seed)
    content = bytearray(save(GOOD))
    for _ in range(300):
        bad = content.copy()
        for at in rng.integers(0, len(bad), rng.integers(1, 4)).tolist():
            bad[at] = int(rng.integers(256))
        bad = bad[: rng.integers(len(bad) // 2, len(bad) + 1)]
        try:
            tensors, _ = view(bytes(bad))
        except ValueError as error:
            assert str(error) == "not safetensors"
        else:
            assert sum(t.nbytes for t in tensors.values()) <= 4 * len(bad)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_numbers_are_told_from_others(kind, bad):
    array = np.full((3, 5), np.finfo(kind).max)  # their sum overflows
    assert is_finite(array.astype(kind))
    array[1, 2] = bad
    assert not is_finite(array.astype(kind))


def test_sections_are_not_copied():
    """The budget counts sections once, as read from the file. Predictors keep less: the core stores them in 8 bits."""
    L, E, D = 2, 4, 1 << 15
    zeros = np.zeros((L, E, 3), np.float32)
    routers = BitRouters(
        levels=(2, 3, 4), weight=np.zeros((L, E, 3, D), np.float32), gate_weight=zeros, bias=zeros
    ).to_bytes()
    n, d = L * E * 512, 32
    shapes = {
        "w_input": (3 * d, d), "w_state": (3 * d, d), "b_input": (3 * d,), "b_state": (3 * d,),
        "now": (n, 2 * d), "now_bias": (n,), "next": (n, d), "next_bias": (n,),
    }  # fmt: skip
    paths = save(
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        | {"embedding": np.zeros((1 << 8, d), np.float16)}
    )
    tracemalloc.start()
    try:
        kept = BitRouters.from_bytes(routers, "x"), PathPredictor.from_section(paths, L, E * 512)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept
    assert peak < min(len(routers), len(paths)) / 8


@pytest.mark.parametrize("rows", [16, 1 << 40])
def test_a_predictor_of_no_width_is_refused(rows):
    shapes = {
        "w_input": (0, 0), "w_state": (0, 0), "b_input": (0,), "b_state": (0,), "now": (4, 0),
        "now_bias": (4,), "next": (4, 0), "next_bias": (4,),
    }  # fmt: skip
    content = save(
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        | {"embedding": np.zeros((rows, 0), np.float16)}
    )
    with pytest.raises(ValueError, match="section paths: expected a power of two of rows"):
        PathPredictor.from_section(content, 1, 4)


def test_routers_without_a_level_are_refused():
    none = np.zeros((2, 4, 0), np.float32)
    content = BitRouters(
        levels=(), weight=np.zeros((2, 4, 0, 8), np.float32), gate_weight=none, bias=none
    ).to_bytes()
    with pytest.raises(ValueError, match="^x: not bit routers"):
        BitRouters.from_bytes(content, "x")


def test_sections_that_nobody_keeps_do_not_count_against_the_experts(tiny_moe, tmp_path):
    copy = shutil.copy(tiny_moe, tmp_path / "x.moe")
    add_sections(copy, {"LICENSE": bytes(64 << 20)})
    rooms = []
    for path in (tiny_moe, copy):  # in separate processes, as memory is measured
        code = "import edgemoe, sys; print(edgemoe.load(sys.argv[1], ram='400MiB').budget.room)"
        done = subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
        )
        rooms.append(int(done.stdout))
    assert rooms[1] > rooms[0] - (16 << 20)

"""The budget as the kernel sees it: a process's peak memory, and that it survives a limit of exactly `ram`."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import limits
import pytest
import synth

_RUN = """
import json, sys, edgemoe
from pathlib import Path
path, ram, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with edgemoe.load(path, ram=ram, whole_process=True, threads=2, context=256) as engine:
    greedy = edgemoe.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for token in engine.generate(list(range(30, 50)), greedy):
        pass
    stats = engine.stats
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({
        "hash": stats.logits_hash, "peak": stats.peak_bytes, "evictions": stats.evictions,
        "slots": engine.model.room.size, "certain": engine.budget.slots,
        "tables": int(status["VmPTE"].split()[0]) * 1024,
    }))
"""
MIB = 1 << 20


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model that is mostly experts: 128 of them, 26 MiB in all."""
    path = tmp_path_factory.mktemp("wide") / "wide.moe"
    config = dataclasses.replace(synth.SHAPES["tiny"], num_experts=32)
    synth.write(path, config, bits=8, embedding=100.0, name="wide")
    return path


def command(path, ram, tokens=120):
    return [sys.executable, "-c", _RUN, str(path), str(ram), str(tokens)]


def smallest(path):
    """Returns the smallest budget, in bytes, as the program's error names it."""
    done = subprocess.run(command(path, MIB), capture_output=True, text=True, check=False)
    match = re.search(r"smallest that works is (\d+) MiB", done.stderr)
    assert match, done.stderr
    return int(match[1]) * MIB


@pytest.fixture(scope="module")
def free(wide):
    """The results of a run in which everything fits."""
    done = subprocess.run(command(wide, 1 << 30), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["evictions"] == 0
    return found


@pytest.mark.parametrize("more", [0, 2])
def test_the_budget_is_used_and_never_passed(wide, free, more):
    ram = smallest(wide) + more * MIB
    done = subprocess.run(command(wide, ram), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["hash"] == free["hash"]
    assert found["evictions"] > 0
    assert found["peak"] + found["tables"] <= ram
    # Unused are the slack, less than an expert, and memory for later keys and values: 97% is used from 80 MiB on.
    assert found["peak"] + found["tables"] >= ram - 2.4 * MIB
    assert found["slots"] > found["certain"]


@pytest.mark.parametrize("more", [0, 3])
def test_a_run_lives_below_a_limit_of_its_budget(wide, free, more):
    if (why := limits.missing()) is not None:
        pytest.skip(f"no control group can be made: {why}")
    ram = smallest(wide) + more * MIB
    outcome = limits.run(command(wide, ram), limit=ram)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["hash"] == free["hash"]
    assert found["evictions"] > 0
    assert outcome.group_peak <= ram
    assert outcome.swapped == 0


def test_a_small_model_lives_below_its_smallest_budget(tiny_moe):
    if (why := limits.missing()) is not None:
        pytest.skip(f"no control group can be made: {why}")
    ram = smallest(tiny_moe)
    outcome = limits.run(command(tiny_moe, ram, 40), limit=ram)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["peak"] <= ram
    assert outcome.group_peak <= ram
    assert outcome.swapped == 0


def test_a_limit_is_one(tmp_path):
    """A process that exceeds its group's limit is killed; the tests above rely on that."""
    if (why := limits.missing()) is not None:
        pytest.skip(f"no control group can be made: {why}")
    greedy = [sys.executable, "-c", "x = bytearray(200 << 20); print(len(x))"]
    outcome = limits.run(greedy, limit=64 * MIB)
    assert outcome.code < 0
    assert outcome.out == ""

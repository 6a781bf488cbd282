"""A device that shares the CPU's memory has one tier of experts and one budget, and gives the CPU's bits."""

from __future__ import annotations

import re

import pytest
from engines import with_slots
from simulated import configured, plug_in
from test_on_device import GREEDY, IDS, on_device, play

import edgemoe
from edgemoe import _core
from edgemoe.errors import DeviceError, OutOfBudget
from edgemoe.file.reader import open_moe
from edgemoe.store import ExpertStore, expert_bytes


@pytest.fixture(autouse=True)
def integrated():
    with configured(integrated=1) as simulator:
        yield simulator


@pytest.mark.parametrize("slots", [1, 2, 16])
@pytest.mark.parametrize("more", [{}, {"bits": 3, "scheduler": "expertflow"}], ids=str)
def test_the_answer_is_the_processors(tiny_moe, monkeypatch, slots, more):
    with_slots(monkeypatch, slots * expert_bytes(open_moe(tiny_moe), 5), chunk=16)
    expected, got = play(tiny_moe, **more), play(tiny_moe, **more, **on_device())
    assert got[:4] == expected[:4]
    stats = got[4]
    assert stats["device_hits"] == stats["hits"] + stats["misses"] > 0  # all ran on the device
    assert stats["device_bytes_in"] == 0  # and nothing was copied
    assert stats["device_bytes"] == stats["resident_bytes"] <= stats["budget_bytes"]


@pytest.mark.parametrize("setting", [{"seed": 3}, {"starved": 0}, {"starved": 1}], ids=str)
def test_no_slot_is_read_into_while_a_kernel_may_read_it(tiny_moe, monkeypatch, setting):
    with_slots(monkeypatch, 2 * expert_bytes(open_moe(tiny_moe), 5), chunk=16)
    expected = play(tiny_moe)
    with configured(**setting):
        assert play(tiny_moe, **on_device())[:4] == expected[:4]


def test_levels_that_rise_read_what_is_missing(tiny_moe):
    moe = open_moe(tiny_moe)
    each = expert_bytes(moe, 5)
    device = _core.Device(plug_in(), 0, 1 << 20)
    shared = ExpertStore.open(moe, bits=8, budget_bytes=3 * each, verify=True, device=device).cache
    plain = ExpertStore.open(moe, bits=8, budget_bytes=3 * each, verify=True).cache
    for level in (1, 3, 5, 2):
        for a, b in zip(shared.decode(4, level), plain.decode(4, level), strict=True):
            assert (a == b).all()
        assert shared.stats["bytes_read"] == plain.stats["bytes_read"]
        assert shared.stats["resident_bytes"] == each  # a slot has a whole expert
    shared.check_integrity()


def test_one_budget_is_for_both(tiny_moe, integrated):
    with pytest.raises(ValueError, match="vram: cuda:0 has the processor's memory and none of its"):
        edgemoe.load(tiny_moe, vram="1GiB", **on_device())
    with pytest.raises(
        OutOfBudget, match=r"a budget of 1 MiB is too small; .* for what the device has"
    ) as least:
        edgemoe.load(tiny_moe, ram="1MiB", context=128, whole_process=False, **on_device())
    smallest = int(re.search(r"smallest that works is (\d+) MiB", str(least.value))[1])
    with edgemoe.load(
        tiny_moe, ram=f"{smallest + 8}MiB", context=128, whole_process=False, **on_device()
    ) as engine:
        budget, there = engine.model.budget, engine.model.ops._device.stats
        list(engine.generate(IDS[:5], GREEDY))
        assert budget.device > 0
        assert there["peak_bytes"] <= there["budget_bytes"] == budget.device
        assert budget.fixed + engine.model.store.stats["budget_bytes"] <= budget.ram


def test_memory_that_cannot_be_lent_is_said(tiny_moe):
    with configured(may_lend=0), pytest.raises(DeviceError, match="cudaHostRegister: .*no memory"):
        edgemoe.load(tiny_moe, context=64, **on_device())

"""Experts that pass through a device: which ones do, and that it changes nothing but where they run."""

from __future__ import annotations

import numpy as np
import pytest
from engines import with_slots
from simulated import configured
from test_on_device import IDS, on_device, play, with_vram

import edgemoe
from edgemoe.file.reader import open_moe
from edgemoe.runtime.trace import read
from edgemoe.store import expert_bytes
from edgemoe.store.rates import Rates

WEIGHTS = 1 << 20
MIB = 1 << 20


def split(link, read, products, sizes, tokens):
    rates = Rates(link, WEIGHTS)
    rates.read, rates.products = read, products
    return rates.split(np.array(sizes), np.array(tokens)).tolist()


@pytest.mark.parametrize(
    ("link", "read", "products", "sizes", "tokens", "goes"),
    [
        # A single token: bytes decide. The CPU is four times as fast as the link: one of six passes.
        (1e9, 4e9, 0, [MIB] * 6, [1] * 6, [True, False, False, False, False, False]),
        # A link as fast as the CPU takes half. A single expert is a tie, and stays on the CPU.
        (1e9, 1e9, 0, [MIB] * 4, [1] * 4, [True, True, False, False]),
        (1e9, 1e9, 0, [MIB], [1], [False]),
        (3e9, 1e9, 0, [MIB], [1], [True]),
        # A prompt: products decide, and experts with the most tokens gain most.
        (1e9, 1e10, 1e9, [MIB] * 4, [3, 90, 40, 60], [False, True, True, True]),
        (1e9, 1e10, 1e12, [MIB] * 3, [90] * 3, [False, False, False]),
        # The CPU has not been measured, or not with so many tokens.
        (1e12, 0, 0, [MIB], [1], [False]),
        (1e12, 1e9, 0, [MIB], [90], [False]),
        (1e12, 0, 1e9, [MIB], [1], [False]),
        (1e9, 1e9, 1e9, [], [], []),
    ],
)
def test_what_goes_over_the_link(link, read, products, sizes, tokens, goes):
    assert split(link, read, products, sizes, tokens) == goes


def test_no_other_choice_is_done_sooner():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 7))
        sizes, tokens = rng.integers(1, 4, n) * MIB, rng.integers(3, 100, n)
        link, read, products = 10 ** rng.uniform(8, 11, 3)
        here = np.maximum(sizes / read, tokens * WEIGHTS / products)
        there = np.maximum(sizes / link, tokens * WEIGHTS / 1e12)

        def took(goes, here=here, there=there):
            goes = np.array(goes, bool)
            return max(there[goes].sum(), here[~goes].sum())

        chosen = took(split(link, read, products, sizes, tokens))
        every = [took([i >> k & 1 for k in range(n)]) for i in range(1 << n)]
        # The choice, a prefix in order of gain, is within one expert's time of the best set.
        assert chosen <= min(every) + np.minimum(here, there).max() * 1.0001
        assert chosen <= min(took([True] * n), took([False] * n)) * 1.0001


def test_the_processor_is_measured_by_what_it_does():
    rates = Rates(1e9, WEIGHTS)
    rates.note(8 * MIB, 8, 8, 0.01)
    assert (rates.read, rates.products) == (8 * MIB / 0.01, 0)
    rates.note(8 * MIB, 8, 8, 0.02)
    assert rates.read == pytest.approx(8 * MIB / 0.01 * 0.9)
    rates.note(2 * MIB, 64, 2, 1.0)
    assert rates.products == 64 * WEIGHTS
    rates.note(2 * MIB, 10, 2, 1.0)  # in between: updates neither
    rates.note(0, 0, 0, 1.0)
    assert rates.products == 64 * WEIGHTS


def test_a_processor_that_was_busy_is_tried_again():
    rates, one = Rates(1e9, WEIGHTS), (np.array([MIB]), np.array([1]))
    rates.read = 1.0
    chosen = [bool(rates.split(*one)[0]) for _ in range(80)]
    assert [i for i, goes in enumerate(chosen) if not goes] == [32, 65]


CHOICES = {
    "all": lambda sizes, tokens: np.ones(len(sizes), bool),
    "every other": lambda sizes, tokens: np.arange(len(sizes)) % 2 == 0,
    "prompts": lambda sizes, tokens: np.full(len(sizes), tokens.sum() > len(sizes)),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    ("setting", "more"),
    [({}, {}), ({"seed": 3}, {"bits": 3}), ({"starved": 0}, {}), ({"starved": 1}, {"scheduler": "auto"})],
    ids=str,
)  # fmt: skip
def test_the_answer_is_the_processors(tiny_moe, monkeypatch, choice, setting, more):
    with_slots(monkeypatch, 6 * expert_bytes(open_moe(tiny_moe), 5), chunk=16)
    expected = play(tiny_moe, **more)
    with_vram(monkeypatch, 5, tiny_moe)  # two of them for passing experts
    monkeypatch.setattr(Rates, "split", lambda self, *given: CHOICES[choice](*given))
    with configured(**setting):
        got = play(tiny_moe, **more, **on_device())
    assert got[:4] == expected[:4]
    stats = got[4]
    assert stats["device_hits"] > (0.9 if choice == "all" else 0.2) * (
        stats["hits"] + stats["misses"]
    )
    assert stats["device_bytes"] <= 3 * expert_bytes(open_moe(tiny_moe), 5)


def test_a_trace_says_where_each_use_ran(tiny_moe, monkeypatch, tmp_path):
    path, ran = tmp_path / "x.trace", []
    with_slots(monkeypatch, 5 * expert_bytes(open_moe(tiny_moe), 5))
    with_vram(monkeypatch, 5, tiny_moe)
    monkeypatch.setattr(Rates, "split", lambda self, *given: CHOICES["every other"](*given))
    for more in (on_device(), {}):
        with edgemoe.load(tiny_moe, context=64, trace=path, **more) as engine:
            for i in IDS[:30]:
                engine.extend([i])
            stats = engine.model.store.stats
        rows = read(path).rows
        assert (rows["tokens"] == 1).all()
        assert rows["device"].sum() == stats.get("device_hits", 0)
        ran.append(rows["device"].mean())
    assert 0.2 < ran[0] < 1
    assert ran[1] == 0
    with configured(integrated=1):
        with edgemoe.load(tiny_moe, context=64, trace=path, **on_device()) as engine:
            engine.logits(IDS[:5])
        assert (read(path).rows["device"] == 1).all()


def test_with_little_room_none_pass(tiny_moe, monkeypatch):
    with_vram(monkeypatch, 3, tiny_moe)
    with edgemoe.load(tiny_moe, context=64, **on_device()) as engine:
        assert engine.model.store.cache.stream is None
    with_vram(monkeypatch, 4, tiny_moe)
    with edgemoe.load(tiny_moe, context=64, **on_device()) as engine:
        tiers = engine.model.store.cache
        assert tiers.rates.link > 0
        assert tiers.device.stats["budget_bytes"] == 2 * tiers.device.slot_bytes(1)

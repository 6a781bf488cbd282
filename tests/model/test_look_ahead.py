"""Reading ahead: what is asked for, and what is learnt from it. That answers stay the same is in test_engine.py."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe.plan import Routing
from edgemoe.scheduler import OnDemand, Setting
from edgemoe.scheduler.look_ahead import LookAhead

L, E, K = 3, 8, 2
SETTING = Setting(
    num_layers=L, num_experts=E, experts_per_token=K, bits=4, level_bits=(2, 3, 4),
    level_bytes=(4096, 8192, 12288), slots_bytes=6 * 12288,
)  # fmt: skip


def routing(layer, experts, ahead=None):
    chosen = np.array([experts], np.int32)
    guess = None if ahead is None else np.array([[ahead]], np.int32)
    gates = np.full((1, K), 0.5, np.float32)
    return Routing(layer, chosen, gates, guess, None if ahead is None else gates[None])


def absent(*resident):
    residency = np.zeros((L, E), np.int8)
    for layer, expert in resident:
        residency[layer, expert] = 3
    return residency


def test_the_next_layers_guess_is_wished_for_at_the_bits_in_use():
    plan = OnDemand(SETTING).plan(routing(1, [3, 4], [7, 0]), absent())
    assert plan.ahead.tolist() == [2 * E + 7, 2 * E + 0]
    assert plan.ahead_bits.tolist() == [4, 4]
    assert OnDemand(SETTING).plan(routing(2, [3, 4]), absent()).ahead is None
    assert OnDemand(SETTING, look_ahead=False).look_ahead == 0


def several(layer, experts, ahead=None):
    """Returns the routing of several sequences, each with one token."""
    gates = np.full((len(experts), K), 0.5, np.float32)
    guess = None if ahead is None else np.array([ahead], np.int32)
    return Routing(
        layer, np.array(experts, np.int32), gates, guess, None if ahead is None else gates[None],
        sequences=len(experts),
    )  # fmt: skip


def test_guesses_of_several_sequences_are_read_in_turn_and_each_once():
    plan = OnDemand(SETTING).plan(several(0, [[3, 4], [4, 1]], [[7, 0], [2, 7]]), absent())
    assert plan.ahead.tolist() == [E + 7, E + 2, E + 0]
    assert plan.ahead_bits.tolist() == [4, 4, 4]
    assert plan.experts.tolist() == [1, 3, 4]  # a single read for both sequences
    assert OnDemand(SETTING).plan(several(2, [[3, 4], [4, 1]]), absent()).ahead is None


def test_ranks_are_judged_by_all_sequences_that_guess():
    ahead = LookAhead(SETTING)
    for _ in range(14):  # the second rank is right for no sequence
        ahead.wishes(several(0, [[1, 2], [0, 3]], [[5, 6], [4, 2]]), absent())
        ahead.wishes(several(1, [[5, 7], [4, 1]], [[1, 2], [1, 2]]), absent((2, 2)))
        ahead.wishes(several(2, [[1, 0], [1, 4]]), absent())
        ahead.passed(2, 1.0, sequences=2)
    ahead.passed(2, 1.0)  # a prompt teaches nothing
    wishes, _ = ahead.wishes(several(0, [[1, 2], [0, 3]], [[5, 6], [4, 2]]), absent())
    assert wishes.tolist() == [E + 5, E + 4]
    wishes, _ = ahead.wishes(routing(0, [1, 2], [5, 6]), absent())  # a single sequence too
    assert wishes.tolist() == [E + 5]


def test_a_rank_that_is_mostly_wrong_is_left_out():
    ahead = LookAhead(SETTING)
    for _ in range(14):
        ahead.wishes(routing(0, [1, 2], [5, 6]), absent())
        ahead.wishes(routing(1, [5, 7], [1, 2]), absent((2, 2)))  # a wrong guess, but resident
        ahead.wishes(routing(2, [1, 0]), absent())
        ahead.passed(1, 1.0)
    wishes, _ = ahead.wishes(routing(0, [1, 2], [5, 6]), absent())
    assert wishes.tolist() == [E + 5]
    assert "right" in ahead.report()


@pytest.mark.parametrize(("right", "is_worth"), [(4, False), (6, True)])
def test_a_rank_is_worth_it_from_half_of_its_absent_experts(right, is_worth):
    """For `right` of every ten tokens the second rank predicts correctly; the first rank always does."""
    ahead = LookAhead(SETTING, trials=False)
    for token in range(400):
        ahead.wishes(routing(0, [1, 2], [5, 6]), absent())
        wanted = 6 if token * right % 10 < right else 7
        ahead.wishes(routing(1, [5, wanted], [1, 2]), absent((2, 1), (2, 2)))
        ahead.wishes(routing(2, [1, 2]), absent())
        ahead.passed(1, 1.0)
    wishes, _ = ahead.wishes(routing(0, [1, 2], [5, 6]), absent())
    assert (len(wishes) == 2) is is_worth


@pytest.mark.parametrize("gain", [-0.2, 0.2])
def test_it_stays_only_where_tokens_are_faster(gain):
    ahead = LookAhead(SETTING)
    states = []
    for _ in range(200):
        states.append(ahead.is_on)
        ahead.passed(1, 1.0 - gain * ahead.is_on)
    assert False in states  # it also tried to be off
    assert ahead.is_on == (gain > 0)
    assert ("off" in ahead.report()) == (gain < 0)


def test_a_trial_under_way_is_no_verdict():
    ahead = LookAhead(SETTING)
    while ahead.is_on:
        ahead.passed(1, 1.0)
    assert "off" not in ahead.report()


def test_a_prompt_that_wants_everything_reads_into_the_next_layer():
    scheduler = OnDemand(SETTING)
    everything = np.arange(E, dtype=np.int32).reshape(4, 2)
    gates = np.full((4, K), 0.5, np.float32)
    residency = absent((1, 0), (1, 2))
    plan = scheduler.plan(Routing(0, everything, gates), residency)
    assert plan.ahead.tolist() == [E + 1, E + 3, E + 4, E + 5]
    assert scheduler.plan(Routing(0, everything[:2], gates[:2]), residency).ahead is None
    assert scheduler.plan(Routing(2, everything, gates), residency).ahead is None

"""States of sequences: only passes that succeeded count, also for layers that cannot go back token by token."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe.model import Batch, SequenceState


class BrokenOff(Exception):
    """Raised where a pass breaks off, as if a read failed or Ctrl-C came."""


class Running:
    """A minimal recurrent state: the sum of all tokens, kept beside the sum before the last pass."""

    def __init__(self) -> None:
        self.sums = {0: 0}  # by length
        self.kept: set[int] = set()

    def forward(self, pos, ids) -> None:
        total = self.sums[pos] + sum(ids)
        marks = {n: s for n, s in self.sums.items() if n in self.kept or n in (0, pos)}
        self.sums = {**marks, pos + len(ids): total}

    def reaches(self, length):
        return max((n for n in self.sums if n <= length), default=0)

    def rewind(self, length):
        self.sums = {0: 0, **{n: s for n, s in self.sums.items() if 0 < n <= length}}
        self.kept = {n for n in self.kept if n <= length}

    def snapshot(self, length):
        self.kept.add(length)


class Positions:
    """A minimal state of keys and values: what was written at each position."""

    def __init__(self) -> None:
        self.at = {}

    def forward(self, pos, ids) -> None:
        self.at |= {pos + i: token for i, token in enumerate(ids)}

    def reaches(self, length):
        return length

    def rewind(self, length):
        pass

    def snapshot(self, length):
        pass


def sequence():
    return SequenceState([Positions(), Running(), Running()], 100)


def run(state, ids, *, stop_at=None):
    """Runs a pass through the layers; it breaks off before layer `stop_at`."""
    state.begin(len(ids))
    for i, layer in enumerate(state.layers):
        if i == stop_at:
            raise BrokenOff
        layer.forward(state.length, ids)
    state.commit(ids)


def check(state):
    """Checks that every layer stands for exactly the tokens that count."""
    assert state.rewind(state.length) == state.length
    kv, *sums = state.layers
    assert [kv.at[i] for i in range(state.length)] == state.ids
    assert all(layer.sums[state.length] == sum(state.ids) for layer in sums)


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_a_pass_that_breaks_off_leaves_every_layer_where_it_was(stop_at):
    state = sequence()
    run(state, [3, 5])
    for _ in range(3):
        with pytest.raises(BrokenOff):
            run(state, [7, 7, 7], stop_at=stop_at)
        assert (state.ids, state.is_dirty) == ([3, 5], True)
    run(state, [9])
    assert state.ids == [3, 5, 9]
    check(state)


def test_going_back_reaches_what_all_layers_can_go_on_from():
    state = sequence()
    run(state, [1, 2, 3, 4])
    state.snapshot()
    run(state, [5])
    run(state, [6])
    assert state.rewind(5) == 5  # the one before the pass is there
    check(state)
    run(state, [7])
    assert state.rewind(3) == 0  # before that there is only the start
    run(state, [8, 9])
    state.layers[1].sums.pop(2)  # a single layer that cannot go on from here
    assert state.rewind(2) == 0
    run(state, [1])
    check(state)


def test_a_snapshot_can_be_come_back_to_until_the_sequence_went_back_further():
    state = sequence()
    run(state, [1, 2])
    state.snapshot()
    run(state, [3])
    state.snapshot()
    for token in range(5):
        run(state, [token])
    assert state.rewind(7) == 7
    assert state.rewind(6) == 3
    check(state)
    run(state, [4])
    assert state.rewind(2) == 2
    check(state)
    run(state, [9])
    run(state, [9])
    assert state.rewind(3) == 3
    assert state.rewind(2) == 2


def test_what_a_broken_pass_has_cost_is_said():
    class Forgetful(Running):
        def forward(self, pos, ids):
            super().forward(pos, ids)
            self.sums.pop(pos)  # no room for two

    state = SequenceState([Forgetful(), Running()], 100)
    run(state, [4])
    with pytest.raises(BrokenOff):
        run(state, [5], stop_at=1)
    with pytest.raises(ValueError, match="broken off took the sequence back from 1 to 0 tokens"):
        state.begin(1)
    run(state, [6, 7])
    assert (state.ids, state.layers[1].sums[2]) == ([6, 7], 13)


def test_a_sequence_is_bounded_and_in_a_batch_once():
    state, other = sequence(), sequence()
    with pytest.raises(ValueError, match="101 tokens do not fit a context of 100"):
        state.begin(101)
    run(state, list(range(60)))
    with pytest.raises(ValueError, match="41 tokens do not fit a context of 100 with 60 tokens"):
        state.begin(41)
    ids = np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="each sequence once"):
        Batch.of((state, ids), (other, ids), (state, ids))
    with pytest.raises(ValueError, match="at least one token"):
        Batch.of((state, ids), (other, ids[:0]))
    batch = Batch.of((state, ids), (other, ids[:1]))
    assert batch.positions.tolist() == [60, 61, 0]
    assert [(s.start, s.stop) for s in batch.slices] == [(0, 2), (2, 3)]
    assert not batch.is_decoding
    assert Batch.of((state, ids[:1]), (other, ids[:1])).is_decoding

"""States of recurrent layers go back to a few lengths that were kept, and never overwrite what counts."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe.model import SequenceState
from edgemoe.model.recurrent import RecurrentState


class Arrays:
    """The only verb of `Ops` that a state uses; its arrays are not zeroed."""

    def __init__(self) -> None:
        self.made = 0

    def empty(self, *shape: int):
        self.made += 4 * int(np.prod(shape))
        return np.full(shape, np.nan, np.float32)


class Layer:
    """A layer whose state is the sum of its tokens, in arrays [1] and [2, 1]."""

    def __init__(self) -> None:
        self.ops = Arrays()
        self.state = RecurrentState(self.ops, (1,), (2, 1))

    def forward(self, pos, ids) -> None:
        before, after = self.state.step(pos, len(ids))
        for old, new in zip(before, after, strict=True):
            assert old is not new
            new[:] = sum(ids) + (0 if old is None else old)

    def sum(self, length) -> float:
        before, _ = self.state.step(length, 1)
        return 0.0 if before[0] is None else float(before[1][1, 0])


def sequence():
    layers = [Layer(), Layer()]
    return layers, SequenceState([layer.state for layer in layers], 1000)


def run(layers, state, ids, stop_at=None) -> None:
    state.begin(len(ids))
    for i, layer in enumerate(layers):
        if i == stop_at:
            raise InterruptedError
        layer.forward(state.length, ids)
    state.commit(ids)


def check(layers, state) -> None:
    assert state.rewind(state.length) == state.length
    assert [layer.sum(state.length) for layer in layers] == [sum(state.ids)] * 2
    assert state.rewind(state.length) == state.length  # the pass that `sum` began is void


def test_memory_is_what_is_said():
    layers, _ = sequence()
    assert layers[0].ops.made == RecurrentState.bytes((1,), (2, 1))
    assert RecurrentState.bytes((1,), (2, 1)) == 4 * RecurrentState.read_bytes((1,), (2, 1)) == 48


def test_a_pass_that_breaks_off_leaves_the_state_before_it():
    layers, state = sequence()
    assert state.needs_snapshots
    run(layers, state, [3, 5])
    for stop_at in (0, 1, 1):
        with pytest.raises(InterruptedError):
            run(layers, state, [7, 7], stop_at=stop_at)
        assert state.ids == [3, 5]
    run(layers, state, [9])
    check(layers, state)
    with pytest.raises(InterruptedError):
        run(layers, state, [7] * 9, stop_at=1)
    check(layers, state)


def test_the_last_snapshots_can_be_come_back_to():
    layers, state = sequence()
    for n in range(4):
        run(layers, state, [n + 1] * 2)
        state.snapshot()
        state.snapshot()
    run(layers, state, [9])
    run(layers, state, [9])
    assert state.rewind(9) == 9  # the state before the last pass is still there
    check(layers, state)
    assert state.rewind(7) == 6
    check(layers, state)
    run(layers, state, [5])
    check(layers, state)
    assert state.rewind(6) == 6
    assert state.rewind(5) == 0  # two are kept, those of 6 and of 8 tokens
    run(layers, state, [1])
    check(layers, state)


def test_snapshots_of_another_text_are_void():
    layers, state = sequence()
    run(layers, state, [1, 2])
    state.snapshot()
    run(layers, state, [3])
    state.snapshot()
    assert state.rewind(2) == 2
    run(layers, state, [4])
    run(layers, state, [5])
    run(layers, state, [6])
    assert state.ids == [1, 2, 4, 5, 6]
    assert state.rewind(3) == 2
    check(layers, state)

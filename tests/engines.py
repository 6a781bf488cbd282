"""Engines and caches of an exact size, and requests to them."""

from __future__ import annotations

import dataclasses

import numpy as np

import edgemoe
from edgemoe.model import Batch
from edgemoe.runtime.budget import Budget

GREEDY = edgemoe.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def with_slots(monkeypatch, num_bytes, chunk=None):
    """Gives the expert cache exactly `num_bytes`, or `num_bytes(budget)` if it is a function.

    Args:
        chunk: the chunk size of prompts; None leaves the budget's.
    """
    real = Budget.divide.__func__

    def divide(cls, moe, **kwargs):
        budget = real(cls, moe, **kwargs)
        slots = num_bytes(budget) if callable(num_bytes) else num_bytes
        return dataclasses.replace(budget, fixed_slots=slots, chunk=chunk or budget.chunk)

    monkeypatch.setattr(Budget, "divide", classmethod(divide))


def begin(cache, experts, levels, ahead=(), ahead_levels=()):
    cache.begin(
        np.array(experts, np.int32), np.array(levels, np.int8),
        np.arange(len(experts) + 1, dtype=np.int32), 1,
        ahead=np.array(ahead, np.int32), ahead_levels=np.array(ahead_levels, np.int8),
    )  # fmt: skip


def logits_in_turn(engine, ids):
    """Returns the logits, as bytes, of two sequences that decode eight tokens of `ids` in turn, then one together."""
    model, out = engine.model, []
    states = [model.make_state() for _ in range(2)]
    rows = np.empty((2, model.config.vocab_size), np.float32)
    for i in range(8):
        for j, state in enumerate(states):
            token = np.array([ids[3 * i + j]], np.int32)
            model.logits(model.forward(Batch.of((state, token))), rows[:1], state)
            out.append(rows[:1].tobytes())
    both = [(state, np.array([9], np.int32)) for state in states]
    model.logits(model.forward(Batch.of(*both)), rows, states[0])
    return [*out, rows.tobytes()]

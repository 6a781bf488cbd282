"""The sequences of a batcher: what each holds, which request has it, and which of them a prompt takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.model import SequenceState
from edgemoe.runtime.model import Counters
from edgemoe.runtime.requests import Request
from edgemoe.runtime.sequence import shared_length
from edgemoe.text.sampler import Sampler

__all__ = ["Slot", "SlotView", "best_slot"]

# The share of a sequence that a prompt must have in common with it; else it takes the least recently used one.
_WORTH_KEEPING = 0.1


class SlotView(NamedTuple):
    """What a sequence is doing, as of the last pass."""

    length: int
    """Tokens that it holds."""
    is_busy: bool
    prompt: int
    """Tokens of the prompt."""
    made: int
    """Tokens of the reply so far."""


class Slot:
    """One sequence, and the request that has it."""

    def __init__(self, state: SequenceState) -> None:
        self.state = state
        self.request: Request | None = None
        self.tokens: list[int] = []
        """Prompt and reply so far. Tokens beyond those that the state holds are still to be computed."""
        self.last_used = 0

    def start(
        self, request: Request, tokens: NDArray[np.int32], cached: int, now: Counters
    ) -> None:
        """Gives the sequence to a request.

        Args:
            request: the request.
            tokens: its prompt, [T].
            cached: how many of these tokens the sequence holds already.
            now: the model's counters at the start.
        """
        self.request, self.tokens, self.sampler = request, tokens.tolist(), Sampler(request.params)
        self.prompt, self.cached, self.before, self.beside = len(tokens), cached, now, 0
        self.started = self.first = self.last = time.perf_counter()
        self.limit = self.state.capacity - self.prompt
        if request.params.max_tokens >= 0:
            self.limit = min(self.limit, request.params.max_tokens)
        self.state.goal = self.prompt
        request.began, request.cached, request.computed = self.started, cached, cached
        request.has_begun = True
        self.state.begin_turn(self.prompt)

    @property
    def made(self) -> int:
        """Tokens of the reply so far."""
        return len(self.tokens) - self.prompt

    @property
    def is_filling(self) -> bool:
        """Whether the prompt is not yet computed, or more than the last token was lost."""
        held = self.state.length
        return held < self.prompt or held + 1 < len(self.tokens)

    def view(self) -> SlotView:
        """Returns what the sequence is doing."""
        is_busy = self.request is not None
        made = self.made if is_busy else 0
        return SlotView(self.state.length, is_busy, self.prompt if is_busy else 0, made)


def best_slot(
    config: ModelConfig, idle: Sequence[Slot], tokens: NDArray[np.int32], most: int, adapter: int
) -> tuple[Slot, int]:
    """Returns the idle sequence that a prompt should take, and how many tokens it shares.

    It is the one that shares the most, but no long text is given up for a short common beginning: if less than a tenth
    of that sequence is shared, the prompt takes an empty sequence or the least recently used one. What was computed
    with another adapter is not shared.

    Args:
        config: the model's.
        idle: the sequences without a request, at least one.
        tokens: the prompt, [T].
        most: how many tokens may be shared at most.
        adapter: the number of the adapter that the prompt is computed with.
    """
    shared = [
        shared_length(config, slot.state, tokens, most) if slot.state.adapter == adapter else 0
        for slot in idle
    ]
    at = max(range(len(idle)), key=lambda i: (shared[i], -idle[i].last_used))
    if shared[at] < _WORTH_KEEPING * idle[at].state.length:
        at = min(range(len(idle)), key=lambda i: (idle[i].state.length > 0, idle[i].last_used))
    return idle[at], shared[at]

"""One conversation with a model: its tokens and states, how its reply is sampled, and what its last call did."""

from __future__ import annotations

import time
from collections import abc
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.errors import quoted
from edgemoe.model import Batch, SequenceState
from edgemoe.runtime.meter import Meter
from edgemoe.runtime.model import Model
from edgemoe.runtime.requests import Constraint
from edgemoe.text.sampler import Sampler, SamplingParams

__all__ = ["Sequence", "shared_length", "token_ids"]


class Sequence:
    """Runs one sequence on a model that others may share. One thread at a time, that of the model."""

    def __init__(self, model: Model) -> None:
        """Takes one of the model's states; raises what `Model.make_state` does."""
        self.state = model.make_state()
        self.row = np.empty((1, model.config.vocab_size), np.float32)
        """The last logits, [1, V]: scratch."""
        self.meter = Meter(model, model.budget.kv // model.options.sequences)
        self.call = 0
        """Counts calls: what an earlier one began has ended."""
        self.is_cancelled: abc.Callable[[], bool] | None = None
        """Of the call; see `Batch.is_cancelled`."""
        self._model = model
        self._sampler = Sampler(SamplingParams())
        self._constraint: Constraint | None = None
        self._start = 0.0

    def begin(self, tokens: NDArray[np.int32], *, kept: int) -> int:
        """Starts a call, and keeps at most `kept` tokens of what is there if `tokens` [T] begin with them.

        Returns:
            How many were kept: the position of the first token that is to be computed.
        """
        self._start_call()
        shared = shared_length(self._model.config, self.state, tokens, kept)
        return self.state.rewind(shared)

    def go_on(self) -> None:
        """Starts a call that adds tokens to what is there."""
        self._start_call()

    def _start_call(self) -> None:
        self.call += 1
        self.is_cancelled = None
        self.meter.start()

    def evaluate(self, tokens: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Appends tokens [T], chunk by chunk; logits of the last ones go to `out` [1 or T, V]."""
        model, chunk, state = self._model, self._model.budget.chunk, self.state
        self.meter.prompt_progress = (0, len(tokens))
        state.goal = state.length + len(tokens)
        try:
            done = 0
            while done < len(tokens):
                first, done = done, done + state.span(min(chunk, len(tokens) - done))
                batch = Batch.of((state, tokens[first:done]))
                batch.is_cancelled = self.is_cancelled
                hidden = model.forward(batch)
                self.meter.prompt_progress = (done, len(tokens))
                with self.meter.row_lock:
                    if len(out) == len(tokens):
                        model.logits(hidden, out[first:done], state)
                    elif done == len(tokens):
                        model.logits(hidden[-1:], out, state)
        finally:
            state.goal = 0

    def prompt(self, tokens: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Does `evaluate` for the first tokens of a call, and counts them."""
        known, start = self.state.length, time.perf_counter()
        self.evaluate(tokens, out)
        self.meter.prompt(len(tokens), known, time.perf_counter() - start)

    def reply(self, params: SamplingParams, constraint: Constraint | None = None) -> None:
        """A reply begins, which is sampled so, of the tokens that a constraint allows."""
        self._constraint = constraint
        self._sampler = Sampler(params)
        self._start = time.perf_counter()

    def sample(self) -> int:
        """Returns the next token of the reply, from the last logits."""
        self.meter.hash(self.row[0])
        mask = None if self._constraint is None else self._constraint.allowed()
        token = self._sampler.sample(self.row[0], self.state.ids, allowed=mask)
        self.meter.token(time.perf_counter() - self._start)
        return token


def shared_length(
    config: ModelConfig, state: SequenceState, tokens: NDArray[np.int32], most: int
) -> int:
    """Returns with how many of the tokens that a state holds, `most` at most, `tokens` [T] begin and can go on."""
    if not config.turns_alike(state.turned, len(tokens)):
        return 0  # all that is there would be computed again
    held, given = state.ids[:most], tokens[: min(most, state.length)].tolist()
    if held[: len(given)] == given:
        return len(given)
    return next(
        i for i, (mine, theirs) in enumerate(zip(held, given, strict=False)) if mine != theirs
    )


def token_ids(
    ids: abc.Sequence[int] | NDArray[Any], vocab_size: int, context: int, known: int
) -> NDArray[np.int32]:
    """Returns tokens of a caller as an array [T].

    Args:
        known: how many are in the context before them.

    Raises:
        ValueError: there are none, they do not fit, or one is outside the vocabulary; says what came.
    """
    try:
        tokens = np.asarray(ids)
    except ValueError:  # lists of several lengths
        tokens = np.empty(0)
    if tokens.ndim != 1 or len(tokens) == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"ids: expected a list of at least one token, whole numbers; got {quoted(ids)}"
        )
    if len(tokens) > context - known:
        have = f" with {known} tokens in it" if known else ""
        raise ValueError(f"{len(tokens)} tokens do not fit a context of {context}{have}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = int(tokens[(tokens < 0) | (tokens >= vocab_size)][0])
        raise ValueError(f"ids: expected tokens from 0 to {vocab_size - 1}, got {wrong}")
    return tokens.astype(np.int32)

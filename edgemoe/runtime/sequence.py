"""One sequence on a model: its tokens and states, how its reply is sampled, and the figures of its last call."""

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
    """One sequence on a model, which other sequences may share. Used on the model's thread alone."""

    def __init__(self, model: Model) -> None:
        """Takes one of the model's states; raises what `Model.make_state` does."""
        self.state = model.make_state()
        self.row = np.empty((1, model.config.vocab_size), np.float32)
        """The last logits, [1, V]: scratch."""
        self.meter = Meter(model, model.budget.kv // model.options.sequences)
        self.call = 0
        """The number of the current call. A generator of an earlier call has ended."""
        self.is_cancelled: abc.Callable[[], bool] | None = None
        """Of the current call; see `Batch.is_cancelled`."""
        self._model = model
        self._sampler = Sampler(SamplingParams())
        self._constraint: Constraint | None = None
        self._start = 0.0

    def begin(self, tokens: NDArray[np.int32], *, kept: int) -> int:
        """Starts a call, and keeps the tokens that the sequence shares with `tokens` [T].

        Args:
            tokens: the new sequence.
            kept: the most tokens to keep.

        Returns:
            How many were kept: the position of the first token that must be computed.
        """
        self._start_call()
        shared = shared_length(self._model.config, self.state, tokens, kept)
        return self.state.rewind(shared)

    def go_on(self) -> None:
        """Starts a call that adds tokens to the sequence."""
        self._start_call()

    def _start_call(self) -> None:
        self.call += 1
        self.is_cancelled = None
        self.meter.start()

    def evaluate(self, tokens: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Appends tokens, chunk by chunk.

        Args:
            tokens: [T].
            out: [1, V] for the logits of the last token, or [T, V] for those of all.
        """
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
        """Does `evaluate` for the first tokens of a call, and counts them as its prompt."""
        known, start = self.state.length, time.perf_counter()
        self.evaluate(tokens, out)
        self.meter.prompt(len(tokens), known, time.perf_counter() - start)

    def reply(self, params: SamplingParams, constraint: Constraint | None = None) -> None:
        """Begins a reply: `sample` uses these parameters, and chooses among the tokens that the constraint allows."""
        self._constraint = constraint
        self._sampler = Sampler(params)
        self._start = time.perf_counter()

    def sample(self) -> int:
        """Returns the next token of the reply, sampled from the last logits."""
        self.meter.hash(self.row[0])
        mask = None if self._constraint is None else self._constraint.allowed()
        token = self._sampler.sample(self.row[0], self.state.ids, allowed=mask)
        self.meter.token(time.perf_counter() - self._start)
        return token


def shared_length(
    config: ModelConfig, state: SequenceState, tokens: NDArray[np.int32], most: int
) -> int:
    """Returns how many of a state's tokens `tokens` [T] can begin with, `most` at most.

    That is the length of their common beginning, or the longest one within it that the state can go back to; 0 where
    the number of `tokens` changes the frequencies of RoPE.
    """
    if not config.turns_alike(state.turned, len(tokens)):
        return 0  # all of it would be computed again anyway
    held, given = state.ids[:most], tokens[: min(most, state.length)].tolist()
    if held[: len(given)] == given:
        return state.reaches(len(given))
    pairs = enumerate(zip(held, given, strict=False))
    return state.reaches(next(i for i, (mine, theirs) in pairs if mine != theirs))


def token_ids(
    ids: abc.Sequence[int] | NDArray[Any], vocab_size: int, context: int, known: int
) -> NDArray[np.int32]:
    """Returns the tokens that a caller gave as a checked array [T].

    Args:
        ids: the tokens.
        vocab_size: tokens are from 0 to below this.
        context: the most tokens of the sequence.
        known: how many tokens are in the context before them.

    Raises:
        ValueError: there are none, they do not fit the context, or one is outside the vocabulary; says what came.
    """
    try:
        tokens = np.asarray(ids)
    except ValueError:  # lists of different lengths
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

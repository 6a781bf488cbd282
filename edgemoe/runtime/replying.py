"""The decoding loop of a single reply: compute, sample, yield the token, until something ends the reply."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from edgemoe.runtime.requests import Constraint
from edgemoe.runtime.sequence import Sequence
from edgemoe.text.sampler import SamplingParams
from edgemoe.text.stops import ReplyText

__all__ = ["reply"]


def reply(
    alone: Callable[[], AbstractContextManager[Sequence]],
    prompt: NDArray[np.int32],
    params: SamplingParams,
    *,
    context: int,
    eos: Collection[int],
    constraint: Constraint | None,
    text: ReplyText | None,
) -> Iterator[int]:
    """Yields the tokens after a prompt. The sequence is locked while a token is computed, and not between tokens.

    Args:
        alone: lends the sequence to one caller at a time.
        prompt: [T]: the tokens of the prompt that are still to be computed.
        params: how to sample; `max_tokens` of the reply, less than 0 for no limit.
        context: the most tokens of the prompt and the reply together.
        eos: tokens that end the reply and are not yielded.
        constraint: says which tokens may come next; None for all.
        text: looks for stop texts; None if there are none.
    """
    with alone() as sequence:
        sequence.reply(params, constraint)
        sequence.state.begin_turn(sequence.state.length + len(prompt))
        sequence.prompt(prompt, sequence.row)
        limit = context - sequence.state.length
        if params.max_tokens >= 0:
            limit = min(limit, params.max_tokens)
        token = sequence.sample() if limit > 0 else -1
    for made in range(1, limit + 1):
        if token in eos:
            return
        is_complete = constraint is not None and constraint.take(token)
        yield token
        if is_complete:
            return
        if text is not None:
            text.push(token)
            if text.is_stopped:
                return
        if made < limit:
            with alone() as sequence:
                sequence.evaluate(np.array([token], np.int32), sequence.row)
                token = sequence.sample()

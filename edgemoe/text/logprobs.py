"""Log-probabilities of tokens, from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.text.sampler import most_likely

__all__ = ["TokenLogprob", "log_softmax", "token_logprobs"]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns log-probabilities [T, V] of logits [T, V]."""
    out: NDArray[np.float64] = logits - logits.max(axis=1, keepdims=True).astype(np.float64)
    out -= np.log(np.exp(out).sum(axis=1, keepdims=True))
    return out


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model itself found a token: before temperature, penalties, masks and anything else."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log-probabilities, likeliest first; equal ones by id."""


def token_logprobs(
    logits: NDArray[np.float32], tokens: Sequence[int], top: int
) -> list[TokenLogprob]:
    """Returns the log-probabilities of `tokens` [T] under logits [T, V], each with those of the `top` likeliest."""
    found = []
    for row, token in zip(log_softmax(logits), tokens, strict=True):
        # `most_likely` does not sort where it returns the whole vocabulary.
        best = most_likely(row, top) if top < len(row) else np.argsort(-row, kind="stable")
        likeliest = tuple((int(i), float(row[i])) for i in best[:top])
        found.append(TokenLogprob(int(token), float(row[token]), likeliest))
    return found

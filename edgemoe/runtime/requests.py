"""Requests to a batcher and their outcomes: plain values, and functions that are called on the model's thread."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemoe.runtime.model import Counters
from edgemoe.text.logprobs import TokenLogprob
from edgemoe.text.sampler import SamplingParams

__all__ = ["Constraint", "Figures", "Outcome", "Request", "figures"]

_CHANGES = ("hits", "misses", "bytes_read", "wait_s", "bits")


class Constraint(Protocol):
    """A constraint on one reply: which tokens may come next."""

    def allowed(self) -> NDArray[np.int32] | None:
        """Returns a mask of the allowed tokens, as `Sampler.sample` takes it; None if all are allowed."""

    def take(self, token: int) -> bool:
        """Takes the token that was chosen; returns whether the reply is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The figures of one request.

    Hits, misses, reads, waits, bits and shares are those of its passes as a whole, and so include the requests that ran
    in the same passes.
    """

    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were not computed again."""
    new_tokens: int
    queue_s: float
    """Seconds that it waited for a sequence."""
    prompt_s: float
    """Seconds from the end of that wait to the first token."""
    decode_s: float
    """Seconds from the first token to the last."""
    beside: int
    """The most other requests in any of its passes."""
    hits: int
    misses: int
    bytes_read: int
    wait_s: float
    """Seconds for which computing stalled on reads."""
    average_bits: float
    skipped_share: float
    substituted_share: float
    changed: int
    """How often the model was changed so that answers differ, while the request waited or ran. The hash is of the last
    model."""
    logits_hash: str
    """CRC-32C of the last logits, in hexadecimal: the same alone or in a batch, for every budget and thread count."""


class Outcome(NamedTuple):
    """How a request ended, and what it took."""

    reason: Literal["stop", "length", "cancelled", "error"]
    figures: Figures
    error: Exception | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A prompt, and the reply that is wanted. `take`, `prompt_logprobs` and `end` are called on the model's thread."""

    ids: abc.Sequence[int]
    """The tokens of the prompt."""
    params: SamplingParams
    take: Callable[[int, TokenLogprob | None], bool]
    """Takes each token of the reply, except the one that ends it; returning False ends the reply."""
    end: Callable[[Outcome], None]
    """Is called once, after everything else."""
    top: int | None = None
    """How many of the likeliest tokens are reported with each token; None for no log-probabilities."""
    prompt_logprobs: Callable[[list[TokenLogprob]], None] | None = None
    """Takes the log-probabilities of the prompt's tokens, except the first, in parts. If it is given, the whole prompt
    is computed and nothing is reused."""
    constraint: Constraint | None = None
    slot: int | None = None
    """The number of the sequence that it waits for; None for the best one."""
    adapter: int = 0
    """The number of the adapter that it is computed with; 0 for the model alone."""
    reuses: bool = True
    """Whether it may begin with what was computed before for the same tokens."""
    is_cancelled: bool = False
    """May be set on any thread. A prompt then ends at the next layer, a reply at its next token."""
    has_begun: bool = False
    began: float = 0.0
    """When it got a sequence, by `time.perf_counter`."""
    cached: int = 0
    """Tokens of the prompt that were reused when it began."""
    computed: int = 0
    """Tokens of the prompt that are computed so far, the reused ones included."""
    changed: int = 0
    """See `Figures.changed`."""
    came: float = field(default_factory=time.perf_counter)
    """When it was made, by `time.perf_counter`."""


def figures(before: Counters, now: Counters, **own: Any) -> Figures:
    """Returns the figures of a request: what the model did between two readings of its counters, and its `own`."""
    change = {name: now.store[name] - before.store[name] for name in _CHANGES}
    uses, routed = change["hits"] + change["misses"], max(now.routed - before.routed, 1)
    return Figures(
        hits=int(change["hits"]), misses=int(change["misses"]), bytes_read=int(change["bytes_read"]),
        wait_s=float(change["wait_s"]), average_bits=change["bits"] / uses if uses else 0.0,
        skipped_share=(now.skipped - before.skipped) / routed,
        substituted_share=(now.substituted - before.substituted) / routed, **own,
    )  # fmt: skip

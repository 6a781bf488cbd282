"""What is asked of a batcher and what it answers: values, and what is called on the engine's thread."""

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
    """Says which tokens may come next in one reply."""

    def allowed(self) -> NDArray[np.int32] | None:
        """Returns a mask as `Sampler.sample` takes it; None for all tokens."""

    def take(self, token: int) -> bool:
        """Is told of the token that came; returns whether the reply is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Says what one request took. What was read was read for all that ran beside it too."""

    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were not computed again."""
    new_tokens: int
    queue_s: float
    prompt_s: float
    """From the queue's end to the first token."""
    decode_s: float
    """From the first token to the last."""
    beside: int
    """The most other requests in one pass."""
    hits: int
    misses: int
    bytes_read: int
    wait_s: float
    average_bits: float
    skipped_share: float
    substituted_share: float
    changed: int
    """How often the model's answers were changed while it waited or ran; the hash is of the last."""
    logits_hash: str
    """CRC-32C of the last logits: the same alone and in company, on every budget and thread count."""


class Outcome(NamedTuple):
    """Says how a request ended."""

    reason: Literal["stop", "length", "cancelled", "error"]
    figures: Figures
    error: Exception | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """Is a prompt and what is wanted of it. `take`, `prompt_logprobs` and `end` are called on the engine's thread."""

    ids: abc.Sequence[int]
    params: SamplingParams
    take: Callable[[int, TokenLogprob | None], bool]
    """Gets each token of the reply but the one that ends it; False ends the reply."""
    end: Callable[[Outcome], None]
    """Called once, after all else."""
    top: int | None = None
    """How many of the likeliest tokens go with each token; None for no log-probabilities."""
    prompt_logprobs: Callable[[list[TokenLogprob]], None] | None = None
    """Gets those of the prompt's tokens but the first, in parts; then nothing of the prompt is taken from before."""
    constraint: Constraint | None = None
    slot: int | None = None
    """The sequence that it waits for; None for the best one."""
    adapter: int = 0
    """The number of the one that it is computed with; 0 for the model alone."""
    reuses: bool = True
    """Begins with what was computed before of the same tokens."""
    is_cancelled: bool = False
    """May be set on any thread: the reply ends at the next layer of a prompt, the next token of a reply."""
    has_begun: bool = False
    began: float = 0.0
    cached: int = 0
    """Tokens of the prompt that were there when it began."""
    computed: int = 0
    """Tokens of the prompt that are there so far."""
    changed: int = 0
    """See `Figures.changed`."""
    came: float = field(default_factory=time.perf_counter)


def figures(before: Counters, now: Counters, **own: Any) -> Figures:
    """Returns what a request took: what the model did meanwhile, and its `own` figures."""
    change = {name: now.store[name] - before.store[name] for name in _CHANGES}
    uses, routed = change["hits"] + change["misses"], max(now.routed - before.routed, 1)
    return Figures(
        hits=int(change["hits"]), misses=int(change["misses"]), bytes_read=int(change["bytes_read"]),
        wait_s=float(change["wait_s"]), average_bits=change["bits"] / uses if uses else 0.0,
        skipped_share=(now.skipped - before.skipped) / routed,
        substituted_share=(now.substituted - before.substituted) / routed, **own,
    )  # fmt: skip

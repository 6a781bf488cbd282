"""The choice of the next token from logits: llama.cpp's filters, in its order, with its defaults."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.arguments import number, switch, texts, whole, wholes
from edgemoe.errors import RangeError, quoted

__all__ = ["Sampler", "SamplingParams", "most_likely"]

_BLOCK = 128  # logits per block maximum: 1,200 maxima for a vocabulary of 150,000


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a reply is sampled and when it ends. Names and defaults are llama.cpp's."""

    temperature: float = 0.8
    """0 takes the most likely token always."""
    top_k: int = 40
    """Keep this many of the most likely tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the smallest set of most likely tokens whose probabilities sum to at least this; 1 keeps all."""
    min_p: float = 0.05
    """Keep tokens whose probability is at least this share of the most likely one's; 0 keeps all."""
    repeat_penalty: float = 1.0
    """Divides (multiplies, where negative) the logits of recent tokens; 1 does nothing."""
    repeat_last_n: int = 64
    """How many of the last tokens count as recent for the three penalties; 0 for none, -1 for all."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every recent token."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a recent token for each time that it occurred."""
    seed: int = -1
    """The same seed gives the same reply; -1 takes a random one."""
    max_tokens: int = -1
    """The longest reply in tokens; -1 goes on until the model ends it or the context is full."""
    stop: tuple[str, ...] = ()
    """Texts that end the reply; they are not part of it."""
    ignore_eos: bool = False
    """Go on after the tokens with which the model ends a reply."""

    typical_p: float = 1.0
    """Keep the tokens whose surprise (negative log-probability) is nearest to its mean, the entropy, until their
    probabilities sum to this; 1 keeps all."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that are never taken."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that are not taken as the first of a reply."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that are never completed, in prompt and reply together."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token and what is added to its logit, before anything else; may be given as a mapping."""
    no_repeat_ngram_size: int = 0
    """No sequence of this many tokens occurs twice, in prompt and reply together; 0 allows all."""

    def __post_init__(self) -> None:
        """Checks every field, and turns numpy's numbers and lists into Python's numbers and tuples.

        Raises:
            ValueError: a field is of the wrong kind or outside its range; says which.
        """

        def put(name: str, read: Callable[..., object], *limits: object) -> None:
            object.__setattr__(self, name, read(f"sampling: {name}", getattr(self, name), *limits))

        put("temperature", number, 0, math.inf)
        for name in ("top_p", "min_p", "typical_p"):
            put(name, number, 0, 1)
        # Within these limits no logit overflows float32; sensible values are near 1 and 0.
        put("repeat_penalty", number, 0.01, 100)
        for name in ("presence_penalty", "frequency_penalty"):
            put(name, number, -1000, 1000)
        for name in ("top_k", "no_repeat_ngram_size"):
            put(name, whole, 0)
        for name in ("repeat_last_n", "seed", "max_tokens"):
            put(name, whole, -1)
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            put(name, wholes, 0)
        put("bad_words_ids", _sequences)
        put("logit_bias", _biases)
        put("stop", texts)
        put("ignore_eos", switch)

    def of_choice(self, choice: int) -> SamplingParams:
        """Returns those of a further reply to the same prompt, with another seed, whose caller looks for stop texts.

        Long fields are shared and not checked again, as thousands of replies may have them.
        """
        made = copy.copy(self)
        object.__setattr__(made, "stop", ())
        object.__setattr__(made, "seed", self.seed + choice if self.seed >= 0 else self.seed)
        return made

    @property
    def bans(self) -> bool:
        """Whether any token may be forbidden."""
        return bool(
            self.suppress_tokens
            or self.begin_suppress_tokens
            or self.bad_words_ids
            or self.no_repeat_ngram_size
        )


def _sequences(name: str, value: object) -> tuple[tuple[int, ...], ...]:
    items = list(value) if isinstance(value, (list, tuple)) else value
    if not isinstance(items, list) or not all(isinstance(i, (list, tuple)) and i for i in items):
        raise ValueError(f"{name}: expected a list of lists of tokens, got {quoted(value)}")
    return tuple(wholes(name, item, 0) for item in items)


def _biases(name: str, value: object) -> tuple[tuple[int, float], ...]:
    items = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(items, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in items
    ):
        raise ValueError(f"{name}: expected tokens and what to add to each, got {quoted(value)}")
    return tuple(
        (whole(name, token, 0), number(f"{name}: {token}", bias, -1000, 1000))
        for token, bias in items
    )


class Sampler:
    """The sampler of one reply's tokens. One thread at a time."""

    def __init__(self, params: SamplingParams) -> None:
        """Starts a reply; draws are a function of `params.seed` and of what `sample` is given."""
        self.params = params
        self._is_first = True
        # Python's generator gives the same numbers in every version; numpy's may change.
        self._random = random.Random(None if params.seed == -1 else params.seed)

    def sample(
        self,
        logits: NDArray[np.float32],
        history: Sequence[int] = (),
        *,
        allowed: NDArray[np.int32] | None = None,
    ) -> int:
        """Returns the next token.

        Args:
            logits: float32 [V], not changed.
            history: the tokens before this one, prompt included, for the penalties and the bans on repetition.
            allowed: a bit mask of the tokens to choose from: token i is bit i % 32 of word i // 32; None for all.

        Raises:
            ValueError: the shape is wrong, or no token is allowed.
            RangeError: the largest logit is not a finite number, as with damaged weights.
        """
        if logits.ndim != 1 or not len(logits):
            raise ValueError(f"sample: expected logits [V], got {list(logits.shape)}")
        params = self.params
        if params.logit_bias:
            logits = _biased(logits, params.logit_bias)
        logits = _penalised(logits, history, params)
        if params.bans:
            logits = _without(logits, _banned(history, params, is_first=self._is_first))
        if allowed is not None:
            logits = _among(logits, allowed)
        bans = params.bans or allowed is not None
        self._is_first = False
        best = int(logits.argmax())  # the lowest id among equals; that of a NaN, if any
        if not math.isfinite(logits[best]):
            if bans and logits[best] == -math.inf:
                raise ValueError("sample: no token is left that is not suppressed")
            raise RangeError(
                f"the logit of token {best} is {logits[best]}, not a finite number: "
                "the model's weights are damaged, or its numbers left the range of float32"
            )
        if params.temperature == 0 or params.top_k == 1:
            return best
        ids = most_likely(logits, params.top_k)
        gaps = logits[ids].astype(np.float64) - float(logits[best])
        if bans:
            ids, gaps = ids[gaps > -math.inf], gaps[gaps > -math.inf]
        if params.typical_p < 1:
            ids, gaps = _typical(ids, gaps, params.typical_p)
        ids, gaps = _filtered(ids, gaps, params)
        with np.errstate(over="ignore"):  # near temperature 0 all but the best become 0
            chance = np.cumsum(np.exp(gaps / params.temperature))
        at = np.searchsorted(chance, self._random.random() * chance[-1], side="right")
        return int(ids[min(int(at), len(ids) - 1)])


def _penalised(
    logits: NDArray[np.float32], history: Sequence[int], params: SamplingParams
) -> NDArray[np.float32]:
    """Returns the logits after the penalties: a copy, or the same array where none applies."""
    idle = params.repeat_penalty == 1 and not (params.presence_penalty or params.frequency_penalty)
    if idle or params.repeat_last_n == 0:
        return logits
    recent = history if params.repeat_last_n == -1 else history[-params.repeat_last_n :]
    ids, counts = np.unique(np.asarray(recent, dtype=np.int64), return_counts=True)
    inside = ids < len(logits)
    ids, counts = ids[inside], counts[inside]
    logits = logits.copy()
    hit = logits[ids]
    hit = np.where(hit > 0, hit / params.repeat_penalty, hit * params.repeat_penalty)
    logits[ids] = hit - counts * params.frequency_penalty - params.presence_penalty
    return logits


def _banned(history: Sequence[int], params: SamplingParams, *, is_first: bool) -> set[int]:
    """Returns the tokens that may not come next."""
    banned = set(params.suppress_tokens)
    if is_first:
        banned.update(params.begin_suppress_tokens)
    for *before, last in params.bad_words_ids:
        if not before or list(history[-len(before) :]) == before:
            banned.add(last)
    size = params.no_repeat_ngram_size
    if 0 < size <= len(history):
        ids = np.asarray(history, dtype=np.int64)
        starts = len(ids) - size + 1
        is_same = np.ones(starts, dtype=bool)
        for at in range(size - 1):  # where the last size - 1 tokens have occurred before
            is_same &= ids[at : at + starts] == ids[starts + at]
        banned.update(ids[size - 1 :][is_same].tolist())
    return banned


def _without(logits: NDArray[np.float32], banned: set[int]) -> NDArray[np.float32]:
    """Returns a copy of the logits in which banned tokens have no chance."""
    ids = np.fromiter(banned, np.int64, len(banned))
    logits = logits.copy()
    logits[ids[ids < len(logits)]] = -np.inf
    return logits


def _biased(
    logits: NDArray[np.float32], biases: Sequence[tuple[int, float]]
) -> NDArray[np.float32]:
    """Returns a copy of the logits with the biases added."""
    logits = logits.copy()
    for token, bias in biases:
        if token < len(logits):
            logits[token] += np.float32(bias)
    return logits


def _among(logits: NDArray[np.float32], allowed: NDArray[np.int32]) -> NDArray[np.float32]:
    """Returns a copy of the logits in which only the tokens of a bit mask have a chance."""
    bits = np.unpackbits(np.ascontiguousarray(allowed).view(np.uint8), bitorder="little")
    if len(bits) < len(logits):
        raise ValueError(f"sample: expected a mask of {len(logits)} tokens, got {len(bits)}")
    return np.where(bits[: len(logits)].view(bool), logits, np.float32(-np.inf))


def _typical(
    ids: NDArray[np.intp], gaps: NDArray[np.float64], mass: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Returns what typical_p keeps (Meister et al., arXiv 2202.00666); gaps are then to the likeliest token left."""
    weights = np.exp(gaps)
    chance = weights / weights.sum()
    surprise = math.log(float(weights.sum())) - gaps
    order = np.argsort(np.abs(surprise - float((chance * surprise).sum())), kind="stable")
    count = int(np.searchsorted(np.cumsum(chance[order]), mass)) + 1
    kept = np.sort(order[:count])  # in their former order
    return ids[kept], gaps[kept] - gaps[kept].max()


def most_likely(logits: NDArray[np.floating[Any]], k: int) -> NDArray[np.intp]:
    """Returns the k tokens with the largest logits, largest first, equal ones by id.

    For k = 0, and for k of at least the vocabulary, it returns all tokens in the order of their ids.
    """
    if k == 0 or k >= len(logits):
        return np.arange(len(logits))
    blocks = len(logits) // _BLOCK
    if k <= blocks:
        # At least k logits are at or above the k-th largest block maximum, so none of the top k
        # is below it: two passes of SIMD compares instead of a partition of the whole vocabulary.
        maxima = logits[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        floor = np.partition(maxima, blocks - k)[blocks - k]
    else:
        floor = np.partition(logits, len(logits) - k)[len(logits) - k]
    ids = np.flatnonzero(logits >= floor)
    return ids[np.argsort(-logits[ids], kind="stable")[:k]]


def _filtered(
    ids: NDArray[np.intp], gaps: NDArray[np.float64], params: SamplingParams
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Returns what top_p and min_p keep of `ids`; `gaps` are their logits less the largest."""
    if params.top_p == 1:
        near = gaps >= _log(params.min_p)
        return ids[near], gaps[near]
    weights = np.exp(gaps)
    total = float(weights.sum())
    # All tokens with less weight than this have, together, less than top_p leaves out. So only the
    # few others need sorting, even where top_k lets the whole vocabulary through.
    light = (1 - params.top_p) * total / len(ids)
    near = gaps >= _log(min(max(light, params.min_p), 1.0))
    ids, gaps, weights = ids[near], gaps[near], weights[near]
    order = np.argsort(-gaps, kind="stable")
    cut = int(np.searchsorted(np.cumsum(weights[order]), params.top_p * total)) + 1
    order = order[:cut]
    return ids[order], gaps[order]


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf

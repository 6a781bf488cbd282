"""Chooses the next token from logits: llama.cpp's filters, in its order, with its defaults."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import FormatError
from edgemoe.file.parse import parse_json

__all__ = ["Sampler", "SamplingParams"]

_MODEL_SETTINGS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Names in generation_config.json, and ours."""

_BLOCK = 128  # logits per block maximum: 1,200 maxima for a vocabulary of 150,000


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Says how a reply is sampled and when it ends. Names and defaults are llama.cpp's."""

    temperature: float = 0.8
    """0 takes the most likely token always."""
    top_k: int = 40
    """Keep this many of the most likely tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the fewest most likely tokens that have this probability together; 1 keeps all."""
    min_p: float = 0.05
    """Keep tokens at least this likely, relative to the most likely one; 0 keeps all."""
    repeat_penalty: float = 1.0
    """Divides (multiplies, where negative) the logits of recent tokens; 1 does nothing."""
    repeat_last_n: int = 64
    """How many last tokens the three penalties look at; 0 for none, -1 for all."""
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

    @classmethod
    def of_model(cls, generation_config: bytes | None) -> SamplingParams:
        """Returns the defaults, with what a model's generation_config.json says of sampling instead.

        What is not a valid setting there is left out: a file that others made must not stop a chat.
        """
        try:
            said = parse_json(generation_config or b"{}", "generation_config.json")
        except FormatError:
            return cls()
        params = cls()
        for theirs, ours in _MODEL_SETTINGS.items():
            if isinstance(said, dict) and said.get(theirs) is not None:
                with contextlib.suppress(ValueError, OverflowError):
                    params = replace(params, **{ours: said[theirs]})
        return params

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a field is outside its range; says which.
        """
        for name, low, high in (
            ("temperature", 0, math.inf),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repeat_penalty", 0, math.inf),
            ("presence_penalty", -math.inf, math.inf),
            ("frequency_penalty", -math.inf, math.inf),
        ):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or not low <= value <= high:
                span = f"from {low} to {high}" if math.isfinite(high) else "0 or more"
                span = span if math.isfinite(low) else "any finite one"
                raise ValueError(f"sampling: {name} must be a number, {span}; got {value!r}")
        if self.repeat_penalty == 0:
            raise ValueError("sampling: repeat_penalty must be above 0; got 0")
        for name, least in (("top_k", 0), ("repeat_last_n", -1), ("seed", -1), ("max_tokens", -1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"sampling: {name} must be a whole number, {least} or more; got {value!r}"
                )
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"sampling: stop must be a tuple of texts, got {self.stop!r}")
        if type(self.ignore_eos) is not bool:
            raise ValueError(f"sampling: ignore_eos must be True or False, got {self.ignore_eos!r}")


class Sampler:
    """Draws the tokens of one reply. One thread at a time."""

    def __init__(self, params: SamplingParams) -> None:
        """Starts a reply; draws are a function of `params.seed` and of what `sample` is given."""
        self.params = params
        # Python's generator gives the same numbers in every version; numpy's may change.
        self._random = random.Random(None if params.seed == -1 else params.seed)

    def sample(self, logits: NDArray[np.float32], history: Sequence[int] = ()) -> int:
        """Returns the next token.

        Args:
            logits: float32 [V], not changed.
            history: the tokens before, prompt included; only the penalties look at it.

        Raises:
            ValueError: the shape is wrong, or the largest logit is not a finite number.
        """
        if logits.ndim != 1 or not len(logits):
            raise ValueError(f"sample: expected logits [V], got {list(logits.shape)}")
        params = self.params
        logits = _penalised(logits, history, params)
        best = int(logits.argmax())  # the lowest id of equals; of a NaN, if there is one
        if not math.isfinite(logits[best]):
            raise ValueError(f"sample: logits must be finite, got {logits[best]} for token {best}")
        if params.temperature == 0 or params.top_k == 1:
            return best
        ids = _most_likely(logits, params.top_k)
        gaps = logits[ids].astype(np.float64) - float(logits[best])
        ids, gaps = _filtered(ids, gaps, params)
        with np.errstate(over="ignore"):  # next to no temperature: all but the best have no chance
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


def _most_likely(logits: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Returns the k tokens with the largest logits, largest first, equals by id; all for k = 0."""
    if k == 0 or k >= len(logits):
        return np.arange(len(logits))
    blocks = len(logits) // _BLOCK
    if k <= blocks:
        # The k-th largest block maximum has k logits at or above it, so none of the top k is
        # below: two passes of SIMD compares instead of a partition of the whole vocabulary.
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
    # Tokens lighter than this weigh, all together, less than what top_p leaves out: so only the
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

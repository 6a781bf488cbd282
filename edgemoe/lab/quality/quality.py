"""Measures what a level or a scheduler costs in quality, on the engine itself.

A text is cut into chunks, and the second half of each chunk is scored, so that every scored token has at least half a
chunk before it. This is the rule of llama.cpp's `llama-perplexity`, so figures can be compared with it. Nothing is
sampled: the same file, text and settings give the same figures on every instruction set.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgemoe.experts import Observer
from edgemoe.file.reader import open_moe
from edgemoe.lab.quality.logprobs import LogProbs, LogProbsWriter
from edgemoe.lab.quality.loss import standard_error
from edgemoe.places import Places
from edgemoe.plan import Plan, Routing
from edgemoe.runtime.engine import Engine
from edgemoe.runtime.options import EngineOptions
from edgemoe.text.logprobs import log_softmax
from edgemoe.text.tokenizer import Tokenizer

__all__ = [
    "Quality",
    "Routes",
    "Sample",
    "Trial",
    "agreement",
    "first_token",
    "measure",
    "recorded",
    "score",
]

Progress = Callable[[int, int], None]
"""Called after each chunk with how many chunks are done and how many there are."""

_LOGITS = 1 << 24  # at once, 64 MiB; a whole chunk with a large vocabulary would take 300 MiB
_BLOCK = 1 << 20  # at once in float64, where several arrays of this size are needed
_CAPACITY_OFFSET = 24.0  # bits; the published offset for mixed text
_SMALLEST = -16.0  # nats; as in llama.cpp, tokens that the reference finds less likely do not count


@dataclass(frozen=True, slots=True)
class Sample:
    """A text, cut into chunks of tokens."""

    windows: NDArray[np.int32]
    """[N, C]: the tokens of each chunk."""
    first_token: int | None
    """The token that the model expects before every text; it replaces each chunk's first token. None for none."""

    @classmethod
    def of_text(
        cls, text: str, tokenizer: Tokenizer, *, chunk: int, chunks: int | None = None
    ) -> Sample:
        """Cuts a text into chunks.

        Args:
            chunk: tokens of each chunk, at least 4.
            chunks: how many chunks; None for all that the text fills.

        Raises:
            ValueError: the text is too short, or a number is out of range.
        """
        if chunk < 4 or (chunks is not None and chunks < 1):
            raise ValueError(f"expected at least 1 chunk of at least 4 tokens, got {chunk} tokens")
        first = first_token(tokenizer)
        ids = tokenizer.encode(text, add_special=False)
        if first is not None:
            ids.insert(0, first)
        full = len(ids) // chunk
        if full < (chunks or 1):
            raise ValueError(
                f"the text has {len(ids)} tokens; expected at least {chunks or 1} × {chunk}"
            )
        count = chunks or full
        return cls(np.array(ids[: count * chunk], np.int32).reshape(count, chunk), first)

    @property
    def positions(self) -> int:
        """How many positions are scored."""
        count, chunk = self.windows.shape
        return int(count * (chunk - 1 - chunk // 2))


def first_token(tokenizer: Tokenizer) -> int | None:
    """Returns the token that a model expects before every text; None if it expects none."""
    around = tokenizer.encode("")
    return around[0] if around else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How well a model predicts a text, and how far it is from a reference. Fields are None if they do not apply."""

    positions: int
    """How many were scored."""
    chunks: int
    """How many chunks they are in, from whose means standard errors are computed."""
    perplexity: float
    """exp of the mean negative log-likelihood of the actual tokens."""
    kl: float | None = None
    """Mean KL divergence of the model's distribution from the reference's, in nats."""
    kl_error: float | None = None
    """Its standard error, from the means of chunks; see `standard_error` in `edgemoe.lab.quality.loss`."""
    kl_99: float | None = None
    """The 99th percentile over positions."""
    same_top: float | None = None
    """The share of positions where both models find the same token likeliest."""
    loss_change: float | None = None
    """Mean loss on the actual tokens, less the reference's: ln of the ratio of the two perplexities."""
    loss_error: float | None = None
    """Its standard error, likewise over pairs of the same position: far smaller than that of either perplexity."""
    bits_per_byte: float | None = None
    """The loss in bits per byte of scored text, which does not depend on the tokenizer; None without a tokenizer."""
    same_experts: float | None = None
    """Of the experts that the reference's routers chose, the share that this model's routers chose too. None if the
    reference is not a run of edgemoe, or no layer has routed experts."""
    capacity: float | None = None
    """Information capacity (arXiv 2511.08066), with bytes read in place of operations: (b - loss - 24) / log2 r. Here b
    is the bits of a token's text, the loss is in bits per token, and r is `read_per_token`. None if r is unknown or
    below 2."""
    average_bits: float
    """Mean bits over the experts that ran."""
    skipped_share: float
    """The share of the experts chosen by the model's routers that did not run."""
    read_per_token: float | None = field(default=None, compare=False)
    """Bytes of experts read per token, if tokens were scored one by one; else None."""
    slots_bytes: int = field(default=0, compare=False)
    """The bytes of memory that experts had."""


class Routes(Observer):
    """An observer that records the routers' choices while `is_on` is true."""

    def __init__(self) -> None:
        self.is_on = False
        self.places: Places | None = None
        """The places of the observed engine's experts; with an adapter they differ from the experts' own numbers."""
        self._layers: dict[int, list[NDArray[np.int32]]] = {}

    def planned(self, routing: Routing, plan: Plan, residency: NDArray[np.int8]) -> None:
        """See `Observer.planned`."""
        if self.is_on:
            experts = routing.experts.copy()
            if self.places is not None:
                experts = self.places.names[routing.layer].take(experts)
            self._layers.setdefault(routing.layer, []).append(experts)

    def taken(self) -> list[NDArray[np.int32]]:
        """Returns the recorded choices [n, K] of each layer."""
        return [np.concatenate(rows) for _, rows in sorted(self._layers.items())]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial(EngineOptions):
    """One way to run a model. The precisions must be given; the context is that of the text."""

    bits: int | Literal["auto"]
    dense_bits: int | Literal["auto"]
    whole_process: bool = True
    steady: bool = True
    decode: bool = False
    """Score token by token, as in a reply. The figures are the same unless the scheduler changes the answer."""


def measure(
    path: str | os.PathLike[str],
    trial: Trial,
    sample: Sample,
    *,
    reference: LogProbs | None = None,
    record: LogProbsWriter | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Runs one trial and returns its quality; the other arguments are those of `score`.

    Raises:
        ValueError: a setting is out of range, or the chunks are longer than the model's context.
        FormatError: the file is not a valid `.moe` file.
        OutOfBudget: the budget is too small; the message says the smallest that works.
        ReadError: the disk failed.
    """
    routes = Routes()
    with Engine(path, replace(trial, context=sample.windows.shape[1], observer=routes)) as engine:
        routes.places = engine.model.adapters.places
        step = 1 if trial.decode else None
        return score(
            engine, sample, reference=reference, record=record, step=step, routes=routes, progress=progress
        )  # fmt: skip


@contextlib.contextmanager
def recorded(
    path: str | os.PathLike[str], trial: Trial, sample: Sample, *, progress: Progress | None = None
) -> Iterator[tuple[Quality, LogProbs]]:
    """Runs one trial and yields its quality, and its predictions as a reference for others.

    The log-probabilities are in a temporary file for as long as the context lasts. For a large vocabulary they take
    gigabytes, and a second engine at the same time would have to share the budget.

    Raises:
        OSError: the disk is full; also all that `measure` raises.
    """
    vocab_size = open_moe(path).config.vocab_size
    with tempfile.NamedTemporaryFile(prefix="edgemoe-", suffix=".logprobs") as file:
        record = LogProbsWriter(file.file, sample.windows, vocab_size)
        quality = measure(path, trial, sample, record=record, progress=progress)
        with LogProbs(file.name) as reference:
            reference.losses, reference.routes = record.losses, record.routes
            yield quality, reference


def score(
    engine: Engine,
    sample: Sample,
    *,
    reference: LogProbs | None = None,
    record: LogProbsWriter | None = None,
    step: int | None = None,
    routes: Routes | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Scores a sample and returns the model's quality on it.

    Args:
        reference: predictions to compare with; their first chunks must be those of the sample.
        record: gets this model's log-probabilities, to be a reference later.
        step: how many tokens to evaluate at once in the scored half; None for as many as memory allows.
        routes: the engine's observer; None to ignore what routers choose.
        progress: see `Progress`.

    Raises:
        ValueError: the reference has another vocabulary or other tokens.
        ReadError: the disk failed.
    """
    windows, vocab_size = sample.windows, engine.config.vocab_size
    if reference is not None:
        _check(reference, windows, vocab_size)
    step = step or max(_LOGITS // vocab_size, 1)
    losses, changes, divergences, tops = [], [], [], []
    bits = uses = read = skipped = 0.0
    for i, window in enumerate(windows):
        at = 0
        for logits in _second_half(engine, window, sample.first_token, step, routes):
            stats = engine.stats
            count = stats.hits + stats.misses
            bits, uses = bits + count * stats.average_bits, uses + count
            read, skipped = read + stats.bytes_read, skipped + stats.skipped_share * len(logits)
            for part in _blocks(logits):
                mine = log_softmax(part)
                next_at = len(window) // 2 + 1 + at
                came = window[next_at : next_at + len(mine)]
                losses.append(-mine[np.arange(len(mine)), came])
                if record is not None:
                    record.add(mine)
                if reference is not None:
                    other = reference.rows(i, at, len(mine))
                    changes.append(losses[-1] - reference.loss(i, at, other))
                    divergences.append(_divergence(other, mine))
                    tops.append(other.argmax(axis=1) == mine.argmax(axis=1))
                at += len(mine)
        if progress is not None:
            progress(i + 1, len(windows))
    loss, read_each = float(np.concatenate(losses).mean()), read / sample.positions
    text_bits = _text_bits(engine.tokenizer, windows)
    alone = Quality(
        positions=sample.positions,
        chunks=len(windows),
        perplexity=float(np.exp(loss)),
        bits_per_byte=loss / math.log(2) / text_bits * 8 if text_bits else None,
        capacity=_capacity(text_bits, loss, read_each) if step == 1 else None,
        average_bits=bits / uses if uses else 0.0,
        skipped_share=skipped / sample.positions,
        read_per_token=read_each if step == 1 else None,
        slots_bytes=engine.budget.slots,
    )
    chosen = None if routes is None else routes.taken()
    if record is not None:
        record.routes = chosen
    if reference is None:
        return alone
    kl, change = np.concatenate(divergences), np.concatenate(changes)
    return replace(
        alone,
        kl=float(kl.mean()),
        kl_error=standard_error(kl, len(windows)),
        kl_99=float(np.percentile(kl, 99)),
        same_top=float(np.concatenate(tops).mean()),
        same_experts=agreement(reference.routes, chosen),
        loss_change=float(change.mean()),
        loss_error=standard_error(change, len(windows)),
    )


def _check(reference: LogProbs, windows: NDArray[np.int32], vocab_size: int) -> None:
    if reference.vocab_size != vocab_size:
        raise ValueError(
            f"reference: expected a vocabulary of {vocab_size} tokens, got {reference.vocab_size}"
        )
    if not np.array_equal(reference.windows[: len(windows)], windows):
        raise ValueError("reference: expected the same tokens in the same chunks")


def agreement(
    reference: list[NDArray[np.int32]] | None, chosen: list[NDArray[np.int32]] | None
) -> float | None:
    """Returns the share of the reference's choices that were chosen again, as a mean over layers; None without choices.

    Args:
        reference: for each layer, the experts [n, K] that the reference's routers chose.
        chosen: likewise; n may be smaller.
    """
    if not reference or not chosen:
        return None
    pairs = zip(reference, chosen, strict=True)
    same = [(a[:, :, None] == b[: len(a), None, :]).any(2).mean() for a, b in pairs]
    return float(np.mean(same))


def _text_bits(tokenizer: Tokenizer | None, windows: NDArray[np.int32]) -> float | None:
    """Returns the mean bits of a scored token's text in UTF-8; None without a tokenizer."""
    if tokenizer is None:
        return None
    half, total = windows.shape[1] // 2, 0
    for window in windows:
        # Decoding may drop a space before the first token, so one more token is decoded and its text subtracted.
        whole, before = (
            tokenizer.decode(ids.tolist(), skip_special=False)
            for ids in (window[half:], window[half : half + 1])
        )
        total += len(whole.encode()) - len(before.encode())
    return float(8 * total / (len(windows) * (windows.shape[1] - half - 1)))


def _capacity(text_bits: float | None, loss: float, read: float) -> float | None:
    if text_bits is None or read < 2:
        return None
    return float((text_bits - loss / math.log(2) - _CAPACITY_OFFSET) / math.log2(read))


def _second_half(
    engine: Engine,
    window: NDArray[np.int32],
    first_token: int | None,
    step: int,
    routes: Routes | None,
) -> Iterator[NDArray[np.float32]]:
    """Yields the logits [≤ step, V] at positions C // 2 to C - 2, which predict the tokens after these positions."""
    tokens = window.copy()
    if first_token is not None:
        tokens[0] = first_token
    half = len(tokens) // 2
    if routes is not None:
        routes.is_on = False
    engine.logits(tokens[:half], last_only=True)
    if routes is not None:
        routes.is_on = True
    for at in range(half, len(tokens) - 1, step):
        yield engine.extend(tokens[at : min(at + step, len(tokens) - 1)], last_only=False)


def _blocks(logits: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    rows = max(_BLOCK // logits.shape[1], 1)
    for first in range(0, len(logits), rows):
        yield logits[first : first + rows]


def _divergence(reference: NDArray[np.float64], model: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns KL(reference ‖ model) [T] in nats, for log-probabilities [T, V]."""
    terms = np.exp(reference)
    terms *= reference - model
    terms[reference <= _SMALLEST] = 0
    total: NDArray[np.float64] = terms.sum(axis=1)
    return total

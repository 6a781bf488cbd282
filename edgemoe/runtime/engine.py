"""The engine: one open model, one sequence, one budget."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.model import KvCache, KvTypes
from edgemoe.runtime.meter import Meter, Stats
from edgemoe.runtime.model import Model
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.runtime.trace import TraceWriter
from edgemoe.scheduler import Scheduler
from edgemoe.text.sampler import Sampler, SamplingParams

if TYPE_CHECKING:
    from edgemoe.runtime.chat import Chat

__all__ = ["Engine", "load"]


def load(path: str | os.PathLike[str], **options: Any) -> Engine:
    """Opens a model.

    Args:
        path: a `.moe` file.
        options: the fields of `EngineOptions`, which says what they mean.

    Raises:
        ValueError: an option is of the wrong kind or out of range.
        FormatError: the file is not a sound `.moe` file.
        OutOfBudget: says the smallest budget that works.
        ReadError: the disk failed.
    """
    return Engine(path, EngineOptions(**options))


class Engine:
    """Runs one model inside one budget. One thread at a time; several engines can live in one process.

    Also a context manager.
    """

    def __init__(self, path: str | os.PathLike[str], options: EngineOptions) -> None:
        """See `load`."""
        opened = open_model(path, options)
        model, text = opened.model, opened.text
        self._model: Model | None = model
        self._profile = opened.profile
        self.options = options
        self.config, self.budget, self.threads = model.config, model.budget, model.threads
        self.bits, self.notes, self._top_bits = model.bits, model.notes, model.top_bits
        self.tokenizer, self.sampling, self._eos = text.tokenizer, text.sampling, text.eos_ids
        self._kv = KvCache(self.config, model.ops, self.budget.context, options.kv_types)
        self._ids: list[int] = []  # what the KV cache holds
        self._logits = np.empty((1, self.config.vocab_size), np.float32)
        self._call = 0
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._meter = Meter(model.experts, self.budget.kv)

    sampling: SamplingParams
    """How replies are sampled unless said otherwise: the model's own settings, or the defaults."""
    notes: tuple[str, ...]
    """What the user chose that changes the answer, one line each; empty when exact."""

    @property
    def model(self) -> Model:
        """What runs: weights, store, scheduler.

        Raises:
            ValueError: the engine is closed.
        """
        if self._model is None:
            raise ValueError("the engine is closed")
        return self._model

    @property
    def scheduler(self) -> Scheduler:
        """Who decides."""
        return self.model.scheduler

    @property
    def scheduler_name(self) -> str:
        """As it was asked for."""
        return self.options.scheduler

    @property
    def kv_types(self) -> KvTypes:
        """How the KV cache holds keys and values."""
        return self.options.kv_types

    @property
    def context(self) -> int:
        """Tokens of prompt and reply together."""
        return self.budget.context

    @property
    def expert_bits(self) -> NDArray[np.int8]:
        """The most bits that each expert may run at, [layers with experts, E]."""
        return self._top_bits.reshape(-1, self.config.num_experts)

    @property
    def isa(self) -> str:
        """The instruction set of the kernels in use."""
        return _core.isa()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that computing one token reads from memory, at the bits in use."""
        return self.model.bytes_per_token

    def kv_bytes(self, length: int) -> int:
        """Returns the bytes of keys and values that attention reads for a token after `length` others."""
        return self.model.kv_bytes(length)

    @property
    def stats(self) -> Stats:
        """What the last call of `generate` or `logits` did."""
        return self._meter.stats()

    @property
    def source(self) -> Mapping[str, Any]:
        """Where the weights came from, as the file says."""
        return self.model.moe.source

    def logits(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], *, last_only: bool = False
    ) -> NDArray[np.float32]:
        """Computes a new sequence from its start.

        Args:
            ids: [T] tokens, T from 1 to `context`.
            last_only: return the last position alone.

        Returns:
            float32 [T, V], or [1, V]; the caller's own.

        Raises:
            ValueError: too many tokens, none, or one outside the vocabulary.
            ReadError: the disk failed; the engine stays usable.
        """
        with self._alone():
            tokens = self._begin(ids, keep_prefix=False)
            out = np.empty((1 if last_only else len(tokens), self.config.vocab_size), np.float32)
            start = time.perf_counter()
            self._evaluate(tokens, out)
            self._meter.prompt(len(tokens), 0, time.perf_counter() - start)
            self._meter.hash(out[-1].copy())
        return out

    def extend(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], *, last_only: bool = True
    ) -> NDArray[np.float32]:
        """Adds tokens to the sequence of the last call and returns the logits of the last, float32 [1, V].

        For decoding loops of one's own. The result is scratch, valid until the next call.

        Args:
            ids: [T] tokens, at least one.
            last_only: False for the logits of all of them, float32 [T, V]; the caller's own.

        Raises:
            ValueError: too many tokens, none, or one outside the vocabulary.
            ReadError: the disk failed; the engine stays usable.
        """
        with self._alone():
            known = len(self._ids)
            tokens = self._checked(ids, self.context - known)
            self._kv.length = known  # Ctrl-C may have come between the two
            self._call += 1
            self._meter.start()
            out = self._logits
            if not last_only:
                out = np.empty((len(tokens), self.config.vocab_size), np.float32)
            start = time.perf_counter()
            self._evaluate(tokens, out)
            self._meter.prompt(len(tokens), known, time.perf_counter() - start)
            self._meter.hash(out[-1] if last_only else out[-1].copy())
        return out

    def generate(self, ids: Sequence[int], params: SamplingParams | None = None) -> Iterator[int]:
        """Yields tokens as they are made, until an end token, `max_tokens` or the end of the context.

        What the sequence shares with the one before is not computed again; the result is the same, bit for bit.

        Args:
            ids: [T] the prompt, T from 1 to `context` - 1.
            params: how to sample; None for `sampling`.

        Raises:
            ValueError: too many tokens, none, or one outside the vocabulary.
            ReadError: the disk failed; the engine stays usable.
        """
        params = params or self.sampling
        if len(ids) >= self.context:
            raise ValueError(
                f"a prompt of {len(ids)} tokens does not fit a context of {self.context} with a reply"
            )
        with self._alone():
            tokens = self._begin(ids, keep_prefix=True)
        return self._generate(tokens, params, self._call)

    def _generate(
        self, tokens: NDArray[np.int32], params: SamplingParams, call: int
    ) -> Iterator[int]:
        meter = self._meter
        sampler = Sampler(params)
        history = tokens.tolist()
        limit = self.context - len(history)
        if params.max_tokens >= 0:
            limit = min(limit, params.max_tokens)
        eos = frozenset() if params.ignore_eos else self._eos
        row = self._logits
        start = time.perf_counter()
        with self._alone(call):
            cached = self._kv.length
            self._evaluate(tokens[cached:], row)
        now = time.perf_counter()
        meter.prompt(len(tokens) - cached, cached, now - start)
        for _ in range(limit):
            meter.hash(row[0])
            token = sampler.sample(row[0], history)
            meter.token(time.perf_counter() - start)
            if token in eos:
                return
            history.append(token)
            yield token
            if len(history) - len(tokens) >= limit:
                return
            with self._alone(call):
                self._evaluate(np.array([token], np.int32), row)

    @contextlib.contextmanager
    def _alone(self, call: int | None = None) -> Iterator[None]:
        """Keeps other threads out, and a generator of an earlier call."""
        _ = self.model
        if os.getpid() != self._pid:
            raise RuntimeError("the engine belongs to the process that opened it")
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("the engine is in use by another thread")
        try:
            if call not in (None, self._call):
                raise RuntimeError("generate: the engine was used for something else meanwhile")
            yield
        finally:
            self._lock.release()

    def _checked(self, ids: Sequence[int] | NDArray[Any], room: int) -> NDArray[np.int32]:
        """Returns tokens as an array, of which there may be at most `room`."""
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or len(tokens) == 0 or not np.issubdtype(tokens.dtype, np.integer):
            what = "an empty list" if tokens.size == 0 else f"{tokens.dtype} {list(tokens.shape)}"
            raise ValueError(
                f"ids: expected a list of at least one token, whole numbers; got {what}"
            )
        if len(tokens) > room:
            have = f" with {self.context - room} tokens in it" if room < self.context else ""
            raise ValueError(f"{len(tokens)} tokens do not fit a context of {self.context}{have}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"ids: expected tokens from 0 to {self.config.vocab_size - 1}")
        return tokens.astype(np.int32)

    def _begin(self, ids: Sequence[int] | NDArray[Any], *, keep_prefix: bool) -> NDArray[np.int32]:
        """Checks a sequence and takes the KV cache back to what it shares with the last one."""
        tokens = self._checked(ids, self.context)
        self._call += 1
        shared = 0
        if keep_prefix:  # the last token is always computed, for its logits
            for mine, theirs in zip(self._ids, tokens[:-1].tolist(), strict=False):
                if mine != theirs:
                    break
                shared += 1
        self._kv.length = shared
        del self._ids[shared:]
        self._meter.start()
        return tokens

    def _evaluate(self, tokens: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Appends tokens to the sequence; logits of the last ones go to `out` [1 or len(tokens), V]."""
        model, chunk, trace = self.model, self.budget.chunk, self._trace
        for first in range(0, len(tokens), chunk):
            part = tokens[first : first + chunk]
            if trace is not None:
                trace.begin(self._kv.length, part)
            if self._kv.length == 0:
                model.scheduler.begin()
            start = time.perf_counter()
            model.scheduler.tokens(part)
            hidden = model.decoder.forward(part, self._kv)
            model.scheduler.passed(len(part), time.perf_counter() - start)
            self._ids.extend(part.tolist())
            if len(out) == len(tokens):
                model.decoder.logits(hidden, out[first : first + len(part)])
            elif first + chunk >= len(tokens):
                model.decoder.logits(hidden[-1:], out)
            if trace is not None:
                trace.end()

    def record(self, path: str | os.PathLike[str], *, look_ahead: int = 0) -> None:
        """Records from now on what is routed, resident and waited for; see `edgemoe.runtime.trace`.

        Args:
            look_ahead: for the record, how many of the next layers' routers are asked for each layer's input; at
                least as many as the scheduler asks for.

        Raises:
            ValueError: the engine has an observer or a trace already, or there is a file that is not a trace.
            OSError: the file cannot be written.
        """
        self.model.record(path, look_ahead=look_ahead)

    def warm(self) -> int:
        """Loads the experts that were used most, until the slots are full; changes no answer.

        They are loaded at the highest bits that they may run at, the most used first; Ctrl-C leaves those that came.

        Returns:
            The bytes read: 0 when the profile knows of no use yet, or all is there.

        Raises:
            ValueError: the engine has no profile.
            ReadError: the disk failed; the engine stays usable.
        """
        if self._profile is None:
            raise ValueError("warm: expected an engine with a profile")
        with self._alone():
            return self.model.warm()

    def chat(self, *, system: str | None = None, params: SamplingParams | None = None) -> Chat:
        """Opens a conversation.

        Raises:
            FormatError: the file has no tokenizer.
        """
        from edgemoe.runtime.chat import Chat

        return Chat(self, system=system, params=params or self.sampling)

    def close(self) -> None:
        """Saves the profile and gives all memory back; the engine cannot be used afterwards.

        Raises:
            OSError: the profile cannot be written; what was there stays, and the engine is closed.
        """
        self._call += 1
        model, profile = self._model, self._profile
        if model is None:
            return
        learned = None
        if profile is not None and os.getpid() == self._pid:
            learned = profile.learned(model.store, model.scheduler)
        self._meter.freeze()
        if self._trace is not None:
            self._trace.close()
        self._model = None
        del self._kv, model
        if profile is not None and learned is not None:
            profile.write(learned)

    @property
    def _trace(self) -> TraceWriter | None:
        observer = self.model.experts.observer
        return observer if isinstance(observer, TraceWriter) else None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

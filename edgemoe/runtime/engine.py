"""The engine: one open model, one sequence, one budget."""

from __future__ import annotations

import functools
import os
from collections import abc
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.arguments import kind, path_of, whole
from edgemoe.errors import quoted
from edgemoe.runtime.change import change
from edgemoe.runtime.held import Held
from edgemoe.runtime.meter import Stats
from edgemoe.runtime.model import Model
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.runtime.replying import reply
from edgemoe.runtime.requests import Constraint
from edgemoe.runtime.sequence import token_ids
from edgemoe.scheduler import Scheduler
from edgemoe.text.sampler import SamplingParams
from edgemoe.text.stops import ReplyText

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
        opened = open_model(path_of("path", path), kind("options", options, EngineOptions))
        self._held = Held(opened)
        model, text = opened.model, opened.text
        self.budget, self.threads = model.budget, model.threads
        self._describe(model)
        self.tokenizer, self.sampling, self._eos = text.tokenizer, text.sampling, text.eos_ids
        self.sampling_notes = text.notes

    sampling: SamplingParams
    """How replies are sampled unless said otherwise: the model's own settings, or the defaults."""
    sampling_notes: tuple[str, ...]
    """What of the model's own settings is not honoured, one line each."""
    notes: tuple[str, ...]
    """What the user chose that changes the answer, one line each; empty when exact."""

    def _describe(self, model: Model) -> None:
        self.options, self.config = model.options, model.config
        self.bits, self.notes, self._top_bits = model.bits, model.notes, model.top_bits

    @property
    def model(self) -> Model:
        """What runs: weights, store, scheduler.

        Raises:
            ValueError: the engine is closed.
        """
        return self._held.model

    @property
    def scheduler(self) -> Scheduler:
        """Who decides."""
        return self.model.scheduler

    @property
    def context(self) -> int:
        """Tokens of prompt and reply together."""
        return self.budget.context

    @property
    def expert_bits(self) -> NDArray[np.int8]:
        """The most bits that each expert may run at, [layers with experts, E]."""
        return self._top_bits.reshape(len(self.config.moe_layers), -1)[:, : self.config.num_experts]

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
        return self.model.kv_bytes(whole("length", length, 0))

    @property
    def stats(self) -> Stats:
        """What the last call of `generate` or `logits` did, as of its last pass through the layers.

        Any thread may ask at any time.
        """
        return self._held.meter.stats()

    @property
    def progress(self) -> tuple[int, int]:
        """How many tokens of what is computed now are done, and how many there are; any thread may ask."""
        return self._held.meter.prompt_progress

    @property
    def source(self) -> Mapping[str, Any]:
        """Where the weights came from, as the file says."""
        return self.model.moe.source

    def logits(
        self, ids: abc.Sequence[int] | NDArray[np.integer[Any]], *, last_only: bool = False
    ) -> NDArray[np.float32]:
        """Computes a new sequence from its start.

        With LongRoPE all positions have the frequencies of the sequence's length, as in transformers: the logits of
        the first tokens depend on how many follow.

        Args:
            ids: [T] tokens, T from 1 to `context`.
            last_only: return the last position alone.

        Returns:
            float32 [T, V], or [1, V]; the caller's own.

        Raises:
            ValueError: too many tokens, none, or one outside the vocabulary.
            ReadError: the disk failed; the engine stays usable.
        """
        with self._held.alone() as sequence:
            tokens = self._tokens(ids)
            sequence.begin(tokens, kept=0)
            out = np.empty((1 if last_only else len(tokens), self.config.vocab_size), np.float32)
            sequence.prompt(tokens, out)
            sequence.meter.hash(out[-1].copy())
        return out

    def extend(
        self, ids: abc.Sequence[int] | NDArray[np.integer[Any]], *, last_only: bool = True
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
        with self._held.alone() as sequence:
            tokens = self._tokens(ids, known=sequence.state.length)
            sequence.go_on()
            out = sequence.row
            if not last_only:
                out = np.empty((len(tokens), self.config.vocab_size), np.float32)
            sequence.prompt(tokens, out)
            sequence.meter.hash(out[-1] if last_only else out[-1].copy())
        return out

    def lend(self, size: int) -> None:
        """Makes room for `size` bytes that the caller needs until the next call; experts have it back then."""
        size = whole("size", size, 0)
        with self._held.alone():
            self.model.room.lend(size)

    def generate(
        self, ids: abc.Sequence[int], params: SamplingParams | None = None, *,
        constraint: Constraint | None = None, is_cancelled: abc.Callable[[], bool] | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """Yields tokens as they are made, until an end token, a stop text, `max_tokens` or the end of the context.

        The token that completes a stop text is the last.

        What the sequence shares with the one before is not computed again; the result is the same, bit for bit.

        Args:
            ids: [T] the prompt, T from 1 to `context` - 1.
            params: how to sample; None for `sampling`.
            constraint: says which tokens may come next; None for all.
            is_cancelled: asked before each layer, of the prompt too; True ends the call with Cancelled.

        Raises:
            ValueError: too many tokens, none, or one outside the vocabulary; stop texts without a tokenizer.
            ReadError: the disk failed; the engine stays usable.
            Cancelled: likewise, and what was computed is not computed again.
        """
        params = self.sampling if params is None else kind("params", params, SamplingParams)
        if not (is_cancelled is None or callable(is_cancelled)):
            raise ValueError(f"is_cancelled: expected a function, got {quoted(is_cancelled)}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop: expected no texts, as the model has no tokenizer")
        _ = self.model  # or it says that it is closed
        tokens = self._tokens(ids)
        if len(tokens) >= self.context:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens does not fit a context of {self.context} with a reply"
            )
        with self._held.alone() as sequence:
            # The last token is always computed, for its logits.
            cached = sequence.begin(tokens, kept=len(tokens) - 1)
            sequence.is_cancelled = is_cancelled
        text = None
        if params.stop and self.tokenizer is not None:
            text = ReplyText(self.tokenizer, params.stop, continues=True)
        return reply(
            functools.partial(self._held.alone, sequence.call), tokens[cached:], params, context=self.context,
            eos=frozenset() if params.ignore_eos else self._eos, constraint=constraint, text=text,
        )  # fmt: skip

    def _tokens(self, ids: abc.Sequence[int] | NDArray[Any], known: int = 0) -> NDArray[np.int32]:
        """Returns tokens as an array, which come after `known` others."""
        return token_ids(ids, self.config.vocab_size, self.context, known)

    def change(self, **wanted: Any) -> None:
        """Changes `bits`, `experts`, `scheduler` or its `options`: from now on it is the engine that `load` opens so.

        What is in memory stays as far as it is of use. A reply under way ends: its generator raises RuntimeError.

        Raises:
            ValueError: something cannot be changed, or not to this, such as more bits than the engine was opened with.
            RuntimeError: the engine is in use by another thread.
        """
        with self._held.alone() as sequence:
            change(self.model, **wanted)
            sequence.call += 1
            self._describe(self.model)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of those that the engine was opened with."""
        return self.model.adapters.names

    @property
    def adapter(self) -> str | None:
        """With which of them the sequence is computed; None for none. To set another one ends a reply under way.

        What is shared stays in memory; a text so far is computed again when it is wanted.

        Raises:
            ValueError: there is none of that name, or the engine is closed.
            RuntimeError: the engine is in use by another thread.
        """
        sequence, names = self._held.sequence, self.model.adapters.names
        number = 0 if sequence is None else sequence.state.adapter
        return names[number - 1] if number else None

    @adapter.setter
    def adapter(self, name: str | None) -> None:
        with self._held.alone() as sequence:
            sequence.state.use(self.model.adapters.number(name))
            sequence.call += 1

    def record(self, path: str | os.PathLike[str], *, look_ahead: int = 0) -> None:
        """Records from now on what is routed, resident and waited for; see `edgemoe.runtime.trace`.

        Args:
            look_ahead: for the record, how many of the next layers' routers are asked for each layer's input; at
                least as many as the scheduler asks for.

        Raises:
            ValueError: the engine has an observer or a trace already, or there is a file that is not a trace.
            OSError: the file cannot be written.
            RuntimeError: the engine is in use by another thread.
        """
        with self._held.alone():
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
        return self._held.warm()

    def chat(self, *, system: str | None = None, params: SamplingParams | None = None) -> Chat:
        """Opens a conversation.

        Raises:
            FormatError: the file has no tokenizer.
        """
        from edgemoe.runtime.chat import Chat

        return Chat(self, system=system, params=params)

    def close(self) -> None:
        """Saves the profile and gives all memory back; the engine cannot be used afterwards.

        What another thread is computing is waited for; it finds the engine closed when it wants to go on.

        Raises:
            OSError: the profile or the trace cannot be written; what was there stays, and the engine is closed.
            RuntimeError: called by what the engine calls, such as an observer.
        """
        self._held.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

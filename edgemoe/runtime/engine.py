"""The engine: one open model with one sequence, inside one memory budget."""

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
        options: fields of `EngineOptions`, where each is described.

    Raises:
        ValueError: an option is of the wrong type or out of range.
        FormatError: the file is not a sound `.moe` file.
        OutOfBudget: the model does not fit; says the smallest budget that works.
        ReadError: the disk failed.
    """
    return Engine(path, EngineOptions(**options))


class Engine:
    """One open model with one sequence, inside one memory budget. Also a context manager.

    One thread at a time may use it. Several engines can live in one process.
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
    """How replies are sampled by default: the model's own settings, or those of `SamplingParams`."""
    sampling_notes: tuple[str, ...]
    """The model's own sampling settings that are not honoured, one line each."""
    notes: tuple[str, ...]
    """The chosen options that change the answer, one line each; empty if the engine is exact."""

    def _describe(self, model: Model) -> None:
        self.options, self.config = model.options, model.config
        self.bits, self.notes, self._top_bits = model.bits, model.notes, model.top_bits

    @property
    def model(self) -> Model:
        """The model itself: weights, expert store, scheduler.

        Raises:
            ValueError: the engine is closed.
        """
        return self._held.model

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, which decides which experts are read when, and at how many bits."""
        return self.model.scheduler

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its reply together."""
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
        """Bytes of weights that computing one token reads from memory, at the bits in use: the mean over experts."""
        return self.model.bytes_per_token

    def kv_bytes(self, length: int) -> int:
        """Returns the bytes of keys and values that attention reads for a token after `length` others."""
        return self.model.kv_bytes(whole("length", length, 0))

    @property
    def stats(self) -> Stats:
        """What the last call of `generate`, `logits` or `extend` did, as of its last pass through the layers.

        Any thread may read it at any time.
        """
        return self._held.meter.stats()

    @property
    def progress(self) -> tuple[int, int]:
        """How many tokens of the current input are computed, and how many there are. Any thread may read it."""
        return self._held.meter.prompt_progress

    @property
    def source(self) -> Mapping[str, Any]:
        """The origin of the weights, such as the checkpoint's name, as the file gives it."""
        return self.model.moe.source

    def logits(
        self, ids: abc.Sequence[int] | NDArray[np.integer[Any]], *, last_only: bool = False
    ) -> NDArray[np.float32]:
        """Starts a new sequence and returns its logits.

        With LongRoPE, all positions are rotated at the frequencies for the sequence's length, as in transformers. Then
        the logits of the first tokens depend on how many tokens follow.

        Args:
            ids: [T] tokens, T from 1 to `context`.
            last_only: return the logits of the last position alone.

        Returns:
            float32 [T, V], or [1, V] with `last_only`; a new array.

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
        """Adds tokens to the sequence of the last call and returns the logits of the last one, for decoding loops.

        Args:
            ids: [T] tokens, at least one.
            last_only: return the logits of the last position alone.

        Returns:
            float32 [1, V], which the next call overwrites; or, without `last_only`, a new array [T, V].

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
        """Frees `size` bytes of the budget for the caller, until the next call; raises OutOfBudget if it lacks them."""
        size = whole("size", size, 0)
        with self._held.alone():
            self.model.room.lend(size)

    def generate(
        self, ids: abc.Sequence[int], params: SamplingParams | None = None, *,
        constraint: Constraint | None = None, is_cancelled: abc.Callable[[], bool] | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """Yields tokens as they are made, until an end token, a stop text, `max_tokens` or the end of the context.

        An end token is not yielded; the token that completes a stop text is. The prefix that `ids` share with the
        sequence of the last call is not computed again. The result is the same, bit for bit.

        Args:
            ids: [T] the prompt, T from 1 to `context` - 1.
            params: how to sample; None for `sampling`.
            constraint: says which tokens may come next; None for all.
            is_cancelled: is called before each layer, of the prompt too; True ends the call with Cancelled.

        Raises:
            ValueError: too many tokens, none, or one outside the vocabulary; stop texts without a tokenizer.
            RuntimeError: the engine is in use by another thread, or was used for something else since the last token.
            ReadError: the disk failed; the engine stays usable.
            Cancelled: `is_cancelled` returned True; the engine stays usable, and keeps what was computed.
        """
        params = self.sampling if params is None else kind("params", params, SamplingParams)
        if not (is_cancelled is None or callable(is_cancelled)):
            raise ValueError(f"is_cancelled: expected a function, got {quoted(is_cancelled)}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop: expected no texts, as the model has no tokenizer")
        _ = self.model  # raises if the engine is closed
        tokens = self._tokens(ids)
        if len(tokens) >= self.context:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens does not fit a context of {self.context} with a reply"
            )
        with self._held.alone() as sequence:
            # The last token is always computed again, as its logits are needed.
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
        """Returns tokens as a checked array; they come after `known` others in the context."""
        return token_ids(ids, self.config.vocab_size, self.context, known)

    def change(self, **wanted: Any) -> None:
        """Changes `bits`, `experts`, `scheduler` or its `options`. Later answers are those of an engine opened so.

        Experts in memory stay as far as they are of use. A reply in progress ends: its generator raises RuntimeError.

        Args:
            wanted: the options that change, as in `EngineOptions`. A new scheduler starts without the old one's
                `options`.

        Raises:
            ValueError: an option that cannot be changed, or not to this value, such as more bits than the engine was
                opened with.
            FormatError: a section of the file does not fit the scheduler, or the file was replaced.
            RuntimeError: the engine is in use by another thread.
        """
        with self._held.alone() as sequence:
            change(self.model, **wanted)
            sequence.call += 1
            self._describe(self.model)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that the engine was opened with."""
        return self.model.adapters.names

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that the sequence is computed with; None for the model alone.

        An engine begins with the first of `adapters`. Setting another one ends a reply in progress. Experts that both
        share stay in memory; the text so far is computed again when it is used next.

        Raises:
            ValueError: no adapter has that name, or the engine is closed.
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
        """Records a trace from now on: what is routed, resident and waited for; see `edgemoe.runtime.trace`.

        Args:
            path: the trace file; an existing trace is replaced.
            look_ahead: how many of the next layers' routers are asked for each layer's input, so that the trace has
                their guesses. If the scheduler asks for more, those are recorded.

        Raises:
            ValueError: the engine has an observer or a trace already, or `path` is a file that is not a trace.
            OSError: the file cannot be written.
            RuntimeError: the engine is in use by another thread.
        """
        with self._held.alone():
            self.model.record(path, look_ahead=look_ahead)

    def warm(self) -> int:
        """Loads the most used experts, according to the profile, until the slots are full. Changes no answer.

        The most used come first, each at the highest bits that it may run at. After Ctrl-C those already read stay.

        Returns:
            The bytes read: 0 if the profile knows of no uses yet, or if everything is in memory.

        Raises:
            ValueError: the engine has no profile.
            ReadError: the disk failed; the engine stays usable.
        """
        return self._held.warm()

    def chat(self, *, system: str | None = None, params: SamplingParams | None = None) -> Chat:
        """Opens a conversation.

        Args:
            system: the system message; None for none.
            params: how replies are sampled; None for `sampling`.

        Raises:
            FormatError: the file has no tokenizer, or its chat template is broken.
        """
        from edgemoe.runtime.chat import Chat

        return Chat(self, system=system, params=params)

    def close(self) -> None:
        """Saves the profile and frees all memory; the engine cannot be used afterwards.

        If another thread is computing, waits until it is done; that thread's next call then raises ValueError.

        Raises:
            OSError: the profile or the trace cannot be written; what is on disk stays, and the engine is closed.
            RuntimeError: called from something that the engine calls, such as an observer.
        """
        self._held.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""Continuous batching: many requests on one model.

Each pass computes one new token of every running reply. Prompts get the rest of the chunk. So the experts that a layer
needs are read once for all sequences, and no reply waits longer than one chunk for its next token. The other tokens of
a batch do not change a result: a reply has the same bits, and with a seed the same words, as when it runs alone.

`Batcher.step` is called on one thread; requests may be submitted on any thread.
"""

from __future__ import annotations

import threading
import time
from collections import abc, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.errors import Cancelled, DeviceLost, EdgemoeError
from edgemoe.model import Batch, SequenceState
from edgemoe.runtime.change import change
from edgemoe.runtime.errands import Errands
from edgemoe.runtime.model import Model
from edgemoe.runtime.pool import PrefixPool
from edgemoe.runtime.prefix_store import PrefixStore
from edgemoe.runtime.requests import Outcome, Request, figures
from edgemoe.runtime.room import Room
from edgemoe.runtime.sequence import token_ids
from edgemoe.runtime.slots import Slot, SlotView, best_slot
from edgemoe.text.logprobs import token_logprobs

__all__ = ["Batcher", "QueueFull", "SlotView"]

_T = TypeVar("_T")


class QueueFull(EdgemoeError):
    """The error of a request that is refused because too many are waiting already."""


class Batcher:
    """The owner of all sequences of a model, which gives them to requests."""

    def __init__(
        self,
        model: Model,
        eos_ids: abc.Set[int],
        *,
        most_waiting: int = 64,
        prefixes: PrefixStore | PrefixPool | None = None,
    ) -> None:
        """Takes all states that the model has room for.

        Args:
            model: opened for as many sequences as may run at once (`EngineOptions.sequences`).
            eos_ids: tokens that end a reply.
            most_waiting: how many requests may wait; more are refused.
            prefixes: keeps the tokens and states that sequences give up to other prompts; None keeps nothing.
        """
        self._model, self._eos, self._most_waiting = model, frozenset(eos_ids), most_waiting
        self._prefixes = prefixes
        count = model.options.sequences
        self._slots = [Slot(model.make_state()) for _ in range(count)]
        self._rows = np.empty((count, model.config.vocab_size), np.float32)
        self._waiting: deque[tuple[Request, NDArray[np.int32]]] = deque()
        self._changed = threading.Condition()
        self._clock = 0
        self._ending: Exception | None = None
        self._errands = Errands(self._changed)
        self.computed = self.made = 0
        """Prompt tokens computed so far, and reply tokens made so far; any thread may read them."""
        self.views: tuple[SlotView, ...] = ()
        """What each sequence is doing. Replaced as a whole after each pass; any thread may read it."""
        self._look()

    @property
    def waiting(self) -> int:
        """How many requests have not begun."""
        return len(self._waiting)

    def running(self) -> list[Request]:
        """Returns the requests that have a sequence."""
        found = [slot.request for slot in self._slots]
        return [request for request in found if request is not None]

    def submit(self, request: Request) -> None:
        """Queues a request. May be called on any thread.

        Raises:
            ValueError: no tokens, too many, or one outside the vocabulary.
            QueueFull: too many requests are waiting; this one is not queued.
            RuntimeError: the batcher has ended.
        """
        context = self._model.budget.context
        tokens = token_ids(request.ids, self._model.config.vocab_size, context, 0)
        if len(tokens) >= context and request.params.max_tokens != 0:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens does not fit a context of {context} with a reply"
            )
        with self._changed:
            if self._ending is not None:
                raise RuntimeError("the batcher has ended") from self._ending
            if len(self._waiting) >= self._most_waiting:
                raise QueueFull(f"{len(self._waiting)} requests wait already")
            self._waiting.append((request, tokens))
            self._changed.notify()

    def change(self, **wanted: Any) -> Future[None]:
        """Changes the model before the next pass; see `edgemoe.runtime.change`. May be called on any thread.

        Running replies go on. Where the change affects answers, what was computed for them is computed again, so that
        each further token is the one that the changed model gives for the text before it. A prompt whose
        log-probabilities are being computed is finished first.

        Returns:
            A future that is done when the change is. It raises ValueError where the change is impossible, and
            RuntimeError when the batcher has ended.
        """
        return self._errands.add(lambda: self._change(wanted), when=self._can_change)

    def with_slot(self, number: int, use: Callable[[SequenceState], _T]) -> Future[_T]:
        """Calls `use` with the state of a sequence as soon as no request has it. May be called on any thread.

        Returns:
            A future of what `use` returns or raises. It raises RuntimeError when the batcher has ended.
        """
        slot = self._slots[number]
        return self._errands.add(lambda: use(slot.state), when=lambda: slot.request is None)

    def with_room(self, use: Callable[[Room], _T]) -> Future[_T]:
        """Calls `use` with the room for experts between two passes. May be called on any thread.

        Returns:
            A future of what `use` returns or raises. It raises RuntimeError when the batcher has ended.
        """
        return self._errands.add(lambda: use(self._model.room), when=lambda: True)

    def _can_change(self) -> bool:
        """Returns whether no prompt is being scored: all its log-probabilities have to come from one model."""
        busy = [(slot, slot.request) for slot in self._slots if slot.request is not None]
        return not any(r.prompt_logprobs is not None and slot.is_filling for slot, r in busy)

    def _change(self, wanted: dict[str, Any]) -> None:
        is_other = change(self._model, **wanted)
        if is_other and self._prefixes is not None:
            self._prefixes.look()
        with self._changed:
            waiting = [request for request, _ in self._waiting]
        for request in [*self.running(), *waiting]:
            request.changed += is_other

    def wait(self, seconds: float | None = None) -> None:
        """Waits until there may be something to do."""
        with self._changed:
            if not self._waiting and not self._errands:
                self._changed.wait(seconds)

    def wake(self) -> None:
        """Ends a `wait`."""
        with self._changed:
            self._changed.notify()

    def step(self) -> bool:
        """Runs one pass for all requests that have a sequence; returns whether there was something to compute."""
        self._errands.run()
        self._drop_cancelled()
        self._admit()
        parts = self._parts()
        if parts:
            self._advance(parts)
        self._look()
        return bool(parts)

    def end(self, error: Exception) -> None:
        """Ends all requests with an error, including those that wait, and refuses new ones from now on."""
        with self._changed:
            self._ending = error
            waiting, self._waiting = list(self._waiting), deque()
        self._errands.end(error)
        for slot in self._slots:
            if slot.request is not None:
                self._finish(slot, "error", error)
        for request, tokens in waiting:
            self._refuse(request, tokens, "error", error)
        self._look()

    def rest(self) -> None:
        """Gives the experts' memory back to the system until the next pass. Not to be called during `step`."""
        self._model.room.rest()

    def save(self) -> None:
        """Saves what all sequences hold, if prefixes are kept. Not to be called during `step`."""
        if self._prefixes is not None:
            for slot in self._slots:
                self._prefixes.save(slot.state)

    def _drop_cancelled(self) -> None:
        for slot in self._slots:
            if slot.request is not None and slot.request.is_cancelled:
                self._finish(slot, "cancelled")
        if not self._waiting:
            return
        with self._changed:
            gone = [item for item in self._waiting if item[0].is_cancelled]
            for item in gone:
                self._waiting.remove(item)
        for request, tokens in gone:
            self._refuse(request, tokens, "cancelled")

    def _admit(self) -> None:
        """Gives idle sequences to waiting requests, first come, first served; some ask for a particular sequence."""
        if not self._waiting:
            return
        with self._changed:
            waiting = list(self._waiting)
        for item in waiting:
            request, tokens = item
            idle = [slot for slot in self._slots if slot.request is None]
            if request.slot is not None:
                idle = [slot for slot in idle if slot is self._slots[request.slot]]
            if not idle:
                if request.slot is None:
                    return
                continue
            is_new = request.prompt_logprobs is not None or not request.reuses
            most = 0 if is_new else len(tokens) - 1
            adapter = request.adapter
            slot, shared = best_slot(self._model.config, idle, tokens, most, adapter)
            if self._prefixes is not None:
                shared = self._prefixes.exchange(slot.state, tokens, shared, most, adapter)
            slot.state.use(adapter)
            slot.start(request, tokens, slot.state.rewind(shared), self._model.counters)
            with self._changed:  # only now: if anything above fails, `end` still finds the request
                self._waiting.remove(item)

    def _parts(self) -> list[tuple[Slot, NDArray[np.int32]]]:
        """Returns the tokens that each sequence contributes to the next pass, replies last.

        In this order the rows whose logits are wanted are mostly adjacent, and `_runs` computes them together.
        """
        busy = [slot for slot in self._slots if slot.request is not None]
        for slot in busy:
            if slot.state.is_dirty:
                slot.state.rewind(slot.state.length)
        filling = [slot for slot in busy if slot.is_filling]
        room = self._model.budget.chunk - (len(busy) - len(filling))
        parts = []
        for slot in sorted(filling, key=lambda s: s.started):
            have = slot.state.length
            count = slot.state.span(min(room, len(slot.tokens) - have))
            if count > 0:
                parts.append((slot, np.array(slot.tokens[have : have + count], np.int32)))
                room -= count
        for slot in busy:
            if not slot.is_filling:
                parts.append((slot, np.array(slot.tokens[slot.state.length :], np.int32)))
        return parts

    def _advance(self, parts: list[tuple[Slot, NDArray[np.int32]]]) -> None:
        """Runs a pass. If it fails, each sequence is tried alone, so that only those that need unreadable data fail."""
        batch = Batch.of(*((slot.state, ids) for slot, ids in parts))
        batch.is_cancelled = _given_up(
            [s for s, _ in parts if s.is_filling] or [s for s, _ in parts]
        )
        try:
            hidden = self._model.forward(batch)
        except Cancelled:
            return
        except DeviceLost:
            raise  # every other request would fail too
        except (EdgemoeError, ValueError) as error:
            if len(parts) == 1:
                self._finish(parts[0][0], "error", error)
                return
            for part in parts:
                self._advance([part])
            return
        for slot, _ in parts:
            slot.beside = max(slot.beside, len(parts) - 1)
        self.computed += sum(len(ids) for slot, ids in parts if slot.made == 0 or len(ids) > 1)
        rows = []
        for (slot, _), span in zip(parts, batch.slices, strict=True):
            assert slot.request is not None
            slot.request.computed = min(slot.state.length, slot.prompt)
            if slot.request.prompt_logprobs is not None and slot.state.length <= slot.prompt:
                try:
                    self._score(slot, hidden[span.start : span.stop])
                except DeviceLost:
                    raise
                except Exception as error:  # as in `_reply`, it ends one request
                    self._finish(slot, "error", error)
                    continue
            if slot.state.length == len(slot.tokens):
                rows.append((span.stop - 1, slot))
        for run in _runs(rows, self._model):
            out = self._rows[: len(run)]
            try:
                self._model.logits(hidden[run[0][0] : run[-1][0] + 1], out, run[0][1].state)
            except DeviceLost:
                raise
            except EdgemoeError as error:
                for _, slot in run:
                    self._finish(slot, "error", error)
                continue
            for row, (_, slot) in zip(out, run, strict=True):
                self._reply(slot, row)

    def _score(self, slot: Slot, hidden: NDArray[np.float32]) -> None:
        """Passes on the log-probabilities of the prompt's tokens, as far as a pass has come.

        A row scores the token that follows it. Only a few rows are done at a time, as logits take V floats a row.

        Args:
            hidden: the pass's hidden states of this sequence, [T, D].
        """
        request = slot.request
        assert request is not None
        assert request.prompt_logprobs is not None
        first = slot.state.length - len(hidden) + 1
        last, block = min(first + len(hidden), slot.prompt), len(self._rows)
        following = slot.tokens[first:last]
        for at in range(0, len(following), block):
            tokens = following[at : at + block]
            out = self._rows[: len(tokens)]
            self._model.logits(hidden[at : at + len(tokens)], out, slot.state)
            request.prompt_logprobs(token_logprobs(out, tokens, request.top or 0))

    def _reply(self, slot: Slot, row: NDArray[np.float32]) -> None:
        """Samples the next token of a reply from its logits, `row` [V]."""
        request, state = slot.request, slot.state
        assert request is not None
        if slot.made == 0:
            state.goal = 0
        now = time.perf_counter()
        slot.first, slot.last = (now if slot.made == 0 else slot.first), now
        if slot.made >= slot.limit:
            self._finish(slot, "length", row=row)
            return
        constraint = request.constraint
        try:
            mask = None if constraint is None else constraint.allowed()
            token = slot.sampler.sample(row, state.ids, allowed=mask)
            if token in self._eos and not request.params.ignore_eos:
                self._finish(slot, "stop", row=row)
                return
            is_complete = constraint is not None and constraint.take(token)
            said = None
            if request.top is not None:
                said = token_logprobs(row[None], [token], request.top)[0]
            goes_on = request.take(token, said)
        except Exception as error:  # whatever it is, it ends one request and not the batcher
            self._finish(slot, "error", error)
            return
        slot.tokens.append(token)
        self.made += 1
        if is_complete or not goes_on:
            self._finish(slot, "stop", row=row)
        elif slot.made >= slot.limit:
            self._finish(slot, "length", row=row)

    def _finish(
        self,
        slot: Slot,
        reason: Literal["stop", "length", "cancelled", "error"],
        error: Exception | None = None,
        row: NDArray[np.float32] | None = None,
    ) -> None:
        """Ends a slot's request; `row` [V] are its last logits, if there are any."""
        request = slot.request
        assert request is not None
        logits_hash = "" if row is None else f"{_core.crc32c(row):08x}"
        took = figures(
            slot.before, self._model.counters, prompt_tokens=slot.prompt, cached_tokens=slot.cached,
            new_tokens=slot.made, queue_s=slot.started - request.came, prompt_s=slot.first - slot.started,
            decode_s=slot.last - slot.first, beside=slot.beside, changed=request.changed,
            logits_hash=logits_hash,
        )  # fmt: skip
        self._clock += 1
        slot.request, slot.last_used, slot.state.goal = None, self._clock, 0
        request.end(Outcome(reason, took, error))

    def _refuse(
        self,
        request: Request,
        tokens: NDArray[np.int32],
        reason: Literal["cancelled", "error"],
        error: Exception | None = None,
    ) -> None:
        """Ends a request that has not begun."""
        now = time.perf_counter()
        took = figures(
            self._model.counters, self._model.counters, prompt_tokens=len(tokens), cached_tokens=0,
            new_tokens=0, queue_s=now - request.came, prompt_s=0.0, decode_s=0.0, beside=0,
            changed=request.changed, logits_hash="",
        )  # fmt: skip
        request.end(Outcome(reason, took, error))

    def _look(self) -> None:
        self.views = tuple(slot.view() for slot in self._slots)


def _given_up(slots: list[Slot]) -> Callable[[], bool]:
    """Returns a function that says whether all of these requests were cancelled; it is called before each layer."""
    wanted = [slot.request for slot in slots if slot.request is not None]

    def ask() -> bool:
        while wanted and wanted[-1].is_cancelled:  # cancelled for good: mostly one is asked
            wanted.pop()
        return not wanted

    return ask


def _runs(rows: list[tuple[int, Slot]], model: Model) -> list[list[tuple[int, Slot]]]:
    """Returns rows grouped into runs of adjacent ones with the same weights; a run's logits are computed at once."""
    runs: list[list[tuple[int, Slot]]] = []
    variant = 0
    for row in rows:
        before, variant = variant, model.variant(row[1].state)
        if runs and row[0] == runs[-1][-1][0] + 1 and variant == before:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs

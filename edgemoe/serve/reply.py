"""One reply on its way from the model's thread to a client: tokens become events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from edgemoe.errors import EdgemoeError
from edgemoe.runtime.requests import Figures, Outcome, Request
from edgemoe.serve.ask import Ask
from edgemoe.serve.problems import Problem
from edgemoe.serve.usage import timing_fields
from edgemoe.text.calls import ToolCall
from edgemoe.text.logprobs import TokenLogprob
from edgemoe.text.reading import Reader, Reading
from edgemoe.text.replies import Event, Piece, joined
from edgemoe.text.stops import ReplyText
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["Ended", "Part", "Progress", "Reply"]

logger = logging.getLogger(__name__)

_LOOKS = 0.05
"""Seconds between two reports of a prompt's progress, for clients that ask for it."""
_TOGETHER = 0.05
"""Seconds whose tokens are sent together: making an event and waking a client take time from the model."""
_SELDOM = 0.5
"""The same for a reply that is sent as a whole."""
_APART = 256
"""The most events that wait apart: one for each token takes far more memory than its text."""

_Token = tuple[int, TokenLogprob | None]


@dataclass(slots=True)
class Part:
    """What some tokens of a reply add to it."""

    events: list[Event]
    logprobs: list[TokenLogprob]
    tokens: int
    """Tokens of the reply so far."""


@dataclass(slots=True)
class Progress:
    """The progress of a prompt."""

    total: int
    """Tokens of the prompt."""
    cached: int
    """Tokens that were reused."""
    computed: int
    """Tokens that are computed so far, the reused ones included."""
    seconds: float
    """Time since it began."""


@dataclass(slots=True)
class Ended:
    """The last part of a reply."""

    finish: str
    """Why it ended: "stop", "length" or "tool_calls"."""
    figures: Figures
    reasoning_tokens: int
    stop: str | None = None
    """The stop text that ended it."""


class Reply:
    """One choice of one request. Made and read on the event loop; `take` and `end` run on the model's thread.

    Tokens are turned into text on the event loop's thread, while the model computes the next ones. Only where the text
    decides whether the reply goes on (stop texts, or at most one call) is this done on the model's thread.
    """

    def __init__(
        self,
        ask: Ask,
        choice: int,
        tokenizer: Tokenizer,
        reading: Reading,
        on_end: Callable[[Outcome], None],
        *,
        streams: bool,
    ) -> None:
        """Prepares a choice. The caller then submits `request`.

        Args:
            ask: what is asked.
            choice: the number of the choice, which changes the seed.
            tokenizer: the model's.
            reading: how the model's replies are read.
            on_end: is called with the outcome, on the model's thread.
            streams: parts are passed on as they come; False for one part at the end.
        """
        self._loop, self._on_end = asyncio.get_running_loop(), on_end
        self._parts: asyncio.Queue[Part | Ended | Exception] = asyncio.Queue()
        self._fresh: deque[_Token | Part | Outcome] = deque()
        self._looks = False  # whether `_look` is scheduled, so that the loop need not be woken
        self._timer: asyncio.TimerHandle | None = None
        self._every = _TOGETHER if streams else _SELDOM
        params, shown = ask.params, frozenset[int]()
        self._parser: Reader | None = None
        if not ask.is_raw:
            shown = reading.shown(tools=ask.schemas is not None)
            self._parser = reading.reader(ask.schemas, ask.prompt, must_call=ask.must_call)
        self._text = ReplyText(tokenizer, params.stop, continues=ask.is_raw, shown=shown)
        self._several, self._calls = ask.several_calls, 0
        self._decides = bool(params.stop) or not ask.several_calls
        self._count = self._read_so_far = self._reasoning = 0
        self._first = self._last = 0.0
        self._said: list[TokenLogprob] = []
        self._streams, self._made = streams, list[Event]()
        self.prompt_logprobs: list[TokenLogprob] = []
        self.request = Request(
            ids=ask.ids, params=params.of_choice(choice), take=self.take, end=self.end,
            top=ask.top, constraint=ask.constraint(), slot=ask.slot, reuses=ask.reuses, adapter=ask.adapter,
            prompt_logprobs=self.prompt_logprobs.extend if ask.echo and ask.top is not None else None,
        )  # fmt: skip

    def take(self, token: int, said: TokenLogprob | None) -> bool:
        """Takes a token on the model's thread; returns whether the reply goes on."""
        self._count += 1
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._put(self._read(token, said) if self._decides else (token, said))
        return not self._decides or not (
            self._text.is_stopped or (self._calls and not self._several)
        )

    def _read(self, token: int, said: TokenLogprob | None) -> Part:
        """Turns a token into text, and the text into events."""
        self._read_so_far += 1
        if self._parser is not None and self._parser.state == "reasoning":
            self._reasoning += 1
        events = self._events(self._text.push(token))
        return Part(events, [] if said is None else [said], self._read_so_far)

    def _events(self, text: str, *, is_last: bool = False) -> list[Event]:
        if self._parser is None:
            return [Piece("content", text)] if text else []
        events = self._parser.push(text) if text else []
        if is_last:
            events += self._parser.flush()
        found = []
        for event in events:
            if isinstance(event, ToolCall):
                if self._calls and not self._several:
                    continue
                self._calls += 1
            found.append(event)
        return found

    def end(self, outcome: Outcome) -> None:
        """Takes the outcome, on the model's thread."""
        self._on_end(outcome)
        self._put(outcome)

    def _put(self, item: _Token | Part | Outcome) -> None:
        """Hands an item from the model's thread to the event loop, and wakes the loop unless it will look soon anyway.

        The outcome always wakes it.
        """
        self._fresh.append(item)
        is_last = isinstance(item, Outcome)
        if self._looks and not is_last:
            return
        self._looks = True
        try:
            self._loop.call_soon_threadsafe(self._look)
        except RuntimeError:  # the loop has ended, so that nobody waits any more
            self.request.is_cancelled = True

    def _look(self) -> None:
        """Passes on what has come, and schedules the next look. If nothing came, `_put` will wake it."""
        if self._timer is not None:
            self._timer.cancel()
        self._looks = False  # before looking, so that an item that comes now wakes it
        if not self._fresh:
            return
        self._looks = True
        try:
            is_last = self._take_fresh()
        except Exception as error:  # whatever it is, it ends one reply and not the server
            self.request.is_cancelled = True
            self._parts.put_nowait(error)
            return
        if not is_last:
            self._timer = self._loop.call_later(self._every, self._look)

    def _take_fresh(self) -> bool:
        """Turns what has come into parts; returns whether the reply has ended."""
        outcome = None
        while self._fresh:
            item = self._fresh.popleft()
            if isinstance(item, Outcome):
                outcome = item
                break
            part = item if isinstance(item, Part) else self._read(*item)
            self._made += part.events
            self._said += part.logprobs
        if len(self._made) > _APART:
            self._made = joined(self._made)
        if outcome is not None:
            self._end(outcome)
        elif self._streams:
            self._offer()
        return outcome is not None

    def _end(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            self._parts.put_nowait(outcome.error)
            return
        if outcome.reason == "cancelled":
            self._parts.put_nowait(Problem(503, "the request was given up", code="cancelled"))
            return
        self._made += self._events(self._text.flush(), is_last=True)
        if self._made or self._said:
            self._send()
        finish = "length" if outcome.reason == "length" and not self._text.is_stopped else "stop"
        if self._calls and finish == "stop":
            finish = "tool_calls"
        stop = self._text.stopped_by
        self._parts.put_nowait(Ended(finish, outcome.figures, self._reasoning, stop))

    def _offer(self) -> None:
        """Sends what there is, unless the client is behind: its next part then has more, and the queue never does."""
        if self._made and self._parts.empty():
            self._send()

    def _send(self) -> None:
        self._parts.put_nowait(Part(joined(self._made), self._said, self._read_so_far))
        self._made, self._said = [], []

    def progress(self, waiting: int) -> str:
        """Returns the progress as text; `waiting` is the number of requests that wait, this one included."""
        request, total = self.request, len(self.request.ids)
        if self._count:
            return f"{self._count} tokens"
        if not request.has_begun:
            return f"waiting, {max(waiting - 1, 0)} others too"
        return f"prompt {request.computed}/{total}"

    def timings(self) -> dict[str, Any]:
        """Returns the figures of the reply so far, in llama.cpp's format."""
        r = self.request
        return timing_fields(
            r.cached,
            len(r.ids) - r.cached,
            self._first - r.began,
            self._count,
            self._last - self._first,
        )

    async def parts(self) -> AsyncIterator[Part | Ended]:
        """Yields the reply as it is made; closing the iterator early cancels the reply.

        Raises:
            Problem: the reply failed.
        """
        try:
            while not isinstance(item := await self._next(), Ended):
                yield item
            yield item
        finally:
            self.request.is_cancelled = True

    async def watched(self) -> AsyncIterator[Part | Ended | Progress]:
        """Yields what `parts` does, and the progress of the prompt whenever it has changed."""
        request, told, total = self.request, -1, len(self.request.ids)

        def progress(computed: int) -> Progress:
            passed = time.perf_counter() - request.began
            return Progress(total, request.cached, computed, passed)

        try:
            while True:
                wait = _LOOKS if told < total else None
                try:
                    item = await asyncio.wait_for(self._next(), wait)
                except asyncio.TimeoutError:
                    if request.has_begun and request.computed != told:
                        told = request.computed
                        yield progress(told)
                    continue
                if told < total:
                    told = total
                    yield progress(told)
                yield item
                if isinstance(item, Ended):
                    return
        finally:
            self.request.is_cancelled = True

    async def _next(self) -> Part | Ended:
        item = await self._parts.get()
        if isinstance(item, Exception):
            raise _problem(item)
        if self._streams:
            self._offer()
        return item


def _problem(error: Exception) -> Problem:
    """Returns what a client is told about an error of the engine. Errors that are not the client's are also logged."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ValueError) and not isinstance(error, EdgemoeError):
        return Problem(400, str(error))
    if isinstance(error, EdgemoeError):
        logger.error("a request failed: %s", error)
        return Problem(500, str(error))
    logger.error("a request failed: %s: %s", type(error).__name__, error)
    return Problem(500, f"{type(error).__name__}: the server failed at this request")

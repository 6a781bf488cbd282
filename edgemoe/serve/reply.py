"""One reply on its way from the engine's thread to a client: tokens become events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from edgemoe.errors import EdgemoeError
from edgemoe.runtime.requests import Constraint, Figures, Outcome, Request
from edgemoe.serve.problems import Problem
from edgemoe.text.calls import ToolCall
from edgemoe.text.logprobs import TokenLogprob
from edgemoe.text.reading import Reader, Reading
from edgemoe.text.replies import Event, Piece, Schemas, joined
from edgemoe.text.sampler import SamplingParams
from edgemoe.text.stops import ReplyText
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["Ask", "Ended", "Part", "Progress", "Reply", "call_id", "timings", "usage_extras"]

logger = logging.getLogger(__name__)

_LOOKS = 0.05
"""Seconds between two looks at how far a prompt is, for who wants to know."""
_TOGETHER = 0.05
"""Seconds within which tokens go out together: an event, and waking a client, take time that the engine could use."""
_SELDOM = 0.5
"""The same for a reply that goes out as a whole."""


@dataclass(slots=True, kw_only=True)
class Ask:
    """Is what a request of any dialect comes down to."""

    ids: list[int]
    params: SamplingParams
    choices: int = 1
    top: int | None = None
    """Of each token's log-probabilities; None for none."""
    echo: bool = False
    """The prompt is part of the reply."""
    is_raw: bool = False
    """The model continues a text: no reasoning, no calls."""
    schemas: Schemas | None = None
    """Of the tools that may be called."""
    prompt: str = ""
    """The end of a chat's, in text."""
    must_call: bool = False
    """A grammar makes it a call."""
    constraint: Callable[[], Constraint | None] = lambda: None
    """Makes a choice's own."""
    several_calls: bool = True
    slot: int | None = None
    reuses: bool = True
    """See `Request`."""
    adapter: int = 0
    """See `Request`."""
    keep_alive: float | None = None
    """See `Wanted`."""
    ignored: list[str] = field(default_factory=list)


_Token = tuple[int, TokenLogprob | None]


@dataclass(slots=True)
class Part:
    """Is what some tokens brought."""

    events: list[Event]
    logprobs: list[TokenLogprob]
    tokens: int
    """Of the reply, so far."""


@dataclass(slots=True)
class Progress:
    """Says how far a prompt is."""

    total: int
    cached: int
    computed: int
    """The cached ones among them."""
    seconds: float
    """Since it began."""


@dataclass(slots=True)
class Ended:
    """Is the last part of a reply."""

    finish: str
    """stop, length or tool_calls."""
    figures: Figures
    reasoning_tokens: int
    stop: str | None = None
    """The stop text that ended it."""


class Reply:
    """Is one choice of one request. Made and read on the event loop; `take` and `end` run on the engine's thread.

    Tokens become text on the loop's thread, while the engine computes the next ones; on the engine's thread only where
    the text decides whether the reply goes on.
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
        """Makes ready for a choice; `request` is to be submitted.

        Args:
            streams: parts are passed on as they come; False for one part at the end.
        """
        self._loop, self._on_end = asyncio.get_running_loop(), on_end
        self._parts: asyncio.Queue[Part | Ended | Exception] = asyncio.Queue()
        self._fresh: deque[_Token | Part | Outcome] = deque()
        self._looks = False  # soon, without being woken
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
        seed = params.seed + choice if params.seed >= 0 else params.seed
        self.request = Request(
            ids=ask.ids, params=replace(params, stop=(), seed=seed), take=self.take, end=self.end,
            top=ask.top, constraint=ask.constraint(), slot=ask.slot, reuses=ask.reuses, adapter=ask.adapter,
            prompt_logprobs=self.prompt_logprobs.extend if ask.echo and ask.top is not None else None,
        )  # fmt: skip

    def take(self, token: int, said: TokenLogprob | None) -> bool:
        """Takes a token; returns whether the reply goes on."""
        self._count += 1
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._put(self._read(token, said) if self._decides else (token, said))
        return not self._decides or not (
            self._text.is_stopped or (self._calls and not self._several)
        )

    def _read(self, token: int, said: TokenLogprob | None) -> Part:
        """Turns a token into text, and that into events."""
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
        """The engine is done with it."""
        self._on_end(outcome)
        self._put(outcome)

    def _put(self, item: _Token | Part | Outcome) -> None:
        """Hands something to the loop, on the engine's thread; wakes it only where it will not look by itself soon."""
        self._fresh.append(item)
        is_last = isinstance(item, Outcome)
        if self._looks and not is_last:
            return
        self._looks = True
        try:
            self._loop.call_soon_threadsafe(self._look)
        except RuntimeError:  # the loop has ended, and with it who waits
            self.request.is_cancelled = True

    def _look(self) -> None:
        """Passes on what has come, and looks again when more may go out; where nothing came it is woken."""
        if self._timer is not None:
            self._timer.cancel()
        self._looks = False  # before it looks: what comes from now on wakes it
        if not self._fresh:
            return
        self._looks = True
        try:
            is_last = self._take_fresh()
        except Exception as error:  # of one reply, whatever it is
            self.request.is_cancelled = True
            self._parts.put_nowait(error)
            return
        if not is_last:
            self._timer = self._loop.call_later(self._every, self._look)

    def _take_fresh(self) -> bool:
        """Makes parts of what has come; returns whether that was the last."""
        outcome = None
        while self._fresh:
            item = self._fresh.popleft()
            if isinstance(item, Outcome):
                outcome = item
                break
            part = item if isinstance(item, Part) else self._read(*item)
            self._made += part.events
            self._said += part.logprobs
        if outcome is not None:
            self._end(outcome)
        elif self._made and self._streams:
            self._send()
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

    def _send(self) -> None:
        self._parts.put_nowait(Part(joined(self._made), self._said, self._read_so_far))
        self._made, self._said = [], []

    def progress(self, waiting: int) -> str:
        """Returns how far it is."""
        request, total = self.request, len(self.request.ids)
        if self._count:
            return f"{self._count} tokens"
        if not request.has_begun:
            return f"waiting, {max(waiting - 1, 0)} others too"
        return f"prompt {request.computed}/{total}"

    def timings(self) -> dict[str, Any]:
        """Returns llama.cpp's figures of the reply so far."""
        r = self.request
        return _timings(
            r.cached,
            len(r.ids) - r.cached,
            self._first - r.began,
            self._count,
            self._last - self._first,
        )

    async def parts(self) -> AsyncIterator[Part | Ended]:
        """Yields the reply as it is made; one that is closed early is cancelled.

        Raises:
            Problem: it failed.
        """
        try:
            while not isinstance(item := await self._next(), Ended):
                yield item
            yield item
        finally:
            self.request.is_cancelled = True

    async def watched(self) -> AsyncIterator[Part | Ended | Progress]:
        """Yields what `parts` does, and how far the prompt is whenever it has come further."""
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
        return item


def _problem(error: Exception) -> Problem:
    """Returns what a client is told of an error of the engine; what is not the client's is told to the log too."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ValueError) and not isinstance(error, EdgemoeError):
        return Problem(400, str(error))
    if isinstance(error, EdgemoeError):
        logger.error("a request failed: %s", error)
        return Problem(500, str(error))
    logger.error("a request failed: %s: %s", type(error).__name__, error)
    return Problem(500, f"{type(error).__name__}: the server failed at this request")


def call_id(prefix: str, reply_id: str, number: int) -> str:
    """Returns the name of a call, the same whenever it is asked for."""
    return f"{prefix}{reply_id.rpartition('-')[2][:20]}{number}"


def usage_extras(figures: Figures, ignored: list[str], notes: tuple[str, ...]) -> dict[str, Any]:
    """Returns what a reply says of the engine."""
    uses = figures.hits + figures.misses
    out: dict[str, Any] = {
        "hit_rate": figures.hits / uses if uses else 1.0, "bytes_read": figures.bytes_read,
        "average_bits": round(figures.average_bits, 3), "skipped": figures.skipped_share,
        "substituted": figures.substituted_share, "beside": figures.beside,
        "logits_hash": figures.logits_hash, "ignored": ignored,
    }  # fmt: skip
    if figures.changed:
        out["changed"] = figures.changed
    if notes:
        out["notes"] = list(notes)
    return out


def timings(figures: Figures) -> dict[str, Any]:
    """Returns llama.cpp's figures of a reply."""
    f = figures
    computed = f.prompt_tokens - f.cached_tokens
    return _timings(f.cached_tokens, computed, f.prompt_s, f.new_tokens, f.decode_s) | {
        "queue_ms": 1000 * f.queue_s
    }


def _timings(
    cached: int, computed: int, prompt_s: float, made: int, decode_s: float
) -> dict[str, Any]:
    later = max(made - 1, 0)
    return {
        "cache_n": cached, "prompt_n": computed, "prompt_ms": 1000 * prompt_s,
        "prompt_per_second": computed / prompt_s if prompt_s else 0.0,
        "predicted_n": made, "predicted_ms": 1000 * decode_s,
        "predicted_per_second": later / decode_s if decode_s else 0.0,
    }  # fmt: skip

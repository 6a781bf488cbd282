"""The base of answers in every dialect: replies of the engine, as a stream of events or as a whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from edgemoe.serve.ask import Ask
from edgemoe.serve.problems import Problem
from edgemoe.serve.reply import Reply
from edgemoe.serve.service import Service

__all__ = ["Answer", "call_id"]


class Answer:
    """The answer to one request. It is submitted when it is made, so that errors come before a stream begins."""

    def __init__(self, service: Service, asks: list[Ask], *, streams: bool) -> None:
        """Submits the first choice to the engine; raises what `Service.begin` does.

        Args:
            service: the server's model.
            asks: one for each prompt of the request.
            streams: the answer is sent as a stream of events.
        """
        self.service, self.asks, self._streams = service, asks, streams
        self.replies: list[Reply] = []
        """Those that run: an answer may have thousands."""
        self.first = self._begin(0)

    @property
    def count(self) -> int:
        """How many choices the answer has: those of each prompt, for all prompts."""
        return len(self.asks) * self.asks[0].choices

    def reply(self, index: int) -> Reply:
        """Returns the reply of a choice, and submits it unless it is the first.

        The choices of one prompt run one after another, so that the prompt is computed only once.
        """
        return self.first if index == 0 else self._begin(index)

    def _begin(self, index: int) -> Reply:
        ask, choice = divmod(index, self.asks[0].choices)
        reply = self.service.begin(self.asks[ask], choice, streams=self._streams)
        self.replies = [*(one for one in self.replies if not one.request.is_cancelled), reply]
        return reply

    def cancel(self) -> None:
        """Cancels all replies, as the client has left or the time is up."""
        for reply in self.replies:
            reply.request.is_cancelled = True

    def comment(self) -> bytes:
        """Returns the progress as a comment in a stream of server-sent events."""
        return f": {self.replies[-1].progress(self.service.batcher.waiting)}\n\n".encode()

    def ping(self) -> bytes:
        """Returns what is sent to keep a stream alive."""
        return self.comment()

    async def whole(self) -> dict[str, Any]:
        """Returns the answer once it is complete."""
        raise NotImplementedError

    def events(self) -> AsyncIterator[bytes]:
        """Yields the answer as a stream of events."""
        raise NotImplementedError

    def failure(self, problem: Problem) -> bytes:
        """Returns the last event of a stream that failed."""
        raise NotImplementedError


def call_id(prefix: str, reply_id: str, number: int) -> str:
    """Returns the id of a call: the same for the same arguments."""
    return f"{prefix}{reply_id.rpartition('-')[2][:20]}{number}"

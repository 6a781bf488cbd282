"""What an answer is in every dialect: replies of the engine that become events, or one whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from edgemoe.serve.problems import Problem
from edgemoe.serve.reply import Ask, Reply
from edgemoe.serve.service import Service

__all__ = ["Answer"]


class Answer:
    """Is one request's answer. Submitted when it is made, so that what is wrong is said before a stream begins."""

    def __init__(self, service: Service, asks: list[Ask], *, streams: bool) -> None:
        """Hands the first choice to the engine; raises what `Service.begin` does."""
        self.service, self.asks, self._streams = service, asks, streams
        self.replies: list[Reply] = []
        self.first = self._begin(0)

    @property
    def count(self) -> int:
        """How many choices there are."""
        return len(self.asks) * self.asks[0].choices

    def reply(self, index: int) -> Reply:
        """Returns a choice's reply; those of one prompt come one after the other, so that it is computed once."""
        return self.first if index == 0 else self._begin(index)

    def _begin(self, index: int) -> Reply:
        ask, choice = divmod(index, self.asks[0].choices)
        reply = self.service.begin(self.asks[ask], choice, streams=self._streams)
        self.replies.append(reply)
        return reply

    def cancel(self) -> None:
        """Nobody waits for it."""
        for reply in self.replies:
            reply.request.is_cancelled = True

    def comment(self) -> bytes:
        """Returns how far it is, as a stream's comment."""
        return f": {self.replies[-1].progress(self.service.batcher.waiting)}\n\n".encode()

    def ping(self) -> bytes:
        """Returns what keeps a stream alive."""
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

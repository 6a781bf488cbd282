"""Limits on connections: how many there are, how much is read ahead, and how long a client may take."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["PART", "PATIENCE", "TAKING", "connections"]

logger = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds until a request's head must be complete, and between two parts of its body."""
TAKING = 60.0
"""Seconds in which a client must read some of the answer, once the buffer for it is full."""
PART = 8 << 10
"""The most bytes that are read from a connection at a time. Of a body, the next part is read when it is asked for."""


def connections(each: int, together: int) -> type[H11Protocol]:
    """Returns a protocol class for uvicorn.

    Args:
        each: the most connections of one address; 0 for no limit.
        together: the most connections. Further ones are closed.
    """
    own = {"each": each, "together": together, "counts": Counter(), "told": set()}
    return type("Connection", (_Connection,), own)


class _Connection(H11Protocol):
    each: int
    together: int
    counts: Counter[str]
    told: set[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._full: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.max_size = PART  # 256 KiB by default; asyncio's own loop looks at it
        self._address = self.client[0] if self.client else ""
        self.counts[self._address] += 1
        if 0 < self.each < self.counts[self._address]:
            self._refuse(self._address, self.each)
        elif self.counts.total() > self.together:
            self._refuse("this server", self.together)
        else:
            self._watch()

    def _refuse(self, who: str, most: int) -> None:
        if who not in self.told:  # logged once, until that address has none
            logger.warning("%s has %d connections; further ones are closed", who, most)
        self.told.add(who)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.counts[self._address] -= 1
        if not self.counts[self._address]:
            del self.counts[self._address]
            self.told.discard(self._address)
        if not self.counts:
            self.told.clear()
        self._calm()
        self._taken()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete:
            self.flow.pause_reading()  # until the body's next part is asked for

    def _unsupported_upgrade_warning(self) -> None:
        """Logs nothing, where uvicorn would advise to install a library: this server has no WebSockets."""

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def _wait_for_reader(self, before: int | None = None) -> None:
        """Closes the connection if the client has read nothing for TAKING seconds.

        Args:
            before: bytes in the write buffer at the last look; None at first.
        """
        size = self.transport.get_write_buffer_size()
        if before is None or size < before:
            self._full = self.loop.call_later(TAKING, self._wait_for_reader, size)
        else:
            self.transport.abort()

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def _taken(self) -> None:
        if self._full is not None:
            self._full.cancel()
            self._full = None

    def _watch(self) -> None:
        """Starts the timer for a request's head, unless a request is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._calm()
        elif self._timer is None:
            self._timer = self.loop.call_later(PATIENCE, self._late)

    def _calm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

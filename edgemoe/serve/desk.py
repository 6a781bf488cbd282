"""Where requests are read: within the budget, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from edgemoe import hardware
from edgemoe.file.parse import parsed_bytes
from edgemoe.runtime.batching import Batcher
from edgemoe.runtime.room import Room
from edgemoe.serve.connections import PART
from edgemoe.serve.log import Asked
from edgemoe.serve.problems import Problem
from edgemoe.serve.sizes import kept_bytes

if TYPE_CHECKING:
    from edgemoe.serve.service import Service

__all__ = ["AT_HAND", "Desk"]

_T = TypeVar("_T")

_HELD = 2 << 20  # bytes of the budget that are always there for requests and their bodies
_READ = 13 << 20  # and for the request that is read: the 12 MiB of a template, and 20 KB of texts
AT_HAND = _HELD + _READ
"""Bytes of the budget that are always there for requests. For what takes more, experts make room, once the pass that
runs has ended."""
# That a request takes: itself, as was measured, and a part of its body that is here before there is room for it.
_REQUEST = (16 << 10) + PART
_ARRIVING = 64  # requests that may wait for the memory of theirs
_RETRY_AFTER = 5  # seconds


class Desk:
    """The place where requests are read. Any thread may call it."""

    def __init__(self, batcher: Batcher) -> None:
        """Args:
        batcher: makes room.
        """
        self._batcher = batcher
        self.line = asyncio.Lock()
        """To be held around `read`, so that requests that wait take no thread."""
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._held = self._reads = (
            0  # bytes that bodies take, and the request that is read; only what was granted
        )
        self._borrowed = 0  # beyond AT_HAND, for both
        self._body = self._beside = 0  # of the request that is read
        self._arriving = 0  # requests that wait in `admit`

    async def admit(self, asked: Asked) -> None:
        """Makes room for a request that has come, until `asked.held` is released.

        Raises:
            Problem: there is not enough memory, or too many wait for it.
        """
        if self._arriving < _ARRIVING:
            self._arriving += 1
            try:
                missing = await self._granted(_REQUEST)
            finally:
                self._arriving -= 1
            if not missing:
                asked.held += _REQUEST
                return
        text = "too many requests at once: they take the memory that there is for them"
        raise Problem(503, text, retry_after=_RETRY_AFTER)

    async def hold(self, size: int, *, of: int) -> None:
        """Makes room for `size` further bytes of a body that arrives, until `release`.

        Args:
            size: so many bytes.
            of: the bytes of the body up to now, with these.

        Raises:
            Problem: there is not enough memory.
        """
        _check(await self._granted(size), self._size(size, 0) - max(of - _HELD, 0))

    async def _granted(self, size: int) -> int:
        """Takes `size` bytes, and returns how many are missing; if any are, none was taken."""
        done = self._take(size, 0)
        try:
            return done.result() if done.done() else await asyncio.wrap_future(done)
        except RuntimeError as error:  # the engine has ended
            raise Problem(503, str(error)) from None
        except asyncio.CancelledError:
            if not done.cancel():
                done.add_done_callback(lambda done: self._undo(done, size))
            raise

    def release(self, size: int) -> None:
        """Gives back what `hold` or `admit` has made room for."""
        self._give_back(size, 0)

    def read(
        self, read: Callable[[Service, bytes], _T], service: Service, body: bytes,
        asked: Asked | None = None,
    ) -> _T:  # fmt: skip
        """Returns what `read` returns. It decodes the body, and calls `need` for whatever else takes memory.

        What it returns has its memory until `asked.held` is released.

        Raises:
            Problem: `read` raises it, or there is not enough memory.
        """
        with self._turn:
            try:
                self._body = len(body)
                self._more(parsed_bytes(body))
                found = read(service, body)
                if asked is not None:
                    kept = kept_bytes(found)
                    self._more(-self._reads, held=kept)
                    asked.held += kept
                return found
            finally:
                self._beside = 0
                self._give_back(0, self._reads)

    def need(self, size: int) -> None:
        """Makes room for `size` bytes beside what the request takes that is being read, until it is read.

        Raises:
            Problem: there is not enough memory.
        """
        if size > self._beside:
            self._more(size - self._beside)
            self._beside = size

    def _more(self, size: int, *, held: int = 0) -> None:
        try:
            missing = self._take(held, size).result()
        except RuntimeError as error:  # the engine has ended
            raise Problem(503, str(error)) from None
        _check(missing, max(self._held - _HELD, 0) - max(self._body - _HELD, 0))

    def _size(self, held: int, reads: int) -> int:
        """Returns how much has to be borrowed if so many bytes are added."""
        return max(self._held + held - _HELD, 0) + max(self._reads + reads - _READ, 0)

    def _take(self, held: int, reads: int) -> Future[int]:
        """Adds so many bytes, if there is room for them, and says what is missing."""
        with self._lock:
            if self._size(held, reads) <= self._borrowed:
                self._held += held
                self._reads += reads
                done: Future[int] = Future()
                done.set_result(0)
                return done
        try:
            return self._batcher.with_room(lambda room: self._borrow(room, held, reads))
        except RuntimeError as error:
            raise Problem(503, str(error)) from None

    def _borrow(self, room: Room, held: int, reads: int) -> int:
        with self._lock:
            size = self._size(held, reads)
            missing = room.borrow(size)
            if not missing:
                self._held += held
                self._reads += reads
                self._borrowed = size
            return missing

    def _give_back(self, held: int, reads: int) -> None:
        with self._lock:
            self._held -= held
            self._reads -= reads
            if self._size(0, 0) >= self._borrowed:
                return
        with contextlib.suppress(RuntimeError):  # the engine has ended
            self._batcher.with_room(self._shrink)

    def _shrink(self, room: Room) -> None:
        hardware.trim()
        self._borrow(room, 0, 0)

    def _undo(self, done: Future[int], size: int) -> None:
        """Releases what was granted to one that no longer waits for it."""
        if not done.cancelled() and done.exception() is None and not done.result():
            self.release(size)


def _check(missing: int, others: int) -> None:
    """Refuses a request that misses so many bytes, where other requests have borrowed `others`."""
    if missing > max(others, 0):
        raise Problem(
            413,
            f"body: reading and answering it takes {-(-missing >> 20)} MiB more memory than --ram leaves",
        )
    if missing:
        text = "body: other requests take the memory that reading it takes"
        raise Problem(503, text, retry_after=_RETRY_AFTER)

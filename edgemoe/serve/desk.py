"""Where requests are read: within the budget, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from edgemoe import hardware
from edgemoe.runtime.batching import Batcher
from edgemoe.serve.problems import Problem

if TYPE_CHECKING:
    from edgemoe.serve.service import Service

__all__ = ["AT_HAND", "Desk"]

_T = TypeVar("_T")

AT_HAND = 13 << 20
"""Bytes of the budget that are always there for requests that are read: the 12 MiB that a template may take, and 20 KB
of texts. For what takes more, experts make room, once the pass that runs has ended."""
_PER_BYTE = 4  # that texts take for each byte of a body, as they are decoded and joined
_PER_VALUE = 72  # that a decoded value and its place in a list or an object take; measured
_BETWEEN = b",:[{"  # in JSON, no value comes without one of these before it


class Desk:
    """The place where requests are read. Any thread may call it."""

    def __init__(self, batcher: Batcher) -> None:
        """Args:
        batcher: makes room.
        """
        self._batcher = batcher
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._held = self._decoded = self._beside = 0  # what takes memory, in bytes
        self._borrowed = 0

    async def hold(self, size: int) -> None:
        """Makes room for `size` further bytes of bodies that arrive, until `release`.

        Raises:
            Problem: there is not enough memory.
        """
        self._held += size
        try:
            _check(await asyncio.wrap_future(self._borrow()))
        except BaseException:
            self.release(size)
            raise

    def release(self, size: int) -> None:
        """Gives back what `hold` has made room for."""
        self._held -= size
        if size:
            self._give_back()

    def read(self, read: Callable[[Service, bytes], _T], service: Service, body: bytes) -> _T:
        """Returns what `read` returns. It decodes the body, and calls `need` for whatever else takes memory.

        Raises:
            Problem: `read` raises it, or there is not enough memory.
        """
        with self._turn:
            try:
                self._decoded = _PER_BYTE * len(body) + _PER_VALUE * sum(map(body.count, _BETWEEN))
                self.need(0)
                return read(service, body)
            finally:
                self._decoded = self._beside = 0
                self._give_back()

    def need(self, size: int) -> None:
        """Makes room for `size` bytes beside what the request takes that is being read, until it is read.

        Raises:
            Problem: there is not enough memory.
        """
        self._beside = max(size, self._beside)
        _check(self._borrow().result())

    def _borrow(self) -> Future[int]:
        """Borrows as much as is needed now; see `Room.borrow`."""
        with self._lock:
            size = max(self._held + self._decoded + self._beside - AT_HAND, 0)
            if size == self._borrowed:
                done: Future[int] = Future()
                done.set_result(0)
                return done
            self._borrowed = size
            try:
                return self._batcher.borrow(size)
            except RuntimeError as error:
                raise Problem(503, str(error)) from None

    def _give_back(self) -> None:
        if self._borrowed:
            hardware.trim()
            with contextlib.suppress(Problem):  # the engine has ended
                self._borrow()


def _check(missing: int) -> None:
    if missing:
        raise Problem(
            413, f"body: reading it takes {-(-missing >> 20)} MiB more memory than --ram leaves"
        )

"""One caller at a time: who may compute with what an engine has."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

__all__ = ["Alone"]


class Alone:
    """Keeps other threads and other processes out while one caller computes."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._owner = 0  # the thread that holds it

    @property
    def is_foreign(self) -> bool:
        """Whether another process asks than the one that made it: a child after a fork."""
        return os.getpid() != self._pid

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Is the caller's turn; others are refused at once.

        Raises:
            RuntimeError: another thread has it, or it belongs to another process.
        """
        if self.is_foreign:
            raise RuntimeError("the engine belongs to the process that opened it")
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("the engine is in use by another thread")
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = 0
            self._lock.release()

    @contextlib.contextmanager
    def last(self) -> Iterator[None]:
        """Is the turn of who closes: waits for the others.

        Raises:
            RuntimeError: the caller is called by who has it.
        """
        if self._owner == threading.get_ident():
            raise RuntimeError("the engine cannot be closed by what it calls")
        with self._lock:
            yield

"""Exclusive use of an engine: one caller at a time."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

__all__ = ["Alone"]


class Alone:
    """A lock that keeps other threads and other processes out while one caller computes."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._owner = 0  # the thread that holds it

    @property
    def is_foreign(self) -> bool:
        """Whether the calling process is not the one that made the lock: it is a child after a fork."""
        return os.getpid() != self._pid

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Holds the lock within a `with` block; a second caller is refused at once and does not wait.

        Raises:
            RuntimeError: another thread holds it, or it belongs to another process.
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
        """Holds the lock to close the engine: unlike `hold`, waits for the thread that has it.

        Raises:
            RuntimeError: this thread has it already, so that waiting would never end.
        """
        if self._owner == threading.get_ident():
            raise RuntimeError("the engine cannot be closed by what it calls")
        with self._lock:
            yield

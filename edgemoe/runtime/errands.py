"""Jobs for the thread that owns a model, which runs them between two passes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from edgemoe.errors import EdgemoeError

__all__ = ["Errands"]

_T = TypeVar("_T")


class Errands:
    """A queue of jobs. Any thread may add one; the model's thread runs them."""

    def __init__(self, changed: threading.Condition) -> None:
        """Args:
        changed: protects the queue, and is notified when a job is added.
        """
        self._changed = changed
        self._queue: list[tuple[Future[Any], Callable[[], Any], Callable[[], bool]]] = []
        self._ending: Exception | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, run: Callable[[], _T], *, when: Callable[[], bool]) -> Future[_T]:
        """Queues a job.

        Args:
            run: the job.
            when: whether it can run now; asked between passes, with `changed` held.

        Returns:
            A future of what `run` returns. It raises what `run` raises (EdgemoeError, ValueError or OSError), and
            RuntimeError if the thread ends before.

        Raises:
            RuntimeError: the thread has ended.
        """
        done: Future[_T] = Future()
        with self._changed:
            if self._ending is not None:
                raise RuntimeError("the batcher has ended") from self._ending
            self._queue.append((done, run, when))
            self._changed.notify()
        return done

    def run(self) -> None:
        """Runs the jobs that can run now, in the order in which they came."""
        if not self._queue:
            return
        with self._changed:
            ready = [item for item in self._queue if item[2]()]
        for item in ready:
            # Removed one by one: if a job ends this thread, `end` still finds the rest.
            with self._changed:
                self._queue.remove(item)
            done, run, _ = item
            if not done.set_running_or_notify_cancel():
                continue
            try:
                result = run()
            except (EdgemoeError, ValueError, OSError) as error:
                done.set_exception(error)
            except BaseException:
                done.set_exception(RuntimeError("the batcher has ended"))
                raise
            else:
                done.set_result(result)

    def end(self, error: Exception) -> None:
        """Fails the jobs that wait, and refuses new ones from now on."""
        with self._changed:
            self._ending = error
            left, self._queue = self._queue, []
        for done, _, _ in left:
            if done.set_running_or_notify_cancel():
                done.set_exception(RuntimeError("the batcher has ended"))

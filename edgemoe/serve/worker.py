"""The model's thread, which alone runs it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from edgemoe.errors import EdgemoeError
from edgemoe.runtime.batching import Batcher

__all__ = ["Worker"]

logger = logging.getLogger(__name__)


class Worker:
    """A thread that runs a batcher."""

    def __init__(self, batcher: Batcher, on_death: Callable[[BaseException], None]) -> None:
        """Starts the thread.

        Args:
            batcher: runs on it.
            on_death: is called on the thread if it ends with an error, and not by `stop`.
        """
        self.batcher, self._on_death = batcher, on_death
        self.error: BaseException | None = None
        """The error that ended the thread; None while it runs, or if `stop` ended it."""
        self.keep_alive = math.inf
        """Seconds without a request after which experts leave memory; any thread may set it."""
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="edgemoe-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends all requests, and then the thread."""
        self._is_stopping = True
        self.batcher.wake()
        self._thread.join()

    def _run(self) -> None:
        try:
            idle = (
                time.monotonic()
            )  # since the last pass, or since the start; infinity after `rest`
            while not self._is_stopping:
                if self.batcher.step():
                    idle = time.monotonic()
                    continue
                left = idle + self.keep_alive - time.monotonic()
                if left <= 0:
                    idle = math.inf
                    self.batcher.rest()
                self.batcher.wait(min(max(left, 0.01), 1.0))
            self.batcher.end(RuntimeError("the server is stopping"))
        except BaseException as error:
            self.error = error
            logger.critical("the engine's thread has ended: %s: %s", type(error).__name__, error)
            if isinstance(error, EdgemoeError):  # its text says what failed
                self.batcher.end(error)
            else:
                self.batcher.end(RuntimeError("the engine has failed"))
            self._on_death(error)

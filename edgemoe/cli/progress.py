"""The progress of long tasks, on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from edgemoe.cli.console import is_terminal, note, shown
from edgemoe.errors import shortened

__all__ = ["Progress", "time_left"]


class Progress:
    """A progress bar on a terminal; elsewhere, a line for every tenth of the task. Also a context manager."""

    def __init__(self, task: str, *, unit: str) -> None:
        """Names the task.

        Args:
            task: what is being done ("writing x.moe").
            unit: what is counted; "B" for bytes.
        """
        self._task = shown(shortened(task))
        self._unit = unit
        self._bar: Any = None  # tqdm has no types
        self._tenths = 0
        self._begun: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> None:
        """Shows that `done` units of `total` are done by now."""
        if not is_terminal(sys.stderr):
            now = time.monotonic()
            self._begun = self._begun or (now, done)
            tenths = 10 * done // total if total else 0
            if tenths > self._tenths:
                self._tenths = tenths
                since, before = now - self._begun[0], done - self._begun[1]
                left = time_left(since * (total - done) / before) if before else ""
                note(f"# {self._task}: {10 * tenths}%{left}")
            return
        if self._bar is None:
            from tqdm import tqdm

            # What an earlier run has done must not count in the speed of this one.
            self._bar = tqdm(
                desc=self._task,
                initial=done,
                total=total,
                unit=self._unit,
                unit_scale=self._unit == "B",
                unit_divisor=1024,
                file=sys.stderr,
            )
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Ends the bar and leaves it on the screen; later calls show nothing."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def time_left(seconds: float) -> str:
    """Returns the end of a line, such as ", 5 min left"; "" for less than a minute."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 60:
        return ""
    return f", {hours} h {minutes} min left" if hours else f", {minutes} min left"

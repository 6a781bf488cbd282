"""The measurements of a search: units alone, then choices; its progress, and its time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import EdgemoeError
from edgemoe.lab.bits.search_file import SearchFile
from edgemoe.lab.bits.units import Choice, Units
from edgemoe.lab.quality.mixed_loss import MixedLoss

__all__ = ["Clock", "Measured", "Progress", "TimeIsOver", "Work", "measure_alone"]

Progress = Callable[[int, int], None]

_TOGETHER = 16
"""How many steps are measured at once. With more of them, more layers are shared, but Ctrl-C may lose more."""


class TimeIsOver(EdgemoeError):
    """A search's time was over before it had a choice."""


class Clock:
    """The time limit of a search."""

    def __init__(self, seconds: float | None) -> None:
        """Args:
        seconds: from now on; None for no limit.
        """
        self._begun, self._seconds = time.monotonic(), seconds
        self._last, self._took = self._begun, 0.0

    def lap(self, *, is_first: bool = False) -> None:
        """Called when a round of measurements has ended, and with `is_first` when the first one begins."""
        now = time.monotonic()
        self._took, self._last = 0.0 if is_first else now - self._last, now

    def is_over(self) -> bool:
        """Returns whether a round as long as the last one would end too late."""
        spent = self._last - self._begun + self._took
        return self._seconds is not None and spent >= self._seconds


class Work:
    """The progress of a search, counted in windows that go through a layer."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done, self._end = total, progress, 0, 0

    def begin(self, amount: int) -> None:
        """Ends the task under way, whatever was counted of it, and begins one of `amount`."""
        self._done = self._end
        self._end += amount
        self.count(0)

    def count(self, windows: int) -> None:
        """Counts windows that went through a layer; fewer than planned if choices have layers in common."""
        self._done = min(self._done + windows, self._end)
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


class Measured:
    """The losses of choices, of which no window is measured twice until `forget`."""

    def __init__(self, loss: MixedLoss, units: Units) -> None:
        self.loss, self._units = loss, units
        self._known: dict[bytes, list[NDArray[np.float64]]] = {}

    def __call__(self, choices: Sequence[Choice], count: int) -> list[float]:
        """Returns the mean loss over the tokens of the first `count` windows, for each choice."""
        by_name = {choice.tobytes(): choice for choice in choices}
        starts: dict[int, list[bytes]] = {}
        for name in by_name:
            starts.setdefault(len(self._known.setdefault(name, [])), []).append(name)
        for start, names in starts.items():
            if start >= count:
                continue
            mixes = [self._units.mix(by_name[name]) for name in names]
            for name, windows in zip(names, self.loss(mixes, range(start, count)), strict=True):
                self._known[name].extend(windows)
        found = (np.concatenate(self._known[choice.tobytes()][:count]) for choice in choices)
        return [float(tokens.mean()) for tokens in found]

    def forget(self) -> None:
        """Forgets all measurements."""
        self._known.clear()


def measure_alone(
    steps: Mapping[str, Choice],
    efforts: Mapping[str, int],
    saved: SearchFile,
    measured: Measured,
    windows: int,
    work: Work,
    clock: Clock,
) -> None:
    """Measures the steps that are not in `saved` yet, as many at once as can go through the layers together.

    Args:
        steps: the choices to measure, by name.
        efforts: the work that each takes, in the units of `work`.
        saved: the losses are added to it.
        windows: how many windows to measure on.

    Raises:
        TimeIsOver: before all were measured. What was measured is in `saved`.
    """
    left = [name for name in steps if name not in saved.costs]
    work.begin(sum(efforts[name] for name in steps if name in saved.costs))
    most = min(measured.loss.most(windows), _TOGETHER)
    clock.lap(is_first=True)
    for first in range(0, len(left), most):
        if first and clock.is_over():  # so each call gets on
            known = len(steps) - len(left) + first
            raise TimeIsOver(f"the time is over, with {known} of {len(steps)} costs measured")
        some = left[first : first + most]
        work.begin(sum(efforts[name] for name in some))
        losses = measured([steps[name] for name in some], windows)
        saved.add(dict(zip(some, losses, strict=True)))
        measured.forget()
        clock.lap()

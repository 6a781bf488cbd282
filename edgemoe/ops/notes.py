"""Work that operations are told once and repeat: what stands between two choices of the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

from edgemoe import _core
from edgemoe.specs import AttentionSpec, MlaSpec

__all__ = ["MOST_NOTED", "CpuNotes", "DeviceNotes", "Notes"]

MOST_NOTED = 512
"""Pieces of work: what a driver keeps of each is not counted in the budget."""
MOST_STEPS = 4096
"""Of all work on a processor, before another piece is noted: a MiB, which is left to the budget's margin."""


class _Noting(Protocol):
    """Is a workspace."""

    def begin_noting(self) -> None:
        """From now on work is noted instead of run."""

    def end_noting(self) -> int:
        """Returns the number of what was noted."""

    def forget(self, noted: int) -> None:
        """Drops what was noted."""


class Notes:
    """Keeps what was noted, by keys. One caller at a time.

    A note has the addresses and sizes of then. What else is another each time lies in memory: the position of the
    token, and whatever was written there before.
    """

    def __init__(self, ws: _Noting) -> None:
        self._ws = ws
        self._made: dict[Hashable, int | None] = {}
        """Numbers, in the order in which they came; None for what came once, which may never come again."""

    def of(self, key: Hashable, work: Callable[[], None]) -> int | None:
        """Returns the number of the note of some work; None for what comes for the first time.

        It is made the second time, by `work`, which is noted then and does not run.
        """
        if key not in self._made:
            if len(self._made) >= MOST_NOTED:
                self._forget(self._made.pop(next(iter(self._made))))
            self._made[key] = None
            return None
        note = self._made[key]
        if note is None:
            noted = iter([other for other, there in self._made.items() if there is not None])
            while self._is_long() and (oldest := next(noted, None)) is not None:
                self._forget(self._made.pop(oldest))
            try:
                self._ws.begin_noting()
                work()
            except BaseException:
                self._forget(self._ws.end_noting())
                raise
            note = self._made[key] = self._ws.end_noting()
        return note

    def forget(self) -> None:
        """Forgets everything, the keys first: Ctrl-C may come at any moment."""
        made, self._made = self._made, {}
        for note in made.values():
            self._forget(note)

    def _is_long(self) -> bool:
        """Says whether there are too many steps for one more piece."""
        return False

    def _forget(self, note: int | None) -> None:
        if note is not None:
            self._ws.forget(note)


class CpuNotes(Notes):
    """Is that of a processor."""

    def __init__(self, ws: _core.Workspace) -> None:
        super().__init__(ws)
        self._cpu_ws = ws

    def _is_long(self) -> bool:
        return self._cpu_ws.noted >= MOST_STEPS


class DeviceNotes(Notes):
    """Is that of a device."""

    def __init__(self, ws: _core.DeviceWorkspace) -> None:
        super().__init__(ws)
        self._device_ws, self._pos = ws, -1

    def place(self, spec: AttentionSpec | MlaSpec, pos: int) -> Hashable | None:
        """See `Ops.place`: attention is the same work while it begins and ends in the same blocks of positions."""
        if spec.growth:  # which is the host's logarithms
            return None
        if self._pos != pos:
            self._device_ws.place(pos)
            self._pos = pos
        window, chunk = (spec.window, spec.chunk) if isinstance(spec, AttentionSpec) else (0, 0)
        first = max(pos + 1 - window if window else 0, pos // chunk * chunk if chunk else 0)
        return first // _core.KEY_BLOCK, pos // _core.KEY_BLOCK

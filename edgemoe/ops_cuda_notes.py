"""Work that a device is told once and repeats: what stands between two choices of the host; see `edgemoe.ops_cuda`."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from edgemoe import _core
from edgemoe.specs import AttentionSpec, MlaSpec

__all__ = ["MOST_NOTED", "Notes"]

MOST_NOTED = 512
"""Pieces of work: what a driver keeps of each is not counted in the budget."""


class Notes:
    """Keeps what was noted, by keys. One caller at a time.

    A note has the addresses and sizes of then. What else is another each time lies in the device's memory: the position
    of the token, and whatever was uploaded before.
    """

    def __init__(self, ws: _core.DeviceWorkspace) -> None:
        self._ws = ws
        self._made: dict[Hashable, int | None] = {}
        """Numbers, in the order in which they came; None for what came once, which may never come again."""
        self._pos = -1

    def place(self, spec: AttentionSpec | MlaSpec, pos: int) -> Hashable | None:
        """See `Ops.place`: attention is the same work while it begins and ends in the same blocks of positions."""
        if spec.growth:  # which is the host's logarithms
            return None
        if self._pos != pos:
            self._ws.place(pos)
            self._pos = pos
        window, chunk = (spec.window, spec.chunk) if isinstance(spec, AttentionSpec) else (0, 0)
        first = max(pos + 1 - window if window else 0, pos // chunk * chunk if chunk else 0)
        return first // _core.KEY_BLOCK, pos // _core.KEY_BLOCK

    def of(self, key: Hashable, work: Callable[[], None]) -> int | None:
        """Returns the number of the note of some work; None for what comes for the first time.

        It is made the second time, by `work`, which is noted then and does not run.
        """
        if key not in self._made:
            while len(self._made) >= MOST_NOTED:
                self._forget(self._made.pop(next(iter(self._made))))
            self._made[key] = None
            return None
        note = self._made[key]
        if note is None:
            self._ws.begin_noting()
            try:
                work()
            except BaseException:
                self._forget(self._ws.end_noting())
                raise
            note = self._made[key] = self._ws.end_noting()
        return note

    def forget(self) -> None:
        """Forgets everything."""
        for note in self._made.values():
            self._forget(note)
        self._made.clear()

    def _forget(self, note: int | None) -> None:
        if note is not None:
            self._ws.forget(note)

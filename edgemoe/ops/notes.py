"""Notes: work that is recorded once and then repeated in one call, without Python in between.

A token of a reply does the same work as the token before, up to where the host chooses experts. A note records the work
between two such choices. On a device it is a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

from edgemoe import _core
from edgemoe.specs import AttentionSpec, MlaSpec

__all__ = ["MOST_NOTED", "CpuNotes", "DeviceNotes", "Notes"]

MOST_NOTED = 512
"""The most pieces of work to keep. Bounded because the budget does not count what a driver keeps of each."""
MOST_STEPS = 4096
"""On a CPU, old notes are forgotten before a new one is recorded until all notes have fewer steps than this.

So many steps take about a MiB, which the margin of the budget covers."""


class _Noting(Protocol):
    """A workspace of the native core, as far as recording is concerned."""

    def begin_noting(self) -> None:
        """From now on records work instead of running it."""

    def end_noting(self) -> int:
        """Stops recording, and returns the number of the note."""

    def forget(self, noted: int) -> None:
        """Drops a note."""


class Notes:
    """The notes of one workspace, by keys. One caller at a time.

    A note contains addresses and sizes, which must be the same whenever it is repeated. Whatever differs from token to
    token is read from memory at those addresses, as is the token's position.
    """

    def __init__(self, ws: _Noting) -> None:
        self._ws = ws
        self._made: dict[Hashable, int | None] = {}
        """Numbers of notes by key, oldest first; None for a key seen once, which may never come again."""

    def of(self, key: Hashable, work: Callable[[], None]) -> int | None:
        """Returns the number of the note for a key, or None if the key is new: then the caller runs the work itself.

        The note is made when a key comes for the second time. `work` is then recorded, and not run: the caller repeats
        the note.
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
        """Forgets all notes. The keys go first, as Ctrl-C may come at any moment."""
        made, self._made = self._made, {}
        for note in made.values():
            self._forget(note)

    def _is_long(self) -> bool:
        """Returns whether there are too many steps for one more note."""
        return False

    def _forget(self, note: int | None) -> None:
        if note is not None:
            self._ws.forget(note)


class CpuNotes(Notes):
    """The notes of a CPU, whose memory is bounded by `MOST_STEPS`."""

    def __init__(self, ws: _core.Workspace) -> None:
        super().__init__(ws)
        self._cpu_ws = ws

    def _is_long(self) -> bool:
        return self._cpu_ws.noted >= MOST_STEPS


class DeviceNotes(Notes):
    """The notes of a device, which are graphs."""

    def __init__(self, ws: _core.DeviceWorkspace) -> None:
        super().__init__(ws)
        self._device_ws, self._pos = ws, -1

    def place(self, spec: AttentionSpec | MlaSpec, pos: int) -> Hashable | None:
        """See `Ops.place`: attention is the same work while it begins and ends in the same blocks of positions."""
        if spec.growth:  # the host computes a factor for each position, which a note cannot have
            return None
        if self._pos != pos:
            self._device_ws.place(pos)
            self._pos = pos
        window, chunk = (spec.window, spec.chunk) if isinstance(spec, AttentionSpec) else (0, 0)
        first = max(pos + 1 - window if window else 0, pos // chunk * chunk if chunk else 0)
        return first // _core.KEY_BLOCK, pos // _core.KEY_BLOCK

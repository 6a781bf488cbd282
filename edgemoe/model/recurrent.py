"""Recurrent states, which do not grow with the sequence: a few arrays stand for all tokens before a position."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, Protocol, cast

from edgemoe.model.batch import Batch
from edgemoe.model.kv import KvTypes
from edgemoe.model.setup import Setup
from edgemoe.model.state import SNAPSHOTS
from edgemoe.ops import Array, Ops

__all__ = ["Recurrent", "RecurrentState"]


class RecurrentState:
    """The state of a recurrent layer. Implements `State`.

    Such a layer cannot go back token by token, so its arrays are kept for each of a few lengths. A pass reads the
    arrays of the present length and writes to others, so that nothing has to be undone if it fails.
    """

    can_rewind_anywhere = can_look_back = False

    def __init__(self, ops: Ops, *shapes: tuple[int, ...]) -> None:
        # One set of arrays for the present length, one for the length after the pass, and one for each snapshot. The
        # system provides their pages when they are first written to.
        self._free = [tuple(ops.empty(*s) for s in shapes) for _ in range(2 + SNAPSHOTS)]
        self._at: dict[int, tuple[Array, ...]] = {}
        self._kept: list[int] = []
        self._start = (None,) * len(shapes)

    @staticmethod
    def bytes(*shapes: tuple[int, ...]) -> int:
        """Returns the bytes of a state and its snapshots, once all of them have been written."""
        return (2 + SNAPSHOTS) * RecurrentState.read_bytes(*shapes)

    @staticmethod
    def read_bytes(*shapes: tuple[int, ...]) -> int:
        """Returns the bytes of the state that a pass reads."""
        return 4 * sum(map(math.prod, shapes))

    def step(self, pos: int, count: int) -> tuple[tuple[Array | None, ...], tuple[Array, ...]]:
        """Returns the arrays that stand for the first `pos` tokens, and those to write for `count` more.

        The former are None at the start, where the state is all zeros. Drops what was kept for longer lengths.
        """
        before = self._at[pos] if pos else self._start
        self._drop({n for n in self._at if n > pos or (n < pos and n not in self._kept)})
        after = self._at[pos + count] = self._free.pop()
        return before, after

    def reaches(self, length: int) -> int:
        """See `State.reaches`."""
        return max((n for n in self._at if n <= length), default=0)

    def rewind(self, length: int) -> None:
        """See `State.rewind`."""
        self._drop({n for n in self._at if n > length})

    def snapshot(self, length: int) -> None:
        """See `State.snapshot`: keeps the last `SNAPSHOTS`."""
        if length and length not in self._kept:
            self._kept = [*self._kept, length][-SNAPSHOTS:]

    def parts(self, length: int) -> tuple[Any, ...] | None:
        """See `State.parts`."""
        return self._at.get(length)

    def make_parts(self, length: int) -> tuple[Any, ...]:
        """See `State.make_parts`."""
        self._drop(set(self._at))
        made = self._at[length] = self._free.pop()
        return made

    def _drop(self, lengths: set[int]) -> None:
        """Forgets some lengths, and frees their arrays."""
        self._kept = [n for n in self._kept if n not in lengths]
        self._free += [self._at.pop(n) for n in lengths]


class RecurrentSpec(Protocol):
    """The spec of a mixer with a recurrent state."""

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the arrays that stand for the tokens so far."""

    @property
    def scratch_widths(self) -> tuple[int, ...]:
        """The width, in floats per token, of each scratch array."""


class Recurrent:
    """What all layers of one recurrent spec share. Subclasses implement `Mixer` by adding `layer`."""

    def __init__(self, spec: Any, setup: Setup) -> None:
        self.spec, self.ops = spec, setup.ops
        self._rows = setup.scratch.rows(*spec.scratch_widths)
        self._layers: dict[int, None] = {}  # numbers of the layers with this spec, in order

    @staticmethod
    def scratch_widths(spec: RecurrentSpec) -> tuple[int, ...]:
        """See `Mixer.scratch_widths`."""
        return spec.scratch_widths

    @staticmethod
    def state_bytes(spec: RecurrentSpec, context: int, types: KvTypes, chunk: int) -> int:
        """See `Mixer.state_bytes`: the same for every context."""
        return RecurrentState.bytes(*spec.state_shapes)

    @staticmethod
    def read_bytes(spec: RecurrentSpec, length: int, types: KvTypes) -> int:
        """See `Mixer.read_bytes`."""
        return RecurrentState.read_bytes(*spec.state_shapes)

    def make_state(self) -> RecurrentState:
        """See `Mixer.make_state`."""
        return RecurrentState(self.ops, *self.spec.state_shapes)

    def join(self, index: int) -> None:
        """Adds layer `index` to those whose states `start` prepares."""
        self._layers[index] = None

    def start(self, batch: Batch) -> Hashable | None:
        """See `Mixer.start`.

        The batch gets all rows of scratch and, for each sequence, its own rows and the arrays that each layer reads and
        writes. The identities of those arrays are the key.
        """
        parts = []
        for part in batch.slices:
            states = cast("list[RecurrentState]", part.state.layers)
            steps = {i: states[i].step(part.state.held, part.count) for i in self._layers}
            parts.append((steps, self._rows.between(part.start, part.stop)))
        batch.shared[self] = (self._rows.first(len(batch.ids)), parts)
        # A state's arrays live as long as the state, so their identities are stable.
        return tuple(id(arrays) for both in parts[0][0].values() for arrays in both)

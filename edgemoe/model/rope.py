"""Rotary position embedding (RoPE): the rotations of a batch's rows, shared by layers with the same frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from edgemoe.model.batch import Batch
from edgemoe.model.scratch import Rows
from edgemoe.model.state import SequenceState
from edgemoe.ops import Array, Ops, RopeTable
from edgemoe.specs import RopeSpec
from edgemoe.store import Weight

__all__ = ["Rope"]


class Rope:
    """The cosines and sines of a batch's positions, computed once for all layers of one `RopeSpec`."""

    def __init__(
        self, spec: RopeSpec, ops: Ops, weights: Mapping[str, Weight], max_tokens: int
    ) -> None:
        self.spec, self._ops = spec, ops
        self._tables: Mapping[str, RopeTable] = {
            name: ops.rope_table(cast(Array, weights[name]), spec.scale) for name in spec.tensors()
        }
        half = spec.dim // 2
        self.rows = Rows(ops.empty(max_tokens, half), ops.empty(max_tokens, half))
        """cos and sin, each [max tokens, dim / 2]."""

    def start(self, batch: Batch) -> None:
        """Computes cos and sin of a batch's rows, each at the row's position in its own sequence."""
        for part in batch.slices:
            cos, sin = self.rows.between(part.start, part.stop)
            self._ops.rope(self.table(part.state), part.state.held, cos, sin)

    def table(self, state: SequenceState) -> RopeTable:
        """Returns the table of frequencies for a sequence, which may depend on its length (LongRoPE)."""
        return self._tables[self.spec.frequencies(state.turned)]

    def keep(self, positions: int) -> None:
        """Keeps the rotations of so many positions.

        Attention needs them where the cache stores keys without their biases: it adds each bias to the scores, rotated
        to the position of its key.
        """
        for table in self._tables.values():
            table.keep(positions)

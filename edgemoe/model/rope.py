"""Rotary positions: the rotations of a batch's rows, for all layers that have the same frequencies."""

from __future__ import annotations

from edgemoe.model.batch import Batch
from edgemoe.model.scratch import Rows
from edgemoe.ops import Array, Ops, RopeTable

__all__ = ["Rope"]


class Rope:
    """Turns positions into cosines and sines, once for a batch."""

    def __init__(self, ops: Ops, inv_freq: Array, scale: float, max_tokens: int) -> None:
        """Args:
        inv_freq: [rotated components / 2].
        scale: multiplies both.
        """
        self._ops = ops
        self.table: RopeTable = ops.rope_table(inv_freq, scale)
        half = len(inv_freq)
        self.rows = Rows(ops.empty(max_tokens, half), ops.empty(max_tokens, half))
        """cos and sin"""

    def start(self, batch: Batch) -> None:
        """Fills the rows of a batch, each by the position in its own sequence."""
        for part in batch.slices:
            cos, sin = self.rows.between(part.start, part.stop)
            self._ops.rope(self.table, part.state.length, cos, sin)

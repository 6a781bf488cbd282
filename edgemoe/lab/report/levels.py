"""The size of each level of a file, counted from the file: bytes, and bits per weight with scales and padding.

If a level only looks up rows of the embedding, the embedding is not resident and does not count there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgemoe.file.format import MoeFile
from edgemoe.store import resident_matrices

__all__ = ["Level", "bits_per_weight", "dense_bits_at", "levels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One level of a file: the same prefix of rungs of all its matrices."""

    bits: int
    """The bits by which the level is called, those of w_gate."""
    ladder: tuple[int, int, int]
    """Bits of w_gate, w_up and w_down."""
    average_bits: float
    """Mean bits of an expert, including experts that have fewer bits than this level."""
    dense_bits: int
    """Bits of the other matrices: at the same rung; at the last rung, the highest that they have."""
    expert_bytes: int
    """Bytes of all routed experts."""
    dense_bytes: int
    """Bytes of all other matrices that are resident."""
    expert_weights: int
    """Weights of all routed experts."""
    dense_weights: int
    """Weights of all other matrices that are resident."""

    @property
    def bytes(self) -> int:
        """The bytes of all these matrices. Routers, norms and biases are float32 and not counted."""
        return self.expert_bytes + self.dense_bytes

    @property
    def bits_per_weight(self) -> float:
        """The average over all these matrices."""
        return 8 * self.bytes / (self.expert_weights + self.dense_weights)


def dense_bits_at(moe: MoeFile, bits: int | None) -> int:
    """Returns the bits of dense matrices that go with a level of the experts; None for the highest."""
    return moe.dense_ladder[moe.dense_level_beside(bits) - 1]


def levels(moe: MoeFile) -> list[Level]:
    """Returns a file's levels, ascending."""
    config, count = moe.config, len(moe.experts.offsets)
    out = []
    for rung, ladder in enumerate(moe.ladder):
        dense_bits = dense_bits_at(moe, ladder[0])
        dense_bytes, dense_weights = _dense(moe, moe.dense_level(dense_bits))
        out.append(
            Level(
                bits=ladder[0],
                ladder=ladder,
                average_bits=float(np.minimum(moe.expert_bits, ladder[0]).mean()),
                dense_bits=dense_bits,
                expert_bytes=int(moe.experts.sizes(rung + 1).sum()),
                dense_bytes=dense_bytes,
                expert_weights=count * 3 * config.hidden_size * config.expert_hidden,
                dense_weights=dense_weights,
            )
        )
    return out


def bits_per_weight(moe: MoeFile, average_bits: float, dense_bits: int | Literal["auto"]) -> float:
    """Returns bits per weight over all resident matrices if experts have `average_bits`, interpolated between levels.

    Args:
        dense_bits: one of the dense ladder, which may have more levels than the experts'; "auto" for all the bits that
            the file has of each matrix.
    """
    all_levels = levels(moe)
    experts = np.interp(
        average_bits,
        [level.average_bits for level in all_levels],
        [8 * level.expert_bytes / level.expert_weights for level in all_levels],
    )
    weights = all_levels[-1].expert_weights
    dense_bytes, dense_weights = _dense(
        moe, moe.dense_level(None if dense_bits == "auto" else dense_bits)
    )
    return (float(experts) * weights + 8 * dense_bytes) / (weights + dense_weights)


def _dense(moe: MoeFile, level: int) -> tuple[int, int]:
    """Returns the bytes and the number of weights of all resident matrices outside the routed experts."""
    matrices = resident_matrices(moe, level).values()
    return sum(t.size(level) for t in matrices), sum(int(np.prod(t.spec.shape)) for t in matrices)

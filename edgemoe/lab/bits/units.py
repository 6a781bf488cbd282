"""The parts of a model that may have more or fewer bits: experts, other matrices, and each layer's keys and values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgemoe.file.format import MoeFile
from edgemoe.lab.bits.kv_types import KINDS, cells_of
from edgemoe.lab.quality.mixed_loss import Mix
from edgemoe.model.kv_table import Row
from edgemoe.ops import kv_bytes
from edgemoe.specs import AttentionSpec
from edgemoe.store import resident_matrices

__all__ = ["Choice", "Units"]

Choice = NDArray[np.int64]
"""[U]: the level of each unit, 0 for the fewest bits."""


class Units:
    """The numbering of all units that a choice gives a level: experts, layer by layer; matrices; keys and values."""

    def __init__(self, moe: MoeFile, *, context: int) -> None:
        """Args:
        context: for how many tokens keys and values count; a layer with a sliding window has at most as many as that.
        """
        config = moe.config
        self.moe, self.context = moe, context
        self.num_experts = len(moe.experts.offsets)
        self.matrices = tuple(name for name, t in moe.tensors.items() if t.spec.kind == "nested")
        self.cells = tuple(cells_of(moe))
        each = [moe.experts.sizes(level + 1) for level in range(len(moe.ladder))]
        sizes = [
            [int(size[e]) for size in each[:rungs]] for e, rungs in enumerate(moe.experts.rungs)
        ]
        for name in self.matrices:
            tensor = moe.tensors[name]
            sizes.append([_resident_bytes(moe, name, i) for i in range(1, len(tensor.lengths) + 1)])
        for cell in self.cells:
            spec = config.mixer(cell.layer)
            window = spec.window if isinstance(spec, AttentionSpec) else 0
            held = min(context, window or context)
            sizes.append([kv_bytes(kind, cell.heads, held, cell.columns) for kind in KINDS])
        self.counts = np.array([len(row) for row in sizes])
        """[U]: how many levels each unit has."""
        self.sizes = np.array([row + [row[-1]] * (max(self.counts) - len(row)) for row in sizes])
        """[U, B]: bytes in memory, ascending; beyond a unit's levels, those of its last. A matrix whose rows are only
        looked up in the file takes none."""

        layers = [_layer_of(moe, name) for name in self.matrices] + [c.layer for c in self.cells]
        self._layers = np.concatenate(
            [np.repeat(config.moe_layers, config.num_experts), np.array(layers, np.int64)]
        )

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def top(self) -> Choice:
        """The highest level of every unit."""
        return self.counts - 1

    def first_layer(self, choice: Choice) -> int:
        """Returns the first layer in which a choice is below `top`; the number of layers if at most the head is."""
        differs = self._layers[choice != self.top]
        return int(differs.min(initial=self.moe.config.num_layers))

    def bytes(self, choice: Choice) -> int:
        """Returns the bytes that a choice takes."""
        return int(self.sizes[np.arange(len(self)), choice].sum())

    def expert_bits(self, choice: Choice) -> NDArray[np.int8]:
        """Returns the bits of every expert, [L, E]."""
        bits = np.array([rung[0] for rung in self.moe.ladder], np.int8)
        return bits[choice[: self.num_experts]].reshape(-1, self.moe.config.num_experts)

    def rungs(self, choice: Choice) -> Mapping[str, int]:
        """Returns how many rungs each matrix outside the experts has."""
        first = self.num_experts
        return {name: int(choice[first + i]) + 1 for i, name in enumerate(self.matrices)}

    def dense_bits(self, choice: Choice) -> Mapping[str, int]:
        """Returns the bits of each matrix outside the experts."""
        ladder = self.moe.dense_ladder
        return {name: ladder[rungs - 1] for name, rungs in self.rungs(choice).items()}

    def mix(self, choice: Choice) -> Mix:
        """Returns a choice in the form that `MixedLoss` measures."""
        return Mix(self.expert_bits(choice), self.rungs(choice), self.kv_rows(choice))

    def kv_rows(self, choice: Choice) -> tuple[Row, ...]:
        """Returns the types of each layer's keys and values."""
        rows: list[Row] = [None] * self.moe.config.num_layers
        first = self.num_experts + len(self.matrices)
        for cell, level in zip(self.cells, choice[first:].tolist(), strict=True):
            kind, keys = KINDS[level], rows[cell.layer]
            rows[cell.layer] = (kind, kind) if keys is None else (keys[0], kind)
        return tuple(rows)


def _resident_bytes(moe: MoeFile, name: str, level: int) -> int:
    """Returns the bytes that a matrix takes in memory at a level: 0 if its rows are only looked up in the file."""
    tensor = resident_matrices(moe, level).get(name)
    return 0 if tensor is None else tensor.size(level)


def _layer_of(moe: MoeFile, name: str) -> int:
    """Returns the layer of a matrix; for others, as the head and the embedding, the number of layers."""
    return int(name.split(".")[1]) if name.startswith("layers.") else moe.config.num_layers

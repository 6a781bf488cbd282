"""Reads the weights back from a `.moe` file with numpy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import reference_correction
import reference_float4
import reference_mwq
import reference_nested
from numpy.typing import NDArray

from edgemoe.config import MATRICES, ModelConfig
from edgemoe.file.reader import open_moe
from edgemoe.quant.correction import SHARED, kind_of

Array = NDArray[Any]

REFERENCES: Mapping[str, Any] = {
    "nested": reference_nested,
    "mwq": reference_mwq,
    "mxfp4": reference_float4.MXFP4,
    "nvfp4": reference_float4.NVFP4,
}
"""By scheme, the function that decodes the rungs of a matrix."""


class Decoded:
    """The weights of a file at the highest precision that it holds, float64."""

    config: ModelConfig
    tensors: Mapping[str, Array]
    """The dense tensors, by the names of `edgemoe.config.dense_tensors`."""

    def __init__(self, path: Path, *, without: str = "") -> None:
        """Args:
        without: a kind of matrix; the corrections of such matrices are left out.
        """
        self._without = without
        self._moe = moe = open_moe(path)
        self._bytes = np.fromfile(path, np.uint8)
        self.config = moe.config
        self._experts: dict[tuple[int, int, int | None], tuple[Array, Array, Array]] = {}
        self.tensors = {}
        for name, tensor in moe.tensors.items():
            shape = tensor.spec.shape
            if tensor.spec.kind == "f32":
                raw = self._bytes[tensor.offset : tensor.offset + tensor.lengths[0]]
                self.tensors[name] = raw.view(np.float32).reshape(shape)
            else:
                starts = tensor.offset + np.cumsum([0, *tensor.lengths])
                rungs = [self._bytes[a:b] for a, b in pairwise(starts)]
                self.tensors[name] = self._decode(name, rungs, moe.dense_ladder, shape, None)

    def expert(
        self, layer: int, index: int, level: int | None = None
    ) -> tuple[Array, Array, Array]:
        """Returns gate [H, D], up [H, D] and down [D, H], from the first rungs or from all."""
        key = layer, index, level
        if key not in self._experts:
            self._experts[key] = self._read_expert(layer, index, level)
        return self._experts[key]

    def _read_expert(self, layer: int, index: int, level: int | None) -> tuple[Array, Array, Array]:
        moe, config = self._moe, self.config
        row = config.moe_layers.index(layer) * config.num_experts + index
        shapes = config.expert_shapes
        ladders = list(zip(*moe.ladder, strict=True))
        rungs: list[list[Array]] = [[], [], []]
        at = int(moe.experts.offsets[row])
        have = min(int(moe.experts.rungs[row]), level or 8)
        sizes = [
            moe.scheme.rung_bytes(*shape, bits, f"experts.{part}") if shape[0] else [0] * len(bits)
            for part, shape, bits in zip(MATRICES, shapes, ladders, strict=True)
        ]
        for rung in range(have):
            for part in range(3):
                rungs[part].append(self._bytes[at : at + sizes[part][rung]])
                at += sizes[part][rung]
        basis = None if moe.bases is None else moe.bases[config.moe_layers.index(layer)]
        gate, up, down = (
            self._decode(f"experts.{part}", rungs[i], ladders[i][:have], shapes[i], basis)
            if shapes[i][0]
            else np.empty(shapes[i])
            for i, part in enumerate(MATRICES)
        )
        return gate, up, down

    def _decode(
        self,
        name: str,
        rungs: list[Array],
        ladder: Sequence[int],
        shape: tuple[int, ...],
        basis: Array | None,
    ) -> Array:
        widths, scheme = np.diff([0, *ladder]), self._moe.scheme.of(name)
        if not (ranks := scheme.ranks(name)):
            return REFERENCES[scheme.name].decode_rungs(rungs, widths, *shape, scheme.row_scales)
        shared = (
            basis.reshape(-1).view(np.uint8)
            if kind_of(name) in SHARED and basis is not None
            else None
        )
        return reference_correction.decode_rungs(
            rungs, widths, *shape, ranks, scheme.row_scales, shared,
            is_whole=kind_of(name) != self._without,
        )  # fmt: skip

"""Reads the weights back from a `.moe` file with numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import reference_mwq
import reference_nested
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.file.format import open_moe

Array = NDArray[Any]


class Decoded:
    """The weights of a file at the highest precision that it holds, float64."""

    config: ModelConfig
    tensors: Mapping[str, Array]
    """By the names of `edgemoe.config.dense_tensors`."""

    def __init__(self, path: Path) -> None:
        self._moe = moe = open_moe(path)
        self._scheme = reference_mwq if moe.scheme.name == "mwq" else reference_nested
        self._bytes = np.fromfile(path, np.uint8)
        self.config = moe.config
        self.tensors = {}
        for name, tensor in moe.tensors.items():
            shape = tensor.spec.shape
            if tensor.spec.kind == "f32":
                raw = self._bytes[tensor.offset : tensor.offset + tensor.lengths[0]]
                self.tensors[name] = raw.view(np.float32).reshape(shape)
            else:
                starts = tensor.offset + np.cumsum([0, *tensor.lengths])
                rungs = [self._bytes[a:b] for a, b in pairwise(starts)]
                widths = np.diff([0, *moe.dense_ladder])
                self.tensors[name] = self._scheme.decode_rungs(
                    rungs, widths, *shape, moe.scheme.row_scales
                )

    def expert(
        self, layer: int, index: int, level: int | None = None
    ) -> tuple[Array, Array, Array]:
        """Returns gate [H, D], up [H, D] and down [D, H], of the first rungs or of all."""
        moe, config = self._moe, self.config
        row = config.moe_layers.index(layer) * config.num_experts + index
        shapes = config.expert_shapes
        ladders = [np.diff([0, *bits]) for bits in zip(*moe.ladder, strict=True)]
        rungs: list[list[Array]] = [[], [], []]
        at = int(moe.experts.offsets[row])
        have = min(int(moe.experts.rungs[row]), level or 8)
        for rung in range(have):
            for part, (rows, cols) in enumerate(shapes):
                if not rows:
                    continue
                size = self._scheme.rung_bytes(
                    rows, cols, int(ladders[part][rung]), rung, moe.scheme.row_scales
                )
                rungs[part].append(self._bytes[at : at + size])
                at += size
        gate, up, down = (
            self._scheme.decode_rungs(
                rungs[part], ladders[part][:have], *shapes[part], moe.scheme.row_scales
            )
            if shapes[part][0]
            else np.empty(shapes[part])
            for part in range(3)
        )
        return gate, up, down

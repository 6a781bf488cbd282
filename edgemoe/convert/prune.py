"""Leaves neurons out of experts as they are converted: those that matter least, the same number in every expert.

Neuron k of an expert is row k of w_gate and w_up and column k of w_down. Its score is the energy of what it adds, the
mean of h_k^2 times ||w_k||^2, after CAMERA (arXiv 2508.02322). Slopes of the loss, by which HEAPr (arXiv 2509.22299)
weighs it, tell which experts can do with fewer neurons; among the neurons of one expert they choose no better. A file
has one width for all.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.convert.checkpoint import Checkpoint
from edgemoe.convert.source import SourceModel
from edgemoe.quant import Calibration

__all__ = ["PrunedCalibration", "PrunedModel", "kept_width"]

Array = NDArray[np.float32]
Places = NDArray[np.intp]

_WIDE, _WIDE_STEP, _STEP = 640, 64, 16
_BIASES = ("expert_bias.gate", "expert_bias.up")


def kept_width(width: int, share: float) -> int:
    """Returns how many of an expert's neurons are left without a share of them.

    Rounded to whole tiles of columns, of narrow experts to tiles of rows.

    Raises:
        ValueError: the share is not below 1, or so small that nothing is left out.
    """
    if not 0 < share < 1:
        raise ValueError(f"prune: expected more than 0% and less than 100%, got {100 * share:g}%")
    step = _WIDE_STEP if width >= _WIDE else _STEP
    kept = max(round(width * (1 - share) / step) * step, step)
    if kept >= width:
        raise ValueError(
            f"prune: {100 * share:g}% of {width} neurons is less than {step}, the fewest that can be left out"
        )
    return kept


class PrunedModel(SourceModel):
    """Is a checkpoint's model with narrower experts."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        share: float,
        calibration: Calibration,
        *,
        are_there: bool = True,
    ) -> None:
        """Args:
        share: of each expert's neurons, those that are left out.
        calibration: of the whole model.

        Raises:
            ValueError: see `kept_width`.
            FormatError: as `SourceModel`, or the calibration is of another model or has no squares.
        """
        super().__init__(checkpoint, are_there=are_there)
        self._whole = self.config
        width = kept_width(self._whole.expert_hidden, share)
        calibration.check(self._whole)
        self._calibration = calibration
        self._kept: dict[tuple[int, int], Places] = {}
        self.config = replace(self._whole, expert_hidden=width)
        self.notes += (f"{width} of {self._whole.expert_hidden} neurons of every expert are kept",)

    def kept(self, layer: int, index: int) -> Places:
        """Returns which neurons of an expert are left, ascending."""
        if (layer, index) not in self._kept:
            *_, down = super().expert(layer, index)
            self._kept[layer, index] = self._best(layer, index, down)
        return self._kept[layer, index]

    def _best(self, layer: int, index: int, down: Array) -> Places:
        name = f"experts.{layer}.{index}.down"
        squares = self._calibration.diagonal(name)
        if squares is None and (products := self._calibration.matrix(name)) is not None:
            squares = products.diagonal()
        scores = np.square(down, dtype=np.float64).sum(axis=0)
        if squares is not None:  # else no token reached the layer
            scores *= squares
        order = np.argsort(-scores, kind="stable")
        return np.sort(order[: self.config.expert_hidden])

    def expert(self, layer: int, index: int) -> tuple[Array, Array, Array]:
        """See `SourceModel.expert`."""
        gate, up, down = super().expert(layer, index)
        if (layer, index) not in self._kept:
            self._kept[layer, index] = self._best(layer, index, down)
        kept = self._kept[layer, index]
        return gate[kept] if len(gate) else gate, up[kept], np.ascontiguousarray(down[:, kept])

    def tensor(self, name: str) -> Array:
        """See `SourceModel.tensor`."""
        if not name.endswith(_BIASES):
            return super().tensor(name)
        layer, c = int(name.split(".")[1]), self._whole
        whole = self._read(name).reshape(c.num_experts, c.expert_hidden)
        return np.stack([row[self.kept(layer, e)] for e, row in enumerate(whole)])


class PrunedCalibration(Calibration):
    """Is a calibration of the whole model, as one of its pruned form."""

    def __init__(self, calibration: Calibration, model: PrunedModel) -> None:
        super().__init__(calibration.path)
        self._model = model

    def check(self, config: ModelConfig) -> None:
        """See `Calibration.check`; done before anything was left out."""

    def diagonal(self, name: str) -> Array | None:
        """See `Calibration.diagonal`."""
        found = super().diagonal(name)
        kept = self._kept(name)
        return found if found is None or kept is None else found[kept]

    def matrix(self, name: str) -> Array | None:
        """See `Calibration.matrix`."""
        found = super().matrix(name)
        kept = self._kept(name)
        return found if found is None or kept is None else found[np.ix_(kept, kept)]

    def _kept(self, name: str) -> Places | None:
        if not (name.startswith("experts.") and name.endswith(".down")):
            return None
        _, layer, index, _ = name.split(".")
        return self._model.kept(int(layer), int(index))

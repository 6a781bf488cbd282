"""Prunes the neurons of experts during conversion: the least important ones, the same number in every expert.

Neuron k of an expert is row k of w_gate and w_up and column k of w_down; h is the input of w_down. With a calibration
that has products of h, pruning follows Optimal Brain Surgeon (Hassibi and Stork, 1993). Neurons are removed greedily,
each time those whose removal costs least, and the remaining columns of w_down make up for them: of all matrices with
these columns, the new w_down is the one whose output is nearest to the old.

With squares alone, and in experts that saw few tokens, w_down stays as it is. A neuron's score is then the energy of
its contribution, the mean of h_k^2 times ||w_k||^2 with w_k its column, after CAMERA (arXiv 2508.02322). HEAPr (arXiv
2509.22299) weighs that by gradients of the loss. These tell which experts can do with fewer neurons, but a file has
one width for all experts; among the neurons of one expert, gradients choose no better.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.convert.checkpoint import Checkpoint
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.quant import Calibration

__all__ = ["PrunedCalibration", "PrunedModel", "kept_width", "made_up", "needed", "strongest"]

Array = NDArray[np.float32]
Places = NDArray[np.intp]

_WIDE, _WIDE_STEP, _STEP = 640, 64, 16
_BIASES = ("expert_bias.gate", "expert_bias.up")
_DAMPING = 0.01  # of the mean square, as in `edgemoe.quant.mwq`
_AT_ONCE = 32  # the most rounds of removal; wide experts lose several neurons in each


def kept_width(width: int, share: float) -> int:
    """Returns how many of an expert's neurons remain when a share of them is removed.

    The width is rounded to multiples of 64, the columns of a tile; below 640 neurons, of 16, the rows of a tile.

    Raises:
        ValueError: the share is not between 0 and 1, or so small that nothing would be removed.
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


def strongest(down: Array, squares: Array | None, count: int) -> Places:
    """Returns the columns of a matrix that contribute the most energy to its output, ascending.

    Args:
        down: [rows, cols].
        squares: mean squares of its inputs, [cols]; None if no token reached it.
        count: how many columns to return.
    """
    scores = np.square(down, dtype=np.float64).sum(axis=0)
    if squares is not None:
        scores *= squares
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def needed(down: Array, moments: Array, count: int) -> Places:
    """Returns the columns of a matrix that remain after removing those the others can best make up for, ascending.

    Args:
        down: [rows, cols].
        moments: mean of x xᵀ over its inputs, [cols, cols].
        count: how many columns remain.

    Raises:
        ValueError: `moments` is not positive semi-definite, so it cannot be such a mean.
    """
    w, damped = down.astype(np.float64), _damped(moments)
    try:
        np.linalg.cholesky(damped)
    except np.linalg.LinAlgError:
        raise ValueError("expected products of inputs with each other") from None
    inverse = np.linalg.inv(damped)
    left = np.arange(len(moments))
    step = -(-(len(left) - count) // _AT_ONCE)
    while len(left) > count:
        costs = np.square(w).sum(axis=0) / inverse.diagonal()
        gone = np.argsort(costs, kind="stable")[: min(step, len(left) - count)]
        shares = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[gone])
        stay = np.setdiff1d(np.arange(len(left)), gone)
        w = (w - w[:, gone] @ shares)[:, stay]
        inverse = (inverse - inverse[:, gone] @ shares)[np.ix_(stay, stay)]
        left = left[stay]
    return left


def made_up(down: Array, moments: Array, kept: Places) -> Array:
    """Returns the columns `kept` of a matrix, changed so that they make up for the others: [rows, kept].

    Of all matrices [rows, kept], this has the output nearest to the whole matrix's on inputs of these moments, apart
    from damping.
    """
    damped = _damped(moments)
    found = np.linalg.solve(damped[np.ix_(kept, kept)], damped[kept] @ down.T)
    return np.asarray(found.T, np.float32)


def _damped(moments: Array) -> NDArray[np.float64]:
    cols = len(moments)
    mean = float(moments.diagonal().mean()) or 1.0
    return moments.astype(np.float64) + _DAMPING * mean * np.eye(cols)


class PrunedModel(SourceModel):
    """A checkpoint's model with narrower experts."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        share: float,
        calibration: Calibration,
        *,
        are_there: bool = True,
    ) -> None:
        """Args:
            share: the share of each expert's neurons to remove, above 0 and below 1.
            calibration: a calibration of the unpruned model.

        Raises:
            ValueError: see `kept_width`.
            FormatError: as `SourceModel`, or the calibration is of another model or has no squares.
        """
        super().__init__(checkpoint, are_there=are_there)
        self._whole = self.config
        width = kept_width(self._whole.expert_hidden, share)
        calibration.check(self._whole)
        if not (calibration.has("hidden.products") or calibration.has("hidden.squares")):
            raise FormatError(
                f"{calibration.path}: has no squares of what w_down takes; edgemoe calibrate sums them"
            )
        self._calibration = calibration
        self._kept: dict[tuple[int, int], Places] = {}
        self.config = replace(self._whole, expert_hidden=width)
        how = (
            "make up for the others"
            if calibration.has("hidden.products")
            else "stay as they are; with a calibration of --full they make up for the others"
        )
        of = self._whole.expert_hidden
        self.notes += (f"{width} of {of} neurons of every expert are kept, and {how}",)

    def kept(self, layer: int, index: int) -> Places:
        """Returns which neurons of an expert remain, ascending."""
        if (layer, index) not in self._kept:
            *_, down = super().expert(layer, index)
            self._choose(layer, index, down)
        return self._kept[layer, index]

    def _choose(self, layer: int, index: int, down: Array) -> Array:
        """Returns an expert's w_down for the neurons that remain; which they are is determined once and remembered."""
        name, place, width = (
            f"experts.{layer}.{index}.down",
            (layer, index),
            self.config.expert_hidden,
        )
        moments = self._calibration.matrix(name)
        squares = self._calibration.diagonal(name) if moments is None else moments.diagonal()
        if moments is None or self._calibration.count(name) < self._calibration.min_tokens:
            if place not in self._kept:
                self._kept[place] = strongest(down, squares, width)
            return np.ascontiguousarray(down[:, self._kept[place]])
        if place not in self._kept:
            try:
                self._kept[place] = needed(down, moments, width)
            except ValueError as e:
                raise FormatError(f"{self._calibration.path}: {name}: {e}") from None
        return np.ascontiguousarray(made_up(down, moments, self._kept[place]))

    def expert(self, layer: int, index: int) -> tuple[Array, Array, Array]:
        """See `SourceModel.expert`."""
        gate, up, down = super().expert(layer, index)
        down = self._choose(layer, index, down)
        kept = self._kept[layer, index]
        return gate[kept] if len(gate) else gate, up[kept], down

    def tensor(self, name: str) -> Array:
        """See `SourceModel.tensor`."""
        if not name.endswith(_BIASES):
            return super().tensor(name)
        layer, c = int(name.split(".")[1]), self._whole
        whole = self._read(name).reshape(c.num_experts, c.expert_hidden)
        return np.stack([row[self.kept(layer, e)] for e, row in enumerate(whole)])


class PrunedCalibration(Calibration):
    """A calibration of the unpruned model, presented as one of the pruned model."""

    def __init__(self, calibration: Calibration, model: PrunedModel) -> None:
        vars(self).update(vars(calibration))  # the file that is open: its path may name another now
        self._model = model

    def check(self, config: ModelConfig) -> None:
        """Does nothing: `PrunedModel` has checked the calibration with the unpruned config."""

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

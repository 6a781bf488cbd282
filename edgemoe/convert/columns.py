"""Chooses column scales from a calibration, and moves them from norms into the matrices that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import dense_tensors
from edgemoe.convert.source import SourceModel
from edgemoe.quant import DEFAULT_LADDER, Calibration
from edgemoe.quant.columns import ColumnScales, strength
from edgemoe.quant.ranks import output_errors

__all__ = ["ScaledModel", "choose_scales"]

Array = NDArray[np.float32]

_EXPONENTS = (0.125, 0.25)  # candidate powers of the columns' mean squares
_ROWS = 32  # rows of a matrix that candidates are judged by


class ScaledModel(SourceModel):
    """A checkpoint's model with column scales applied to its norms and matrices. It computes the same function."""

    def __init__(self, model: SourceModel, scales: ColumnScales) -> None:
        self._model, self._scales = model, scales
        self.config, self.notes = model.config, model.notes

    def tensor(self, name: str) -> Array:
        """See `SourceModel.tensor`."""
        return self._scales.folded(name, self._model.tensor(name))

    def expert(self, layer: int, index: int) -> tuple[Array, Array, Array]:
        """See `SourceModel.expert`."""
        gate, up, down = self._model.expert(layer, index)
        name = f"experts.{layer}.{index}"
        return (
            self._scales.folded(f"{name}.gate", gate),
            self._scales.folded(f"{name}.up", up),
            down,
        )

    def needs(self, name: str) -> Iterator[str]:
        """See `SourceModel.needs`."""
        return self._model.needs(name)

    @property
    def tied(self) -> tuple[str, str] | None:
        """See `SourceModel.tied`."""
        return self._model.tied


@dataclass(frozen=True, slots=True)
class _Sample:
    """A matrix that represents all matrices that take a norm's output."""

    w: Array
    moments: Array
    """[cols, cols]: mean of x xᵀ over the matrix's inputs."""
    squares: Array
    """[cols]: mean squares of the inputs of all these matrices."""


def choose_scales(
    model: SourceModel,
    calibration: Calibration,
    *,
    bits: int | None = None,
    favour: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ColumnScales:
    """Returns for each norm the scales that minimise the output error: powers of the columns' mean squares, or 1.

    Args:
        calibration: a calibration with input products, of the unscaled model.
        bits: the highest level stored; None for all.
        favour: the only level, counted from 1, whose error counts; None for the mean over all stored levels.
        progress: called with the number of norms done and the total.
    """
    scales = ColumnScales(model.config)
    levels = slice(None) if bits is None else slice(DEFAULT_LADDER.index(bits) + 1)
    if favour is not None:
        levels = slice(favour - 1, favour)
    norms = len(scales.values)
    for row in filter(scales.can_scale, range(norms)):
        if progress is not None:
            progress(row, norms)
        sample = _sample(model, calibration, row)
        if sample is None:
            continue
        tried = [np.ones_like(sample.squares), *(strength(sample.squares, a) for a in _EXPONENTS)]
        errors = [_errors(sample, s, favour)[levels].mean() for s in tried]
        scales.values[row] = tried[int(np.argmin(errors))]
    return scales


def _errors(sample: _Sample, s: Array, favour: int | None) -> NDArray[np.float64]:
    """Returns the logarithm of the output error at each level with scales `s`."""
    moments = np.asarray(sample.moments / np.outer(s, s), np.float32)
    return np.log(output_errors(sample.w * s, moments, None, favour))


def _sample(model: SourceModel, calibration: Calibration, row: int) -> _Sample | None:
    """Returns the matrix that a row of scales is judged by; None if the calibration has no input products for it."""
    config = model.config
    layer, is_ffn = divmod(row, 2)
    tensors = dense_tensors(config)
    squares = None
    if layer == config.num_layers:
        name = "head"
    elif not is_ffn:
        names = (f"layers.{layer}.{n}" for n in config.mixer(layer).inputs)
        name = next(n for n in names if n in tensors and tensors[n].kind == "nested")
    elif layer in config.moe_layers:
        index = int(calibration.layer(layer, "count").argmax())
        name = f"experts.{layer}.{index}.up"
        if calibration.knows(name):
            squares = calibration.layer_diagonal(layer)
    else:
        name = f"layers.{layer}.shared.up"
    moments = calibration.matrix(name) if calibration.knows(name) else None
    if moments is None:
        return None
    w = model.expert(layer, index)[1] if name.startswith("experts.") else model.tensor(name)
    squares = moments.diagonal() if squares is None else squares
    if not squares.any():  # no token reached it, so no column is stronger than another
        return None
    some = np.ascontiguousarray(w[:: max(len(w) // _ROWS, 1)][:_ROWS], np.float32)
    return _Sample(some, moments, squares)

"""Checkpoints with LayerNorm, presented as checkpoints with RMS norms.

Everything that is added to the residual stream is centred at conversion: the mean is subtracted from every embedding,
and from every column of the matrices that write to the stream. The residual then has mean zero, and on such vectors a
LayerNorm equals an RMS norm. A LayerNorm's bias is multiplied by the matrices that follow it, and becomes their bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.checkpoint import Checkpoint, listed
from edgemoe.errors import FormatError

__all__ = ["Biases", "Centred"]

Array = NDArray[np.float32]


class Biases:
    """The bias that a LayerNorm's bias becomes: of one matrix, or of one matrix per expert, with a row for each."""

    def __init__(self, norm: str, weights: Sequence[str], own: str = "", *, stacked: bool) -> None:
        """Takes the names of the stored tensors.

        Args:
            norm: the LayerNorm's bias.
            weights: the matrices that follow the LayerNorm.
            own: the matrix's own bias, if there is one.
            stacked: whether the result has a row for each matrix.
        """
        self.norm, self.weights, self.own, self.stacked = norm, weights, own, stacked

    def shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Returns the shape of the result, from the shapes of the stored tensors."""
        rows = stored[self.weights[0]][0]
        return (len(self.weights), rows) if self.stacked else (rows,)

    def read(self, tensor: Callable[[str], Array]) -> Array:
        """Returns the bias; reads one matrix at a time."""
        bias = tensor(self.norm)
        rows = [tensor(name) @ bias for name in self.weights]
        out = np.stack(rows) if self.stacked else rows[0]
        return np.asarray(out + tensor(self.own) if self.own else out, np.float32)


class Centred:
    """A checkpoint with `biases` in place of its LayerNorms' own; implements `Checkpoint`. Immutable."""

    def __init__(
        self,
        inner: Checkpoint,
        *,
        embed: str,
        writers: Sequence[str],
        biases: Mapping[str, Biases],
        zeros: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Args:
            inner: the stored checkpoint.
            embed: the embedding, whose rows are centred.
            writers: matrices and biases that write to the residual stream; their columns are centred.
            biases: the biases that LayerNorms' become, by name; a stored tensor of the name is replaced.
            zeros: shapes of biases that are all zeros, by name: where experts have some biases, all must exist.

        Raises:
            FormatError: a tensor is missing.
        """
        self.name, self.identity = inner.name, inner.identity
        self.config: Mapping[str, Any] = inner.config
        self.files: Mapping[str, bytes] = inner.files
        self._inner, self._embed, self._writers = inner, embed, set(writers)
        self._biases, self._zeros = biases, zeros
        stored = inner.shapes
        needed = {n for b in biases.values() for n in (b.norm, b.own, *b.weights) if n}
        if gone := listed(n for n in needed if n not in stored):
            raise FormatError(f"missing {gone}")
        norms = {b.norm for b in biases.values()}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            **{name: shape for name, shape in stored.items() if name not in norms},
            **{name: b.shape(stored) for name, b in biases.items()},
            **zeros,
        }

    def tensor(self, name: str) -> Array:
        """See `Checkpoint.tensor`."""
        if name in self._biases:
            return self._biases[name].read(self._inner.tensor)
        if name in self._zeros:
            return np.zeros(self._zeros[name], np.float32)
        values = self._inner.tensor(name)
        if name == self._embed:
            values = values - values.mean(axis=1, keepdims=True)
        elif name in self._writers:
            values = np.asarray(values - values.mean(axis=0))
        return values

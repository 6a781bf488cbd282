"""Scales of columns that a conversion moves from norms into the matrices behind them, where codes then err less.

A matrix takes what a norm gives. With its column c multiplied by s_c, and number c of the norm's weight divided by
that, the product is the same, and strong and weak columns are more alike (AWQ, arXiv 2306.00978). Whatever takes that
norm's output must have the same s: queries, keys and values; router, experts and the FFN beside them.

What runs a file need not know. Who compares its inputs or weights with the checkpoint's does: the section
`column_scales` has s, float32 [2 layers + 1, D]: for each layer of what its mixer takes and of what its FFN takes, and
at last of what the head takes; 1 where nothing was scaled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.errors import FormatError

__all__ = ["COLUMN_SCALES", "ColumnScales", "strength"]

Array = NDArray[np.float32]

COLUMN_SCALES = "column_scales"
"""The section."""

_OF_FFN = ("router", "shared.gate", "shared.up", "shared.sigmoid", "experts")
_WEAKEST = 1e-6  # of the mean square: a column that is always 0 has a scale too


class ColumnScales:
    """Is s of all norms of a model."""

    def __init__(self, config: ModelConfig, values: Array | None = None) -> None:
        """Args:
        values: [2 layers + 1, D]; None for 1 everywhere.
        """
        self._config = config
        shape = 2 * config.num_layers + 1, config.hidden_size
        self.values = np.ones(shape, np.float32) if values is None else values

    @classmethod
    def from_section(cls, config: ModelConfig, content: bytes) -> ColumnScales:
        """Reads what `section` wrote.

        Raises:
            FormatError: it is of another model, or no scales.
        """
        shape = 2 * config.num_layers + 1, config.hidden_size
        if len(content) != 4 * shape[0] * shape[1]:
            raise FormatError(
                f"section {COLUMN_SCALES}: expected {4 * shape[0] * shape[1]} bytes, got {len(content)}"
            )
        values = np.frombuffer(content, "<f4").reshape(shape)
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise FormatError(f"section {COLUMN_SCALES}: expected finite numbers above 0")
        return cls(config, values)

    def section(self) -> bytes:
        """Returns the section of a file, empty where nothing was scaled."""
        return b"" if (self.values == 1).all() else self.values.astype("<f4").tobytes()

    def can_scale(self, row: int) -> bool:
        """Says whether all that takes a norm's output can be scaled.

        Where router, experts and the FFN beside them have norms of their own, the layer's is left alone.
        """
        layer, is_ffn = divmod(row, 2)
        if layer == self._config.num_layers:
            return not self._config.tied
        if not is_ffn:
            return True
        has_own = self._config.branch_norms and layer in self._config.moe_layers
        return self._config.ffn(layer).exists and not has_own

    def of(self, name: str) -> Array | None:
        """Returns s of the columns of a matrix, or of a calibration's input; None for those without.

        Args:
            name: a tensor's, "experts.LAYER.INDEX.gate" and the like, or "layers.LAYER.experts" for what all take.
        """
        kind, _, rest = name.partition(".")
        if name == "head":
            return self._row(-1)
        if kind == "experts":
            return None if name.endswith(".down") else self._row(2 * int(rest.split(".")[0]) + 1)
        if kind != "layers":
            return None
        number, _, part = rest.partition(".")
        layer = int(number)
        if part in self._config.mixer(layer).inputs:
            return self._row(2 * layer)
        return self._row(2 * layer + 1) if part in _OF_FFN else None

    def folded(self, name: str, w: Array) -> Array:
        """Returns a tensor of the checkpoint as it is in the file."""
        norm, s = self._of_norm(name), self.of(name)
        if norm is not None:
            return np.asarray(w / norm, np.float32)
        return w if s is None else np.asarray(w * s, np.float32)

    def unfolded(self, name: str, w: Array) -> Array:
        """Returns a tensor of the file as the checkpoint has it."""
        norm, s = self._of_norm(name), self.of(name)
        if norm is not None:
            return np.asarray(w * norm, np.float32)
        return w if s is None else np.asarray(w / s, np.float32)

    def restore(self, name: str, sums: NDArray[Any]) -> None:
        """Turns sums over inputs of the file into those of the checkpoint, in place.

        Args:
            name: of a calibration's tensor.
        """
        place, _, what = name.rpartition(".")
        if what not in ("squares", "products", "rows"):
            return
        kind, _, where = place.partition(".")
        if kind == "experts":
            layer, _, port = where.partition(".")
            s = self.of(f"layers.{layer}.experts") if port == "in" else None
        else:
            s = self.of(where)
        if s is not None and (s != 1).any():
            sums *= s * s if what == "squares" else s
            if what == "products":
                sums *= s[:, None]

    def _row(self, index: int) -> Array:
        row: Array = self.values[index]
        return row

    def _of_norm(self, name: str) -> Array | None:
        if name == "norm":
            return self._row(-1)
        head, _, part = name.rpartition(".")
        if part not in ("attn_norm", "ffn_norm"):
            return None
        return self._row(2 * int(head.removeprefix("layers.")) + (part == "ffn_norm"))


def strength(squares: Array, exponent: float) -> Array:
    """Returns s for columns of these mean squares: their powers, whose geometric mean is 1."""
    wide = np.asarray(squares, np.float64)
    wide = np.maximum(wide, _WEAKEST * wide.mean()) ** exponent
    return np.asarray(wide / np.exp(np.log(wide).mean()), np.float32)

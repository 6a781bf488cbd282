"""Column scales, which a conversion moves from norms into the matrices that follow them, to reduce quantisation error.

A matrix takes the output of a norm. If its column c is multiplied by s_c, and element c of the norm's weight is divided
by s_c, the product is the same, and strong and weak columns become more alike (AWQ, arXiv 2306.00978). All matrices
that take the same norm's output need the same s: queries, keys and values; or router, experts and the shared FFN.

To run such a file one need not know s. To compare its inputs or weights with the checkpoint's one must. So the section
`column_scales` has s, float32 [2 layers + 1, D]: for each layer, one row for the input of its mixer and one for the
input of its FFN; the last row is for the input of the head. s is 1 where nothing was scaled.
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
"""The name of the section."""

_OF_FFN = ("router", "shared.gate", "shared.up", "shared.sigmoid", "experts")
_WEAKEST = 1e-6  # of the mean of all squares, at least: columns of zeros have a scale too


class ColumnScales:
    """The column scales s of all norms of a model."""

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
            FormatError: it is for another model, or its values are not scales.
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
        """Returns the content of the section; empty if nothing was scaled."""
        return b"" if (self.values == 1).all() else self.values.astype("<f4").tobytes()

    def can_scale(self, row: int) -> bool:
        """Returns whether everything that takes the output of the norm of a row of `values` can be scaled.

        It cannot where router, experts and shared FFN have norms of their own, nor where the head is tied.
        """
        layer, is_ffn = divmod(row, 2)
        if layer == self._config.num_layers:
            return not self._config.tied
        if not is_ffn:
            return True
        has_own = self._config.branch_norms and layer in self._config.moe_layers
        return self._config.ffn(layer).exists and not has_own

    def of(self, name: str) -> Array | None:
        """Returns s [cols] for the columns of a matrix or of an input of a calibration; None for those without scales.

        Args:
            name: of a tensor, "experts.LAYER.INDEX.gate" and the like, or "layers.LAYER.experts" for the input that all
                routed experts of a layer share.
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
        """Turns sums over the file's inputs into sums over the checkpoint's inputs, in place.

        Args:
            name: of a tensor of a calibration file; others than squares, products and rows stay as they are.
            sums: the tensor.
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
    """Returns s [cols] for columns with these mean squares: squares ** exponent, scaled to a geometric mean of 1."""
    wide = np.asarray(squares, np.float64)
    wide = np.maximum(wide, _WEAKEST * wide.mean()) ** exponent
    return np.asarray(wide / np.exp(np.log(wide).mean()), np.float32)

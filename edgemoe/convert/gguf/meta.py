"""Reads a GGUF file's metadata and tensor shapes. Errors name the key that is missing or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgemoe.errors import FormatError, quoted

__all__ = ["Meta"]


class Meta:
    """A file's metadata, with keys relative to its architecture, and the shapes of its tensors. Immutable."""

    def __init__(
        self,
        values: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        where: str,
        rope_factors: list[float] | None = None,
    ) -> None:
        self._values = values
        self.shapes = shapes
        """The shape of every tensor by its name in the file, rows first."""
        self.rope_factors = rope_factors
        """Divisors of the RoPE frequencies; None if they are not divided."""
        self._where = where
        arch = values.get("general.architecture")
        if not isinstance(arch, str):
            raise FormatError(f"{where}: general.architecture must be a name, got {quoted(arch)}")
        self.architecture: str = arch

    def get(self, key: str) -> Any:
        """Returns a raw value, None when absent."""
        return self._values.get(f"{self.architecture}.{key}")

    def of_file(self, key: str) -> Any:
        """Returns the raw value of a key that does not belong to the architecture, None when absent."""
        return self._values.get(key)

    def whole(self, key: str, default: int | None = None, *, at_least: int = 1) -> int:
        """Returns a whole number; without a default the key must exist.

        A list with one number for each block is accepted if all are equal.
        """
        value = self._value(key, default)
        if isinstance(value, list) and len(set(map(repr, value))) == 1:
            value = value[0]
        if type(value) is not int or value < at_least:
            kind = "a positive whole number" if at_least == 1 else "a whole number"
            raise self.error(key, f"must be {kind}, got {quoted(value)}")
        return value

    def most(self, key: str, default: int | None = None) -> int:
        """Returns a whole number, or the largest of a list with one for each block: blocks without any have 0."""
        value = self._value(key, default)
        values = value if isinstance(value, list) and value else [value]
        if not all(type(v) is int and v >= 0 for v in values) or max(values) < 1:
            raise self.error(key, f"must be a positive whole number, got {quoted(value)}")
        return int(max(values))

    def positive(self, key: str, default: float | None = None) -> float:
        """Returns a finite number above zero; without a default the key must exist.

        Files hold float32. Of the numbers that round to the same float32, the shortest is returned: config.json had
        1e-05, not 9.99999975e-06.
        """
        value = self._value(key, default)
        # Some writers store whole numbers as integers.
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < float("inf")
        ):
            raise self.error(key, f"must be a positive number, got {quoted(value)}")
        shortest = float(str(np.float32(value)))
        return shortest if np.float32(value) == value else float(value)

    def optional(self, key: str) -> float | None:
        """Returns a finite number above zero; None if the key is absent or 0."""
        return self.positive(key) if self.get(key) else None

    def flag(self, key: str, default: bool) -> bool:
        """Returns a boolean."""
        value = self._value(key, default)
        if type(value) is not bool:
            raise self.error(key, f"must be true or false, got {quoted(value)}")
        return value

    def per_layer(self, key: str, count: int, kind: type = int) -> list[Any]:
        """Returns a list with one value for each of `count` blocks; a single value applies to all.

        A longer list, which has values for blocks that predict further tokens, is cut.
        """
        value = self._value(key, None)
        values = value if isinstance(value, list) else [value] * count
        if len(values) < count or not all(type(v) is kind for v in values):
            raise self.error(
                key, f"must be a list of {count} values of {kind.__name__}, got {quoted(value)}"
            )
        return values[:count]

    @property
    def layers(self) -> int:
        """The number of the model's blocks, without those after them that predict further tokens."""
        count = self.whole("block_count")
        further = self.whole("nextn_predict_layers", 0, at_least=0)
        if further >= count:
            raise self.error(
                "nextn_predict_layers", f"must be less than {count} blocks, got {further}"
            )
        return count - further

    def layers_with(self, name: str) -> list[int]:
        """Returns the layers that have a tensor `name`, which includes its ending (`.weight`)."""
        return [i for i in range(self.layers) if f"blk.{i}.{name}" in self.shapes]

    def has(self, name: str) -> bool:
        """Returns whether any layer has a tensor `name`, which includes its ending."""
        return bool(self.layers_with(name))

    def rows(self, name: str, *, columns: bool = False) -> int:
        """Returns the number of rows of the first layer's matrix, or matrices, `name`; 0 if no layer has it.

        Args:
            name: the name within a block, with its ending.
            columns: return the number of columns instead.
        """
        for i in self.layers_with(name)[:1]:
            shape = (1, *self.shapes[f"blk.{i}.{name}"])
            return shape[-1] if columns else shape[-2]
        return 0

    def missing(self, tensor: str) -> FormatError:
        """Returns the error for a missing tensor."""
        return FormatError(f"{self._where}: no tensor {tensor}")

    def error(self, key: str, what: str) -> FormatError:
        """Returns the error for one key."""
        return FormatError(f"{self._where}: {self.architecture}.{key} {what}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        return default if value is None else value

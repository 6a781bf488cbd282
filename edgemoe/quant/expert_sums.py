"""Sums over the inputs of routed experts in a calibration file, stored as products or as the inputs themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import FormatError
from edgemoe.file.summed import SummedFile

__all__ = ["ExpertSums", "checked"]

Array = NDArray[np.float32]

_BLOCK = 4096  # tokens whose products are summed at a time


class ExpertSums:
    """Sums over the tokens of one expert, or of all experts of a layer. Names are those of `Calibration`.

    A `port` is "in" for the input of gate and up, or "hidden" for the input of down.
    """

    def __init__(self, file: SummedFile, min_tokens: int) -> None:
        """Args:
        min_tokens: see `Calibration`.
        """
        self._file, self._min_tokens = file, min_tokens
        self._last: dict[str, tuple[int, Array]] = {}  # the last layer's sums over experts
        self._choices: tuple[int, NDArray[np.int64]] | None = None  # the last layer's

    def has_products(self, layer: int, port: str) -> bool:
        """Returns whether there are products for each expert, or the inputs to compute them from."""
        names = (f"experts.{layer}.{port}.{what}" for what in ("products", "rows"))
        return any(name in self._file.shapes for name in names)

    def count(self, layer: int) -> NDArray[np.int64]:
        """Returns the tokens of each expert, [E]."""
        name = f"experts.{layer}.count"
        return checked(self._file, name, self._file.tensor(name))

    def chosen(self, layer: int) -> NDArray[np.int64]:
        """Returns the experts of each token, [T, K]. The last layer's are cached.

        Raises:
            FormatError: they do not fit the counts.
        """
        if self._choices is None or self._choices[0] != layer:
            name, counts = f"experts.{layer}.in.chosen", self.count(layer)
            chosen = checked(self._file, name, self._file.tensor(name))
            found = [np.count_nonzero(chosen == e) for e in range(len(counts))]
            if not np.array_equal(found, counts) or chosen.max(initial=0) > len(counts):
                raise FormatError(f"{self._file.path}: {name} does not fit the counts")
            self._choices = layer, chosen
        return self._choices[1]

    def mean(self, layer: int, index: int, port: str, what: str) -> Array | None:
        """Returns the mean of an expert's squares [cols] or products [cols, cols], float32; None if there are none.

        An expert with few tokens gets the layer's mean mixed in; see `Calibration`.
        """
        is_there = f"experts.{layer}.{port}.{what}" in self._file.shapes
        if not is_there and not (what == "products" and self.has_products(layer, port)):
            return None
        counts = self.count(layer)
        n, needed = int(counts[index]), self._min_tokens
        own = self._own(layer, index, f"{port}.{what}")
        if counts.sum() == 0:
            return None
        if n >= needed:
            return np.asarray(own / np.float32(n), np.float32)
        layer_mean = self._total(layer, f"{port}.{what}") / np.float32(counts.sum())
        return np.asarray(
            (own + np.float32(needed - n) * layer_mean) / np.float32(needed), np.float32
        )

    def layer_products(self, layer: int) -> Array | None:
        """Returns the sum of products over all inputs routed to a layer's experts, [D, D]; None if there are none."""
        key = f"experts.{layer}.in.products"
        if key not in self._file.shapes:
            return self._total(layer, "in.products") if self.has_products(layer, "in") else None
        total = np.zeros(self._file.shapes[key][1:], np.float32)
        for rows in self._file.rows(key):  # an expert at a time: they are large
            total += checked(self._file, key, rows).reshape(-1, *total.shape).sum(axis=0)
        return total

    def _own(self, layer: int, index: int, what: str) -> Array:
        """Returns a sum over an expert's tokens."""
        key = f"experts.{layer}.{what}"
        if key in self._file.shapes:
            return checked(self._file, key, self._file.row(key, index))
        return self._products(layer, np.flatnonzero((self.chosen(layer) == index).any(axis=1)))

    def _total(self, layer: int, what: str) -> Array:
        """Returns a sum over the tokens of all experts of a layer. The last layer's is cached."""
        last = self._last.get(what)
        if last is not None and last[0] == layer:
            return last[1]
        key, counts = f"experts.{layer}.{what}", self.count(layer)
        if key in self._file.shapes:
            total = np.zeros(self._file.shapes[key][1:], np.float32)
            for e in range(len(counts)):  # one expert at a time: products are large
                total += checked(self._file, key, self._file.row(key, e))
        else:
            taken = (self.chosen(layer) < len(counts)).sum(axis=1)
            total = self._products(layer, np.flatnonzero(taken), np.sqrt(taken[taken > 0]))
        self._last[what] = layer, total
        return total

    def _products(
        self, layer: int, tokens: NDArray[np.int64], weights: NDArray[np.floating] | None = None
    ) -> Array:
        """Returns the sum of x xᵀ over some tokens of a layer, with each x multiplied by its weight."""
        key = f"experts.{layer}.in.rows"
        cols = self._file.shapes[key][1]
        total = np.zeros((cols, cols), np.float32)
        for first in range(0, len(tokens), _BLOCK):
            some = tokens[first : first + _BLOCK]
            x = np.empty((len(some), cols), np.float32)
            for to, token in zip(x, some, strict=True):
                to[...] = self._file.row(key, int(token))
            if weights is not None:
                x *= weights[first : first + _BLOCK, None].astype(np.float32)
            total += x.T @ x
        return total


def checked(file: SummedFile, name: str, rows: NDArray[Any]) -> NDArray[Any]:
    """Returns a tensor or some of its rows, after a check of its values.

    Raises:
        FormatError: a value is below 0, in a tensor other than products and rows of inputs.
    """
    if not name.endswith((".products", ".rows")) and rows.size and rows.min() < 0:
        raise FormatError(f"{file.path}: {name}: expected sums, none below 0")
    return rows

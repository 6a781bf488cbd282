"""A choice of key and value types for each layer, by the loss that each costs alone (after KVTuner, arXiv 2502.04420).

A cell is one layer's keys or values. Each type of each cell is measured while all other cells are in float16. Losses
nearly add up, so an exact dynamic programme over their sums finds the types that cost least within a number of bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.file.format import MoeFile
from edgemoe.file.reader import open_moe
from edgemoe.lab.bits.rules import cheapest
from edgemoe.lab.quality.loss import half_log_softmax
from edgemoe.model import KvTable
from edgemoe.ops import kv_bytes
from edgemoe.runtime.engine import load

__all__ = ["KINDS", "Cell", "Found", "cells_of", "choose_kv_types"]

KINDS = ("q2_0", "q3_0", "q4_0", "q8_0", "f16")
"""Types that may be chosen, smallest first."""

_SOME = 256  # positions whose bytes are counted: whole tiles of every type

Progress = Callable[[int, int], None]
Rows = list[tuple[str, str] | None]


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer's keys or values."""

    layer: int
    side: int
    """0 for keys, or for keys that are values too; 1 for values."""
    heads: int
    columns: int
    """Per head."""

    def bytes(self, kind: str) -> int:
        """Returns the bytes of `_SOME` positions in a type."""
        return kv_bytes(kind, self.heads, _SOME, self.columns)


@dataclass(frozen=True, slots=True)
class Found:
    """A table of types, and its cost."""

    table: KvTable
    average_bits: float
    """Mean bits of a number, including its share of the scales."""
    loss: float
    """The measured mean KL divergence from a cache in float16, in nats."""
    expected: float
    """The sum of the losses that its cells cost alone, in nats."""


def cells_of(moe: MoeFile) -> list[Cell]:
    """Returns the cells of a model, layer by layer."""
    out = []
    for i, spec in enumerate(moe.config.mixer_by_layer):
        heads, columns = spec.cached_heads
        sides = 0 if not heads else 1 if spec.values_are_keys else 2
        out += [Cell(i, side, heads, columns) for side in range(sides)]
    return out


def choose_kv_types(
    path: str | os.PathLike[str],
    windows: NDArray[np.int32],
    *,
    average_bits: float | None = None,
    max_loss: float | None = None,
    kinds: Sequence[str] = KINDS,
    progress: Progress | None = None,
    **options: Any,
) -> Found:
    """Measures types and chooses one for each cell, within `average_bits` or `max_loss`, of which one must be given.

    Args:
        path: a `.moe` file.
        windows: int32 [N, T], tokens; the second half of each window counts.
        average_bits: the most bits of a number on average, including scales.
        max_loss: the most, in nats, that the losses of the cells alone may add up to; the fewest bytes within it are
            chosen.
        kinds: types to choose from, smallest first; the reference is float16.
        progress: called with how many measurements are done and how many there are.
        options: of `edgemoe.load`.

    Raises:
        ValueError: the model has no keys and values, the smallest types take more than `average_bits`, or the largest
            cost more than `max_loss`.
    """
    moe = open_moe(path)
    cells = cells_of(moe)
    if not cells:
        raise ValueError(f"{path}: no layer has keys and values")
    sizes = np.array([[cell.bytes(kind) for kind in kinds] for cell in cells])
    numbers = _SOME * sum(cell.heads * cell.columns for cell in cells)
    if average_bits is not None and sizes[:, 0].sum() * 8 > average_bits * numbers:
        least = sizes[:, 0].sum() * 8 / numbers
        raise ValueError(
            f"average bits: expected at least {math.ceil(least * 100) / 100:g}, which {kinds[0]} takes, "
            f"got {average_bits:g}"
        )
    measure = _Measure(path, moe, cells, windows, options)
    total, done = len(cells) * sum(kind != "f16" for kind in kinds) + 2, 0

    def loss(choice: Sequence[str]) -> float:
        nonlocal done
        found = measure(choice)
        done += 1
        if progress is not None:
            progress(done, total)
        return found

    loss(["f16"] * len(cells))
    cost = np.zeros(sizes.shape)
    for i, j in np.ndindex(*sizes.shape):
        if kinds[j] != "f16":
            cost[i, j] = loss([kinds[j] if at == i else "f16" for at in range(len(cells))])
    if average_bits is not None:
        chosen = cheapest(cost, sizes, int(average_bits * numbers / 8))
    else:
        assert max_loss is not None
        chosen = _fewest_bytes(cost, sizes, max_loss)
    choice = [kinds[j] for j in chosen]
    every = np.arange(len(cells))
    settings: dict[str, Any] = {"kinds": list(kinds)}
    settings |= {"average_bits": average_bits} if max_loss is None else {"max_loss": max_loss}
    table = KvTable(of=KvTable.identity(moe), layers=measure.rows(choice), settings=settings)
    return Found(
        table, float(sizes[every, chosen].sum() * 8 / numbers), loss(choice),
        float(cost[every, chosen].sum()),
    )  # fmt: skip


def _fewest_bytes(
    cost: NDArray[np.float64], sizes: NDArray[np.int64], most: float
) -> NDArray[np.int64]:
    """Returns the choice of fewest bytes whose costs add up to at most `most`, by bisection.

    Raises:
        ValueError: even the largest types cost more.
    """
    low, high = int(sizes[:, 0].sum()), int(sizes[:, -1].sum())
    every = np.arange(len(cost))
    best = cheapest(cost, sizes, high)
    if cost[every, best].sum() > most:
        least = cost[every, best].sum()
        raise ValueError(f"max_loss: {most:g}; the largest types cost {least:.3g}")
    while low < high:
        middle = (low + high) // 2
        found = cheapest(cost, sizes, middle)
        if cost[every, found].sum() <= most:
            best, high = found, int(sizes[every, found].sum())
        else:
            low = middle + 1
    return best


class _Measure:
    """The loss of one choice of types after another, measured on the same tokens."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        moe: MoeFile,
        cells: list[Cell],
        windows: NDArray[np.int32],
        options: dict[str, Any],
    ) -> None:
        self._path, self._moe, self._cells, self._windows = path, moe, cells, windows
        self._options = options
        self._reference: list[NDArray[np.float32]] = []

    def rows(self, choice: Sequence[str]) -> tuple[tuple[str, str] | None, ...]:
        """Returns the rows of a table, given a type for each cell."""
        rows: Rows = [None] * len(self._moe.config.mixer_by_layer)
        for cell, kind in zip(self._cells, choice, strict=True):
            keys = rows[cell.layer]
            rows[cell.layer] = (kind, kind) if keys is None else (keys[0], kind)
        return tuple(rows)

    def __call__(self, choice: Sequence[str]) -> float:
        """Returns the mean over tokens of KL(reference ‖ this choice), in nats. The first call sets the reference."""
        table = KvTable(of=KvTable.identity(self._moe), layers=self.rows(choice))
        with load(
            self._path, context=self._windows.shape[1], cache_type_k="auto", cache_type_v="auto",
            kv_table=table, **self._options,
        ) as engine:  # fmt: skip
            found = [half_log_softmax(engine.logits(window)) for window in self._windows]
        self._reference = self._reference or found
        pairs = zip(self._reference, found, strict=True)
        return float(np.mean([(np.exp(p) * (p - q)).sum(1) for p, q in pairs]))

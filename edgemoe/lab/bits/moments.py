"""The sums that a calibration collects; `edgemoe.quant.calibration` specifies their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig, dense_tensors
from edgemoe.plan import Plan
from edgemoe.quant.calibration import SAME_INPUT

__all__ = ["Moments", "Products", "product_shapes"]

Array = NDArray[np.float32]
_OF_LAYER = ".experts.products"


class Moments:
    """Sums squares, counts, gates, outputs and errors. A `Tap`."""

    def __init__(self, config: ModelConfig, *, level_bits: Sequence[int]) -> None:
        """Args:
        level_bits: of the file's levels, ascending; errors are measured against the last.
        """
        self._layers = config.moe_layers
        self._levels = range(1, len(level_bits))
        E, levels = config.num_experts, len(level_bits)
        self.sums: dict[str, NDArray[Any]] = {}
        """What to save, by name; squares are float64 here."""
        for name, cols in _dense_inputs(config).items():
            self.sums[f"dense.{name}.count"] = np.zeros(1, np.int64)
            self.sums[f"dense.{name}.squares"] = np.zeros(cols)
        for i in config.moe_layers:
            p = f"experts.{i}."
            self.sums |= {
                p + "count": np.zeros(E, np.int64), p + "gates": np.zeros(E), p + "gates2": np.zeros(E),
                p + "in.squares": np.zeros((E, config.hidden_size)),
                p + "hidden.squares": np.zeros((E, config.expert_hidden)),
                p + "output2": np.zeros(E), p + "output_max": np.zeros(E, np.float32),
                p + "error": np.zeros((E, levels)), p + "error2": np.zeros((E, levels)),
            }  # fmt: skip
        self._window = np.zeros((len(config.moe_layers), E, levels))

    def dense(self, name: str, x: Array) -> None:
        """See `Tap.dense`."""
        self.sums[f"dense.{name}.count"] += len(x)
        self.sums[f"dense.{name}.squares"] += _squares(x)

    def experts(
        self,
        plan: Plan,
        group: Sequence[int],
        x: Array,
        hidden: Array,
        parts: Array,
        at_level: Callable[[int], Array],
    ) -> None:
        """See `Tap.experts`."""
        p = f"experts.{self._layers[plan.layer]}."
        sums, window = self.sums, self._window[plan.layer]
        gates = _row_gates(plan)
        for i in group:
            e, rows = plan.experts[i], slice(plan.offsets[i], plan.offsets[i + 1])
            g, out = gates[rows], parts[rows]
            sums[p + "count"][e] += len(g)
            sums[p + "gates"][e] += g.sum()
            sums[p + "gates2"][e] += g @ g
            sums[p + "in.squares"][e] += _squares(x[plan.tokens[rows]])
            sums[p + "hidden.squares"][e] += _squares(hidden[rows])
            sums[p + "output2"][e] += np.einsum("td,td->", out, out, dtype=np.float64)
            sums[p + "output_max"][e] = max(sums[p + "output_max"][e], np.abs(out).max())
        for level in self._levels:
            lower = at_level(level)
            for i in group:
                rows = slice(plan.offsets[i], plan.offsets[i + 1])
                change = (lower[rows] - parts[rows]).astype(np.float64)
                norms = np.einsum("td,td->t", change, change)
                window[plan.experts[i], level - 1] += gates[rows] ** 2 @ norms

    def end_window(self) -> None:
        """Ends a piece of text."""
        for i, squares in zip(self._layers, self._window, strict=True):
            self.sums[f"experts.{i}.error2"] += squares
            self.sums[f"experts.{i}.error"] += np.sqrt(squares)
        self._window[:] = 0


class Products:
    """Sums x xᵀ of some layers. A `Tap`."""

    def __init__(self, config: ModelConfig, names: Sequence[str]) -> None:
        """Args:
        names: of `product_shapes`, those that are wanted now.
        """
        self._layers = config.moe_layers
        shapes = {**product_shapes(config), **product_shapes(config, layers=True)}
        self.sums: dict[str, NDArray[Any]] = {}
        """What to save, by name."""
        for name in names:
            self.sums[name] = np.zeros(shapes[name], np.float32)
            if name.endswith(
                _OF_LAYER
            ):  # an input that no dense matrix takes, so that nobody else counts it
                self.sums[name.removesuffix("products") + "count"] = np.zeros(1, np.int64)

    def dense(self, name: str, x: Array) -> None:
        """See `Tap.dense`."""
        _add_product(self.sums.get(f"dense.{name}.products"), x)

    def experts(
        self,
        plan: Plan,
        group: Sequence[int],
        x: Array,
        hidden: Array,
        parts: Array,
        at_level: Callable[[int], Array],
    ) -> None:
        """See `Tap.experts`."""
        p = f"experts.{self._layers[plan.layer]}."
        of_layer = f"dense.layers.{self._layers[plan.layer]}{_OF_LAYER}"
        if of_layer in self.sums and 0 in group:  # once for each plan
            _add_product(self.sums[of_layer], x)
            self.sums[of_layer.removesuffix("products") + "count"] += len(x)
        inputs, hiddens = self.sums.get(p + "in.products"), self.sums.get(p + "hidden.products")
        for i in group:
            e, rows = plan.experts[i], slice(plan.offsets[i], plan.offsets[i + 1])
            if inputs is not None:
                _add_product(inputs[e], x[plan.tokens[rows]])
            if hiddens is not None:
                _add_product(hiddens[e], hidden[rows])

    def end_window(self) -> None:
        """Ends a piece of text."""


def product_shapes(config: ModelConfig, *, layers: bool = False) -> Mapping[str, tuple[int, ...]]:
    """Returns the names and shapes of all products of a model, layer by layer.

    Args:
        layers: experts have one matrix for each layer, of what they all take, in place of their own.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    E, d, h = config.num_experts, config.hidden_size, config.expert_hidden
    dense = _dense_inputs(config)
    for i in range(config.num_layers):
        for name, cols in dense.items():
            if name.startswith(f"layers.{i}."):
                shapes[f"dense.{name}.products"] = (cols, cols)
        if i in config.moe_layers and layers:
            shapes[f"dense.layers.{i}{_OF_LAYER}"] = (d, d)
        elif i in config.moe_layers:
            shapes[f"experts.{i}.in.products"] = (E, d, d)
            shapes[f"experts.{i}.hidden.products"] = (E, h, h)
    head = "embed" if config.tied else "head"
    shapes[f"dense.{head}.products"] = (d, d)
    return shapes


def _dense_inputs(config: ModelConfig) -> dict[str, int]:
    """Returns the columns of every matrix that is the first to take its input."""
    skipped = SAME_INPUT.keys() | (set() if config.tied else {"embed"})
    return {
        name: spec.shape[1]
        for name, spec in dense_tensors(config).items()
        if spec.kind == "nested" and name.rpartition(".")[2] not in skipped
    }


def _row_gates(plan: Plan) -> NDArray[np.float64]:
    """Returns the gate of each row of a plan's parts, [m]."""
    gates = np.zeros(len(plan.tokens))
    used = plan.rows >= 0
    gates[plan.rows[used]] = plan.gates[used]
    return gates


def _squares(x: Array) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    out: NDArray[np.float64] = np.einsum("td,td->d", wide, wide)
    return out


def _add_product(total: Array | None, x: Array) -> None:
    if total is not None:
        total += x.T @ x

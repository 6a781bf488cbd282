"""The sums that a calibration collects for each layer; `edgemoe.quant.calibration` specifies their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig, dense_tensors
from edgemoe.plan import Plan
from edgemoe.quant.calibration import input_name

__all__ = ["Counts", "Form", "LayerSums", "Products", "SumForm", "sum_bytes", "sum_forms"]

Array = NDArray[np.float32]
Form = tuple[np.dtype[Any], tuple[int, ...]]
"""The type and shape of a tensor."""
Products = Literal["none", "layers", "full"]
"""For which inputs products x xᵀ are summed: for none; for dense inputs and a layer's experts together; or for dense
inputs and each expert."""

_OF_LAYER = ".experts.products"


@dataclass(frozen=True, slots=True)
class SumForm:
    """Which sums are collected for each layer."""

    level_bits: Sequence[int]
    """Bits of the file's levels, ascending; errors are measured against the last level."""
    tokens: int
    """How many the text has."""
    products: Products


class LayerSums:
    """The sums over the inputs of one layer's matrices; for the last layer, also over the head's input. A `Tap`."""

    def __init__(self, config: ModelConfig, layer: int, of: SumForm) -> None:
        self._prefix = f"experts.{layer}."
        self._of_layer = f"dense.layers.{layer}{_OF_LAYER}"
        self._levels = range(1, len(of.level_bits))
        forms = sum_forms(config, layer, of, is_filed=False)
        self.sums: dict[str, NDArray[Any]] = {n: np.zeros(s, t) for n, (t, s) in forms.items()}
        """The sums, by name; squares are float64 here."""
        if (chosen := self.sums.get(self._prefix + "in.chosen")) is not None:
            chosen[...] = config.num_experts
        self._window = np.zeros((config.num_experts, len(of.level_bits)))
        self._first = 0
        self._seen = np.zeros(of.tokens, np.int16)  # how many experts of each token came

    def begin(self, first: int) -> None:
        """See `Tap.begin`."""
        self._first = first

    def dense(self, name: str, x: Array) -> None:
        """See `Tap.dense`."""
        name = input_name(name)
        self.sums[f"dense.{name}.count"] += len(x)
        self.sums[f"dense.{name}.squares"] += _squares(x)
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
        p, sums, window = self._prefix, self.sums, self._window
        if 0 in group:  # once for each plan
            self._all(x)
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
            self._products(e, plan.tokens[rows], x, hidden[rows])
        for level in self._levels:
            lower = at_level(level)
            for i in group:
                rows = slice(plan.offsets[i], plan.offsets[i + 1])
                change = (lower[rows] - parts[rows]).astype(np.float64)
                norms = np.einsum("td,td->t", change, change)
                window[plan.experts[i], level - 1] += gates[rows] ** 2 @ norms

    def _all(self, x: Array) -> None:
        """Adds the input x [T, D] of all tokens of a plan."""
        if (total := self.sums.get(self._of_layer)) is not None:
            _add_product(total, x)
            # No dense matrix takes this input, so `dense` does not count it.
            self.sums[self._of_layer.removesuffix("products") + "count"] += len(x)
        if (kept := self.sums.get(self._prefix + "in.rows")) is not None:
            kept[self._first : self._first + len(x)] = x

    def _products(self, e: int, tokens: NDArray[np.integer], x: Array, hidden: Array) -> None:
        """Adds one expert's inputs: those of w_gate and w_up, x[tokens], and those of w_down, hidden."""
        p, sums = self._prefix, self.sums
        if (chosen := sums.get(p + "in.chosen")) is not None:
            at = self._first + tokens
            chosen[at, self._seen[at]] = e
            self._seen[at] += 1
        elif (inputs := sums.get(p + "in.products")) is not None:
            _add_product(inputs[e], x[tokens])
        if (hiddens := sums.get(p + "hidden.products")) is not None:
            _add_product(hiddens[e], hidden)

    def end_window(self) -> None:
        """Ends a piece of text: adds its errors to the sums."""
        if (errors := self.sums.get(self._prefix + "error")) is not None:
            self.sums[self._prefix + "error2"] += self._window
            errors += np.sqrt(self._window)
            self._window[:] = 0

    def finish(self) -> None:
        """Ends the text: sorts the experts of each token, so that they do not depend on the order of arrival."""
        if (chosen := self.sums.get(self._prefix + "in.chosen")) is not None:
            chosen.sort(axis=1)


class Counts:
    """The number of tokens routed to each expert. A `Tap`."""

    def __init__(self, config: ModelConfig) -> None:
        self.counts = np.zeros((len(config.moe_layers), config.num_experts), np.int64)

    def begin(self, first: int) -> None:
        """See `Tap.begin`."""

    def dense(self, name: str, x: Array) -> None:
        """See `Tap.dense`."""

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
        for i in group:
            self.counts[plan.layer, plan.experts[i]] += plan.offsets[i + 1] - plan.offsets[i]


def sum_forms(
    config: ModelConfig, layer: int, of: SumForm, *, is_filed: bool = True
) -> dict[str, Form]:
    """Returns the names, types and shapes of a layer's sums, in the order of the file.

    Args:
        is_filed: types as they are in the file; otherwise as they are in memory.
    """
    heads = ("embed", "head") if layer == config.num_layers - 1 else ()
    out: dict[str, tuple[type, tuple[int, ...]]] = {}
    for name, cols in _dense_inputs(config).items():
        if name in heads or name.startswith(f"layers.{layer}."):
            out |= {
                f"dense.{name}.count": (np.int64, (1,)),
                f"dense.{name}.squares": (np.float64, (cols,)),
            }
            if of.products != "none":
                out[f"dense.{name}.products"] = (np.float32, (cols, cols))
    if layer in config.moe_layers:
        out |= _of_experts(config, layer, of)
    return {
        name: (
            np.dtype(kind if not (is_filed and name.endswith(".squares")) else np.float32),
            shape,
        )
        for name, (kind, shape) in out.items()
    }


def _of_experts(
    config: ModelConfig, layer: int, of: SumForm
) -> dict[str, tuple[type, tuple[int, ...]]]:
    tokens, levels = of.tokens, len(of.level_bits)
    E, D, H, p = config.num_experts, config.hidden_size, config.expert_hidden, f"experts.{layer}."
    out: dict[str, tuple[type, tuple[int, ...]]] = {
        p + "count": (np.int64, (E,)), p + "gates": (np.float64, (E,)), p + "gates2": (np.float64, (E,)),
        p + "in.squares": (np.float64, (E, D)), p + "hidden.squares": (np.float64, (E, H)),
        p + "output2": (np.float64, (E,)), p + "output_max": (np.float32, (E,)),
        p + "error": (np.float64, (E, levels)), p + "error2": (np.float64, (E, levels)),
    }  # fmt: skip
    of_layer = f"dense.layers.{layer}.experts."
    if of.products == "layers":
        out |= {
            of_layer + "count": (np.int64, (1,)),
            of_layer + "products": (np.float32, (D, D)),
        }
    elif of.products == "full":
        if keeps_rows(config, tokens):
            out |= {
                p + "in.rows": (np.float32, (tokens, D)),
                p + "in.chosen": (np.int64, (tokens, config.experts_per_token)),
            }
        else:
            out[p + "in.products"] = (np.float32, (E, D, D))
        out[p + "hidden.products"] = (np.float32, (E, H, H))
    return out


def keeps_rows(config: ModelConfig, tokens: int) -> bool:
    """Returns whether the inputs of the tokens are kept, because they take less than the products for each expert."""
    return tokens < config.num_experts * config.hidden_size


def sum_bytes(forms: Mapping[str, Form]) -> int:
    """Returns the bytes of tensors, plus those of the largest product, which is computed before it is added to one."""
    made = (
        kind.itemsize * math.prod(shape[-2:])
        for name, (kind, shape) in forms.items()
        if name.endswith(".products")
    )
    held = sum(kind.itemsize * math.prod(shape) for kind, shape in forms.values())
    return held + max(made, default=0)


def _dense_inputs(config: ModelConfig) -> dict[str, int]:
    """Returns the width of every input of dense matrices, by the input's name."""
    out: dict[str, int] = {}
    for name, spec in dense_tensors(config).items():
        if spec.kind == "nested" and (config.tied or name != "embed"):
            out.setdefault(input_name(name), spec.shape[1])
    return out


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

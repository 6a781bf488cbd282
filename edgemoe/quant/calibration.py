"""Calibration files: what flows into every matrix of a model, summed over a text. Format, reader and writer.

A `.calib` file is a safetensors file with checksums (`edgemoe.file.summed`). Sums are over the tokens of the text (for
an expert: the tokens routed to it).
`L` is the model's layer index, `E` experts, `K` of them per token, `D` hidden, `H` expert hidden, `T` the text's
tokens; `X` names an input, see below.

    dense.X.count       int64   [1]        tokens
    dense.X.squares     float32 [cols]     sum of x², per input column
    dense.X.products    float32 [cols, cols]  sum of x xᵀ (files made with --full or --layers only)
    experts.L.count     int64   [E]        tokens that were routed to each expert
    experts.L.gates     float64 [E]        sum of their gate weights
    experts.L.gates2    float64 [E]        sum of their squared gate weights
    experts.L.in.squares      float32 [E, D]     inputs of w_gate and w_up
    experts.L.hidden.squares  float32 [E, H]     inputs of w_down, silu(w_gate x) * (w_up x)
    experts.L.in.products     float32 [E, D, D]  (--full only, of texts of E D tokens or more)
    experts.L.in.rows         float32 [T, D]     (--full only, of shorter texts) what each token gives the experts
    experts.L.in.chosen       int64   [T, K]     with it: which experts take it, ascending; E for none
    experts.L.hidden.products float32 [E, H, H]  (--full only)
    experts.L.output2   float64 [E]        sum of the squared norm of the expert's output, without its gate
    experts.L.output_max float32 [E]       largest |value| of the expert's output, without its gate
    experts.L.error     float64 [E, levels]  sum over the text's windows of the Frobenius norm of the change of the
                                           layer's routed output when this expert alone runs at bits[level]
    experts.L.error2    float64 [E, levels]  the same, summed squared over tokens: sum of gate² ‖change‖²

Experts that no token reached have zeros. The inputs `X` of dense matrices are named by the first matrix that takes
them, as `edgemoe.config.dense_tensors` names it: layers.L.q (also k, v), layers.L.o, layers.L.shared.gate (also up,
and up alone where an FFN has no gate), layers.L.shared.down, head (embed where it is tied), and with --layers also
layers.L.experts, without squares: what w_gate and w_up of all routed experts take. An imatrix of llama.cpp gives
counts and squares alone.

The metadata (strings) are: edgemoe_calibration "2", source "edgemoe" or "imatrix", model, tokens, window (tokens
of each piece of text, every one a sequence of its own) and bits (of `error`, separated by spaces; may be empty).

Version 1 had no checksums. It is read, with a notice to the user; version 2 without them is refused.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig, dense_tensors
from edgemoe.errors import FormatError, quoted
from edgemoe.file.summed import SummedFile, write_summed
from edgemoe.quant.columns import ColumnScales
from edgemoe.quant.expert_sums import ExpertSums, checked

__all__ = ["MIN_TOKENS", "Calibration", "calibration_meta", "input_name", "write_calibration"]

Array = NDArray[np.float32]

MIN_TOKENS = 64
"""What an expert must have seen to be judged by its own tokens alone; the best of those tried (benchmarks/LOG.md).

EAQuant (arXiv 2506.13329) asks for twice the mean of the layer's experts, of more text. Filling that up with the
layer's average makes moments much worse: even an expert's first 100 tokens tell more of it than all other experts'.
"""

_VERSIONS = ("1", "2")
# Of each statistic, its type and how many axes it has beside that of experts.
_FORMS = {
    "dense.count": ("int64", 1), "dense.squares": ("float32", 1), "dense.products": ("float32", 2),
    "experts.count": ("int64", 0), "experts.gates": ("float64", 0), "experts.gates2": ("float64", 0),
    "experts.in.squares": ("float32", 1), "experts.in.products": ("float32", 2),
    "experts.hidden.squares": ("float32", 1), "experts.hidden.products": ("float32", 2),
    "experts.in.rows": ("float32", 2), "experts.in.chosen": ("int64", 2),
    "experts.output2": ("float64", 0), "experts.output_max": ("float32", 0),
    "experts.error": ("float64", 1), "experts.error2": ("float64", 1),
}  # fmt: skip
_OF_TOKENS = ("experts.in.rows", "experts.in.chosen")  # not of experts
_LONGEST_LAYER = 4  # digits
_SAME_INPUT = {
    "k": "q",
    "v": "q",
    "q_gate": "q",
    "z": "qkv",
    "z_in": "qkv",
    "decay": "qkv",
    "up": "gate",
    "q_a": "kv_a",
    "q_direct": "kv_a",
    "x_gate": "xbc",
    "b": "u",
    "c": "u",
}
"""Matrices that are applied to what another one is, by the last part of their names."""


class Calibration:
    """Reads a calibration file, one tensor at a time."""

    def __init__(self, path: str | os.PathLike[str], *, min_tokens: int = MIN_TOKENS) -> None:
        """Args:
            min_tokens: an expert with fewer gets its own moments mixed with the average over the layer's routed
                tokens, which stands in for the tokens that are missing: (n * own + (m - n) * layer) / m.

        Raises:
            FormatError: not a calibration file.
        """
        self.path = Path(path)
        self._file = SummedFile(path, "a calibration file")
        self.meta: Mapping[str, str] = self._file.meta
        version = self.meta.get("edgemoe_calibration")
        if version not in _VERSIONS or (version != "1" and not self._file.is_summed):
            raise FormatError(f"{path}: not a calibration file of version {' or '.join(_VERSIONS)}")
        try:
            self.bits = tuple(map(int, self.meta.get("bits", "").split()))
        except ValueError:
            raise FormatError(f"{path}: a calibration file with damaged levels") from None
        """The levels of `error` and `error2`."""
        self._keys = {name: self._key(name) for name in self._file.shapes}
        for name in self._keys:
            self._check_form(name)
        layers = {int(place) for place, form in self._keys.values() if form == "experts.count"}
        self.layers = tuple(sorted(layers))
        """Model layers with routed experts."""
        self._scales: ColumnScales | None = None
        self._experts = ExpertSums(self._file, max(min_tokens, 1))

    def with_scales(self, scales: ColumnScales) -> Calibration:
        """Returns the same as seen by a file whose columns have such scales; without any before."""
        out = copy.copy(self)
        out._scales = scales
        return out

    def _key(self, name: str) -> tuple[str, str]:
        """Returns the input or layer that a tensor is of, and which of the `_FORMS` it has."""
        kind, _, rest = name.partition(".")
        if kind == "dense":
            place, _, what = rest.rpartition(".")
        else:
            place, _, what = rest.partition(".")
            if not (
                place.isdecimal() and len(place) <= _LONGEST_LAYER and place == f"{int(place)}"
            ):
                place = ""
        if not place or f"{kind}.{what}" not in _FORMS:
            raise FormatError(f"{self.path}: {quoted(name)} is nothing that this edgemoe knows")
        return place, f"{kind}.{what}"

    def _check_form(self, name: str) -> None:
        """Checks that a tensor has its type and shape; its experts are those that its layer counts, as it must."""
        shape, (place, form) = self._file.shapes[name], self._keys[name]
        kind, axes = _FORMS[form]
        if form in _OF_TOKENS:
            others = [self._file.shapes.get(f"experts.{place}.{f[8:]}", ()) for f in _OF_TOKENS]
            counts = self._file.shapes.get(f"experts.{place}.count", ())
            is_sound = len(counts) == 1 and all(len(s) == 2 and s[0] == shape[0] for s in others)
            if is_sound and self._file.dtypes[name] == kind:
                return
            raise self._unfit(name, kind)
        experts: tuple[int, ...] = ()
        if form.startswith("experts."):
            experts = self._file.shapes.get(f"experts.{place}.count", (0,))[:1]
        width = {
            "dense.count": 1,
            "experts.error": len(self.bits),
            "experts.error2": len(self.bits),
        }
        cols = width.get(form, shape[-1])
        if self._file.dtypes[name] != kind or shape != experts + (cols,) * axes:
            raise self._unfit(name, kind)

    def _unfit(self, name: str, kind: str) -> FormatError:
        shape = list(self._file.shapes[name])
        return FormatError(f"{self.path}: {name}: {kind} {shape} does not fit the others")

    @property
    def note(self) -> str:
        """What the user must know of the file, in a line; empty for nothing."""
        if self._file.is_summed:
            return ""
        return f"{self.path}: of an earlier version of edgemoe, without checksums to check"

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads all, which takes as long as the disk does, so that no hours are lost to a damaged file.

        Args:
            progress: is told the bytes that were read, and those of all.

        Raises:
            FormatError: a checksum does not match, or what is not one can be no sum: NaN, infinity, below 0.
        """
        done, total = 0, sum(map(self._file.num_bytes, self._file.shapes))
        for name in self._file.shapes:
            for rows in self._file.rows(name):
                checked(self._file, name, rows)
                done += rows.nbytes
                if progress is not None:
                    progress(done, total)
        for place, form in self._keys.values():
            if form == "experts.in.chosen":
                self._experts.chosen(int(place))

    def digest(self) -> str:
        """Returns a sum of the content, in hexadecimal."""
        return self._file.digest()

    @property
    def is_full(self) -> bool:
        """Says whether the file holds products, not only squares."""
        return any(n.endswith((".products", ".in.rows")) for n in self._file.shapes)

    def diagonal(self, name: str) -> Array | None:
        """Returns the mean square of each input column of a matrix, float32 [cols]; None if nothing is known.

        Args:
            name: a dense tensor's, or "experts.LAYER.INDEX.gate", ".up" or ".down".
        """
        return self._mean(name, "squares")

    def matrix(self, name: str) -> Array | None:
        """Returns the mean of x xᵀ over a matrix's inputs, float32 [cols, cols]; None where the file has none.

        Gates and ups of which it knows no products of their own have those of their layer, if it knows these.
        """
        own = self._mean(name, "products")
        if own is None and name.startswith("experts.") and not name.endswith(".down"):
            return self._mean(_experts_input(int(name.split(".")[1])), "products")
        return own

    def layer_matrix(self, layer: int) -> Array:
        """Returns the mean of x xᵀ over all that was routed to a layer's experts, [D, D]; for what `knows` knows."""
        total = self._experts.layer_products(layer)
        if total is None:
            known = self._mean(_experts_input(layer), "products")
            assert known is not None
            return known
        mean = np.asarray(total / np.float32(self.layer(layer, "count").sum()), np.float32)
        return self._scaled(_experts_input(layer), mean)

    def layer_diagonal(self, layer: int) -> Array:
        """Returns the mean square of each column of what was routed to a layer's experts, [D]; as `layer_matrix`."""
        key = f"experts.{layer}.in.squares"
        if key not in self._file.shapes:
            return self.layer_matrix(layer).diagonal()
        mean = self._tensor(key).sum(axis=0) / np.float32(self.layer(layer, "count").sum())
        return self._scaled(_experts_input(layer), np.asarray(mean, np.float32))

    def knows(self, name: str) -> bool:
        """Says whether `matrix` has something of a matrix."""
        if name.startswith("experts."):
            _, layer, _, part = name.split(".")
            port = "hidden" if part == "down" else "in"
            if self._experts.has_products(int(layer), port):
                return bool(self.layer(int(layer), "count").any())
            if part == "down":
                return False
            name = _experts_input(int(layer))
        return f"dense.{input_name(name)}.products" in self._file.shapes and self.count(name) > 0

    def count(self, name: str) -> int:
        """Returns the tokens that a matrix was seen with; 0 if nothing is known."""
        if name.startswith("experts."):
            _, layer, index, _ = name.split(".")
            return int(self.layer(int(layer), "count")[int(index)])
        key = f"dense.{input_name(name)}.count"
        return int(self._tensor(key)[0]) if key in self._file.shapes else 0

    def layer(self, layer: int, what: str) -> NDArray[Any]:
        """Returns a statistic of a layer's experts, [E, …]: count, gates, gates2, output2, output_max, error, error2.

        Raises:
            FormatError: the file does not have it.
        """
        key = f"experts.{layer}.{what}"
        if key not in self._file.shapes:
            raise FormatError(f"{self.path}: has no {key}, which edgemoe calibrate sums")
        return self._tensor(key)

    def has(self, what: str) -> bool:
        """Says whether the file has a statistic of experts, as `layer` names it."""
        return all(f"experts.{i}.{what}" in self._file.shapes for i in self.layers)

    def check(self, config: ModelConfig) -> None:
        """Checks that the file is of a model like this one.

        Raises:
            FormatError: it has other layers, another number of experts, or inputs of another width.
        """
        counts = {self._file.shapes[f"experts.{i}.count"][0] for i in self.layers}
        if self.layers != config.moe_layers or counts != {config.num_experts}:
            raise FormatError(
                f"{self.path}: is of layers {list(self.layers)} with {sorted(counts)} experts; the model has "
                f"layers {list(config.moe_layers)} with {config.num_experts}"
            )
        specs = dense_tensors(config)
        # The matrix that an input is named by may not be there: an FFN can do without a gate.
        dense = {input_name(n): s.shape[-1] for n, s in specs.items() if s.kind == "nested"}
        dense |= {name: spec.shape[-1] for name, spec in specs.items()}
        dense |= {_experts_input(i): config.hidden_size for i in config.moe_layers}
        widths = {"in": config.hidden_size, "hidden": config.expert_hidden}
        for name, (place, form) in self._keys.items():
            port = form.split(".")[1]
            cols = dense.get(place, 0) if form.startswith("dense") else widths.get(port, -1)
            found = self._file.shapes[name][-1]
            if form not in ("dense.count", "experts.in.chosen") and cols not in (-1, found):
                raise FormatError(f"{self.path}: {name} has {found} inputs; the model's has {cols}")

    def _tensor(self, name: str) -> NDArray[Any]:
        return checked(self._file, name, self._file.tensor(name))

    def _scaled(self, name: str, mean: Array) -> Array:
        """Returns means of squares or products of inputs as they are divided by the scales of their columns."""
        s = None if self._scales is None else self._scales.of(name)
        if s is None:
            return mean
        return np.asarray(mean / (s * s if mean.ndim == 1 else np.outer(s, s)), np.float32)

    def _mean(self, name: str, what: str) -> Array | None:
        found = self._mean_as_is(name, what)
        return None if found is None else self._scaled(name, found)

    def _mean_as_is(self, name: str, what: str) -> Array | None:
        if name.startswith("experts."):
            _, layer, index, part = name.split(".")
            port = "hidden" if part == "down" else "in"
            return self._experts.mean(int(layer), int(index), port, what)
        key, count = f"dense.{input_name(name)}.{what}", self.count(name)
        if key not in self._file.shapes or count == 0:
            return None
        return np.asarray(self._tensor(key) / np.float32(count), np.float32)


def _experts_input(layer: int) -> str:
    """Returns the name of what all routed experts of a layer take."""
    return f"layers.{layer}.experts"


def input_name(name: str) -> str:
    """Returns what a calibration calls the input of a dense matrix."""
    head, dot, last = name.rpartition(".")
    return head + dot + _SAME_INPUT.get(last, last)


def write_calibration(
    path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, str]
) -> None:
    """Writes a calibration file, one tensor at a time, under its name only when it is whole.

    Args:
        tensors: by the names above; see `edgemoe.file.summed.write_summed`.
        meta: but for the version.

    Raises:
        OSError: the file cannot be written.
    """
    write_summed(path, tensors, calibration_meta(meta))


def calibration_meta(meta: Mapping[str, str]) -> dict[str, str]:
    """Returns what a calibration file says of itself, with the version."""
    return {"edgemoe_calibration": _VERSIONS[-1], **meta}

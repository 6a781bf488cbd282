"""Calibration files: statistics of the inputs of every matrix of a model, summed over a text. Format, reader, writer.

A `.calib` file is a safetensors file with checksums (`edgemoe.file.summed`). Sums are over the tokens of the text; for
an expert, over the tokens routed to it. `L` is the model's layer index, `E` the experts per layer, `K` the experts per
token, `D` the hidden size, `H` the experts' hidden size, `T` the text's tokens; `X` names an input, see below.

    dense.X.count       int64   [1]        tokens
    dense.X.squares     float32 [cols]     sum of x², per input column
    dense.X.products    float32 [cols, cols]  sum of x xᵀ (only in files made with --full or --layers)
    experts.L.count     int64   [E]        tokens that were routed to each expert
    experts.L.gates     float64 [E]        sum of their gates
    experts.L.gates2    float64 [E]        sum of their squared gates
    experts.L.in.squares      float32 [E, D]     of the input of w_gate and w_up
    experts.L.hidden.squares  float32 [E, H]     of the input of w_down, silu(w_gate x) * (w_up x)
    experts.L.in.products     float32 [E, D, D]  (--full only, for texts of E D tokens or more)
    experts.L.in.rows         float32 [T, D]     (--full only, for shorter texts) the input of each token's experts
    experts.L.in.chosen       int64   [T, K]     with `rows`: the experts of each token, ascending; E for none
    experts.L.hidden.products float32 [E, H, H]  (--full only)
    experts.L.output2   float64 [E]        sum of the squared norm of the expert's output, without its gate
    experts.L.output_max float32 [E]       largest |value| of the expert's output, without its gate
    experts.L.error     float64 [E, levels]  sum, over the text's windows, of the Frobenius norm of the change of the
                                           layer's routed output when only this expert runs at bits[level]
    experts.L.error2    float64 [E, levels]  the same change, squared and summed over tokens: sum of gate² ‖change‖²

Experts that no token reached have zeros. An input `X` is named by the first dense matrix that takes it, with the name
that `edgemoe.config.dense_tensors` gives: layers.L.q (also for k, v), layers.L.o, layers.L.shared.gate (also for up; an
FFN without a gate has up), layers.L.shared.down, head (embed if it is tied). With --layers there is also
layers.L.experts, the input of w_gate and w_up of all routed experts together, without squares. An imatrix of llama.cpp
gives only counts and squares.

The metadata (strings) are: edgemoe_calibration "2", source "edgemoe" or "imatrix", model, tokens, window (tokens
of each piece of text, every one a sequence of its own) and bits (of `error`, separated by spaces; may be empty).

Version 1 had no checksums. It is still read, with a notice to the user. Version 2 without checksums is refused.
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
"""How many tokens an expert must have seen to be judged by its own tokens alone; the best value of those tried
(benchmarks/LOG.md).

EAQuant (arXiv 2506.13329) asks for twice the mean of the layer's experts, with more text. Filling experts up to that
with the layer's average makes moments much worse: even an expert's first 100 tokens say more about it than the tokens
of all other experts.
"""

_VERSIONS = ("1", "2")
# The type of each statistic, and how many axes it has besides that of experts.
_FORMS = {
    "dense.count": ("int64", 1), "dense.squares": ("float32", 1), "dense.products": ("float32", 2),
    "experts.count": ("int64", 0), "experts.gates": ("float64", 0), "experts.gates2": ("float64", 0),
    "experts.in.squares": ("float32", 1), "experts.in.products": ("float32", 2),
    "experts.hidden.squares": ("float32", 1), "experts.hidden.products": ("float32", 2),
    "experts.in.rows": ("float32", 2), "experts.in.chosen": ("int64", 2),
    "experts.output2": ("float64", 0), "experts.output_max": ("float32", 0),
    "experts.error": ("float64", 1), "experts.error2": ("float64", 1),
}  # fmt: skip
_OF_TOKENS = ("experts.in.rows", "experts.in.chosen")  # the first axis is tokens, not experts
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
"""Matrices that have the same input as another one: the last part of its name, by the last part of theirs."""


class Calibration:
    """A calibration file, read one tensor at a time."""

    def __init__(self, path: str | os.PathLike[str], *, min_tokens: int = MIN_TOKENS) -> None:
        """Args:
            min_tokens: an expert that saw only n < m = min_tokens tokens has its mean moments mixed with the mean over
                the layer's routed tokens, in place of the missing tokens: (n * own + (m - n) * layer) / m.

        Raises:
            FormatError: it is not a calibration file, or its tensors do not fit each other.
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
        """The model's layers with routed experts."""
        self._scales: ColumnScales | None = None
        self.min_tokens = max(min_tokens, 1)
        """How many tokens an expert must have seen to be judged by them alone."""
        self._experts = ExpertSums(self._file, self.min_tokens)

    def with_scales(self, scales: ColumnScales) -> Calibration:
        """Returns the calibration as a file with these column scales sees it. Scales set before are replaced."""
        out = copy.copy(self)
        out._scales = scales
        return out

    def _key(self, name: str) -> tuple[str, str]:
        """Returns the input or layer that a tensor belongs to, and its key in `_FORMS`.

        Raises:
            FormatError: the name is unknown.
        """
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
        """Checks that a tensor has its type and shape, and as many experts as the `count` of its layer."""
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
        """A line that the user must see about this file; empty for nothing."""
        if self._file.is_summed:
            return ""
        return f"{self.path}: of an earlier version of edgemoe, without checksums to check"

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads and checks the whole file, so that a damaged file costs no hours of work. As fast as the disk.

        Args:
            progress: called with the bytes that have been read and the bytes of the whole file.

        Raises:
            FormatError: a checksum does not match, or a value cannot be a sum: NaN, infinity, or below 0.
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
        """Returns a checksum of the content, in hexadecimal."""
        return self._file.digest()

    @property
    def is_full(self) -> bool:
        """Whether the file has products, not only squares."""
        return any(n.endswith((".products", ".in.rows")) for n in self._file.shapes)

    def diagonal(self, name: str) -> Array | None:
        """Returns the mean square of each input column of a matrix, float32 [cols]; None if nothing is known.

        Args:
            name: of a dense tensor, or "experts.LAYER.INDEX.gate", ".up" or ".down".
        """
        return self._mean(name, "squares")

    def matrix(self, name: str) -> Array | None:
        """Returns the mean of x xᵀ over a matrix's inputs, float32 [cols, cols]; None if the file has none.

        If the file has no products for the gate and up of each expert but has those of the layer, it returns the
        layer's.
        """
        own = self._mean(name, "products")
        if own is None and name.startswith("experts.") and not name.endswith(".down"):
            return self._mean(_experts_input(int(name.split(".")[1])), "products")
        return own

    def layer_matrix(self, layer: int) -> Array:
        """Returns the mean of x xᵀ over all inputs routed to a layer's experts, [D, D].

        `knows` must be true of the layer's gates and ups.
        """
        total = self._experts.layer_products(layer)
        if total is None:
            known = self._mean(_experts_input(layer), "products")
            assert known is not None
            return known
        mean = np.asarray(total / np.float32(self.layer(layer, "count").sum()), np.float32)
        return self._scaled(_experts_input(layer), mean)

    def layer_diagonal(self, layer: int) -> Array:
        """Returns the mean square of each column over all inputs routed to a layer's experts, [D].

        As for `layer_matrix`, `knows` must be true if the file has no squares.
        """
        key = f"experts.{layer}.in.squares"
        if key not in self._file.shapes:
            return self.layer_matrix(layer).diagonal()
        mean = self._tensor(key).sum(axis=0) / np.float32(self.layer(layer, "count").sum())
        return self._scaled(_experts_input(layer), np.asarray(mean, np.float32))

    def knows(self, name: str) -> bool:
        """Returns whether `matrix` has products for a matrix."""
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
        """Returns how many tokens the statistics of a matrix's input are over; 0 if there are none."""
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
        """Returns whether the file has a statistic of experts, as `layer` names it, for every layer."""
        return all(f"experts.{i}.{what}" in self._file.shapes for i in self.layers)

    def check(self, config: ModelConfig) -> None:
        """Checks that the file fits this model.

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
        # The matrix that an input is named after may be missing: some FFNs have no gate.
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
        """Returns mean squares or products of inputs, for inputs that are divided by their column scales."""
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
    """Returns the name of the input that all routed experts of a layer share."""
    return f"layers.{layer}.experts"


def input_name(name: str) -> str:
    """Returns the name of a dense matrix's input in a calibration file."""
    head, dot, last = name.rpartition(".")
    return head + dot + _SAME_INPUT.get(last, last)


def write_calibration(
    path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, str]
) -> None:
    """Writes a calibration file, one tensor at a time. It appears under its name only once it is complete.

    Args:
        tensors: by the names above; see `edgemoe.file.summed.write_summed`.
        meta: the metadata without the version.

    Raises:
        OSError: the file cannot be written.
    """
    write_summed(path, tensors, calibration_meta(meta))


def calibration_meta(meta: Mapping[str, str]) -> dict[str, str]:
    """Returns the metadata of a calibration file, with the version added."""
    return {"edgemoe_calibration": _VERSIONS[-1], **meta}

"""Calibration files: what flows into every matrix of a model, summed over a text. Format, reader and writer.

A `.calib` file is a safetensors file. Sums are over the tokens of the text (for an expert: the tokens routed to it).
`L` is the model's layer index, `E` experts, `D` hidden, `H` expert hidden; `X` names an input, see below.

    dense.X.count       int64   [1]        tokens
    dense.X.squares     float32 [cols]     sum of x², per input column
    dense.X.products    float32 [cols, cols]  sum of x xᵀ (files made with --full only)
    experts.L.count     int64   [E]        tokens that were routed to each expert
    experts.L.gates     float64 [E]        sum of their gate weights
    experts.L.gates2    float64 [E]        sum of their squared gate weights
    experts.L.in.squares      float32 [E, D]     inputs of w_gate and w_up
    experts.L.hidden.squares  float32 [E, H]     inputs of w_down, silu(w_gate x) * (w_up x)
    experts.L.in.products     float32 [E, D, D]  (--full only)
    experts.L.hidden.products float32 [E, H, H]  (--full only)
    experts.L.output2   float64 [E]        sum of the squared norm of the expert's output, without its gate
    experts.L.output_max float32 [E]       largest |value| of the expert's output, without its gate
    experts.L.error     float64 [E, levels]  sum over the text's windows of the Frobenius norm of the change of the
                                           layer's routed output when this expert alone runs at bits[level]
    experts.L.error2    float64 [E, levels]  the same, summed squared over tokens: sum of gate² ‖change‖²

Experts that no token reached have zeros. The inputs `X` of dense matrices are named by the first matrix that takes
them, as `edgemoe.config.dense_tensors` names it: layers.L.q (also k, v), layers.L.o, layers.L.shared.gate (also up),
layers.L.shared.down, and head (embed where it is tied). An imatrix of llama.cpp gives counts and squares alone.

The metadata (strings) are: edgemoe_calibration "1", source "edgemoe" or "imatrix", model, tokens, window (tokens
of each piece of text, every one a sequence of its own) and bits (of `error`, separated by spaces; may be empty).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edgemoe.config import ModelConfig
from edgemoe.errors import FormatError
from edgemoe.file.whole import whole_file

__all__ = ["MIN_TOKENS", "Calibration", "write_calibration"]

Array = NDArray[np.float32]

MIN_TOKENS = 64
"""What an expert must have seen to be judged by its own tokens alone; the best of those tried (benchmarks/LOG.md).

EAQuant (arXiv 2506.13329) asks for twice the mean of the layer's experts, of more text. Filling that up with the
layer's average makes moments much worse: even an expert's first 100 tokens tell more of it than all other experts'.
"""

_VERSION = "1"
_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}
_SAME_INPUT = {"k": "q", "v": "q", "up": "gate"}


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
        try:
            file: Any = _open(self.path)
            self._names = frozenset(file.keys())
            meta = file.metadata() or {}
        except FileNotFoundError:
            raise FormatError(f"{path}: no such file") from None
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path}: not a calibration file: {error}") from None
        if meta.get("edgemoe_calibration") != _VERSION:
            raise FormatError(f"{path}: not a calibration file of version {_VERSION}")
        self._file = file
        self.meta: Mapping[str, str] = meta
        try:
            self.bits = tuple(map(int, meta.get("bits", "").split()))
        except ValueError:
            raise FormatError(f"{path}: a calibration file with damaged levels") from None
        """The levels of `error` and `error2`."""
        self.layers = tuple(
            sorted(
                int(n.split(".")[1]) for n in self._names if n.endswith(".count") and n[0] == "e"
            )
        )
        """Model layers with routed experts."""
        self._min_tokens = max(min_tokens, 1)

    @property
    def is_full(self) -> bool:
        """Says whether the file holds products, not only squares."""
        return any(n.endswith(".products") for n in self._names)

    def diagonal(self, name: str) -> Array | None:
        """Returns the mean square of each input column of a matrix, float32 [cols]; None if nothing is known.

        Args:
            name: a dense tensor's, or "experts.LAYER.INDEX.gate", ".up" or ".down".
        """
        return self._mean(name, "squares")

    def matrix(self, name: str) -> Array | None:
        """Returns the mean of x xᵀ over a matrix's inputs, float32 [cols, cols]; None where the file has none."""
        return self._mean(name, "products")

    def count(self, name: str) -> int:
        """Returns the tokens that a matrix was seen with; 0 if nothing is known."""
        if name.startswith("experts."):
            _, layer, index, _ = name.split(".")
            return int(self.layer(int(layer), "count")[int(index)])
        key = f"dense.{_input(name)}.count"
        return int(self._file.get_tensor(key)[0]) if key in self._names else 0

    def layer(self, layer: int, what: str) -> NDArray[Any]:
        """Returns a statistic of a layer's experts, [E, …]: count, gates, gates2, output2, output_max, error, error2.

        Raises:
            FormatError: the file does not have it.
        """
        key = f"experts.{layer}.{what}"
        if key not in self._names:
            raise FormatError(f"{self.path}: has no {key}")
        out: NDArray[Any] = self._file.get_tensor(key)
        return out

    def has(self, what: str) -> bool:
        """Says whether the file has a statistic of experts, as `layer` names it."""
        return all(f"experts.{i}.{what}" in self._names for i in self.layers)

    def check(self, config: ModelConfig) -> None:
        """Checks that the file is of a model like this one.

        Raises:
            FormatError: it has other layers or another number of experts.
        """
        counts = {len(self.layer(i, "count")) for i in self.layers}
        if self.layers != config.moe_layers or counts != {config.num_experts}:
            raise FormatError(
                f"{self.path}: is of layers {list(self.layers)} with {sorted(counts)} experts; the model has "
                f"layers {list(config.moe_layers)} with {config.num_experts}"
            )

    def _mean(self, name: str, what: str) -> Array | None:
        if name.startswith("experts."):
            _, layer, index, part = name.split(".")
            return self._expert_mean(
                int(layer), int(index), "hidden" if part == "down" else "in", what
            )
        key, count = f"dense.{_input(name)}.{what}", self.count(name)
        if key not in self._names or count == 0:
            return None
        mean: Array = self._file.get_tensor(key) / np.float32(count)
        return mean

    def _expert_mean(self, layer: int, index: int, port: str, what: str) -> Array | None:
        key = f"experts.{layer}.{port}.{what}"
        if key not in self._names:
            return None
        counts = self.layer(layer, "count")
        n, needed = int(counts[index]), self._min_tokens
        sums = self._file.get_slice(key)
        own = np.asarray(sums[index : index + 1])[0]
        if counts.sum() == 0:
            return None
        if n >= needed:
            return np.asarray(own / np.float32(n), np.float32)
        total = np.zeros_like(own)
        for e in range(len(counts)):  # one expert at a time: products are large
            total += np.asarray(sums[e : e + 1])[0]
        layer_mean = total / np.float32(counts.sum())
        return np.asarray(
            (own + np.float32(needed - n) * layer_mean) / np.float32(needed), np.float32
        )


def _open(path: Path) -> Any:
    return safe_open(path, framework="numpy")


def _input(name: str) -> str:
    head, dot, last = name.rpartition(".")
    return head + dot + _SAME_INPUT.get(last, last)


def write_calibration(
    path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, str]
) -> None:
    """Writes a calibration file, one tensor at a time, under its name only when it is whole.

    Args:
        tensors: by the names above; read once, in order, so that a mapping may make them as they are asked for.
        meta: but for the version.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"edgemoe_calibration": _VERSION, **meta}}
    at = 0
    for name, array in tensors.items():
        size = math.prod(array.shape) * array.dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).data)

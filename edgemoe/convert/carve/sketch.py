"""Sketches of calibrations, small enough to ship with an update: the mean squares of every input and a few directions.

All products of the demo's inputs take 190 MB, and most of their information beyond the squares lies in few directions.
So the mean products M of an input, divided by the mean square of all its columns, are kept as U^T U and a diagonal,
with U [R, cols] in 8-bit codes. A sketch is a safetensors file. X is an input of dense matrices by its name in a
calibration:

X.squares      float16 [cols]     mean squares: the diagonal of M
    X.codes        int8 [R, cols]     U = codes * steps
    X.steps        float16 [R]
    experts.L.count    int32 [E]      tokens that were routed to each expert
    experts.L.hidden   float16 [E, H] mean squares of the inputs of their w_down, divided by the mean of all

    Its metadata is that of the calibration: model, tokens, window. The gates and ups of routed experts have the same
    input as those of the shared expert. A sketch is expanded by sums in a fixed order, so that every machine makes the
    same calibration from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgemoe.errors import FormatError
from edgemoe.file.summed import SummedFile
from edgemoe.quant import write_calibration

__all__ = ["expand_sketch", "write_sketch"]

Array = NDArray[np.float32]

_RANK = 16
_SHARED, _ROUTED = "shared.gate", "experts"


def write_sketch(calibration: Path, out: Path) -> None:
    """Writes the sketch of a calibration that was made with `--layers`.

    Raises:
        FormatError: the file is not a calibration.
    """
    file = SummedFile(calibration, "a calibration file")
    tensors: dict[str, NDArray[Any]] = {}
    for name in file.shapes:
        kind, _, rest = name.partition(".")
        place, _, what = rest.rpartition(".")
        if kind == "dense" and what == "products" and not place.endswith(f".{_ROUTED}"):
            tensors |= {f"{place}.{key}": value for key, value in _drawn(file.tensor(name)).items()}
        elif kind == "experts" and what == "count":
            count = file.tensor(name)
            hidden = file.tensor(f"experts.{place}.hidden.squares") / np.maximum(count, 1)[:, None]
            tensors[name] = count.astype(np.int32)
            tensors[f"experts.{place}.hidden"] = (hidden / hidden.mean()).astype(np.float16)
    meta = {key: file.meta[key] for key in ("model", "tokens", "window")}
    save_file(tensors, out, metadata=meta)


def _drawn(products: Array) -> dict[str, NDArray[Any]]:
    """Returns the squares, codes and steps that represent the products of one input."""
    moments = products.astype(np.float64)
    moments /= moments.diagonal().mean()
    values, vectors = np.linalg.eigh(moments)
    u = (vectors * np.sqrt(np.maximum(values, 0))).T[: -_RANK - 1 : -1]
    steps = np.maximum(np.abs(u).max(axis=1) / 127, 1e-7).astype(np.float16)
    codes = np.rint(u / steps[:, None].astype(np.float64))
    return {
        "squares": moments.diagonal().astype(np.float16),
        "codes": np.ascontiguousarray(np.clip(codes, -127, 127), np.int8),
        "steps": steps,
    }


def expand_sketch(path: Path, out: Path) -> None:
    """Writes the calibration that a sketch represents.

    Raises:
        FormatError: the file is not a sketch.
        OSError: a file cannot be read or written.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            meta = dict(sorted((file.metadata() or {}).items()))  # the library's order is undefined
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        write_calibration(out, _Expanded(tensors), {"source": "edgemoe", "bits": "", **meta})
    except (SafetensorError, KeyError) as error:
        raise FormatError(f"{path.name}: not a sketch of a calibration: {error}") from error


class _Expanded(Mapping[str, NDArray[Any]]):
    """The tensors of a calibration, computed on access. Each dense input counts as one token with its mean products."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> NDArray[Any]:
        kind, _, rest = name.partition(".")
        place, _, what = rest.rpartition(".")
        if kind == "experts":
            count = self._tensors[f"experts.{rest.partition('.')[0]}.count"]
            if what == "count":
                return count.astype(np.int64)
            hidden: Array = self._tensors[name.removesuffix(".squares")].astype(np.float32)
            return hidden * count.astype(np.float32)[:, None]
        if what == "count":
            return np.ones(1, np.int64)
        if place.endswith(f".{_ROUTED}"):
            place = place.removesuffix(_ROUTED) + _SHARED
        squares: Array = self._tensors[f"{place}.squares"].astype(np.float32)
        return squares if what == "squares" else self._products(place, squares)

    def _products(self, place: str, squares: Array) -> Array:
        steps = self._tensors[f"{place}.steps"].astype(np.float32)
        out, one = np.zeros((2, len(squares), len(squares)), np.float32)
        for codes, step in zip(self._tensors[f"{place}.codes"], steps, strict=True):
            u = codes * step
            out += np.multiply(u[:, None], u, out=one)
        np.fill_diagonal(out, np.maximum(squares, out.diagonal()))
        return out

    def __iter__(self) -> Iterator[str]:
        for name in self._tensors:
            place, _, what = name.rpartition(".")
            if what == "squares":
                places = [place]
                if place.endswith(f".{_SHARED}"):
                    places.append(place.removesuffix(_SHARED) + _ROUTED)
                for each in places:
                    yield from (f"dense.{each}.{part}" for part in ("count", "squares", "products"))
            elif place.startswith("experts."):
                yield f"{name}.squares" if what == "hidden" else name

    def __len__(self) -> int:
        return sum(1 for _ in self)

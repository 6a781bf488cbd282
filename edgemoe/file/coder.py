"""Encodes float weights as records: quantises each matrix with its calibration, favoured level and corrections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core, hardware
from edgemoe.config import MATRICES, dense_tensors
from edgemoe.errors import FormatError
from edgemoe.file.layout import Layout
from edgemoe.quant import Calibration, Scheme
from edgemoe.quant.correction import SHARED, kind_of, pack_basis
from edgemoe.quant.lowrank import Directions, directions

__all__ = ["Coder", "sums_of"]

_AT_ONCE = 2
"""Matrices of an expert that are quantised side by side. Some steps use one thread, and leave the others to the other
matrix."""
_LOOKED_UP = 0.3  # look-ups' share of a tied embedding's error; 0.1 to 0.6 did as well


def sums_of(rungs: Sequence[NDArray[np.uint8]]) -> list[int]:
    """Returns the checksum of each rung."""
    return [_core.crc32c(rung) for rung in rungs]


class Coder:
    """A quantiser for the records of one model. Each is encoded by itself, so equal weights give equal bytes."""

    def __init__(
        self,
        layout: Layout,
        scheme: Scheme,
        *,
        favoured: int | None,
        favours_own: bool,
        calibration: Calibration | None,
        threads: int = 0,
        reading: Callable[[int, int], None] | None = None,
    ) -> None:
        """Args:
            layout: the layout of the file, which says how many rungs each expert has.
            scheme: the scheme, with the corrections of all levels of its ladders.
            favoured: the level whose error matters most, as a number of rungs; None to weigh all levels alike.
            favours_own: favour the last level that each expert has instead.
            calibration: statistics of the inputs of the matrices.
            threads: CPU threads for a matrix; 0 for the default of `edgemoe.hardware`. With more than one, two matrices
                of an expert are quantised side by side.
            reading: called with how many layers' input products have been read for the corrections, and the total.

        Raises:
            FormatError: there are corrections but no calibration.
        """
        self._layout, self._scheme, self._calibration = layout, scheme, calibration
        self._favoured, self._favours_own = favoured, favours_own
        self._threads = threads or hardware.num_threads()
        self._specs = dense_tensors(layout.config)
        self._bases = self._find_bases(reading or (lambda done, total: None))

    @property
    def basis(self) -> bytes:
        """The content of the section `basis`; empty if the file needs none."""
        stored = self._layout.scheme.shared_rank
        return pack_basis([v[:stored] for v in self._bases.values()]) if stored else b""

    def tensor(self, name: str, array: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
        """Returns the rungs of a dense tensor; matrices are quantised.

        Raises:
            FormatError: the model has no such tensor, its shape differs, or a weight is not finite.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise FormatError(f"{name}: not a tensor of this model")
        if array.shape != spec.shape:
            raise FormatError(f"{name}: expected shape {spec.shape}, got {array.shape}")
        if spec.kind == "nested":
            moments = self._second_moments(name)
            return self._quantize(name, array, self._layout.ladder, self._favoured, moments)
        if not np.isfinite(array).all():
            raise FormatError(f"{name}: a value is not finite")
        flat = np.ascontiguousarray(array, np.float32).reshape(-1)
        return [flat.view(np.uint8)]

    def expert(
        self,
        layer: int,
        index: int,
        gate: NDArray[np.float32],
        up: NDArray[np.float32],
        down: NDArray[np.float32],
    ) -> list[NDArray[np.uint8]]:
        """Returns the rungs of a routed expert: gate and up [H, D], down [D, H]; gate [0, D] if experts have no gate.

        Raises:
            FormatError: there is no such expert, a shape differs, or a weight is not finite.
        """
        name = f"experts.{layer}.{index}"
        if name not in self._layout.places:
            raise FormatError(f"{name}: not an expert of this model")
        levels = len(self._layout.places[name].sizes)
        favour = levels if self._favours_own else self._favoured and min(self._favoured, levels)

        matrices = dict(zip(MATRICES, (gate, up, down), strict=True))
        for part, shape in zip(MATRICES, self._layout.config.expert_shapes, strict=True):
            if matrices[part].shape != shape:
                found = matrices[part].shape
                raise FormatError(f"{name}.{part}: expected shape {shape}, got {found}")
        ladders = zip(*self._layout.expert_ladder, strict=True)
        inputs = self._second_moments(f"{name}.up")  # those of the gate too

        def rungs_of(part: str, ladder: Sequence[int]) -> list[NDArray[np.uint8]]:
            if not len(matrices[part]):
                return [np.empty(0, np.uint8)] * levels  # the rungs of an absent gate
            moments = self._second_moments(f"{name}.down") if part == "down" else inputs
            return self._quantize(
                f"{name}.{part}", matrices[part], ladder[:levels], favour, moments
            )

        with ThreadPoolExecutor(min(_AT_ONCE, self._threads), "quantize") as pool:
            # As a list here: after an error or Ctrl-C, matrices that are still to come are left out.
            rungs = list(pool.map(rungs_of, MATRICES, ladders))
        return [np.concatenate(parts) for parts in zip(*rungs, strict=True)]

    def _quantize(
        self,
        name: str,
        w: NDArray[np.float32],
        ladder: Sequence[int],
        favour: int | None,
        moments: NDArray[np.float32] | None,
    ) -> list[NDArray[np.uint8]]:
        try:
            return self._scheme.of(name).quantize(
                np.ascontiguousarray(w, np.float32),
                ladder,
                second_moments=moments,
                favour=favour,
                directions=self._directions(name, moments),
                threads=self._threads,
            )
        except ValueError as e:
            raise FormatError(f"{name}: {e}") from None

    def _find_bases(self, reading: Callable[[int, int], None]) -> dict[int, NDArray[np.int8]]:
        """Returns by layer the basis V that the experts' gates and ups share; empty if they have no corrections."""
        rank = self._scheme.shared_rank
        if not rank:
            return {}
        if self._calibration is None:
            raise FormatError("corrections are fitted to a calibration, and there is none")
        layers = self._layout.config.moe_layers
        out: dict[int, NDArray[np.int8]] = {}
        for layer in layers:
            out[layer] = directions(self._calibration.layer_matrix(layer), rank)
            reading(len(out), len(layers))
        return out

    def _directions(self, name: str, moments: NDArray[np.float32] | None) -> Directions | None:
        """Returns the basis V and the ranks of a matrix's corrections; None if it has none."""
        ranks = self._scheme.ranks(name)
        if not any(ranks):
            return None
        if moments is None or moments.ndim < 2:
            raise FormatError(f"{name}: has a correction, but no products of its inputs are known")
        if kind_of(name) in SHARED:
            return Directions(self._bases[int(name.split(".")[1])], ranks, stored=0)
        stored = max(self._layout.scheme.ranks(name), default=0)
        return Directions(directions(moments, max(ranks)), ranks, stored)

    def _second_moments(self, name: str) -> NDArray[np.float32] | None:
        if self._calibration is None:
            return None
        moments = self._calibration.matrix(name)
        if moments is None:
            moments = self._calibration.diagonal(name)
        if moments is None or name != "embed":
            return moments
        # A tied embedding is used twice. As the head it was calibrated; in look-ups every column counts alike.
        diagonal = np.diagonal(moments) if moments.ndim == 2 else moments
        alike = _LOOKED_UP / (1 - _LOOKED_UP) * diagonal.mean()
        spread = np.eye(len(moments)) if moments.ndim == 2 else np.ones(len(moments))
        return np.asarray(moments + alike * spread, np.float32)

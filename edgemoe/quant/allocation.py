"""Bits per expert, fixed offline: the value and its JSON form.

    edgemoe_allocation  the version: 1, or 2 if there is "dense"
    method     how it was found, as `edgemoe allocate --method` names it
    settings   the other settings that it was found with: strings, numbers and lists
    layers     [L] the model's layers with routed experts
    bits       [L][E] the bits of each expert, all levels of the file
    protected  [[layer, expert], …]: Super Experts, which were given the highest level in use
    dense      {tensor: bits} for all other matrices, if these were decided too

It is a file of its own, or the section "allocation" of a `.moe` file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.errors import FormatError, quoted
from edgemoe.file.parse import parse_json

__all__ = ["Allocation"]

_VERSIONS = (1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The bits that each routed expert runs at, and optionally the bits of all other matrices."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...]
    """The model's layers with routed experts."""
    bits: NDArray[np.int8]
    """[L, E]"""
    protected: tuple[tuple[int, int], ...] = ()
    """The Super Experts, as (layer, expert) with the model's layer numbers."""
    dense: Mapping[str, int] = field(default_factory=dict)
    """Bits of each matrix outside the routed experts; empty if these were not decided."""

    @property
    def average(self) -> float:
        """The mean bits of an expert."""
        return float(self.bits.mean())

    def to_json(self) -> bytes:
        """Returns the JSON form."""
        value: dict[str, Any] = {
            "edgemoe_allocation": 2 if self.dense else 1, "method": self.method, "settings": dict(self.settings),
            "layers": list(self.layers), "bits": self.bits.tolist(),
            "protected": [list(p) for p in self.protected],
        }  # fmt: skip
        if self.dense:
            value["dense"] = dict(self.dense)
        return json.dumps(value).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes, where: str) -> Allocation:
        """Reads the JSON form.

        Args:
            where: what errors call it.

        Raises:
            FormatError: `content` is not an allocation.
        """
        try:
            value = parse_json(content, where)
            version = value["edgemoe_allocation"]
        except (FormatError, TypeError, KeyError):
            raise FormatError(f"{where}: not an allocation of edgemoe") from None
        if type(version) is not int or version not in _VERSIONS:
            raise FormatError(f"{where}: allocation version {quoted(version)}; expected 1 or 2")
        try:
            bits = np.array(value["bits"])
            layers = tuple(value["layers"])
            if (
                bits.dtype.kind != "i"
                or bits.ndim != 2
                or len(bits) != len(layers)
                or ((bits < 1) | (bits > 8)).any()
            ):
                raise ValueError
            if ("dense" in value) != (version == 2):
                raise ValueError
            dense = dict(value.get("dense", {}))
            if not all(type(n) is int for n in (*layers, *dense.values())):
                raise ValueError
            return cls(
                method=str(value["method"]), settings=dict(value["settings"]), layers=layers,
                bits=bits.astype(np.int8),
                protected=tuple((int(layer), int(expert)) for layer, expert in value["protected"]),
                dense=dense,
            )  # fmt: skip
        except (ValueError, TypeError, KeyError, OverflowError):
            raise FormatError(f"{where}: not an allocation of edgemoe") from None

    def check(
        self,
        config: ModelConfig,
        levels: tuple[int, ...],
        where: str,
        *,
        most: NDArray[np.int8] | None = None,
    ) -> None:
        """Checks that a model can run it.

        Args:
            levels: bits of the file's levels.
            where: what errors call it.
            most: [L, E], the most bits that the file has of each expert; None if every expert has all levels.

        Raises:
            FormatError: it is for another model, or asks for bits that the file lacks.
        """
        expected = (len(config.moe_layers), config.num_experts)
        if self.layers != config.moe_layers or self.bits.shape != expected:
            raise FormatError(
                f"{where}: is for {self.bits.shape[0]} layers of {self.bits.shape[1]} experts; "
                f"the model has {expected[0]} of {expected[1]}"
            )
        unknown = sorted(set(self.bits.reshape(-1).tolist()) - set(levels))
        if unknown:
            raise FormatError(
                f"{where}: asks for {unknown[0]} bits; the file has {', '.join(map(str, levels))}"
            )
        if most is not None and (self.bits > most).any():
            row, expert = np.argwhere(self.bits > most)[0].tolist()
            raise FormatError(
                f"{where}: asks for {self.bits[row, expert]} bits of expert {expert} of layer {self.layers[row]}; "
                f"the file has {most[row, expert]}"
            )

    def check_dense(self, matrices: Collection[str], levels: tuple[int, ...], where: str) -> None:
        """Checks that `dense` has bits for exactly these matrices, and only bits among a file's levels.

        Raises:
            FormatError: a matrix is missing, is one too many, or has other bits; the message names it.
        """
        if not self.dense:
            raise FormatError(
                f"{where}: says nothing of matrices outside the experts; "
                "edgemoe allocate --method search decides these too"
            )
        odd = sorted(set(self.dense).symmetric_difference(matrices))
        if odd:
            verb = "says nothing of" if odd[0] in matrices else "is for a model with"
            raise FormatError(f"{where}: {verb} the matrix {quoted(odd[0])}")
        for name, bits in self.dense.items():
            if bits not in levels:
                raise FormatError(
                    f"{where}: asks for {bits} bits of {name}; the file has {', '.join(map(str, levels))}"
                )

"""Types of keys and values for each layer, chosen offline (after KVTuner, arXiv 2502.04420), and their JSON form.

    edgemoe_kv_types  1, the version
    of                the model it belongs to: its family, and the checkpoint's fingerprint
    settings          the settings it was found with: strings, numbers and lists
    layers            for each layer [keys, values], or null if the layer has no keys and values

The table is a file of its own, or the section "kv_types" of a `.moe` file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgemoe.errors import FormatError, quoted
from edgemoe.file.format import MoeFile
from edgemoe.file.parse import parse_json
from edgemoe.model.kv import KV_TYPES, KvTypes

__all__ = ["KvTable"]

_VERSION = 1

Row = tuple[str, str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTable:
    """The types of keys and values for each layer of one model."""

    of: Mapping[str, str]
    """The model it belongs to; see `identity`."""
    layers: tuple[Row, ...]
    """For each layer the types (keys, values), or None if the layer has no keys and values."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings it was found with."""

    @staticmethod
    def identity(moe: MoeFile) -> dict[str, str]:
        """Returns the family and fingerprint of a model, by which a table is matched to it."""
        return {
            "family": moe.config.family,
            "fingerprint": str(moe.source.get("fingerprint", "")),
        }

    def types(self, keys: str, values: str) -> KvTypes:
        """Returns the types of a KV cache; where `keys` or `values` is "auto", they are the table's."""
        return KvTypes(keys, values, self.layers)

    def to_json(self) -> bytes:
        """Returns the JSON form."""
        value = {
            "edgemoe_kv_types": _VERSION, "of": dict(self.of), "settings": dict(self.settings),
            "layers": [row and list(row) for row in self.layers],
        }  # fmt: skip
        return json.dumps(value).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes, where: str) -> KvTable:
        """Reads the JSON form.

        Args:
            where: what error messages call the table, such as its path.

        Raises:
            FormatError: the content is not such a table, or is of another version.
        """
        try:
            value = parse_json(content, where)
            version = value["edgemoe_kv_types"]
        except (FormatError, TypeError, KeyError):
            raise FormatError(f"{where}: no table of KV types of edgemoe") from None
        if version != _VERSION:
            raise FormatError(
                f"{where}: KV types of version {quoted(version)}; expected {_VERSION}"
            )
        try:
            of = {str(name): str(it) for name, it in dict(value["of"]).items()}
            layers = tuple(_row(row) for row in value["layers"])
            return cls(of=of, layers=layers, settings=dict(value["settings"]))
        except (ValueError, TypeError, KeyError):
            raise FormatError(f"{where}: no table of KV types of edgemoe") from None

    def check(self, moe: MoeFile, where: str) -> None:
        """Checks that the table belongs to a model.

        Raises:
            FormatError: the table is of another model, or its layers do not match those of the model.
        """
        for name, mine in self.identity(moe).items():
            if self.of.get(name) != mine:
                raise FormatError(
                    f"{where}: KV types of another model: {name} is {quoted(self.of.get(name))}, "
                    f"this model's is {quoted(mine)}"
                )
        specs = moe.config.mixer_by_layer
        if len(self.layers) != len(specs):
            raise FormatError(
                f"{where}: KV types of {len(self.layers)} layers; the model has {len(specs)}"
            )
        for i, (row, spec) in enumerate(zip(self.layers, specs, strict=True)):
            has = spec.cached_heads[0] > 0
            if (row is not None) != has:
                what = "keys and values, which have no types" if has else "no keys and values"
                raise FormatError(f"{where}: layer {i} of the model has {what}")


def _row(row: Any) -> Row:
    if row is None:
        return None
    keys, values = row
    if keys not in KV_TYPES or values not in KV_TYPES:
        raise ValueError
    return keys, values

"""Types of keys and values for each layer, chosen offline (after KVTuner, arXiv 2502.04420), and their JSON form.

    edgemoe_kv_types  1
    of                what it belongs to: family, and the checkpoint's fingerprint
    settings          what it was found with: strings, numbers and lists
    layers            for each layer [keys, values], or null where a layer has none

It is a file of its own, or the section "kv_types" of a `.moe` file.
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
    """Says how each layer holds its keys and values."""

    of: Mapping[str, str]
    """Of which model, see `identity`."""
    layers: tuple[Row, ...]
    """(keys, values), or None for a layer that has none."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def identity(moe: MoeFile) -> dict[str, str]:
        """Returns what a table of a model belongs to."""
        return {
            "family": moe.config.family,
            "fingerprint": str(moe.source.get("fingerprint", "")),
        }

    def types(self, keys: str, values: str) -> KvTypes:
        """Returns the types of a cache, of which "auto" ones are the table's."""
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
            where: what errors call it.

        Raises:
            FormatError: not such a table.
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
        """Checks that it is of a model.

        Raises:
            FormatError: it is another's; says of which.
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

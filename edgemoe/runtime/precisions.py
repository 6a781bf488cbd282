"""At which bits a model's parts run: experts, the other matrices, keys and values, as options and allocations say."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.file.format import MoeFile
from edgemoe.model import KvTable
from edgemoe.quant import Allocation
from edgemoe.runtime.options import EngineOptions

__all__ = ["Bits", "bits_of", "with_kv_table"]


@dataclass(frozen=True, slots=True)
class Bits:
    """Says at which bits experts may run."""

    most: int
    each: NDArray[np.int8]
    """[L, E]"""
    noted: NDArray[np.int8]
    """[L, E]: the same as far as no scheduler has a note of its own."""

    def told(self, options: EngineOptions) -> dict[str, Any]:
        """Returns what the scheduler is told beside its setting."""
        chosen = dict(options.options)
        if (self.each != self.noted).any():  # the scheduler has a note of its own
            chosen["bits"] = self.each
        return chosen


def with_kv_table(moe: MoeFile, options: EngineOptions) -> EngineOptions:
    """Returns options that hold the types of keys and values of each layer, if they are to be a table's.

    Raises:
        ValueError: there is no table.
        FormatError: it is none, or another model's.
        OSError: its file cannot be read.
    """
    given = options.kv_table
    if "auto" not in (options.cache_type_k, options.cache_type_v):
        return options
    if isinstance(given, KvTable):
        table, where = given, "kv_table"
    elif given is not None:
        table, where = KvTable.from_json(Path(given).read_bytes(), str(given)), str(given)
    elif "kv_types" in moe.sections:
        where = f"{moe.path}: section kv_types"
        table = KvTable.from_json(moe.sections["kv_types"], where)
    else:
        raise ValueError(
            f"cache_type_k and cache_type_v: auto takes a table of KV types, and {moe.path} has none; "
            "edgemoe allocate --kv makes it"
        )
    table.check(moe, where)
    return replace(options, kv_table=table)


def bits_of(moe: MoeFile, options: EngineOptions) -> Bits:
    """Returns at which bits a file's experts run."""
    have = moe.expert_bits
    if options.bits == "auto":
        each = _allocation(moe, options.allocation)
        if moe.experts.names is not None:
            # An adapter's expert has the bits of the one in whose place it is.
            names = np.maximum(moe.experts.names, 0).reshape(len(each), -1)
            each = np.take_along_axis(each, names, axis=1)
        return Bits(int(each.max()), each, have)
    bits = moe.ladder[-1][0] if options.bits is None else options.bits
    moe.level(bits)  # or it says which there are
    each = np.minimum(have, np.int8(bits))
    return Bits(bits, each, each)


def _allocation(moe: MoeFile, path: str | os.PathLike[str] | None) -> NDArray[np.int8]:
    """Returns each expert's bits [L, E]: a file's, the model's section, or what is there where experts differ."""
    have = moe.expert_bits[:, : moe.config.num_experts]
    if path is not None:
        content, where = Path(path).read_bytes(), str(path)
    elif "allocation" in moe.sections:
        content, where = moe.sections["allocation"], f"{moe.path}: section allocation"
    elif (have < moe.ladder[-1][0]).any():
        return have
    else:
        raise ValueError(
            f"bits: auto takes an allocation, and {moe.path} has none; edgemoe allocate makes it"
        )
    found = Allocation.from_json(content, where)
    found.check(moe.config, tuple(rung[0] for rung in moe.ladder), where, most=have)
    return found.bits

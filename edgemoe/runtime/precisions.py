"""The precision of each part of a model (experts, other matrices, keys and values), from options and allocations."""

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

__all__ = ["Bits", "bits_of", "dense_level", "with_dense_bits", "with_kv_table"]


@dataclass(frozen=True, slots=True)
class Bits:
    """The bits that experts may run at."""

    most: int
    """The most of any expert."""
    each: NDArray[np.int8]
    """[L, E]: the most of each expert."""
    noted: NDArray[np.int8]
    """[L, E]: what `notes_of` reports. It differs from `each` where the scheduler is given `each` and reports it."""

    def told(self, options: EngineOptions) -> dict[str, Any]:
        """Returns the options that the scheduler is made with: its own, and the bits of an allocation."""
        chosen = dict(options.options)
        if (self.each != self.noted).any():  # the scheduler reports these bits itself
            chosen["bits"] = self.each
        return chosen


def with_dense_bits(moe: MoeFile, options: EngineOptions) -> MoeFile:
    """Returns a file whose matrices outside the experts run at the bits of an allocation, if `dense_bits` is "auto".

    Raises:
        ValueError: there is no allocation.
        FormatError: it is not sound, is another model's, or does not cover these matrices.
        OSError: its file cannot be read.
    """
    if options.dense_bits != "auto":
        return moe
    found, where = _allocation(moe, options.allocation)
    if found is None:
        raise ValueError(
            f"dense_bits: auto takes an allocation, and {moe.path} has none; "
            "edgemoe allocate --method search makes it"
        )
    tensors = dict(moe.tensors)
    names = [name for name, t in tensors.items() if t.spec.kind == "nested"]
    found.check_dense(names, moe.dense_ladder, where)
    for name in names:
        tensors[name] = replace(tensors[name], most=moe.dense_level(found.dense[name]))
    return replace(moe, tensors=tensors)


def dense_level(moe: MoeFile, options: EngineOptions) -> int:
    """Returns the most rungs of any matrix outside the experts that are used."""
    return moe.dense_level(None if options.dense_bits == "auto" else options.dense_bits)


def with_kv_table(moe: MoeFile, options: EngineOptions) -> EngineOptions:
    """Returns options with the table of each layer's types of keys and values, if a cache type is "auto".

    Raises:
        ValueError: there is no table.
        FormatError: it is not sound, or is another model's.
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
    """Returns the bits that a file's experts run at.

    Raises:
        ValueError: the file has no such level, or no allocation where one is asked for.
        FormatError: the allocation is not sound, or is another model's.
        OSError: the allocation's file cannot be read.
    """
    have = moe.expert_bits
    if options.bits == "auto":
        each = _allocated_bits(moe, options.allocation)
        if moe.experts.names is not None:
            # An adapter's expert has the bits of the model's expert that it replaces.
            names = np.maximum(moe.experts.names, 0).reshape(len(each), -1)
            each = np.take_along_axis(each, names, axis=1)
        return Bits(int(each.max()), each, have)
    bits = moe.ladder[-1][0] if options.bits is None else options.bits
    moe.level(bits)  # raises if the file has no such level
    each = np.minimum(have, np.int8(bits))
    return Bits(bits, each, each)


def _allocated_bits(moe: MoeFile, path: str | os.PathLike[str] | None) -> NDArray[np.int8]:
    """Returns each expert's bits [L, E].

    They come from an allocation, in a file or in the model's section. Without one, they are the bits that the model
    file has of each expert, if these differ.
    """
    have = moe.expert_bits[:, : moe.config.num_experts]
    found, where = _allocation(moe, path)
    if found is not None:
        found.check(moe.config, tuple(rung[0] for rung in moe.ladder), where, most=have)
        return found.bits
    if (have < moe.ladder[-1][0]).any():
        return have
    raise ValueError(
        f"bits: auto takes an allocation, and {moe.path} has none; edgemoe allocate makes it"
    )


def _allocation(moe: MoeFile, path: str | os.PathLike[str] | None) -> tuple[Allocation | None, str]:
    """Returns the allocation of a file, or else of the model, and the name that errors use for it."""
    if path is not None:
        return Allocation.from_json(Path(path).read_bytes(), str(path)), str(path)
    where = f"{moe.path}: section allocation"
    if "allocation" not in moe.sections:
        return None, where
    return Allocation.from_json(moe.sections["allocation"], where), where

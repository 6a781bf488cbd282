"""Weights outside the experts: what they take, and how they are read into memory of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.file.adapter import AdapterFile
from edgemoe.file.format import MoeFile, Tensor
from edgemoe.quant import plane_widths

__all__ = [
    "EMBED_ROWS", "Told", "Weight", "dense_bytes", "has_stored_rows", "load_dense", "load_rows", "load_tensors",
    "looked_up_bytes", "nobody", "read_dense", "resident_matrices", "rows_bytes", "rows_read", "tensors_bytes",
]  # fmt: skip

Weight = _core.Nested | NDArray[np.float32]
EMBED_ROWS = "embed.rows"
"""Name of what looks up the embedding's rows at the file's highest level, where its matrices are at a lower one."""
Told = Callable[[float], object]
"""Is called with the share of the bytes that has been read."""


def nobody(share: float) -> None:
    """Is told, where nobody asked."""


def dense_bytes(moe: MoeFile, level: int) -> int:
    """Returns the memory that `load_dense` takes."""
    return tensors_bytes(moe, moe.tensors, level) + moe.basis_bytes


def tensors_bytes(of: MoeFile | AdapterFile, names: Iterable[str], level: int) -> int:
    """Returns the memory that `load_tensors` takes, each tensor in whole pages."""
    whole, stored = _divided(of, names, level)
    rows = rows_bytes(of, level) if stored else 0
    return _pages([of.tensors[name] for name in whole], level) + rows


def looked_up_bytes(moe: MoeFile, level: int) -> int:
    """Returns what of `dense_bytes` only the look-up of the embedding's rows needs, of which a token reads one."""
    if has_stored_rows(moe, level):
        return rows_bytes(moe, level)
    return 0 if moe.config.tied else moe.tensors["embed"].size(level)


def has_stored_rows(of: MoeFile | AdapterFile, level: int) -> bool:
    """Says whether the file has more of the embedding than a level: its rows are looked up there then."""
    embed = of.tensors.get("embed")
    return embed is not None and embed.rungs(level) < len(embed.lengths)


def resident_matrices(of: MoeFile | AdapterFile, level: int) -> dict[str, Tensor]:
    """Returns the matrices outside the routed experts that are resident at a level, by name."""
    whole, _ = _divided(of, of.tensors, level)
    return {name: of.tensors[name] for name in whole if of.tensors[name].spec.kind == "nested"}


def rows_bytes(of: MoeFile | AdapterFile, level: int, *, is_alone: bool = False) -> int:
    """Returns the memory of what `load_rows` returns, beside the rungs that are resident at a level.

    Args:
        is_alone: none are, as where the head is a device's.
    """
    embed = of.tensors["embed"]
    rows, cols = embed.spec.shape
    resident = embed.rungs(level) if of.config.tied and not is_alone else 0
    return _core.StoredRows.bytes_for(
        rows, cols, _widths(of, "embed"), resident, *_coding(of, "embed")
    )


def _divided(of: MoeFile | AdapterFile, names: Iterable[str], level: int) -> tuple[list[str], bool]:
    """Returns which tensors are resident at a level, and whether the embedding's rows are looked up in the file.

    An embedding that is not the head is not resident then: nobody computes with it as a whole.
    """
    stored = "embed" in (whole := list(names)) and has_stored_rows(of, level)
    if stored and not of.config.tied:
        whole.remove("embed")
    return whole, stored


def _pages(tensors: Iterable[Tensor], level: int) -> int:
    page = _core.system_page()
    return sum(-(-t.size(level) // page) * page for t in tensors)


def load_dense(moe: MoeFile, level: int, *, verify: bool, told: Told = nobody) -> dict[str, Weight]:
    """Reads every tensor outside the routed experts into memory of its own.

    With them come the bases of experts' corrections as "layers.I.experts.basis", which the file has read already.

    Args:
        level: rungs of the matrices.
        told: is called after each tensor.

    Raises:
        FormatError: a checksum does not match.
        ReadError: the disk failed.
    """
    weights = load_tensors(moe, moe.tensors, level, verify=verify, told=told)
    matrices = [w for w in weights.values() if isinstance(w, _core.Nested)]
    for before, after in pairwise(matrices):  # as those of q, k and v
        after.share_basis(before)
    if moe.bases is not None:
        for layer, basis in zip(moe.config.moe_layers, moe.bases, strict=True):
            weights[f"layers.{layer}.experts.basis"] = cast(
                Weight, basis
            )  # int8, for experts alone
    return weights


def load_tensors(
    of: MoeFile | AdapterFile,
    names: Iterable[str],
    level: int,
    *,
    verify: bool,
    told: Told = nobody,
) -> dict[str, Weight]:
    """Reads tensors of a file outside the routed experts; see `load_dense`.

    Below the highest level of the embedding its rows come with it, as `EMBED_ROWS`, or instead of it.
    """
    whole, stored = _divided(of, names, level)
    nested = [of.tensors[name] for name in whole if of.tensors[name].spec.kind == "nested"]
    arena = _core.Arena(_pages(nested, level)) if nested else None
    resident = 0 if "embed" not in whole else of.tensors["embed"].rungs(level)
    beside = rows_read(of, resident) if stored and verify else 0
    every = _told_of({name: of.tensors[name] for name in whole}, level, told, beside)
    out = {name: _read(of, name, level, verify, arena) for name in every}
    if stored:
        first = cast("_core.Nested | None", out.get("embed"))
        rows = load_rows(of, first, verify=verify, told=told)
        out[EMBED_ROWS] = cast(Weight, rows)  # for look-ups alone
    return out


def rows_read(of: MoeFile | AdapterFile, resident: int) -> int:
    """Returns the bytes that `load_rows` goes through once, beside the resident rungs."""
    return sum(of.tensors["embed"].lengths[resident:])


def load_rows(
    of: MoeFile | AdapterFile, resident: _core.Nested | None, *, verify: bool, told: Told = nobody
) -> _core.StoredRows:
    """Returns what looks up rows of the embedding at the highest level of its file.

    Args:
        resident: its first rungs, None for none.
        verify: goes through the others once, and compares every read with what they were.
        told: that all has been read.

    Raises:
        FormatError: a checksum does not match.
        ReadError: the disk failed.
    """
    t = of.tensors["embed"]
    rows, cols = t.spec.shape
    out = _core.StoredRows(
        of.file, t.offset, t.lengths, t.crcs, rows, cols, _widths(of, "embed"), resident, verify, "embed",
        *_coding(of, "embed"),
    )  # fmt: skip
    told(1.0)
    return out


def read_dense(
    moe: MoeFile,
    names: Iterable[str],
    level: int,
    *,
    verify: bool,
    told: Told = nobody,
    beside: int = 0,
) -> Iterator[tuple[str, Weight]]:
    """Yields tensors of a level, each by itself: for who takes it elsewhere before the next is read.

    Args:
        beside: bytes that are read after them, as far as `told` is concerned.
    """
    for name in _told_of({name: moe.tensors[name] for name in names}, level, told, beside):
        t = moe.tensors[name]
        arena = _core.Arena(_pages([t], level)) if t.spec.kind == "nested" else None
        yield name, _read(moe, name, level, verify, arena)


def _told_of(
    tensors: Mapping[str, Tensor], level: int, told: Told, beside: int = 0
) -> Iterator[str]:
    """Yields each tensor's name, and tells after it which share of all has been read, and of `beside` bytes more."""
    sizes = {name: t.size(level) for name, t in tensors.items()}
    total, done = sum(sizes.values()) + beside, 0
    for name, size in sizes.items():
        yield name
        done += size
        told(done / total)


def _read(
    moe: MoeFile | AdapterFile, name: str, level: int, verify: bool, arena: _core.Arena | None
) -> Weight:
    """Reads a tensor; a matrix into an arena."""
    t = moe.tensors[name]
    if arena is None or t.spec.kind == "f32":
        return _core.read_f32(moe.file, t.offset, t.spec.shape, t.crcs[0], verify, name)
    rows, cols = t.spec.shape
    count = t.rungs(level)
    return _core.Nested.from_file(
        arena, moe.file, t.offset, t.lengths[:count], t.crcs[:count], rows, cols,
        _widths(moe, name)[:count], verify, name, *_coding(moe, name),
    )  # fmt: skip


def _widths(of: MoeFile | AdapterFile, name: str) -> Sequence[int]:
    """Returns the bits that each rung of a matrix adds."""
    return plane_widths(of.dense_ladder)[: len(of.tensors[name].lengths)]


def _coding(of: MoeFile | AdapterFile, name: str) -> tuple[str, Sequence[int], Sequence[int]]:
    """Returns what a matrix's rungs mean, as `_core` takes it."""
    scheme = of.scheme.of(name)
    return scheme.name, scheme.row_scales, scheme.ranks(name)

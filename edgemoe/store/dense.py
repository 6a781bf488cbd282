"""Dense weights, those outside the routed experts: how much memory they take, and reading them from a file."""

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
"""A resident tensor: a quantised matrix, or a float32 array."""
EMBED_ROWS = "embed.rows"
"""The name of the table that looks up embedding rows in the file, at its highest level, when matrices run at a lower
one."""
Told = Callable[[float], object]
"""A progress callback; its argument is the fraction of the bytes that has been read, from 0 to 1."""


def nobody(share: float) -> None:
    """Does nothing: the progress callback for callers that want none."""


def dense_bytes(moe: MoeFile, level: int) -> int:
    """Returns the bytes of memory that `load_dense` takes."""
    return tensors_bytes(moe, moe.tensors, level) + moe.basis_bytes


def tensors_bytes(of: MoeFile | AdapterFile, names: Iterable[str], level: int) -> int:
    """Returns the bytes of memory that `load_tensors` takes, each tensor in whole pages."""
    whole, stored = _divided(of, names, level)
    rows = rows_bytes(of, level) if stored else 0
    return _pages([of.tensors[name] for name in whole], level) + rows


def looked_up_bytes(moe: MoeFile, level: int) -> int:
    """Returns how many of `dense_bytes` are only for looking up embedding rows. A token reads a single row of them."""
    if has_stored_rows(moe, level):
        return rows_bytes(moe, level)
    return 0 if moe.config.tied else moe.tensors["embed"].size(level)


def has_stored_rows(of: MoeFile | AdapterFile, level: int) -> bool:
    """Returns whether the file has rungs of the embedding beyond a level. Rows are then looked up in the file."""
    embed = of.tensors.get("embed")
    return embed is not None and embed.rungs(level) < len(embed.lengths)


def resident_matrices(of: MoeFile | AdapterFile, level: int) -> dict[str, Tensor]:
    """Returns the dense matrices that are resident at a level, by name."""
    whole, _ = _divided(of, of.tensors, level)
    return {name: of.tensors[name] for name in whole if of.tensors[name].spec.kind == "nested"}


def rows_bytes(of: MoeFile | AdapterFile, level: int, *, is_alone: bool = False) -> int:
    """Returns the bytes of memory of the table that `load_rows` returns, besides the rungs resident at a level.

    Args:
        is_alone: whether no rungs are resident, as when the head is on a device.
    """
    embed = of.tensors["embed"]
    rows, cols = embed.spec.shape
    resident = embed.rungs(level) if of.config.tied and not is_alone else 0
    return _core.StoredRows.bytes_for(
        rows, cols, _widths(of, "embed"), resident, *_coding(of, "embed")
    )


def _divided(of: MoeFile | AdapterFile, names: Iterable[str], level: int) -> tuple[list[str], bool]:
    """Returns which tensors are resident at a level, and whether embedding rows are looked up in the file.

    If they are, an embedding that is not also the head is not resident, as nothing computes with all of it.
    """
    stored = "embed" in (whole := list(names)) and has_stored_rows(of, level)
    if stored and not of.config.tied:
        whole.remove("embed")
    return whole, stored


def _pages(tensors: Iterable[Tensor], level: int) -> int:
    page = _core.system_page()
    return sum(-(-t.size(level) // page) * page for t in tensors)


def load_dense(moe: MoeFile, level: int, *, verify: bool, told: Told = nobody) -> dict[str, Weight]:
    """Reads every dense tensor into memory.

    The result also has the bases of the experts' low-rank corrections as "layers.I.experts.basis", which were read when
    the file was opened.

    Args:
        level: of the matrices, in rungs.
        verify: whether to compare checksums.
        told: the progress callback, called after each tensor.

    Returns:
        The tensors, by name.

    Raises:
        FormatError: a checksum does not match.
        ReadError: the disk failed.
    """
    weights = load_tensors(moe, moe.tensors, level, verify=verify, told=told)
    matrices = [w for w in weights.values() if isinstance(w, _core.Nested)]
    # Matrices with the same input, such as q, k and v, have equal bases: one copy serves all of them.
    for before, after in pairwise(matrices):
        after.share_basis(before)
    if moe.bases is not None:
        for layer, basis in zip(moe.config.moe_layers, moe.bases, strict=True):
            # int8, and used by experts only.
            weights[f"layers.{layer}.experts.basis"] = cast(Weight, basis)
    return weights


def load_tensors(
    of: MoeFile | AdapterFile,
    names: Iterable[str],
    level: int,
    *,
    verify: bool,
    told: Told = nobody,
) -> dict[str, Weight]:
    """Reads some dense tensors of a file; see `load_dense`.

    Below the highest level of the embedding, the result also has a table of its rows, `EMBED_ROWS`. If the embedding is
    not the head too, the table takes its place.
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
        out[EMBED_ROWS] = cast(Weight, rows)  # only used for looking up rows
    return out


def rows_read(of: MoeFile | AdapterFile, resident: int) -> int:
    """Returns the bytes that `load_rows` reads to check them: those of the rungs that are not resident."""
    return sum(of.tensors["embed"].lengths[resident:])


def load_rows(
    of: MoeFile | AdapterFile, resident: _core.Nested | None, *, verify: bool, told: Told = nobody
) -> _core.StoredRows:
    """Returns a table that looks up rows of the embedding at the highest level of its file.

    Args:
        resident: the first rungs of the embedding, if they are in memory; None otherwise.
        verify: whether to read the other rungs once to compare their checksums, and to check every later read
            against what was there then.
        told: the progress callback, called once at the end.

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
    """Yields names and tensors at a level, each in memory of its own, so that a caller can move one before the next.

    Args:
        beside: bytes that the caller will read after them, which count for the progress that `told` reports.
    """
    for name in _told_of({name: moe.tensors[name] for name in names}, level, told, beside):
        t = moe.tensors[name]
        arena = _core.Arena(_pages([t], level)) if t.spec.kind == "nested" else None
        yield name, _read(moe, name, level, verify, arena)


def _told_of(
    tensors: Mapping[str, Tensor], level: int, told: Told, beside: int = 0
) -> Iterator[str]:
    """Yields each tensor's name, and after each one reports the fraction of all their bytes and `beside` more."""
    sizes = {name: t.size(level) for name, t in tensors.items()}
    total, done = sum(sizes.values()) + beside, 0
    for name, size in sizes.items():
        yield name
        done += size
        told(done / total)


def _read(
    moe: MoeFile | AdapterFile, name: str, level: int, verify: bool, arena: _core.Arena | None
) -> Weight:
    """Reads a tensor. A matrix is read into the arena."""
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
    """Returns how many bits each rung of a matrix adds."""
    return plane_widths(of.dense_ladder)[: len(of.tensors[name].lengths)]


def _coding(of: MoeFile | AdapterFile, name: str) -> tuple[str, Sequence[int], Sequence[int]]:
    """Returns how a matrix's rungs are coded, as arguments for `_core`: scheme, row scales, ranks of corrections."""
    scheme = of.scheme.of(name)
    return scheme.name, scheme.row_scales, scheme.ranks(name)

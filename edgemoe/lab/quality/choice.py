"""The choice of the cheapest settings whose measured perplexity is close enough to the exact run's.

The cost of settings is the bytes that they would read per token with the memory that is available for experts. For a
level it is computed as if all experts were used equally often. Real routing reads less, but the order of levels stays
the same. For a scheduler's options this is multiplied by the share of reads that they were measured to need, token by
token, relative to the exact run with the same memory.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgemoe.file.format import MoeFile
from edgemoe.file.parse import parse_json
from edgemoe.quant import Allocation
from edgemoe.scheduler import SECTIONS
from edgemoe.store import (
    all_expert_bytes,
    dense_bytes,
    has_stored_rows,
    level_bytes,
    looked_up_bytes,
)

__all__ = [
    "OLD_ERRORS",
    "Chosen",
    "applies",
    "choose",
    "find",
    "has_chunks",
    "is_plain",
    "merged",
    "plain_rows",
    "reference_sum",
    "sections_sum",
    "stored",
    "stored_rows",
]

Row = Mapping[str, Any]

_SURE = 1.645
"""How many standard errors are added to the mean: the true loss lies below the sum in 19 of 20 measurements.

From few chunks a standard error is uncertain itself (`edgemoe.lab.quality.loss`), and the sum is less sure.
"""

OLD_ERRORS = 1.7
"""What the standard errors of earlier versions are multiplied by: the most that chunks added (benchmarks/LOG.md)."""

_COMPARED = ("tokens", "reference", "reference_sections")
"""The fields in which two reports must agree for their rows to be comparable."""

_KEY = ("scheduler", "options", "bits", "dense_bits", "cache_types")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The settings to run, and the nearest that were refused."""

    row: Row | None
    """The row that was chosen; None for the exact run."""
    nearest: Row | None
    """If no row was chosen: of the cheaper rows, all refused for their loss, the one that loses least. Else None."""


def stored(moe: MoeFile) -> Mapping[str, Any] | None:
    """Returns the report that `edgemoe quality --store` has kept in the file.

    It is None if there is none of this version, or if its reference is outdated, since every row was compared with
    that.
    """
    try:
        report = parse_json(moe.sections["quality"], "quality")
        rows = report["rows"]
        is_sound = isinstance(report["measured_on"], str) and all(_is_row(row) for row in rows)
        found = {name: report[name] for name in ("measured_on", "tokens", "reference", "rows")}
        was = report.get("reference_sections")
        is_sound = is_sound and was == reference_sum(moe, report["reference"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return found if is_sound else None


def _is_row(row: Any) -> bool:
    """Returns whether the fields of a row that are computed with have the right types.

    Raises:
        KeyError, TypeError: it has other fields.
    """
    change = () if row["kl"] is None else (row["loss_change"], row["loss_error"])
    maybe = (row["bits"] if row["bits"] != "auto" else None, row["read_per_token"])
    numbers = [row["dense_bits"], row["slots_bytes"], *change, *(n for n in maybe if n is not None)]
    return (
        all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
        and all(n < 100 for n in change)  # beyond, perplexity may not be finite
        and isinstance(row["scheduler"], str)
        and isinstance(row["options"], dict)
        and len(row["cache_types"]) == 2
        and "sections" in row
    )


def merged(old: bytes | None, report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a new report, with the rows of the stored one that it does not replace added if they are comparable.

    Args:
        old: the stored report as JSON; None for none.
    """
    try:
        before = parse_json(old or b"", "quality")
        if any(before.get(name) != report.get(name) for name in _COMPARED):
            return dict(report)
        new = [_key(row) for row in report["rows"]]
        kept = [row for row in before["rows"] if _key(row) not in new]
    except (AttributeError, KeyError, TypeError, ValueError):
        return dict(report)
    return {**report, "rows": [*kept, *report["rows"]]}


def _key(row: Row) -> list[Any]:
    return [row["read_per_token"] is None, *(row[name] for name in _KEY)]


def sections_sum(
    moe: MoeFile,
    *,
    bits: int | str,
    dense_bits: int | str,
    scheduler: str,
    options: Mapping[str, Any],
    cache_types: Sequence[str] = (),
) -> str | None:
    """Returns a checksum of the file's sections that influence a run with these settings; None if there are none.

    A measured row is valid only as long as this checksum stays the same. A level alone depends only on weights, which
    never change in a file. The checksum also includes the level at which rows of the embedding are looked up, if it is
    not that of `dense_bits`; in earlier versions it always was.
    """
    names: tuple[str, ...] = ()
    if scheduler != "on-demand" or options:
        names = SECTIONS
    elif "auto" in (bits, dense_bits):
        names = ("allocation",)
    if "auto" in cache_types:
        names = (*names, "kv_types")
    sums = [(name, zlib.crc32(moe.sections[name])) for name in names if name in moe.sections]
    if dense_bits in moe.dense_ladder and has_stored_rows(moe, moe.dense_level(dense_bits)):
        sums.append(("rows", moe.dense_ladder[-1]))
    return f"{zlib.crc32(repr(sums).encode()):08x}" if sums else None


def reference_sum(moe: MoeFile, reference: Sequence[Any] | None) -> str | None:
    """Returns `sections_sum` for the reference (bits, dense bits), a level of the file; None if there is none."""
    if reference is None:
        return None
    bits, dense_bits = reference
    return sections_sum(moe, bits=bits, dense_bits=dense_bits, scheduler="on-demand", options={})


def applies(moe: MoeFile, row: Row) -> bool:
    """Returns whether a row was measured with the sections that the file has now, and as it would be measured today."""
    names = ("bits", "dense_bits", "scheduler", "options", "cache_types")
    now = sections_sum(moe, **{name: row[name] for name in names})
    return bool(row["sections"] == now)


def stored_rows(moe: MoeFile, *, dense_bits: int | str) -> list[Row]:
    """Returns the stored rows at these dense bits that still apply (see `applies`)."""
    report = stored(moe)
    rows = () if report is None else report["rows"]
    return [row for row in rows if row["dense_bits"] == dense_bits and applies(moe, row)]


def plain_rows(
    moe: MoeFile, *, dense_bits: int | str, cache_types: tuple[str, str]
) -> dict[int | str, Row]:
    """Returns the stored rows of levels alone, by their bits; "auto" is the allocation, with bits for each expert."""
    rows = stored_rows(moe, dense_bits=dense_bits)
    return {
        row["bits"]: row
        for row in rows
        if is_plain(row) and row["cache_types"] == list(cache_types)
    }


def find(
    moe: MoeFile,
    rows: Sequence[Row],
    *,
    bits: int | str,
    dense_bits: int,
    scheduler: str,
    options: Mapping[str, Any],
    cache_types: tuple[str, str],
    outdated: bool = False,
) -> Row | None:
    """Returns the last row with exactly these settings; None if they were not measured.

    Args:
        outdated: search among the rows that no longer apply.
    """
    texts = {name: str(value) for name, value in options.items()}
    for row in reversed(rows):
        if (
            [row["bits"], row["dense_bits"], row["scheduler"]] == [bits, dense_bits, scheduler]
            and {name: str(value) for name, value in row["options"].items()} == texts
            and row["cache_types"] == list(cache_types)
            and applies(moe, row) != outdated
        ):
            return row
    return None


def choose(
    moe: MoeFile,
    rows: Sequence[Row],
    *,
    max_loss: float,
    cache_types: tuple[str, str],
    slots: Callable[[int], int],
) -> Chosen:
    """Returns the cheapest row that surely loses at most `max_loss`, or the exact run if none is cheaper.

    Args:
        rows: measured against the file's highest level.
        max_loss: the most increase of the perplexity, as a share of it.
        cache_types: the types of keys and values that rows must have.
        slots: returns the bytes that experts would have, given the bits of dense matrices.
    """
    top = (moe.ladder[-1][0], moe.dense_ladder[-1])
    mine = [row for row in rows if row["cache_types"] == list(cache_types)]
    at_top = (row for row in mine if is_plain(row) and (row["bits"], row["dense_bits"]) == top)
    base = next(filter(None, (_saving(moe, row) for row in at_top)), None)
    costs = []
    exact = (_reads(moe, top[0], slots(top[1])), _used(moe, *top), False)
    for row in mine:
        if not applies(moe, row):
            continue
        share, room = 1.0, slots(row["dense_bits"])
        if not is_plain(row):
            saving = _saving(moe, row)
            # With fewer slots than were measured there are more misses, so that handling them loses more quality.
            if not saving or not base or room < row["slots_bytes"]:
                continue
            share = saving / base
        cost = share * _reads(moe, row["bits"], room)
        costs.append(((cost, _used(moe, row["bits"], row["dense_bits"]), not is_plain(row)), row))
    cheaper = sorted((pair for pair in costs if pair[0] < exact), key=lambda pair: pair[0])
    for _, row in cheaper:
        if _bound(row) <= math.log1p(max_loss):
            return Chosen(row=row, nearest=None)
    nearest = min((row for _, row in cheaper), key=_bound, default=None)
    return Chosen(row=None, nearest=nearest)


def is_plain(row: Row) -> bool:
    """Returns whether a row is of a level alone, so that its loss does not depend on memory."""
    return row["scheduler"] == "on-demand" and not row["options"]


def _bound(row: Row) -> float:
    """Returns an upper bound of the row's loss in ln perplexity, by `_SURE`; 0 for the reference."""
    if row["kl"] is None:
        return 0.0
    error = row["loss_error"] * (1 if has_chunks(row) else OLD_ERRORS)
    return float(row["loss_change"] + _SURE * error)


def has_chunks(row: Row) -> bool:
    """Returns whether a row's standard errors are from the means of chunks, as earlier versions' are not."""
    return "chunks" in row


def _saving(moe: MoeFile, row: Row) -> float | None:
    """Returns the bytes that a row was measured to read, relative to `_reads`; None if it was not measured."""
    expected = _reads(moe, row["bits"], row["slots_bytes"])
    read = row["read_per_token"]
    return None if read is None or expected <= 0 else float(read / expected)


def _reads(moe: MoeFile, bits: int | str, slots: int) -> float:
    """Returns the bytes read per token if all experts were used, and kept in memory, equally often."""
    share = moe.config.experts_per_token / moe.config.num_experts
    return share * max(_expert_bytes(moe, bits) - slots, 0)


def _used(moe: MoeFile, bits: int | str, dense_bits: int) -> float:
    """Returns the bytes of weights that computing one token reads from memory."""
    share, level = (
        moe.config.experts_per_token / moe.config.num_experts,
        moe.dense_level(dense_bits),
    )
    dense = dense_bytes(moe, level) - looked_up_bytes(moe, level)
    return share * _expert_bytes(moe, bits) + dense


def _expert_bytes(moe: MoeFile, bits: int | str) -> int:
    """Returns the bytes of all experts at some bits."""
    if bits != "auto":
        return all_expert_bytes(moe, moe.level(int(bits)))
    if "allocation" not in moe.sections:
        return all_expert_bytes(moe, len(moe.ladder))
    found = Allocation.from_json(moe.sections["allocation"], f"{moe.path}: section allocation")
    levels, counts = np.unique(found.bits, return_counts=True)
    each = level_bytes(moe, len(moe.ladder))
    return sum(int(n) * each[moe.level(int(b)) - 1] for b, n in zip(levels, counts, strict=True))

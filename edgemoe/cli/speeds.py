"""The speeds that `edgemoe plan` predicts, and the measurements of this machine that they come from."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.console import error_line, note
from edgemoe.errors import EdgemoeError, size_text

if TYPE_CHECKING:
    from edgemoe.file.format import MoeFile
    from edgemoe.runtime.forecast import Band, Forecast, Row
    from edgemoe.runtime.pace import Pace

__all__ = ["Speeds", "measured", "rate_text", "speeds"]


@dataclass(frozen=True, slots=True)
class Speeds:
    """The predicted speed of each row, and the measurements that it comes from."""

    bands: list[Band | None]
    pace: Pace | None
    disks: dict[int, float | None]
    """Bytes per second by the size of a read in bytes; None where it is not known."""
    disk_of: str
    """The name of the file that was read; "" for none."""
    is_probed: bool
    """Whether the disk was to be measured."""


def speeds(args: argparse.Namespace, forecast: Forecast, rows: Sequence[Row]) -> Speeds:
    """Measures what is not yet known of this machine, and predicts the speed of each row."""
    from edgemoe import library
    from edgemoe.runtime.pace import disk_pace, pace

    if not rows:
        return Speeds([], None, {}, "", is_probed=False)
    try:
        speed = pace(forecast.moe.scheme)
    except (EdgemoeError, OSError, MemoryError) as error:
        note(
            f"# this machine cannot be measured now, so that no speed is known: {error_line(error)}"
        )
        return Speeds([None] * len(rows), None, {}, "", is_probed=False)
    probed = None if args.no_probe else _probed(forecast.moe, is_hollow=args.name is not None)
    folder = _standing(library.folders()[0]) if args.name is not None else args.model.parent
    misses = [None] * len(rows) if args.trace is None else _misses(args.trace, forecast, rows)
    disks: dict[int, float | None] = {}
    bands = []
    for row, share in zip(rows, misses, strict=True):
        if forecast.lent(row) < 1 and row.read_size not in disks:
            disks[row.read_size] = disk_pace(probed, folder, row.read_size)
        bands.append(forecast.band(row, speed, disks.get(row.read_size), share))
    of = "" if probed is None else probed.path.name
    return Speeds(bands, speed, disks, of, is_probed=not args.no_probe)


def _probed(moe: MoeFile, *, is_hollow: bool) -> MoeFile | None:
    """Returns the file to measure the disk with: the model, or the largest kept one if the model has only holes."""
    from edgemoe import library
    from edgemoe.file.reader import open_moe

    if not is_hollow:
        return moe
    kept = [model.path for model in library.models()]
    for path in sorted(kept, key=lambda path: path.stat().st_size, reverse=True):
        with contextlib.suppress(EdgemoeError, OSError):
            return open_moe(path)
    return None


def _misses(path: Path, forecast: Forecast, rows: Sequence[Row]) -> list[float | None]:
    """Returns, for each row, the share of wanted experts that are absent when a trace is replayed in its memory."""
    from edgemoe.lab.routing.replay import Tape, make_scheduler, replay
    from edgemoe.runtime.trace import read

    trace, c = read(path), forecast.moe.config
    header = trace.header
    shape = (header.num_layers, header.num_experts, header.experts_per_token)
    expected = (len(c.moe_layers), c.num_experts, c.experts_per_token)
    if shape != expected:
        raise ValueError(
            f"{path}: a trace of another model: expected layers, experts and experts per token {expected}, got {shape}"
        )
    tape = Tape(trace)
    if not tape.num_tokens:
        raise ValueError(f"{path}: expected a trace with tokens of a reply, got none")
    all_bytes = header.mean_bytes[-1] * header.num_layers * header.num_experts
    found: dict[float, float] = {1.0: 0.0}
    for share in map(forecast.lent, rows):
        if share not in found:
            budget = max(int(share * all_bytes), max(header.level_bytes))
            scheduler = make_scheduler(tape, "on-demand", budget_bytes=budget)
            found[share] = 1 - replay(tape, scheduler, budget_bytes=budget).hit_rate
    return [found[forecast.lent(row)] for row in rows]


def measured(speed: Speeds) -> Iterator[str]:
    """Yields lines about the measurements that the speeds come from."""
    if speed.pace is None:
        return
    days = int((time.time() - speed.pace.measured) / 86400)
    when = {0: "today", 1: "yesterday"}.get(days, f"{days} days ago")
    yield (
        f"  this machine: memory {speed.pace.memory / 1e9:.0f} GB/s, kernels "
        f"{_span(speed.pace.kernels.values(), 0)} GB/s of weights, measured {when}"
    )  # fmt: skip
    rates = [rate for rate in speed.disks.values() if rate is not None]
    if rates:
        sizes = size_text(min(speed.disks)), size_text(max(speed.disks))
        size = sizes[0] if sizes[0] == sizes[1] else " to ".join(sizes)
        of = f"measured now, of {speed.disk_of}" if speed.disk_of else "measured earlier"
        yield f"  disk: {_span(rates, 2)} GB/s at reads of {size}, {of}"
    elif speed.disks:
        cure = (
            "it is measured with a model that is here"
            if speed.is_probed
            else "it is without --no-probe"
        )
        yield f"  disk: not measured, so that no speed is known where experts are read; {cure}"


def _span(rates: Iterable[float], digits: int) -> str:
    """Returns the lowest and highest of rates in bytes per second, as GB/s; one figure where both round to the same."""
    given = list(rates)
    low, high = (f"{rate / 1e9:.{digits}f}" for rate in (min(given), max(given)))
    return low if low == high else f"{low} to {high}"


def rate_text(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2f}"


def _standing(folder: Path) -> Path:
    """Returns a folder, or its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder

"""Replays of one trace through many schedulers, policies and budgets, next to the baselines to judge them by."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgemoe.lab.routing.oracles import ORACLES
from edgemoe.lab.routing.replay import Replay, Tape, make_scheduler, replay
from edgemoe.lab.routing.timing import Timing
from edgemoe.quant import Allocation
from edgemoe.runtime.budget import parse_size
from edgemoe.runtime.trace import Trace
from edgemoe.scheduler import KINDS, Scheduler, check_options

__all__ = ["Line", "budget_of", "lines", "measured", "remarks", "study"]

_BASELINES = ("lru", "lfu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One way to run the trace: a scheduler with its policy and options."""

    name: str
    scheduler: str
    policy: str
    """"lru" or "lfu", for schedulers that leave eviction to the cache's own counts."""
    options: Mapping[str, Any]


def lines(
    schedulers: Sequence[str], policies: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> list[Line]:
    """Returns the lines for LRU, LFU, each scheduler under each policy, SCH(16) and Belady.

    Args:
        options: of each scheduler, by its name.

    Raises:
        ValueError: there is no such policy, or a scheduler has no such option.
    """
    for name, given in options.items():  # check first: replays take minutes
        if name in KINDS:
            check_options(name, given)
    for policy in policies:
        if policy not in _BASELINES:
            raise ValueError(f"policy: expected one of {', '.join(_BASELINES)}, got {policy}")
    plain = {"look_ahead": False}
    out = [Line(name=p, scheduler="on-demand", policy=p, options=plain) for p in _BASELINES]
    for name in schedulers:
        for policy in policies:
            label = name if len(policies) == 1 else f"{name}, {policy}"
            out.append(
                Line(name=label, scheduler=name, policy=policy, options=options.get(name, {}))
            )
    for name, label in zip(ORACLES, ("SCH(16)", "Belady"), strict=True):
        out.append(Line(name=label, scheduler=name, policy="lfu", options={}))
    return out


def budget_of(text: str, trace: Trace) -> int:
    """Returns the bytes of a size like 200MiB, or of a share of all experts like 25%.

    Raises:
        ValueError: the text is neither.
    """
    if not text.endswith("%"):
        return parse_size(text)
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise ValueError(f"budgets: expected shares like 25% or sizes like 200MiB, got {text!r}")
    return int(share * _everything(trace))


def _everything(trace: Trace) -> int:
    """Returns the bytes of all experts at the trace's bits."""
    header = trace.header
    return int(header.num_layers * header.num_experts * header.mean_bytes[-1])


def remarks(trace: Trace, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns caveats for a reader of the rows of `study`: where a replay differs from a run for lack of data."""
    said = sorted({line for r in rows for line in r["notes"] if line.startswith("a trace")})
    further = {r["scheduler"] for r in rows if r["look_ahead"] > trace.header.look_ahead}
    return said + [
        f"{name} looks further ahead than the trace does; --look-ahead records more"
        for name in sorted(further)
    ]


def study(
    trace: Trace,
    ways: Sequence[Line],
    budgets: Sequence[int],
    *,
    vrams: Sequence[int] = (0,),
    timing: Timing | None,
    sections: Mapping[str, bytes] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Returns a row for each budget, device size and line: the fields of `Replay`, its rates, and the hit rate when the
    single tokens come in random order.

    A scheduler with a policy of its own is replayed only under that policy.

    Args:
        ways: from `lines`.
        budgets: bytes for experts.
        vrams: bytes for experts on a device; 0 for no device.
        timing: the timing model of this machine; None for no predicted speeds.
        sections: of the model's file, which some schedulers read.
        progress: called with the replayed lines done and all of them.
    """
    everything = _everything(trace)
    tape, control = Tape(trace), Tape(trace, shuffle=True)
    rows: list[dict[str, Any]] = []
    total = len(ways) * len(budgets) * len(vrams)
    for done, (budget, vram, way) in enumerate(itertools.product(budgets, vrams, ways)):
        progress(done, total)

        def scheduler(of: Tape, way: Line = way, budget: int = budget) -> Scheduler:
            return make_scheduler(
                of, way.scheduler, budget_bytes=budget, options=way.options, sections=sections
            )

        first = scheduler(tape)
        own = first.policy != "lfu"
        if own and any(
            (r["scheduler"], r["budget_bytes"], r["vram_bytes"]) == (way.scheduler, budget, vram)
            for r in rows
        ):
            continue
        given: dict[str, Any] = {
            "budget_bytes": budget, "vram_bytes": vram, "policy": way.policy, "timing": timing,
        }  # fmt: skip
        r: Replay = replay(tape, first, **given)
        mixed = replay(control, scheduler(control), **given)
        rows.append(
            {
                "name": way.scheduler if own and way.scheduler not in ORACLES else way.name,
                "scheduler": way.scheduler,
                "policy": "own" if own else way.policy,
                "options": dict(way.options),
                "is_oracle": way.scheduler in ORACLES,
                "budget_bytes": budget,
                "share": budget / everything,
                "vram_bytes": vram,
                "vram_share": vram / everything,
                **asdict(r),
                "hit_rate": r.hit_rate,
                "device_rate": r.device_rate,
                "copied_per_token": r.device_bytes_in / r.tokens if r.tokens else 0.0,
                "shuffled_hit_rate": mixed.hit_rate,
                "bytes_per_token": r.bytes_per_token,
                "average_bits": r.average_bits,
                "rate": r.rate,
                "look_ahead": first.look_ahead,
                "notes": list(first.notes),
            }
        )
    progress(total, total)
    return rows


def measured(
    trace: Trace,
    qualities: Sequence[Mapping[str, Any]],
    *,
    timing: Timing,
    sections: Mapping[str, bytes],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Replays settings whose quality was measured, with the trace's own memory.

    Args:
        qualities: rows that `edgemoe quality --store` keeps, all with the dense bits of the trace.
        timing: the timing model of this machine, for the trace's bits.
        sections: of the model's file.

    Returns:
        For each setting its name, its predicted rate in tokens per second, and the change of perplexity with its
        standard error, as shares; then a line for each setting that cannot be replayed, saying why.
    """
    header, tape = trace.header, Tape(trace)
    out, refused = [], []
    for row in qualities:
        options = dict(row["options"])
        name = " ".join([row["scheduler"], *(f"{k}={v}" for k, v in options.items())])
        name = f"{row['bits']} bits{'' if name == 'on-demand' else f', {name}'}"
        bits = row["bits"]
        if bits == "auto" and "allocation" not in sections:
            bits = header.bits  # the highest bits that the file has of each expert
        elif bits == "auto":
            options["bits"] = Allocation.from_json(sections["allocation"], "allocation").bits
            bits = int(options["bits"].max())
        if bits not in header.level_bits:
            refused.append(f"{name}: the trace has {', '.join(map(str, header.level_bits))} bits")
            continue
        n = header.level_bits.index(bits) + 1
        rungs = tuple(min(r, n) for r in header.rungs)
        tape.header = replace(
            header, bits=bits, level_bits=header.level_bits[:n], level_bytes=header.level_bytes[:n], rungs=rungs
        )  # fmt: skip
        # The time to compute an expert is proportional to its bytes.
        size = tape.header.mean_bytes[-1] / header.mean_bytes[-1]
        try:
            scheduler = make_scheduler(
                tape, row["scheduler"], budget_bytes=header.slots_bytes, options=options, sections=sections
            )  # fmt: skip
            if any(line.startswith("a trace") for line in scheduler.notes):
                raise ValueError("what it decides by is not in a trace")
            r = replay(
                tape, scheduler, budget_bytes=header.slots_bytes,
                timing=replace(timing, expert_us=timing.expert_us * size),
            )  # fmt: skip
        except ValueError as error:
            refused.append(f"{name}: {error}")
            continue
        is_reference = row["kl"] is None
        out.append({
            "name": name, "rate": r.rate,
            "change": 0.0 if is_reference else math.expm1(row["loss_change"]),
            "error": 0.0 if is_reference else row["loss_error"],
        })  # fmt: skip
    return out, refused

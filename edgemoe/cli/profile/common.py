"""What the subcommands share: their parsers' shape, and how traces and tables are shown."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgemoe.cli.console import note

if TYPE_CHECKING:
    from edgemoe.lab.report.tables import Table
    from edgemoe.lab.routing.timing import Timing
    from edgemoe.runtime.trace import Trace

__all__ = ["add_command", "print_json", "print_table", "timing_of", "title"]


def add_command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, prog=f"edgemoe profile {name}", help=about, description=f"{about.capitalize()}."
    )
    parser.set_defaults(run=run)
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks of errors")
    return parser


def timing_of(trace: Trace) -> Timing | None:
    from edgemoe.lab.routing.timing import fit

    try:
        return fit(trace)
    except ValueError as error:
        note(f"# no prediction of times: {error}")
        return None


def title(trace: Trace) -> str:
    h = trace.header
    _, tokens = trace.passes()
    return (
        f"{h.model}: {h.num_layers} layers of {h.num_experts} experts, {h.experts_per_token} per token, {h.bits} bits; "
        f"{int(tokens.sum())} tokens, {int((tokens == 1).sum())} of them one at a time; recorded with {h.scheduler}, "
        f"{h.slots_bytes / 2**20:.0f} MiB for experts, {h.threads} threads"
    )


def print_table(table: Table) -> None:
    from edgemoe.lab.report.tables import markdown

    print(f"\n{table[0]}\n\n{markdown(table)}")


def print_json(
    trace: Trace, args: argparse.Namespace, timing: Timing | None, **values: object
) -> None:
    report = {
        "command": sys.argv,
        "trace": dataclasses.asdict(trace.header),
        "timing": None if timing is None else dataclasses.asdict(timing),
        **values,
    }
    # What cannot be said is null: JSON has no nan.
    print(json.dumps(_clean(report), indent=1, allow_nan=False))


def _clean(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    return value

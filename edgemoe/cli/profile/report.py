"""`edgemoe profile report`: says what a trace holds."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from edgemoe.cli.console import note
from edgemoe.cli.profile.common import add_command, print_json, print_table, timing_of, title
from edgemoe.errors import FormatError

__all__ = ["add"]

_T = TypeVar("_T")


def add(commands: Any) -> None:
    """Adds the subcommand's parser."""
    report = add_command(commands, "report", _report, "say what a trace holds")
    report.add_argument("trace", metavar="TRACE")
    report.add_argument(
        "--model", metavar="MODEL", help="the .moe file, to judge its predictor of paths too"
    )
    report.add_argument("--json", action="store_true", help="print one JSON object instead")


def _report(args: argparse.Namespace) -> None:
    from edgemoe.file.format import open_moe
    from edgemoe.lab.report import report, tables
    from edgemoe.lab.routing.predictors import predictions
    from edgemoe.runtime.trace import read

    trace = read(args.trace)
    timing = timing_of(trace)
    used, local = report.usage(trace), report.locality(trace)
    sections = {} if args.model is None else open_moe(args.model).sections
    guesses = _or_note(lambda: predictions(trace, timing, sections))
    waits = _or_note(lambda: report.waits(trace))
    if args.json:
        print_json(
            trace, args, timing, usage=used, locality=local, waits=waits,
            predictors=guesses and [dataclasses.asdict(g) for g in guesses],
        )  # fmt: skip
        return
    print(title(trace))
    for table in [
        *tables.usage(used), tables.srp(local), tables.hit_rates(local),
        *([tables.predictors(guesses)] if guesses else []),
        *(tables.waits(waits) if waits else []),
    ]:  # fmt: skip
        print_table(table)


def _or_note(make: Callable[[], _T]) -> _T | None:
    """Returns what is made; None, and says why, where the trace has too few single tokens for it."""
    try:
        return make()
    except FormatError:
        raise
    except ValueError as error:
        note(f"# left out: {error}")
        return None

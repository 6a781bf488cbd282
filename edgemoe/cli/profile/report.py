"""`edgemoe profile report`: shows what a trace holds."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from edgemoe.cli.console import say
from edgemoe.cli.names import model_path
from edgemoe.cli.profile.common import add_command, or_note, print_json, print_table, title

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the subcommand's parser."""
    report = add_command(commands, "report", _report, "show what a trace holds")
    report.add_argument("trace", metavar="TRACE", help="a recorded trace")
    report.add_argument(
        "--model", metavar="MODEL", help="the .moe file, to judge its predictor of paths too"
    )
    report.add_argument("--json", action="store_true", help="print one JSON object instead")


def _report(args: argparse.Namespace) -> None:
    from edgemoe.file.reader import open_moe
    from edgemoe.lab.report import report, tables
    from edgemoe.lab.routing.predictors import predictions
    from edgemoe.lab.routing.timing import fit
    from edgemoe.runtime.trace import read

    trace = read(args.trace)
    timing = or_note(lambda: fit(trace), what="no prediction of times")
    used, local = report.usage(trace), report.locality(trace)
    sections = {} if args.model is None else open_moe(model_path(args.model)).sections
    guesses = or_note(lambda: predictions(trace, timing, sections), what="left out")
    waits = or_note(lambda: report.waits(trace), what="left out")
    if args.json:
        print_json(
            trace, args, timing, usage=used, locality=local, waits=waits,
            predictors=guesses and [dataclasses.asdict(g) for g in guesses],
        )  # fmt: skip
        return
    say(title(trace))
    for table in [
        *tables.usage(used), tables.srp(local), tables.hit_rates(local),
        *([tables.predictors(guesses)] if guesses else []),
        *(tables.waits(waits) if waits else []),
    ]:  # fmt: skip
        print_table(table)

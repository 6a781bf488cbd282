"""What the subcommands share: their parsers' shape, and how traces and tables are shown."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from edgemoe.cli.console import note, say
from edgemoe.errors import FormatError, shortened

if TYPE_CHECKING:
    from edgemoe.lab.report.tables import Table
    from edgemoe.lab.routing.timing import Timing
    from edgemoe.runtime.trace import Trace

__all__ = ["add_command", "or_note", "print_json", "print_table", "title"]

_T = TypeVar("_T")


def add_command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    """Adds a subcommand, which `run` runs, and returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        prog=f"edgemoe profile {name}",
        help=about,
        description=f"{about[:1].upper()}{about[1:]}.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser


def or_note(make: Callable[[], _T], *, what: str) -> _T | None:
    """Returns what `make` makes; None, with a note of the reason, where the trace has too little for it."""
    try:
        return make()
    except FormatError:
        raise
    except ValueError as error:
        note(f"# {what}: {error}")
        return None


def title(trace: Trace) -> str:
    """Returns a line about a trace."""
    h = trace.header
    name, by = shortened(h.model), shortened(h.scheduler)
    _, tokens = trace.passes()
    return (
        f"{name}: {h.num_layers} layers of {h.num_experts} experts, {h.experts_per_token} per token, {h.bits} bits; "
        f"{int(tokens.sum())} tokens, {int((tokens == 1).sum())} of them one at a time; recorded with {by}, "
        f"{h.slots_bytes / 2**20:.0f} MiB for experts, {h.threads} threads"
        f"{'; its end is missing' * trace.is_cut}"
    )


def print_table(table: Table) -> None:
    """Prints a table under its heading."""
    from edgemoe.lab.report.tables import markdown

    say("", table[0], "", *markdown(table).split("\n"))


def print_json(
    trace: Trace, args: argparse.Namespace, timing: Timing | None, **values: object
) -> None:
    """Prints what was found as one JSON object."""
    from edgemoe.lab.report.report import to_json

    report = {
        "command": sys.argv,
        "trace": dataclasses.asdict(trace.header),
        "timing": None if timing is None else dataclasses.asdict(timing),
        **values,
    }
    say(*to_json(report).split("\n"))

"""`edgemoe profile replay`: replays a trace through schedulers and budgets."""

from __future__ import annotations

import argparse
from typing import Any

from edgemoe.cli.console import say
from edgemoe.cli.profile.common import add_command, print_json, print_table, title
from edgemoe.cli.profile.replays import add_flags, studied

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the subcommand's parser."""
    replay = add_command(
        commands, "replay", _replay, "replay a trace through schedulers and budgets"
    )
    replay.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_flags(replay, model_is_for="schedulers with tables of their own in it")


def _replay(args: argparse.Namespace) -> None:
    from edgemoe.lab.report import tables
    from edgemoe.runtime.trace import read

    trace = read(args.trace)
    timing, rows = studied(args, trace)
    if args.json:
        print_json(trace, args, timing, replays=rows)
        return
    say(title(trace))
    print_table(tables.studied(rows))

"""`edgemoe profile`: records how a model routes a text, and shows what that means for caches and schedulers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from edgemoe.cli.console import run_command
from edgemoe.cli.parser import Parser
from edgemoe.cli.profile import fit, plot, replay, report, trace, train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0; 1 for an error, which is one line on stderr; 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 at wrong usage.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:  # list the subcommands, as `edgemoe` alone lists the commands
        parser.print_help()
        return 0
    return run_command(
        f"edgemoe profile {args.command}", lambda: args.run(args), verbose=args.verbose
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="edgemoe profile",
        description="Record how a model routes a text; report on it; replay it through schedulers, policies and "
        "budgets without the model; plot it.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for subcommand in (trace, train, report, replay, fit, plot):
        subcommand.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())

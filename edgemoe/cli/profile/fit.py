"""`edgemoe profile fit`: fits the weights of HOBBIT's eviction to a trace."""

from __future__ import annotations

import argparse
from typing import Any

from edgemoe.cli.console import note, say
from edgemoe.cli.profile.common import add_command, title
from edgemoe.cli.scheduling import read_settings

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the subcommand's parser."""
    # fmt: off
    fit = add_command(commands, "fit", _fit, "fit the weights of HOBBIT's eviction to a trace, by replays")
    fit.add_argument("trace", metavar="TRACE", help="a recorded trace")
    fit.add_argument("--budget", default="25%", metavar="SIZE",
                     help="memory for experts: a share of all of them, or a size (default: 25%%)")
    fit.add_argument("--scheduler", default="on-demand", metavar="NAME", help="what is replayed (default: %(default)s)")
    fit.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                     help="an option of the scheduler; may be repeated")
    # fmt: on


def _fit(args: argparse.Namespace) -> None:
    from edgemoe.cli.progress import Progress
    from edgemoe.lab.routing.replay import Tape
    from edgemoe.lab.routing.study import budget_of
    from edgemoe.lab.routing.weights import NAMES, fit_weights
    from edgemoe.runtime.trace import read

    trace, options = read(args.trace), read_settings(args.set)
    if args.scheduler == "on-demand":  # it tries out reading ahead, which would blur the comparison
        options = {"look_ahead": False, **options}
    with Progress("fitting", unit="replay") as progress:
        found = fit_weights(
            Tape(trace), budget_bytes=budget_of(args.budget, trace), scheduler=args.scheduler,
            options=options, progress=lambda done: progress(done, 0),
        )  # fmt: skip
    say(title(trace), "", "| eviction | MB read per token, first half | second half | hit rate, second half |",
        "|---|---|---|---|")  # fmt: skip
    for name, first, second in found.rows:
        say(f"| {name} | {first.bytes_per_token / 1e6:.3f} | {second.bytes_per_token / 1e6:.3f} "
            f"| {100 * second.hit_rate:.1f}% |")  # fmt: skip
    note(
        f"# {found.replays} replays; fitted on the first half of the single tokens, each half from an empty cache"
    )
    settings = " ".join(f"--set {name}={w:g}" for name, w in zip(NAMES, found.weights, strict=True))
    say("", f"--set eviction=hobbit {settings}")

"""`edgemoe profile plot`: draws a trace and replays of it into one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.cli.console import check_output, note
from edgemoe.cli.names import model_path
from edgemoe.cli.profile.common import add_command, title
from edgemoe.cli.profile.replays import add_flags, studied
from edgemoe.errors import shortened
from edgemoe.file.whole import write_whole

if TYPE_CHECKING:
    from edgemoe.lab.routing.timing import Timing
    from edgemoe.runtime.trace import Trace

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the subcommand's parser."""
    plot = add_command(commands, "plot", _plot, "draw a trace and replays of it into one HTML file")
    add_flags(
        plot,
        model_is_for="schedulers with tables of their own in it, and for the quality that it holds",
    )
    plot.add_argument("-o", "--output", required=True, metavar="FILE", help="the HTML file")
    plot.add_argument("--png", metavar="DIR", help="also write the pictures to DIR")


def _plot(args: argparse.Namespace) -> None:
    from edgemoe.lab.report import pictures, report, tables
    from edgemoe.lab.report.page import page
    from edgemoe.runtime.trace import read

    check_output(Path(args.output), Path(args.trace), args.timing and Path(args.timing))
    pictures.check()  # before the minutes of replaying
    trace = read(args.trace)
    used, local, waits = report.usage(trace), report.locality(trace), report.waits(trace)
    timing, rows = studied(args, trace)
    figures = [
        ("Hit rate and budget", "Dashed lines know the future; dotted ones are the same with the tokens in random "
         "order, where only frequency helps.", pictures.budgets(rows)),
        ("Use and residency", "By layer and expert, over all tokens of the trace.", pictures.heat_maps(trace)),
        ("Timeline", "Single tokens from the middle of the trace. Red is waiting: the bubbles.",
         pictures.timeline(trace, timing=timing)),
        ("Where the time went", "The mean single token, layer by layer.", pictures.waits(waits["layers"])),
    ]  # fmt: skip
    settings, refused = _qualities(args, trace, timing)
    for line in refused:
        note(f"# not drawn: {line}")
    if settings:
        figures.insert(1, ("Quality and speed", "Settings whose quality the model's file holds, with the memory of the "
                           "trace: predicted speed, and the measured change of perplexity. The dashed line is 1%.",
                           pictures.qualities(settings)))  # fmt: skip
    drawn = [(name, about, pictures.png(figure)) for name, about, figure in figures]
    words = [
        *tables.usage(used), tables.srp(local), tables.hit_rates(local), *tables.waits(waits),
        tables.studied(rows),
    ]  # fmt: skip
    heading = f"Routing of {shortened(trace.header.model)}"
    write_whole(Path(args.output), page(heading, title(trace), words, drawn).encode())
    note(f"# {args.output}")
    if args.png:
        folder = Path(args.png)
        folder.mkdir(parents=True, exist_ok=True)
        for heading, _, picture in drawn:
            target = folder / f"{heading.lower().replace(' ', '-')}.png"
            write_whole(target, picture)
            note(f"# {target}")


def _qualities(
    args: argparse.Namespace, trace: Trace, timing: Timing | None
) -> tuple[list[dict[str, Any]], list[str]]:
    from edgemoe.file.reader import open_moe
    from edgemoe.lab.quality.choice import stored_rows
    from edgemoe.lab.routing.study import measured

    if args.model is None or timing is None:
        return [], []
    moe = open_moe(model_path(args.model))
    rows = stored_rows(moe, dense_bits=moe.dense_ladder[-1])
    return measured(trace, rows, timing=timing, sections=moe.sections)

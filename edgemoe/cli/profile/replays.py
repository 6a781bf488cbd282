"""The flags of subcommands that replay traces, and the replays that the flags ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgemoe.cli.console import note
from edgemoe.cli.names import model_path
from edgemoe.cli.profile.common import or_note
from edgemoe.cli.scheduling import read_settings

if TYPE_CHECKING:
    from edgemoe.lab.routing.timing import Timing
    from edgemoe.runtime.trace import Trace

__all__ = ["add_flags", "studied"]

_BUDGETS = ["10%", "25%", "50%", "75%"]


# fmt: off
def add_flags(command: argparse.ArgumentParser, *, model_is_for: str) -> None:
    """Adds the trace, and the flags that say what to replay it through."""
    command.add_argument("trace", metavar="TRACE", help="a recorded trace")
    command.add_argument("--budgets", nargs="+", default=_BUDGETS, metavar="SIZE",
                         help="memory for experts: a share of all of them, or a size "
                         "(default: 10%% 25%% 50%% 75%%)")
    command.add_argument("--vram", nargs="+", default=[], metavar="SIZE",
                         help="device memory for experts, likewise; 0 for no device")
    command.add_argument("--schedulers", nargs="*", default=["on-demand"], metavar="NAME",
                         help="schedulers to replay it through (default: on-demand)")
    command.add_argument("--policies", nargs="+", default=["lfu"], metavar="NAME",
                         help="eviction by lru or lfu, for schedulers without one of their own (default: lfu)")
    command.add_argument("--set", action="append", default=[], metavar="SCHEDULER.KEY=VALUE",
                         help="an option of a scheduler; may be repeated")
    command.add_argument("--model", metavar="MODEL", help=f"the .moe file, for {model_is_for}")
    command.add_argument("--timing", metavar="TRACE", help="predict speeds from the times of this trace "
                         "instead of the replayed one's")
# fmt: on


def studied(args: argparse.Namespace, trace: Trace) -> tuple[Timing | None, list[dict[str, Any]]]:
    """Returns the times of layers, if a trace tells them, and a row for each replay that the flags ask for."""
    from edgemoe.cli.progress import Progress
    from edgemoe.file.reader import open_moe
    from edgemoe.lab.routing.study import budget_of, lines, remarks, study
    from edgemoe.lab.routing.timing import fit
    from edgemoe.runtime.trace import read

    given = _settings_by_scheduler(args.set)
    for name in given:
        if name not in args.schedulers:
            known = ", ".join(args.schedulers)
            raise ValueError(f"--set {name}: expected one of --schedulers, {known}")
    ways = lines(args.schedulers, args.policies, given)
    budgets = list(dict.fromkeys(budget_of(text, trace) for text in args.budgets))
    vrams = [0 if text == "0" else budget_of(text, trace) for text in args.vram] or [0]
    timed = trace if args.timing is None else read(args.timing)
    timing = or_note(lambda: fit(timed), what="no prediction of times")
    sections = {} if args.model is None else open_moe(model_path(args.model)).sections
    with Progress("replaying", unit="run") as progress:
        rows = study(
            trace, ways, budgets, vrams=vrams, timing=timing, sections=sections, progress=progress
        )
    for line in remarks(trace, rows):
        note(f"# {line}")
    return timing, rows


def _settings_by_scheduler(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns options by scheduler, from SCHEDULER.KEY=VALUE."""
    out: dict[str, dict[str, Any]] = {}
    for text in texts:
        scheduler, dot, rest = text.partition(".")
        if not dot or not scheduler or "=" in scheduler or "@" in scheduler:
            raise ValueError(f"--set: expected SCHEDULER.KEY=VALUE, got {text!r}")
        out.setdefault(scheduler, {}).update(read_settings([rest]))
    return out

"""The flags of replays, and replays as they say."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgemoe.cli.console import note
from edgemoe.cli.profile.common import timing_of
from edgemoe.cli.scheduling import read_settings

if TYPE_CHECKING:
    from edgemoe.lab.routing.timing import Timing
    from edgemoe.runtime.trace import Trace

__all__ = ["add_flags", "studied"]

_BUDGETS = ["10%", "25%", "50%", "75%"]


# fmt: off
def add_flags(command: argparse.ArgumentParser, *, model_is_for: str) -> None:
    """Adds a trace and what to replay it through."""
    command.add_argument("trace", metavar="TRACE")
    command.add_argument("--budgets", nargs="+", default=_BUDGETS, metavar="SIZE",
                         help="memory for experts: a share of all of them, or a size "
                         "(default: 10%% 25%% 50%% 75%%)")
    command.add_argument("--schedulers", nargs="*", default=["on-demand"], metavar="NAME",
                         help="(default: on-demand)")
    command.add_argument("--policies", nargs="+", default=["lfu"], metavar="NAME",
                         help="lru, lfu: for schedulers without one of their own (default: lfu)")
    command.add_argument("--set", action="append", default=[], metavar="SCHEDULER.KEY=VALUE",
                         help="an option of a scheduler; may be repeated")
    command.add_argument("--model", metavar="MODEL", help=f"the .moe file, for {model_is_for}")
    command.add_argument("--timing", metavar="TRACE", help="predict speeds from this one's times "
                         "instead of the trace's own")
# fmt: on


def studied(args: argparse.Namespace, trace: Trace) -> tuple[Timing | None, list[dict[str, Any]]]:
    from edgemoe.cli.progress import Progress
    from edgemoe.file.format import open_moe
    from edgemoe.lab.routing.study import lines, study
    from edgemoe.runtime.trace import read
    from edgemoe.scheduler import KINDS, check_options

    given = _settings_by_scheduler(args.set)
    for name, options in given.items():  # before replays take minutes
        if name not in args.schedulers:
            raise ValueError(
                f"--set {name}: expected one of --schedulers, {', '.join(args.schedulers)}"
            )
        if name in KINDS:
            check_options(name, options)
    ways = lines(args.schedulers, args.policies, given)
    budgets = list(dict.fromkeys(_budget(text, trace) for text in args.budgets))
    timing = timing_of(trace if args.timing is None else read(args.timing))
    sections = {} if args.model is None else open_moe(args.model).sections
    with Progress("replaying", unit="run") as progress:
        rows = study(trace, ways, budgets, timing=timing, sections=sections, progress=progress)
    for line in sorted({line for r in rows for line in r["notes"] if line.startswith("a trace")}):
        note(f"# {line}")
    further = {r["scheduler"] for r in rows if r["look_ahead"] > trace.header.look_ahead}
    for name in sorted(further):
        note(f"# {name} looks further ahead than the trace does; --look-ahead records more")
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


def _budget(text: str, trace: Trace) -> int:
    from edgemoe.runtime.budget import parse_size

    header = trace.header
    everything = header.num_layers * header.num_experts * header.mean_bytes[-1]
    if not text.endswith("%"):
        return parse_size(text)
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise ValueError(f"--budgets: expected shares like 25% or sizes like 200MiB, got {text!r}")
    return int(share * everything)

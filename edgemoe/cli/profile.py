"""`edgemoe profile`: records how a model routes a text, and tells what that means for caches and schedulers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgemoe.cli.console import check_output, decode_text, note, run_command
from edgemoe.cli.engine import engine_flags
from edgemoe.cli.parser import Parser
from edgemoe.cli.scheduling import SET_HELP, options_text, read_settings
from edgemoe.cli.values import ram_size
from edgemoe.errors import FormatError
from edgemoe.file.whole import write_whole

if TYPE_CHECKING:
    from edgemoe.lab.report.tables import Table
    from edgemoe.lab.routing.timing import Timing
    from edgemoe.runtime.engine import Engine
    from edgemoe.runtime.trace import Trace

__all__ = ["main"]

_T = TypeVar("_T")

_BUDGETS = ["10%", "25%", "50%", "75%"]
_RANDOM_TOKENS = 512


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0; 1 for an error, which is one line on stderr; 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 at wrong usage.
    """
    args = _parser().parse_args(argv)
    return run_command(
        f"edgemoe profile {args.command}", lambda: args.run(args), verbose=args.verbose
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="edgemoe profile",
        description="Record how a model routes a text; report on it; replay it through schedulers, policies and "
        "budgets without the model; plot it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # fmt: off
    trace = _command(commands, "trace", _trace, "run a text through a model and record it")
    trace.add_argument("model", metavar="MODEL", help="a .moe file")
    trace.add_argument("--text", metavar="FILE",
                       help="UTF-8 text to follow (default: random tokens, as in edgemoe bench)")
    trace.add_argument("-o", "--output", required=True, metavar="FILE", help="the trace")
    trace.add_argument("-n", "--tokens", type=int, metavar="N",
                       help=f"of the text, at most (default: all of it; {_RANDOM_TOKENS} random ones)")
    trace.add_argument("--prompt", type=int, default=64, metavar="N",
                       help="tokens computed at once, before single ones (default: %(default)s)")
    trace.add_argument("--pieces", type=int, metavar="N",
                       help="instead of --prompt: the text as sequences of N tokens, each computed at once: fast, and "
                       "of any length; for edgemoe profile train")
    trace.add_argument("--look-ahead", type=int, default=2, metavar="N",
                       help="ask the routers of the next N layers too (default: %(default)s)")
    trace.add_argument("--ram", type=ram_size, metavar="SIZE", help="memory for the whole process")
    trace.add_argument("--bits", type=int, metavar="N")
    trace.add_argument("--dense-bits", type=int, metavar="N")
    trace.add_argument("--experts", type=int, metavar="K", help="per token")
    trace.add_argument("-t", "--threads", type=int, metavar="N")
    trace.add_argument("--scheduler", metavar="NAME",
                       help="(default: on-demand without reading ahead, which predictions of speed need)")
    trace.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=SET_HELP)
    trace.add_argument("--no-verify", action="store_true")

    train = _command(commands, "train", _train,
                     "train a predictor of routing paths on traces, and keep it in the model's file")
    train.add_argument("model", metavar="MODEL", help="the .moe file that was traced")
    train.add_argument("traces", nargs="+", metavar="TRACE", help="best 100,000 tokens or more of text like yours")
    train.add_argument("--width", type=int, default=192, metavar="N",
                       help="of the network (default: %(default)s)")
    train.add_argument("--rows", type=int, default=16384, metavar="N",
                       help="of its embedding, a power of two (default: %(default)s)")
    train.add_argument("--epochs", type=int, default=6, metavar="N", help="(default: %(default)s)")

    report = _command(commands, "report", _report, "say what a trace holds")
    report.add_argument("--model", metavar="MODEL", help="the .moe file, to judge its predictor of paths too")
    replay = _command(commands, "replay", _replay, "replay a trace through schedulers and budgets")
    plot = _command(commands, "plot", _plot, "draw a trace and replays of it into one HTML file")
    for command in (report, replay, plot):
        command.add_argument("trace", metavar="TRACE")
    for command in (report, replay):
        command.add_argument("--json", action="store_true", help="print one JSON object instead")
    for command in (replay, plot):
        command.add_argument("--budgets", nargs="+", default=_BUDGETS, metavar="SIZE",
                             help="memory for experts: a share of all of them, or a size "
                             "(default: 10%% 25%% 50%% 75%%)")
        command.add_argument("--schedulers", nargs="*", default=["on-demand"], metavar="NAME",
                             help="(default: on-demand)")
        command.add_argument("--policies", nargs="+", default=["lfu"], metavar="NAME",
                             help="lru, lfu: for schedulers without one of their own (default: lfu)")
        command.add_argument("--set", action="append", default=[], metavar="SCHEDULER.KEY=VALUE",
                             help="an option of a scheduler; may be repeated")
        command.add_argument("--model", metavar="MODEL",
                             help="the .moe file, for schedulers with tables of their own in it"
                             + (" and for the quality that it holds" if command is plot else ""))
        command.add_argument("--timing", metavar="TRACE", help="predict speeds from this one's times "
                             "instead of the trace's own")
    plot.add_argument("-o", "--output", required=True, metavar="FILE", help="the HTML file")
    plot.add_argument("--png", metavar="DIR", help="write the pictures there too")
    # fmt: on
    return parser


def _command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, prog=f"edgemoe profile {name}", help=about, description=f"{about.capitalize()}."
    )
    parser.set_defaults(run=run)
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks of errors")
    return parser


def _trace(args: argparse.Namespace) -> None:
    from edgemoe.cli.progress import Progress
    from edgemoe.lab.routing.record import follow, follow_pieces
    from edgemoe.runtime.engine import Engine
    from edgemoe.runtime.options import EngineOptions

    if "help" in args.set:
        print(options_text(args.scheduler or "on-demand"))
        return
    options: Mapping[str, Any] = read_settings(args.set)
    if args.scheduler is None:
        options = {"look_ahead": False, **options}
    # Before the model is loaded.
    text = None if args.text is None else decode_text(Path(args.text).read_bytes(), args.text)
    if args.tokens is not None and args.tokens < 2:
        raise ValueError(f"--tokens: expected at least 2, got {args.tokens}")
    if args.pieces is not None and args.pieces < 1:
        raise ValueError(f"--pieces: expected at least 1 token, got {args.pieces}")
    ids = _ids(args.model, text, args.tokens, cut=args.pieces is None)
    given = engine_flags(
        args,
        context=len(ids) if args.pieces is None else args.pieces,
        scheduler=args.scheduler or "on-demand",
        options=options,
    )
    with Engine(args.model, EngineOptions(**given)) as engine:
        for line in engine.notes:
            note(f"# {line}")
        engine.record(args.output, look_ahead=args.look_ahead if args.pieces is None else 0)
        with Progress(f"tracing {Path(args.model).name}", unit="tok") as progress:
            if args.pieces is not None:
                follow_pieces(engine, ids, length=args.pieces, progress=progress)
            else:
                follow(engine, ids, prompt=min(args.prompt, len(ids) - 1), progress=progress)
        _say_traced(engine, args.output, len(ids))


def _say_traced(engine: Engine, path: str, count: int) -> None:
    b = engine.budget
    note(
        f"# {path}: {count} tokens; {b.slots / 2**20:.0f} of {b.experts / 2**20:.0f} MiB of experts fit "
        f"({100 * b.slots / b.experts:.0f}%)"
    )


def _ids(model: str, text: str | None, limit: int | None, *, cut: bool) -> list[int]:
    """Returns the tokens of a text, or random ones; with `cut` no more than one sequence may have."""
    import numpy as np

    from edgemoe.file.format import open_moe
    from edgemoe.text.tokenizer import Tokenizer

    moe = open_moe(model)
    if text is None:
        rng = np.random.default_rng(1)
        count = _RANDOM_TOKENS if limit is None else limit
        ids: list[int] = rng.integers(0, moe.config.vocab_size, count).tolist()
    elif "tokenizer.json" in moe.sections:
        ids = Tokenizer.from_files(moe.sections).encode(text)[:limit]
    else:
        raise ValueError(f"{model}: has no tokenizer; without --text random tokens are traced")
    if len(ids) < 2:
        raise ValueError(f"expected a text of at least 2 tokens, got {len(ids)}")
    most = moe.config.context_length
    if not cut:
        return ids
    if len(ids) > most:
        note(f"# the first {most} of {len(ids)} tokens: the model was made for no more")
    return ids[:most]


def _train(args: argparse.Namespace) -> None:
    from edgemoe.cli.progress import Progress
    from edgemoe.file.append import add_sections
    from edgemoe.file.format import open_moe
    from edgemoe.lab.routing.paths import pieces, train
    from edgemoe.runtime.trace import read
    from edgemoe.scheduler.paths import SECTION

    config = open_moe(args.model).config
    if not os.access(args.model, os.W_OK):  # before it takes minutes
        raise PermissionError(f"{args.model} cannot be written")
    ids, uses = pieces(read(path) for path in args.traces)
    expected = (len(config.moe_layers), config.num_experts)
    if uses.shape[2:] != expected or ids.max() >= config.vocab_size:
        raise ValueError(
            f"expected traces of {args.model}, which has {expected[0]} layers of {expected[1]} experts"
        )
    note(f"# {ids.size} tokens")
    with Progress("training", unit="step") as progress:
        section = train(
            ids, uses, width=args.width, rows=args.rows, epochs=args.epochs, progress=progress
        )
    add_sections(args.model, {SECTION: section})
    note(f"# stored in {args.model}: {len(section) / 2**20:.1f} MiB; --scheduler expertflow uses it, "
         "and --set eviction=next-path")  # fmt: skip


def _report(args: argparse.Namespace) -> None:
    from edgemoe.file.format import open_moe
    from edgemoe.lab.report import report, tables
    from edgemoe.lab.routing.predictors import predictions
    from edgemoe.runtime.trace import read

    trace = read(args.trace)
    timing = _timing(trace)
    used, local = report.usage(trace), report.locality(trace)
    sections = {} if args.model is None else open_moe(args.model).sections
    guesses = _or_note(lambda: predictions(trace, timing, sections))
    waits = _or_note(lambda: report.waits(trace))
    if args.json:
        _print_json(
            trace, args, timing, usage=used, locality=local, waits=waits,
            predictors=guesses and [dataclasses.asdict(g) for g in guesses],
        )  # fmt: skip
        return
    print(_title(trace))
    for table in [
        *tables.usage(used), tables.srp(local), tables.hit_rates(local),
        *([tables.predictors(guesses)] if guesses else []),
        *(tables.waits(waits) if waits else []),
    ]:  # fmt: skip
        _print_table(table)


def _or_note(make: Callable[[], _T]) -> _T | None:
    """Returns what is made; None, and says why, where the trace has too few single tokens for it."""
    try:
        return make()
    except FormatError:
        raise
    except ValueError as error:
        note(f"# left out: {error}")
        return None


def _replay(args: argparse.Namespace) -> None:
    from edgemoe.lab.report import tables
    from edgemoe.runtime.trace import read

    trace = read(args.trace)
    timing, rows = _studied(args, trace)
    if args.json:
        _print_json(trace, args, timing, replays=rows)
        return
    print(_title(trace))
    _print_table(tables.studied(rows))


def _plot(args: argparse.Namespace) -> None:
    from edgemoe.lab.report import pictures, report, tables
    from edgemoe.lab.report.page import page
    from edgemoe.runtime.trace import read

    check_output(Path(args.output), Path(args.trace), args.timing and Path(args.timing))
    pictures.check()  # before it takes minutes
    trace = read(args.trace)
    used, local, waits = report.usage(trace), report.locality(trace), report.waits(trace)
    timing, rows = _studied(args, trace)
    figures = [
        ("Hit rate and budget", "Dashed lines know the future; dotted ones are the same with the tokens in random "
         "order, where only frequency helps.", pictures.budgets(rows)),
        ("Use and residency", "By layer and expert, over all tokens of the trace.", pictures.heat_maps(trace)),
        ("Timeline", "Single tokens from the middle of the trace. Red is waiting: the bubbles.",
         pictures.timeline(trace, timing=timing)),
        ("Where the time went", "The mean single token, layer by layer.", pictures.waits(waits["layers"])),
    ]  # fmt: skip
    if settings := _measured(args, trace, timing):
        figures.insert(1, ("Quality and speed", "Settings whose quality the model's file holds, with the memory of the "
                           "trace: predicted speed, and the measured change of perplexity. The dashed line is 1%.",
                           pictures.qualities(settings)))  # fmt: skip
    drawn = [(title, about, pictures.png(figure)) for title, about, figure in figures]
    words = [
        *tables.usage(used), tables.srp(local), tables.hit_rates(local), *tables.waits(waits),
        tables.studied(rows),
    ]  # fmt: skip
    title = f"Routing of {trace.header.model}"
    write_whole(Path(args.output), page(title, _title(trace), words, drawn).encode())
    note(f"# {args.output}")
    if args.png:
        folder = Path(args.png)
        folder.mkdir(parents=True, exist_ok=True)
        for heading, _, picture in drawn:
            target = folder / f"{heading.lower().replace(' ', '-')}.png"
            write_whole(target, picture)
            note(f"# {target}")


def _studied(args: argparse.Namespace, trace: Trace) -> tuple[Timing | None, list[dict[str, Any]]]:
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
    timing = _timing(trace if args.timing is None else read(args.timing))
    sections = {} if args.model is None else open_moe(args.model).sections
    with Progress("replaying", unit="run") as progress:
        rows = study(trace, ways, budgets, timing=timing, sections=sections, progress=progress)
    for line in sorted({line for r in rows for line in r["notes"] if line.startswith("a trace")}):
        note(f"# {line}")
    further = {r["scheduler"] for r in rows if r["look_ahead"] > trace.header.look_ahead}
    for name in sorted(further):
        note(f"# {name} looks further ahead than the trace does; --look-ahead records more")
    return timing, rows


def _measured(
    args: argparse.Namespace, trace: Trace, timing: Timing | None
) -> list[dict[str, Any]]:
    """Returns the speeds and losses of the settings that the model's file has measured, for a picture."""
    from edgemoe.file.format import open_moe
    from edgemoe.lab.quality.choice import applies, stored
    from edgemoe.lab.routing.study import measured

    if args.model is None or timing is None:
        return []
    moe = open_moe(args.model)
    if (report := stored(moe)) is None:
        return []
    dense = moe.dense_ladder[-1]
    rows = [row for row in report["rows"] if row["dense_bits"] == dense and applies(moe, row)]
    found, refused = measured(trace, rows, timing=timing, sections=moe.sections)
    for line in refused:
        note(f"# not drawn: {line}")
    return found


def _settings_by_scheduler(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns options by scheduler, from SCHEDULER.KEY=VALUE."""
    out: dict[str, dict[str, Any]] = {}
    for text in texts:
        scheduler, dot, rest = text.partition(".")
        if not dot or not scheduler or "=" in scheduler or "@" in scheduler:
            raise ValueError(f"--set: expected SCHEDULER.KEY=VALUE, got {text!r}")
        out.setdefault(scheduler, {}).update(read_settings([rest]))
    return out


def _timing(trace: Trace) -> Timing | None:
    from edgemoe.lab.routing.timing import fit

    try:
        return fit(trace)
    except ValueError as error:
        note(f"# no prediction of times: {error}")
        return None


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


def _title(trace: Trace) -> str:
    h = trace.header
    _, tokens = trace.passes()
    return (
        f"{h.model}: {h.num_layers} layers of {h.num_experts} experts, {h.experts_per_token} per token, {h.bits} bits; "
        f"{int(tokens.sum())} tokens, {int((tokens == 1).sum())} of them one at a time; recorded with {h.scheduler}, "
        f"{h.slots_bytes / 2**20:.0f} MiB for experts, {h.threads} threads"
    )


def _print_table(table: Table) -> None:
    from edgemoe.lab.report.tables import markdown

    print(f"\n{table[0]}\n\n{markdown(table)}")


def _print_json(
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


if __name__ == "__main__":
    sys.exit(main())

"""`edgemoe bench`: how fast a model runs here, compared with what the machine could do."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.console import note, run_command, say, say_json
from edgemoe.cli.engine import ONE_ADAPTER_HELP, engine_flags, one_adapter
from edgemoe.cli.measured import MAX_LOSS_HELP, check, cost, pick
from edgemoe.cli.names import add_model, model_path
from edgemoe.cli.parser import Parser
from edgemoe.cli.scheduling import SET_HELP, options_text, read_settings
from edgemoe.cli.values import CACHE_TYPES_TEXT, bits_or_auto, ram_size, whole, wholes

if TYPE_CHECKING:
    from edgemoe.runtime.bench import Result, Roof
    from edgemoe.runtime.engine import Engine

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
    args = _parser().parse_args(argv)
    return run_command("edgemoe bench", lambda: _run(args), verbose=args.verbose)


def _run(args: argparse.Namespace) -> None:
    from edgemoe.runtime.bench import measure, roof
    from edgemoe.runtime.engine import Engine
    from edgemoe.runtime.options import EngineOptions

    if "help" in args.set:
        say(*options_text(args.scheduler).split("\n"))
        return
    args.set = read_settings(args.set)
    prompts, generations = ([n for n in counts if n] for counts in (args.n_prompt, args.n_gen))
    longest = max([*prompts, *generations], default=0)
    if longest < 1:
        raise ValueError("expected at least one test of at least one token")
    context = max(args.n_depth) + longest + 2
    args.model = model_path(args.model, converts=True)
    one_adapter(args)
    if args.max_quality_loss is not None:
        check(args)
        note(f"# {pick(args, context=context)}")
    known = None if args.max_quality_loss is not None else cost(args)
    levels = None if args.bits == "auto" else args.bits

    def machine() -> Roof:
        return roof(args.model, bits=levels, threads=args.threads, ram=args.ram, device=args.device)

    before = machine()
    with Engine(args.model, EngineOptions(**engine_flags(args, context=context))) as engine:
        for line in engine.notes:
            note(f"# {line}")
        if engine.adapter:
            note(f"# adapter: {engine.adapter}")
        if engine.notes and known:
            note(f"# {known}")
        results = []
        if not args.json:
            say(*_HEAD.split("\n"))
        for result in measure(
            engine, prompts=prompts, generations=generations, depths=args.n_depth,
            repetitions=args.repetitions, seed=args.seed,
        ):  # fmt: skip
            results.append(result)
            if not args.json:
                say(_row(result))
        report, said, budget = _report(engine, results), engine.scheduler.report(), engine.budget
    # On a shared machine the roof changes within minutes, so it is measured before and after.
    roofs = (before, machine())
    if args.json:
        say_json(
            {
                **report,
                "roofs": [{k: v for k, v in dataclasses.asdict(r).items() if v} for r in roofs],
            }
        )
        return
    note(
        f"# roof, before and after: memory {_span([r.memory for r in roofs], 1)} GB/s, "
        f"disk {_span([r.disk for r in roofs], 2)} GB/s{_there(roofs)}; "
        f"experts {budget.slots / 2**30:.2f} of {budget.experts / 2**30:.2f} GiB"
    )
    if said:
        note(f"# {args.scheduler}: {said}")


def _span(rates: Sequence[float], digits: int) -> str:
    """Returns the lowest and highest of rates in bytes per second, as GB/s; one figure where both round to the same."""
    low, high = (f"{rate / 1e9:.{digits}f}" for rate in (min(rates), max(rates)))
    return low if low == high else f"{low}–{high}"


def _there(roofs: Sequence[Roof]) -> str:
    """Returns the rates of a device's memory and link as text, "" without a device."""
    if not roofs[0].link:
        return ""
    vram, link = ([getattr(r, name) for r in roofs] for name in ("vram", "link"))
    return f", device memory {_span(vram, 0)} GB/s, link {_span(link, 1)} GB/s"


_ABOUT = """\
Measure the speed of prompts (pp) and single tokens (tg), as llama-bench does: random
tokens, one unmeasured repetition, the median of the others ± their standard deviation.
If all experts fit, they are loaded first; otherwise they are read when tokens need them.
The roof of memory is the rate of reading the experts in memory, measured just before and
just after a test; "of roof" is the share of the higher one.
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="edgemoe bench",
        description=_ABOUT,
    )
    add_model(parser)
    parser.add_argument("-p", "--n-prompt", type=wholes(0), default=[512], metavar="N,…",
                        help="prompt lengths in tokens, 0 for none (default: 512)")  # fmt: skip
    parser.add_argument("-n", "--n-gen", type=wholes(0), default=[128], metavar="N,…",
                        help="how many single tokens, 0 for none (default: 128)")  # fmt: skip
    parser.add_argument("-d", "--n-depth", type=wholes(0), default=[0], metavar="N,…",
                        help="tokens in the context before a test (default: 0)")  # fmt: skip
    parser.add_argument("-ctk", "--cache-type-k", default="f16", metavar="TYPE",
                        help=f"type of keys in the KV cache: {CACHE_TYPES_TEXT} (default: f16)")  # fmt: skip
    parser.add_argument("-ctv", "--cache-type-v", default="f16", metavar="TYPE",
                        help="the same for values (default: f16)")  # fmt: skip
    parser.add_argument("-r", "--repetitions", type=whole(1), default=5, metavar="N",
                        help="how often each test is measured (default: 5)")  # fmt: skip
    parser.add_argument(
        "-t", "--threads", type=whole(1), metavar="N", help="threads (default: all cores)"
    )
    parser.add_argument("--ram", type=ram_size, metavar="SIZE",
                        help="memory for the whole process, such as 4GiB or 50%% of what is free")  # fmt: skip
    parser.add_argument("--device", default="cpu", metavar="NAME",
                        help="cpu, cuda or cuda:N (default: %(default)s)")  # fmt: skip
    parser.add_argument("--vram", type=ram_size, metavar="SIZE",
                        help="device memory to use (default: most of what is free)")  # fmt: skip
    parser.add_argument(
        "--bits",
        type=bits_or_auto,
        metavar="N",
        help="bits of the experts; auto: as allocated to each (default: all that the file has)",
    )
    parser.add_argument("--allocation", type=Path, metavar="FILE",
                        help="an allocation for --bits auto (default: the model file's own)")  # fmt: skip
    parser.add_argument("--adapter", action="append", default=[], metavar="[NAME=]FILE",
                        help=ONE_ADAPTER_HELP)  # fmt: skip
    parser.add_argument("--dense-bits", type=int, metavar="N",
                        help="bits of everything else (default: all that the file has)")  # fmt: skip
    parser.add_argument("--max-quality-loss", metavar="X", help=MAX_LOSS_HELP)
    parser.add_argument("--experts", type=int, metavar="K",
                        help="experts per token (default: the model's)")  # fmt: skip
    parser.add_argument("--scheduler", default="on-demand", metavar="NAME",
                        help="what decides which experts are loaded when (default: %(default)s)")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=SET_HELP)
    parser.add_argument(
        "--seed", type=whole(0), default=1, metavar="N", help="seed of the tokens (default: 1)"
    )
    parser.add_argument("--no-verify", action="store_true",
                        help="do not check the checksums of weights as they are read")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser


_HEAD = """\
| test | t/s | hit | read/token | disk GB/s | memory GB/s | roof GB/s | of roof | waiting | bits | peak |
|---|---|---|---|---|---|---|---|---|---|---|"""


def _row(result: Result) -> str:
    used, roofs = result.used_per_token * result.rate, result.memory_roofs
    share = f"{100 * used / max(roofs):.0f}%" if used and max(roofs) else ""
    return (
        f"| {result.test} | {result.rate:.2f} ± {result.deviation:.2f} | {100 * result.hit_rate:.1f}% "
        f"| {result.read_per_token / 1e6:.2f} MB | {result.read_rate / 1e9:.2f} "
        f"| {f'{used / 1e9:.1f}' if used else ''} | {_span(roofs, 1)} | {share} "
        f"| {100 * result.wait_share:.0f}% | {result.average_bits:.1f} | {result.peak_bytes / 2**20:.0f} MiB |"
    )


def _report(engine: Engine, results: Sequence[Result]) -> dict[str, object]:
    return {
        "command": sys.argv,
        "family": engine.config.family,
        "adapter": engine.adapter,
        "bits": engine.bits,
        "cache_types": dataclasses.asdict(engine.options.kv_types),
        "scheduler": engine.options.scheduler,
        "notes": engine.notes,
        "threads": engine.threads,
        "isa": engine.isa,
        "budget": dataclasses.asdict(engine.budget),
        "results": [
            {**dataclasses.asdict(r), "rate": r.rate, "deviation": r.deviation} for r in results
        ],
    }


if __name__ == "__main__":
    sys.exit(main())

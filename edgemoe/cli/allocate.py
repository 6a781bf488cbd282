"""`edgemoe allocate`: decides offline how many bits each routed expert, or each layer's keys and values, run at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.allocated import check_target, keep, show, windows
from edgemoe.cli.console import note, run_command, say
from edgemoe.cli.names import model_path
from edgemoe.cli.parser import Parser
from edgemoe.cli.progress import Progress
from edgemoe.cli.values import levels, ram_size, whole

if TYPE_CHECKING:
    from edgemoe.lab.bits.kv_types import Found

__all__ = ["main"]

_PROG = "edgemoe allocate"
_METHOD = "error"

_ONLY_FOR = {
    "max_loss": ("expertwise",),
    "text": ("expertwise", "search"),
    "window": ("expertwise", "search"),
    "chunks": ("expertwise", "search"),
    "exponents": ("pmq",),
    "seed": ("random", "search"),
    "bytes": ("search",),
    "context": ("search",),
    "generations": ("search",),
    "held_out": ("search",),
    "minutes": ("search",),
    "ram": ("search",),
    "threads": ("search",),
}

_EPILOG = """\
METHOD is one of:
  error        least change of the layers' outputs, by the calibration (default)
  pmq          MC-MoE's integer programme over frequency, gates and errors
  expertwise   EdgeMoE's search by measured loss; needs one run per expert
  frequency    QuantMoE-Bench: experts that are chosen often get more bits
  first-blocks, outlier   QuantMoE-Bench's other rules
  random       bits at random, as a control
  search       EvoPress: a search by measured loss over experts, the other
               matrices, and keys and values together, within --bytes

The result is used by

    edgemoe-run MODEL.moe --bits auto --allocation OUT.json
    edgemoe convert SOURCE SMALL.moe --allocation OUT.json

The second stores only the given bits of each expert. With --store instead of
-o, the result is in the model file, and the first needs no --allocation.

The result of search is used by

    edgemoe-run MODEL.moe --bits auto --dense-bits auto -ctk auto -ctv auto

after --store, or with --allocation OUT.json --kv-table OUT.kv.json. Ctrl-C ends
a search with the best result so far, once each unit has been measured alone;
the same command continues it.

With --kv, a type for the keys and one for the values of each layer are chosen
instead: each is measured alone, and those that cost least are taken, as in
KVTuner. The result is used by

    edgemoe-run MODEL.moe -ctk auto -ctv auto --kv-table OUT.json

or without --kv-table after --store.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments after `edgemoe allocate`; None for those of the process.

    Returns:
        The exit code: 0, 1 for an error (one line on stderr), 2 for wrong usage, 130 for Ctrl-C.
    """
    args = _parser().parse_args(argv)
    return run_command(
        _PROG,
        lambda: _allocate(args),
        verbose=args.verbose,
        blames_arguments=True,
        interrupted=lambda: _interrupted(args),
    )


def _interrupted(args: argparse.Namespace) -> str:
    from edgemoe.cli.allocate_search import goes_on, kept

    is_saved = args.method == "search" and kept(args).exists()
    return f"interrupted; {goes_on(args)}" if is_saved else "interrupted"


def _allocate(args: argparse.Namespace) -> int | None:
    if args.store and args.out is not None:
        raise ValueError("expected either --store or -o")
    if not args.kv:
        args.method = args.method or _METHOD
        for name, methods in _ONLY_FOR.items():
            if getattr(args, name) is not None and args.method not in methods:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: for --method {' or '.join(methods)} only")
    if args.overwrite and not args.kv and args.method != "search":
        raise ValueError("--overwrite: for --method search only")
    if args.method == "search" and not args.kv:
        from edgemoe.cli.allocate_search import search

        return search(args)
    if (args.avg_bits is None) == (args.max_loss is None):
        raise ValueError("expected either --avg-bits or --max-loss")
    if args.kv:
        _allocate_kv(args)
        return None
    args.model = model_path(str(args.model))
    out: Path = args.out or args.model.with_suffix(".allocation.json")
    check_target(args, out)
    from edgemoe.lab.bits.allocate import METHODS, Settings, allocate
    from edgemoe.quant import Calibration

    if args.method not in METHODS:
        known = ", ".join([*METHODS, "search"])
        raise ValueError(f"--method: expected one of {known}, got {args.method}")
    settings = Settings(
        average_bits=args.avg_bits, max_loss=args.max_loss, levels=args.levels,
        exponents=args.exponents or (1, 1, 2), per_layer=args.per_layer, protect=not args.no_protect,
        seed=args.seed or 0,
    )  # fmt: skip
    calibration = None if args.calibration is None else Calibration(args.calibration)
    if calibration is not None and calibration.note:
        note(f"{_PROG}: {calibration.note}")
    measured = windows(args) if args.method == "expertwise" else None
    with Progress("measuring", unit="expert") as progress:
        found = allocate(
            args.model, args.method, settings,
            calibration=calibration, windows=measured, progress=progress,
        )  # fmt: skip
    keep(args, out, "allocation", found.to_json())
    show(found)
    note(f"{_PROG}: {f'stored in {args.model}' if args.store else f'wrote {out}'}")
    return None


def _allocate_kv(args: argparse.Namespace) -> None:
    for name in (
        "method",
        "per_layer",
        "no_protect",
        "overwrite",
        "calibration",
        "levels",
        "exponents",
        "seed",
        "bytes",
        "context",
        "generations",
        "held_out",
        "minutes",
        "ram",
        "threads",
    ):
        if getattr(args, name) is not None and getattr(args, name) is not False:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: is for experts, not for --kv")
    args.model = model_path(str(args.model))
    out: Path = args.out or args.model.with_suffix(".kv.json")
    check_target(args, out)
    from edgemoe.lab.bits.kv_types import choose_kv_types

    measured = windows(args)
    with Progress("measuring", unit="choice") as progress:
        found = choose_kv_types(
            args.model, measured,
            average_bits=args.avg_bits, max_loss=args.max_loss, progress=progress,
        )  # fmt: skip
    keep(args, out, "kv_types", found.table.to_json())
    _show_kv(found)
    note(f"{_PROG}: {f'stored in {args.model}' if args.store else f'wrote {out}'}")


def _show_kv(found: Found) -> None:
    """Prints each layer's types, and what they cost."""
    say("| layer | keys | values |", "|---|---|---|")
    for layer, row in enumerate(found.table.layers):
        say(f"| {layer} | {' | '.join(row or ('–', '–'))} |")
    say(
        "",
        f"{found.average_bits:.2f} bits per number with scales; KL from float16 {found.loss:.5f} "
        f"(the sum of each alone: {found.expected:.5f})",
    )


def _exponents(text: str) -> tuple[float, float, float]:
    try:
        alpha, beta, gamma = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected three numbers like 1,1.5,1, got {text!r}"
        ) from None
    return alpha, beta, gamma


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        description="Decide how many bits each routed expert of a model, or its keys and values, run at.",
        epilog=_EPILOG,
    )
    # fmt: off
    parser.add_argument("model", type=Path, metavar="MODEL.moe", help="a converted file")
    parser.add_argument("--avg-bits", type=float, metavar="N",
                        help="the most bits per expert on average; --kv: per number, its share of the scales included")
    parser.add_argument("--kv", action="store_true",
                        help="choose the types of each layer's keys and values instead of experts' bits")
    parser.add_argument("--method", metavar="METHOD", help=f"how to choose bits, see below (default: {_METHOD})")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="a file of edgemoe calibrate")
    parser.add_argument("-o", "--out", type=Path, metavar="OUT.json",
                        help="the file to write (default: MODEL.allocation.json; --kv: MODEL.kv.json)")
    parser.add_argument("--store", action="store_true",
                        help="write the result into the model file instead, where --bits auto finds it")
    parser.add_argument("--levels", type=levels, metavar="N,…",
                        help="bits to choose from (default: error: all of the file; pmq: its lowest three; "
                        "others: the two next to the average)")
    parser.add_argument("--exponents", type=_exponents, metavar="A,B,C",
                        help="pmq: exponents of frequency, gate weight and error (default: 1,1,2 as published; "
                        "its code computes 1,1.5,1)")
    parser.add_argument("--per-layer", action="store_true",
                        help="give every layer the same average, as published for pmq; not for first-blocks")
    parser.add_argument("--no-protect", action="store_true",
                        help="do not give Super Experts the highest of these bits")
    parser.add_argument("--seed", type=int, metavar="N", help="random, search: the seed (default: 0)")
    parser.add_argument("--bytes", type=ram_size, metavar="SIZE",
                        help="search: the most bytes for experts, other matrices, and keys and values together")
    parser.add_argument("--context", type=whole(1), metavar="N",
                        help="search: tokens whose keys and values count (default: 4096, or the model's most)")
    parser.add_argument("--generations", type=whole(0), metavar="N",
                        help="search: rounds of 16 offspring (default: 40)")
    parser.add_argument("--minutes", type=whole(1), metavar="N",
                        help="search: stop after so many minutes, between two rounds of measurements")
    parser.add_argument("--ram", type=ram_size, metavar="SIZE",
                        help="search: memory for the whole process (default: what is free, less a margin)")
    parser.add_argument("-t", "--threads", type=whole(1), metavar="N", help="search: threads (default: all cores)")
    parser.add_argument("--held-out", type=Path, metavar="FILE",
                        help="search: another text, to measure the result on (default: the package's)")
    parser.add_argument("--overwrite", action="store_true", help="search: start anew instead of continuing")
    parser.add_argument("--max-loss", type=float, metavar="X",
                        help="expertwise, --kv, instead of --avg-bits: most mean KL divergence from the highest level")
    parser.add_argument("--text", type=Path, metavar="FILE",
                        help="expertwise, search, --kv: the text to measure loss on (default: the package's)")
    parser.add_argument("--window", type=int, metavar="N",
                        help="expertwise, search, --kv: tokens in each piece of the text (default: 256)")
    parser.add_argument("--chunks", type=int, metavar="N",
                        help="expertwise, search, --kv: number of pieces (default: 8; search: 16)")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    # fmt: on
    return parser

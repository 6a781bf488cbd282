"""`edgemoe allocate`: decides offline how many bits each routed expert, or each layer's keys and values, run at."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.console import check_output, decode_text, note, run_command, say
from edgemoe.cli.names import model_path
from edgemoe.cli.parser import Parser
from edgemoe.cli.progress import Progress
from edgemoe.cli.values import levels
from edgemoe.file.whole import write_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgemoe.lab.bits.kv_types import Found
    from edgemoe.quant import Allocation

__all__ = ["main"]

_PROG = "edgemoe allocate"

_ONLY_FOR = {
    "max_loss": "expertwise",
    "text": "expertwise",
    "window": "expertwise",
    "chunks": "expertwise",
    "exponents": "pmq",
    "seed": "random",
}

_EPILOG = """\
METHOD is one of:
  error        least change of the layers' outputs, as calibrated (the default)
  pmq          MC-MoE's integer programme over frequency, gates and errors
  expertwise   EdgeMoE's search with measured loss; takes a run per expert
  frequency    QuantMoE-Bench: often chosen experts get more
  first-blocks, outlier   its other rules
  random       the control

With --kv the types of keys and values of each layer are chosen instead: each is
measured alone, and those that cost least are taken, as in KVTuner. Used by
`edgemoe-run MODEL.moe -ctk auto -ctv auto --kv-table OUT.json`, or without
--kv-table if it was stored in the model file.

The result is used by `edgemoe-run MODEL.moe --bits auto --allocation OUT.json`,
or without --allocation if it was stored in the model file; and by
`edgemoe convert SOURCE SMALL.moe --allocation OUT.json`, which stores no more.
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
    )


def _allocate(args: argparse.Namespace) -> None:
    if (args.avg_bits is None) == (args.max_loss is None):
        raise ValueError("expected either --avg-bits or --max-loss")
    if args.store and args.out is not None:
        raise ValueError("expected either --store or -o")
    if args.kv:
        _allocate_kv(args)
        return
    for name, method in _ONLY_FOR.items():
        if getattr(args, name) is not None and args.method != method:
            raise ValueError(f"--{name.replace('_', '-')}: for --method {method} only")
    args.model = model_path(str(args.model))
    out: Path = args.out or args.model.with_suffix(".allocation.json")
    _check_target(args, out)
    from edgemoe.lab.bits.allocate import Settings, allocate
    from edgemoe.quant import Calibration

    settings = Settings(
        average_bits=args.avg_bits, max_loss=args.max_loss, levels=args.levels,
        exponents=args.exponents or (1, 1, 2), per_layer=args.per_layer, protect=not args.no_protect,
        seed=args.seed or 0,
    )  # fmt: skip
    calibration = None if args.calibration is None else Calibration(args.calibration)
    if calibration is not None and calibration.note:
        note(f"{_PROG}: {calibration.note}")
    windows = _windows(args) if args.method == "expertwise" else None
    with Progress("measuring", unit="expert") as progress:
        found = allocate(
            args.model, args.method, settings,
            calibration=calibration, windows=windows, progress=progress,
        )  # fmt: skip
    _keep(args, out, "allocation", found.to_json())
    _show(found)
    note(f"{_PROG}: {f'stored in {args.model}' if args.store else f'wrote {out}'}")


def _allocate_kv(args: argparse.Namespace) -> None:
    for name in ("calibration", "levels", "exponents", "seed"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: is for experts, not for --kv")
    args.model = model_path(str(args.model))
    out: Path = args.out or args.model.with_suffix(".kv.json")
    _check_target(args, out)
    from edgemoe.lab.bits.kv_types import choose_kv_types

    windows = _windows(args)
    with Progress("measuring", unit="choice") as progress:
        found = choose_kv_types(
            args.model, windows,
            average_bits=args.avg_bits, max_loss=args.max_loss, progress=progress,
        )  # fmt: skip
    _keep(args, out, "kv_types", found.table.to_json())
    _show_kv(found)
    note(f"{_PROG}: {f'stored in {args.model}' if args.store else f'wrote {out}'}")


def _check_target(args: argparse.Namespace, out: Path) -> None:
    """Checks that the result can be written, before hours are spent."""
    if not args.store:
        check_output(out, args.model, args.calibration, args.text)
    elif args.model.exists() and not os.access(args.model, os.W_OK):
        raise PermissionError(f"--store: {args.model} cannot be written")


def _windows(args: argparse.Namespace) -> NDArray[np.int32]:
    """Returns the tokens that losses are measured on."""
    from edgemoe.file.format import open_moe
    from edgemoe.lab.bits.calibrate import default_text, windows_of

    text = default_text() if args.text is None else decode_text(args.text.read_bytes(), args.text)
    return windows_of(
        open_moe(args.model), text,
        window=256 if args.window is None else args.window,
        count=8 if args.chunks is None else args.chunks,
    )  # fmt: skip


def _keep(args: argparse.Namespace, out: Path, name: str, content: bytes) -> None:
    """Writes a result into the model file, as a section, or to a file of its own."""
    if args.store:
        from edgemoe.file.append import add_sections

        add_sections(args.model, {name: content})
    else:
        write_whole(out, content)


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


def _show(found: Allocation) -> None:
    """Prints how many experts of each layer got which bits."""
    given = sorted(set(found.bits.reshape(-1).tolist()))
    say(
        "| layer | average |" + "".join(f" {b} bits |" for b in given),
        "|---|---|" + "---|" * len(given),
    )
    for layer, row in zip(found.layers, found.bits, strict=True):
        counts = "".join(f" {int((row == b).sum())} |" for b in given)
        say(f"| {layer} | {row.mean():.2f} |{counts}")
    counts = "".join(f" {int((found.bits == b).sum())} |" for b in given)
    say(f"| all | {found.average:.2f} |{counts}")
    if found.protected:
        which = ", ".join(f"{layer}.{expert}" for layer, expert in found.protected)
        say("", f"Super Experts (layer.expert), protected: {which}")


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
    parser.add_argument("model", type=Path, metavar="MODEL.moe")
    parser.add_argument("--avg-bits", type=float, metavar="N",
                        help="the mean over all experts, at most; --kv: of a number, with its share of the scales")
    parser.add_argument("--kv", action="store_true",
                        help="of keys and values: a type for each layer's keys and for its values")
    parser.add_argument("--method", default="error", metavar="METHOD", help="(default: %(default)s)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="of edgemoe calibrate")
    parser.add_argument("-o", "--out", type=Path, metavar="OUT.json",
                        help="(default: MODEL.allocation.json)")
    parser.add_argument("--store", action="store_true",
                        help="write it into the model file instead, where --bits auto finds it")
    parser.add_argument("--levels", type=levels, metavar="N,…",
                        help="bits that may be given (default: the file's; pmq: the lowest three; "
                        "else the two next to the average)")
    parser.add_argument("--exponents", type=_exponents, metavar="A,B,C",
                        help="pmq: of frequency, gate weight and error (default: 1,1,2 as published; "
                        "its code computes 1,1.5,1)")
    parser.add_argument("--per-layer", action="store_true",
                        help="the same average in every layer, as published for pmq")
    parser.add_argument("--no-protect", action="store_true",
                        help="do not give Super Experts the highest of the levels")
    parser.add_argument("--seed", type=int, metavar="N", help="of random (default: 0)")
    parser.add_argument("--max-loss", type=float, metavar="X",
                        help="expertwise or --kv, instead of --avg-bits: most mean KL divergence to the highest level")
    parser.add_argument("--text", type=Path, metavar="FILE",
                        help="expertwise, --kv: what loss is measured on (default: the package's calibration text)")
    parser.add_argument("--window", type=int, metavar="N",
                        help="expertwise, --kv: tokens of each piece of it (default: 256)")
    parser.add_argument("--chunks", type=int, metavar="N",
                        help="expertwise, --kv: number of pieces (default: 8)")
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks of errors")
    # fmt: on
    return parser

"""`edgemoe train-bit-router`: trains the routers that choose each expert's bits per token, for the scheduler d2moe."""

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
from edgemoe.cli.values import ram_size, wholes

if TYPE_CHECKING:
    from edgemoe.lab.bits.train_bit_router import Row

__all__ = ["main"]

_PROG = "edgemoe train-bit-router"
_STEPS = 200
_ROWS = 10  # of the table that is printed

_EPILOG = """\
These are D2MoE's routers (arXiv 2504.15299): one small linear layer per expert;
nothing else is trained. Needs torch: pip install "edgemoe[train]". The model's
weights are held in memory as float32, once per level.

With --store the routers become part of the model file, and d2moe uses them:

    edgemoe-run MODEL.moe --scheduler d2moe

Without --store they stay in OUT, which also holds the state of the training:
the same command continues it, after Ctrl-C too, with more --steps, or --store.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments after `edgemoe train-bit-router`; None for those of the process.

    Returns:
        The exit code: 0, 1 for an error (one line on stderr), 2 for wrong usage, 130 for Ctrl-C.
    """
    args = _parser().parse_args(argv)
    return run_command(
        _PROG,
        lambda: _train(args),
        verbose=args.verbose,
        blames_arguments=True,
        interrupted=lambda: _interrupted(args),
    )


def _interrupted(args: argparse.Namespace) -> str:
    is_saved = _out(args).exists()
    what = f"the same command goes on from {_out(args)}" if is_saved else "nothing was done yet"
    return f"interrupted; {what}"


def _train(args: argparse.Namespace) -> None:
    args.model = model_path(str(args.model))
    out = _out(args)
    check_output(out, args.model, args.text)
    if args.store and args.model.exists() and not os.access(args.model, os.W_OK):
        raise PermissionError(f"--store: {args.model} cannot be written")
    from edgemoe.lab.bits.calibrate import default_text
    from edgemoe.lab.bits.train_bit_router import RouterSettings, train_bit_router

    settings = RouterSettings(
        levels=args.levels, average_bits=args.avg_bits, alpha=args.alpha,
        capacities=args.capacities, window=args.window, batch=args.batch, rate=args.rate,
        seed=args.seed,
    )  # fmt: skip
    if args.text is None:
        note("# no --text: the package's own, from Moby-Dick and State of the Union")
    text = default_text() if args.text is None else decode_text(args.text.read_bytes(), args.text)
    with Progress("training", unit="step") as progress:
        routers, rows = train_bit_router(
            args.model, text, out, settings, steps=args.steps, count=args.chunks, ram=args.ram,
            threads=args.threads, is_new=args.overwrite, progress=progress,
        )  # fmt: skip
    _show(rows)
    if not args.store:
        note(f"{_PROG}: wrote {out}; the same command with --store lets d2moe use it")
        return
    from edgemoe.file.append import add_sections

    add_sections(args.model, {"bit-routers": routers.to_bytes()})
    if args.out is None:
        out.unlink()
    note(f"{_PROG}: stored in {args.model}")


def _show(rows: Sequence[Row]) -> None:
    """Prints about ten rows of the training's progress; nothing where there are none."""
    if not rows:
        return
    say("| steps | KL | average bits | dropped | alpha |", "|---|---|---|---|---|")
    every = -(-len(rows) // _ROWS) or 1
    for row in rows[::-1][::every][::-1]:  # the last row included
        say(
            f"| {row.step} | {row.divergence:.6f} | {row.bits:.2f} "
            f"| {100 * row.dropped:.1f}% | {row.alpha:.2e} |"
        )


def _out(args: argparse.Namespace) -> Path:
    out: Path = args.out or args.model.with_suffix(".bit-routers")
    return out


def _levels(text: str) -> tuple[int, ...]:
    return tuple(wholes(0)(text))


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(c) for c in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected shares like 0.3,0.4,0.3, got {text!r}"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        description="Train the routers that choose each expert's bits per token, for the scheduler d2moe.",
        epilog=_EPILOG,
    )
    # fmt: off
    parser.add_argument("model", type=Path, metavar="MODEL.moe", help="a converted file")
    parser.add_argument("--text", type=Path, metavar="FILE",
                        help="the text to train on (default: the package's calibration text)")
    parser.add_argument("--levels", type=_levels, default=(2, 3, 4), metavar="N,…",
                        help="bits to choose from (default: 2,3,4); with 0 in front, an expert may be left out")
    parser.add_argument("--avg-bits", type=float, metavar="N",
                        help="the average to reach, by adjusting alpha (default: the middle of the levels)")
    parser.add_argument("--alpha", type=float, metavar="A",
                        help="instead of --avg-bits: a fixed price per bit, in nats, as published")
    parser.add_argument("--capacities", type=_shares, metavar="C,…",
                        help="share of an expert's tokens that may use each level while training; what exceeds "
                        "it is dropped (published: 0.3,0.4,0.3; default: no limit)")
    parser.add_argument("--steps", type=int, default=_STEPS, metavar="N", help="training steps (default: %(default)s)")
    parser.add_argument("--window", type=int, default=256, metavar="N",
                        help="tokens in each piece of the text (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, metavar="N",
                        help="pieces per step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.003, metavar="N",
                        help="learning rate of Adam (default: %(default)s)")
    parser.add_argument("--chunks", type=int, metavar="N", help="most pieces to use (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("-o", "--out", type=Path, metavar="OUT",
                        help="where the training is kept (default: MODEL.bit-routers, removed once stored)")
    parser.add_argument("--store", action="store_true", help="write the routers into the model file at the end")
    parser.add_argument("--overwrite", action="store_true", help="start anew if OUT exists")
    parser.add_argument("--ram", type=ram_size, metavar="SIZE",
                        help="memory for the whole process (default: what is free)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: torch's own)")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    # fmt: on
    return parser

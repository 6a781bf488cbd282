"""`edgemoe calibrate`: collects statistics of the inputs of a model's matrices, for quantisation and allocation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from edgemoe.cli.console import check_output, decode_text, note, run_command
from edgemoe.cli.names import model_path
from edgemoe.cli.parser import Parser
from edgemoe.cli.progress import Progress
from edgemoe.cli.values import ram_size
from edgemoe.errors import size_text

__all__ = ["main"]

_PROG = "edgemoe calibrate"
_NAMED = 8  # experts with few tokens that are named; the others are counted

_EPILOG = """\
OUT.calib is read by `edgemoe convert --calibration` and `edgemoe allocate`.
Take a text like those that the model will be used for, but not one that you
measure its quality on. The whole text goes through one layer before the next:
an interrupted run leaves OUT.calib.part and OUT.calib.part.state, and the same
command continues after the last finished layer.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments after `edgemoe calibrate`; None for those of the process.

    Returns:
        The exit code: 0, 1 for an error (one line on stderr), 2 for wrong usage, 130 for Ctrl-C.
    """
    args = _parser().parse_args(argv)
    return run_command(
        _PROG,
        lambda: _calibrate(args),
        verbose=args.verbose,
        blames_arguments=True,
        interrupted=lambda: _interrupted(args),
    )


def _interrupted(args: argparse.Namespace) -> str:
    from edgemoe.lab.bits.calibrate import is_begun

    is_saved = args.imatrix is None and is_begun(_out(args))
    what = (
        "the same command goes on behind the last layer that was done"
        if is_saved
        else "no layer was done yet, so that nothing was saved"
    )
    return f"interrupted; {what}"


def _calibrate(args: argparse.Namespace) -> None:
    args.model = model_path(str(args.model))
    out = _out(args)
    if out.exists() and not args.overwrite:
        raise FileExistsError(f"{out}: exists; --overwrite replaces it")
    check_output(out, args.model, args.text, args.more, args.imatrix)
    if args.full and args.layers:
        raise ValueError("--layers: not together with --full, which has more")
    if args.imatrix is not None:
        for name in ("text", "more", "full", "layers", "window", "chunks", "ram", "threads"):
            if getattr(args, name) not in (None, False):
                raise ValueError(f"--{name}: not together with --imatrix, which is read as it is")
        from edgemoe.convert.imatrix import convert_imatrix

        missing = convert_imatrix(args.model, args.imatrix, out)
        if missing:
            note(f"{_PROG}: {args.imatrix} knows nothing of {', '.join(missing)}")
    else:
        from edgemoe.lab.bits.calibrate import ENOUGH, WINDOW, calibrate, default_text

        if args.text is None:
            note("# no --text: the package's own, from Moby-Dick and State of the Union")
        text = (
            default_text() if args.text is None else decode_text(args.text.read_bytes(), args.text)
        )
        more = None if args.more is None else decode_text(args.more.read_bytes(), args.more)
        with (
            Progress("counting", unit="window") as counting,
            Progress("calibrating", unit="window") as progress,
        ):

            def say(text: str) -> None:
                counting.close()  # otherwise its bar would move below the other one
                note(f"# {text}")

            starved = calibrate(
                args.model, text, out, full=args.full, layers=args.layers,
                window=WINDOW if args.window is None else args.window, count=args.chunks,
                more=more, ram=args.ram, threads=args.threads, counting=counting, progress=progress,
                say=say,
            )  # fmt: skip
        if starved:
            some = ", ".join(f"{layer}.{expert}" for layer, expert in starved[:_NAMED])
            also = f" and {len(starved) - _NAMED} others" if len(starved) > _NAMED else ""
            note(
                f"# fewer than {ENOUGH} tokens for expert {some}{also} (layer.expert); --more goes on with more text"
            )
    note(f"{_PROG}: wrote {out}: {size_text(out.stat().st_size)}")


def _out(args: argparse.Namespace) -> Path:
    out: Path = args.out or args.model.with_suffix(".calib")
    return out


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        description="Run a text through a model and collect statistics of the inputs of every matrix.",
        epilog=_EPILOG,
    )
    parser.add_argument("model", type=Path, metavar="MODEL.moe", help="a converted file")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="the text to run (default: the package's own)"
    )
    parser.add_argument("-o", "--out", type=Path, metavar="OUT.calib",
                        help="the file to make (default: MODEL.calib)")  # fmt: skip
    parser.add_argument("--full", action="store_true",
                        help="also sum the products of all pairs of inputs, for error compensation: gigabytes for a "
                        "large model; the size is shown at the start")  # fmt: skip
    parser.add_argument("--layers", action="store_true",
                        help="like --full, but with one matrix for all experts of a layer, and none for w_down: much "
                        "less to sum, and most of the gain")  # fmt: skip
    parser.add_argument("--window", type=int, metavar="N",
                        help="tokens in each piece of the text (default: 512)")  # fmt: skip
    parser.add_argument("--chunks", type=int, metavar="N", help="most pieces to run (default: all)")
    parser.add_argument("--more", type=Path, metavar="FILE",
                        help="more text, which is run until nearly all experts have seen 128 tokens")  # fmt: skip
    parser.add_argument("--imatrix", type=Path, metavar="FILE",
                        help="take the sums from an imatrix of llama.cpp (.dat or .gguf) instead")  # fmt: skip
    parser.add_argument(
        "--ram",
        type=ram_size,
        metavar="SIZE",
        help="memory for the whole process (default: what is free)",
    )
    parser.add_argument(
        "-t", "--threads", type=int, metavar="N", help="threads (default: all cores)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.calib if it exists")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser

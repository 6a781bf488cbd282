"""`edgemoe stand-ins`: fits small maps that take the place of experts that lossy schedulers leave out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from edgemoe.cli.console import decode_text, note, run_command
from edgemoe.cli.names import model_path
from edgemoe.cli.parser import Parser
from edgemoe.cli.progress import Progress
from edgemoe.cli.values import ram_size
from edgemoe.errors import size_text

__all__ = ["main"]

_PROG = "edgemoe stand-ins"
_RANK = 4
_WINDOW = 256

_EPILOG = """\
For every expert, the affine map of rank N that is nearest to it on the text is
stored in the model file. It stays in memory wherever experts may be left out:

    edgemoe-run MODEL.moe --set top_p=0.9
    edgemoe-run MODEL.moe --scheduler hobbit
    edgemoe-run MODEL.moe --set stand_in_below=0.1    never wait for weak experts

--set stand_ins=none runs without the maps. Running this command again replaces
them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments after `edgemoe stand-ins`; None for those of the process.

    Returns:
        The exit code: 0, 1 for an error (one line on stderr), 2 for wrong usage, 130 for Ctrl-C.
    """
    args = _parser().parse_args(argv)
    return run_command(_PROG, lambda: _fit(args), verbose=args.verbose, blames_arguments=True)


def _fit(args: argparse.Namespace) -> None:
    model = model_path(str(args.model))
    if model.exists() and not os.access(model, os.W_OK):
        raise PermissionError(f"{model}: cannot be written")
    from edgemoe.file.append import add_sections
    from edgemoe.file.reader import open_moe
    from edgemoe.lab.bits.calibrate import default_text, windows_of
    from edgemoe.lab.bits.stand_ins import fit_stand_ins

    if args.text is None:
        note("# no --text: the package's own, from Moby-Dick and State of the Union")
    text = default_text() if args.text is None else decode_text(args.text.read_bytes(), args.text)
    windows = windows_of(open_moe(model), text, window=args.window, count=args.chunks)
    with Progress("fitting", unit="window") as progress:
        found = fit_stand_ins(
            model, windows, args.rank, ram=args.ram, threads=args.threads, progress=progress
        )
    content = found.to_bytes()
    add_sections(model, {"stand-ins": content})
    note(
        f"{_PROG}: stored in {model}: {size_text(len(content))}, resident where experts may be left out"
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        description="Fit small maps that take the place of experts that lossy schedulers leave out.",
        epilog=_EPILOG,
    )
    # fmt: off
    parser.add_argument("model", type=Path, metavar="MODEL.moe", help="a converted file")
    parser.add_argument("--rank", type=int, default=_RANK, metavar="N",
                        help="rank of each map: it takes 8 N bytes per column of the model (default: %(default)s)")
    parser.add_argument("--text", type=Path, metavar="FILE",
                        help="the text to fit to (default: the package's calibration text)")
    parser.add_argument("--window", type=int, default=_WINDOW, metavar="N",
                        help="tokens in each piece of the text (default: %(default)s)")
    parser.add_argument("--chunks", type=int, metavar="N", help="most pieces to use (default: all)")
    parser.add_argument("--ram", type=ram_size, metavar="SIZE",
                        help="memory for the whole process (default: what is free)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: all cores)")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    # fmt: on
    return parser

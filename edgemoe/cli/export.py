"""`edgemoe export`: writes a .moe file as a checkpoint that other programs load."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from edgemoe.cli.console import note, run_command
from edgemoe.cli.names import model_path
from edgemoe.cli.parser import Parser
from edgemoe.cli.progress import Progress
from edgemoe.errors import size_text

__all__ = ["main"]

_PROG = "edgemoe export"

_EPILOG = """\
OUT becomes a Hugging Face directory in bfloat16, with config.json and the tokenizer,
which transformers, vLLM and SGLang load: for the day a model outgrows one machine.
An OUT that ends with .gguf becomes a file for llama.cpp, in Q8_0 or F16.
The weights are those of the chosen level, as edgemoe computes with them except for
the rounding to the new type: what quantisation lost stays lost. An embedding that is
also the head has that level too, while edgemoe reads its rows at the highest level.

Families whose tensors the conversion changed for good are refused by name.
"""


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
    return run_command(_PROG, lambda: _run(args), verbose=args.verbose)


def _run(args: argparse.Namespace) -> int:
    from edgemoe.file.reader import open_moe

    moe = open_moe(model_path(str(args.model)))
    levels = {"bits": args.bits, "dense_bits": args.dense_bits}
    is_gguf = args.out.suffix == ".gguf"
    if args.type is not None and not is_gguf:
        raise ValueError("--type: is of GGUF files, whose names end with .gguf")
    with Progress(f"exporting {moe.path.name}", unit="B") as progress:
        if is_gguf:
            from edgemoe.convert.export.gguf_file import export_gguf

            export_gguf(moe, args.out, kind=args.type or "Q8_0", progress=progress, **levels)
        else:
            from edgemoe.convert.export.hf import export_hf

            export_hf(moe, args.out, progress=progress, **levels)
    files = [args.out] if is_gguf else args.out.iterdir()
    size = sum(file.stat().st_size for file in files)
    note(f"{_PROG}: wrote {args.out}: {size_text(size)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        description="Write a .moe file as a checkpoint that other programs load.",
        epilog=_EPILOG,
    )
    parser.add_argument("model", type=Path, metavar="FILE.moe", help="a converted file")
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory or GGUF file to make")
    parser.add_argument("--bits", type=int, metavar="N",
                        help="bits of the experts, a level of the file (default: the highest)")  # fmt: skip
    parser.add_argument(
        "--dense-bits", type=int, metavar="N", help="bits of everything else (default: the highest)"
    )
    parser.add_argument(
        "--type", choices=("Q8_0", "F16"), help="type of a GGUF file's matrices (default: Q8_0)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser

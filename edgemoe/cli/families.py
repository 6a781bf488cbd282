"""`edgemoe families`: lists which checkpoints can be converted, from the same tables that the conversion uses."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from edgemoe.cli.console import run_command, say, say_json
from edgemoe.cli.parser import Parser

__all__ = ["main"]

_PROG = "edgemoe families"

_EPILOG = """\
Checkpoints are read from Hugging Face directories with safetensors, in float32,
float16 or bfloat16 or quantised as listed. Families with a GGUF architecture are
read from GGUF files too: all types that the package gguf decodes, split files by
their first part, but no big-endian files.
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
    from edgemoe.convert.supported import supported

    found = supported()
    if args.json:
        say_json(found)
    else:
        say(*_lines(found))
    return 0


def _lines(found: dict[str, Any]) -> list[str]:
    rows = [("models", "model_type", "GGUF architecture")]
    rows += [
        (f["models"], ", ".join(f["model_types"]), ", ".join(f["gguf"]) or "–")
        for f in found["families"]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
    dense = ", ".join(found["dense"]["gguf"])
    lines += [
        "",
        f"With --carve, dense models: model_type {', '.join(found['dense']['model_types'])}, GGUF {dense}",
        "",
        "quantised safetensors, by the quant_method of config.json",
    ]
    lines += [f"  {name:<20} {title}" for name, title in found["quantised"].items()]
    lines += ["", "types of GGUF files"]
    types = found["gguf_types"]
    lines.append(
        "  "
        + (", ".join(types) if types else "needs the package gguf: pip install 'edgemoe[demo]'")
    )
    lines += ["", "tokenizers of GGUF files"]
    lines += [
        f"  {kind}" + (f": {', '.join(names)}" if names else "")
        for kind, names in found["gguf_tokenizers"].items()
    ]
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG, description="List the checkpoints that can be converted.", epilog=_EPILOG
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser

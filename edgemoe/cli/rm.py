"""`edgemoe rm`: removes models that are kept here, and what was left unfinished."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from edgemoe import library
from edgemoe.cli.console import ask, is_terminal, note, run_command
from edgemoe.cli.names import kept_model
from edgemoe.cli.parser import Parser
from edgemoe.errors import size_text

__all__ = ["main"]

_PROG = "edgemoe rm"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0; 1 for an error, which is one line on stderr, or where the answer was no.
    """
    args = _parser().parse_args(argv)
    return run_command(_PROG, lambda: _run(args), verbose=args.verbose)


def _run(args: argparse.Namespace) -> int:
    found = [(name, paths) for text in args.names for name, paths in [_meant(text)]]
    size = 0
    for name, paths in found:
        taken = sum(map(library.disk_bytes, paths))
        size += taken
        note(f"# {name}: {size_text(taken)}, {', '.join(map(str, paths))}")
    if not args.yes:
        if not is_terminal(sys.stdin):
            raise ValueError("expected --yes where nobody can be asked")
        ask(f"remove {'this' if len(found) == 1 else 'these'} and free {size_text(size)}? [y/N] ")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            note("# nothing was removed")
            return 1
    for _, paths in found:
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    note(f"# freed {size_text(size)}")
    return 0


def _meant(text: str) -> tuple[str, list[Path]]:
    """Returns the name of a model, and its files with those that were left unfinished under that name."""
    path = kept_model(text)
    named = {model.path: model.name for model in library.models()}
    name = text if path is None else named[path]
    paths = [] if path is None else [path]
    paths += [p for left in library.unfinished() if left.name == name for p in left.paths]
    if not paths:
        if Path(text).exists():
            raise ValueError(
                f"{text}: is none of the models of edgemoe list; remove your own files by yourself"
            )
        meant = library.near(text)
        hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
        raise FileNotFoundError(f"{text}: no such model{hint}")
    return name, paths


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG, description="Remove models that are here, after showing what that frees."
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="a name of edgemoe list")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

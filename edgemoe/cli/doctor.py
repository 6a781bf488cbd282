"""`edgemoe doctor`: looks at this machine, this install and the models, and says what to repair and how."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.console import check_output, note, run_command, say, say_json
from edgemoe.cli.names import model_path
from edgemoe.cli.options import unknown_variables
from edgemoe.cli.parser import Parser
from edgemoe.cli.progress import Progress

if TYPE_CHECKING:
    from edgemoe.doctor import Finding

__all__ = ["main"]

_PROG = "edgemoe doctor"

_EPILOG = """\
Each line is ok, a note or a problem; the line below says what repairs it. Nothing is
changed, and nothing is sent anywhere. For a bug report, --bundle writes the same
without the names of your folders and files, prompts and keys.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0; 1 where there is a problem, or for an error, which is one line on stderr.
    """
    args = _parser().parse_args(argv)
    return run_command(_PROG, lambda: _run(args), verbose=args.verbose)


def _run(args: argparse.Namespace) -> int:
    from edgemoe.doctor import findings

    check_output(args.bundle)
    model = None if args.model is None else model_path(args.model)
    with Progress("verifying", unit="B") as progress:
        found = list(
            findings(
                model, unknown_variables=unknown_variables(), verify=args.verify, progress=progress
            )
        )
    if args.bundle is not None:
        _bundle(args.bundle, found)
        note(f"# wrote {args.bundle}: please read it before you send it")
    elif args.json:
        say_json([dataclasses.asdict(f) for f in found])
    else:
        say(*_lines(found))
    return int(any(f.kind == "problem" for f in found))


def _lines(found: Sequence[Finding]) -> list[str]:
    lines = []
    for finding in found:
        lines.append(f"{finding.kind:<8} {finding.subject:<12} {finding.text}")
        if finding.cure:
            lines.append(f"{'':<21} → {finding.cure}")
    count = sum(f.kind == "problem" for f in found)
    lines += ["", f"{count or 'no'} problem{'s' * (count != 1)}"]
    return lines


def _bundle(path: Path, found: Sequence[Finding]) -> None:
    from edgemoe.doctor import private
    from edgemoe.file.whole import write_whole

    numbers: dict[str, int] = {}
    kept = []
    for finding in found:
        text, cure = finding.text, finding.cure
        if finding.subject == "model":  # its name may be private
            name = text.partition(":")[0].split(" is unfinished")[0]
            called = f"model {numbers.setdefault(name, len(numbers) + 1)}"
            text, cure = text.replace(name, called), cure.replace(name, called)
        kept.append(dataclasses.replace(finding, text=private(text), cure=cure))
    write_whole(path, ("\n".join(_lines(kept)) + "\n").encode())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        description="Check this machine, the installation and the models.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a model to check, besides those of edgemoe list")
    add("--verify", action="store_true", help="check all checksums of all models, not a sample")
    add("--json", action="store_true", help="print one JSON list instead")
    add("--bundle", type=Path, metavar="FILE", help="write it for a report, without private data")
    add("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

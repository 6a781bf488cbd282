"""`edgemoe demo`: builds the demo model, once, and says where it is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from edgemoe.cli.console import note, run_command
from edgemoe.cli.parser import Parser
from edgemoe.cli.progress import Progress

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0; 1 for an error, which is one line on stderr; 130 after Ctrl-C.
    """
    Parser(
        prog="edgemoe demo",
        description="Download and build the demo model, once. `edgemoe-run` without a model does this by itself.",
    ).parse_args(argv)
    return run_command("edgemoe demo", _build)


def _build() -> None:
    from edgemoe.convert.demo import demo_model

    bars: dict[str, Progress] = {}
    with contextlib.ExitStack() as stack:

        def progress(task: str, done: int, total: int) -> None:
            if task not in bars:
                bars[task] = stack.enter_context(Progress(task, unit="B"))
            bars[task](done, total)

        path = demo_model(say=lambda text: note(f"# {text}"), progress=progress)
    note(f"# the demo model is {path}")


if __name__ == "__main__":
    sys.exit(main())

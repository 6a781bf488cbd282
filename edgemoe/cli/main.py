"""`edgemoe`: picks a command and hands the rest of the arguments to it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

import edgemoe
from edgemoe.cli.console import note, replace_unwritable, run_command, say

__all__ = ["COMMANDS", "main"]

COMMANDS: Mapping[str, tuple[str, str]] = {
    "allocate": ("edgemoe.cli.allocate", "decide how many bits each expert runs at"),
    "bench": ("edgemoe.cli.bench", "measure how fast a model runs here"),
    "calibrate": ("edgemoe.cli.calibrate", "sum what flows into a model's matrices"),
    "convert": ("edgemoe.cli.convert", "make a .moe file from a checkpoint"),
    "demo": ("edgemoe.cli.demo", "build the demo model"),
    "inspect": ("edgemoe.cli.inspect", "say what a .moe file holds, and check it"),
    "profile": ("edgemoe.cli.profile.command", "record, judge and replay how a model routes"),
    "quality": ("edgemoe.cli.quality", "measure what levels and schedulers cost in quality"),
    "run": ("edgemoe.cli.run", "chat with a model; also installed as edgemoe-run"),
    "schedulers": ("edgemoe.cli.scheduling", "tell what may decide, and its options"),
    "serve": ("edgemoe.cli.serve", "answer programs: OpenAI's, Anthropic's and llama.cpp's routes"),
    "train-bit-router": (
        "edgemoe.cli.train_bit_router",
        "train who chooses each expert's bits, for the scheduler d2moe",
    ),
}
"""What each command is: the module whose `main(argv)` runs it, and a line about it."""

_USAGE_ERROR, _INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The command's exit code; 2 when there is no such command.
    """
    replace_unwritable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else None
    if name in ("-h", "--help"):
        return run_command("edgemoe", lambda: say(*_help()))
    if name == "--version":
        return run_command("edgemoe", lambda: say(f"edgemoe {edgemoe.__version__}"))
    if name is None or name not in COMMANDS:
        what = "a command is missing" if name is None else f"no command {name!r}"
        note(f"edgemoe: {what}; commands: {', '.join(COMMANDS)}")
        return _USAGE_ERROR
    try:
        # Imported on use: one command's dependencies must not slow down or break another.
        module = importlib.import_module(COMMANDS[name][0])
        code: int = module.main(arguments[1:])
    except KeyboardInterrupt:  # before the command began
        return _INTERRUPTED
    return code


def _help() -> list[str]:
    lines = [f"  {name:<16} {about}" for name, (_, about) in COMMANDS.items()]
    return [
        "usage: edgemoe COMMAND [ARGUMENTS]",
        "",
        "Runs Mixture-of-Experts language models that do not fit in fast memory.",
        "",
        *lines,
        "",
        "edgemoe COMMAND --help tells more.",
    ]

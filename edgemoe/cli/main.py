"""`edgemoe`: picks a command and passes the other arguments to it."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence

from edgemoe.cli.console import note, replace_unwritable, run_command, say
from edgemoe.errors import shortened

__all__ = ["ALIASES", "COMMANDS", "main"]

COMMANDS: Mapping[str, tuple[str, str]] = {
    "allocate": ("edgemoe.cli.allocate", "decide how many bits each expert runs at"),
    "bench": ("edgemoe.cli.bench", "measure how fast a model runs here"),
    "calibrate": ("edgemoe.cli.calibrate", "collect statistics of what flows into matrices"),
    "completion": ("edgemoe.cli.shells", "complete commands and flags in bash, zsh or fish"),
    "convert": ("edgemoe.cli.convert", "make a .moe file from a checkpoint"),
    "demo": ("edgemoe.cli.demo", "build the demo model"),
    "doctor": ("edgemoe.cli.doctor", "check this machine, the installation and the models"),
    "export": ("edgemoe.cli.export", "write a .moe file as a checkpoint for other programs"),
    "families": ("edgemoe.cli.families", "list the checkpoints that can be converted"),
    "inspect": ("edgemoe.cli.inspect", "show what a .moe file holds, and check it"),
    "list": ("edgemoe.cli.list", "list the models that are here"),
    "plan": ("edgemoe.cli.plan", "show how a model would fit, before it is converted"),
    "profile": ("edgemoe.cli.profile.command", "record, examine and replay how a model routes"),
    "pull": ("edgemoe.cli.pull", "fetch a model from the Hugging Face hub and convert it"),
    "quality": ("edgemoe.cli.quality", "measure what levels and schedulers cost in quality"),
    "rm": ("edgemoe.cli.rm", "remove models that are here"),
    "run": ("edgemoe.cli.run", "chat with a model; also installed as edgemoe-run"),
    "schedulers": ("edgemoe.cli.scheduling", "list the schedulers, which decide what is loaded"),
    "serve": ("edgemoe.cli.serve", "serve the APIs of OpenAI, Anthropic and llama.cpp"),
    "stand-ins": ("edgemoe.cli.stand_ins", "fit small maps that replace experts that are left out"),
    "train-bit-router": (
        "edgemoe.cli.train_bit_router",
        "train the routers of each expert's bits, for the scheduler d2moe",
    ),
}
"""For each command, the module whose `main(argv)` runs it, and a line about it."""

_GROUPS = {
    "use": (
        "run", "serve", "plan", "pull", "list", "rm", "convert", "families", "inspect", "export", "doctor", "demo",
        "completion",
    ),
    "measure": ("bench", "quality", "profile", "schedulers"),
}  # fmt: skip
"""The groups that come first in the help; all other commands follow."""

ALIASES: Mapping[str, str] = {"chat": "run", "show": "inspect"}
"""Other names of commands."""

_PEERS = {
    "cli": "run", "generate": "run", "start": "run", "server": "serve", "download": "pull", "get": "pull",
    "install": "pull", "ls": "list", "models": "list", "delete": "rm", "remove": "rm", "info": "inspect",
    "quantize": "convert", "benchmark": "bench", "perplexity": "quality", "check": "doctor",
}  # fmt: skip
"""What other programs call a command: such a name gets a hint."""

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
    if arguments[:1] == ["help"] and arguments[1:]:
        arguments = [arguments[1], "--help"]
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        return run_command("edgemoe", lambda: say(*_help()))
    if name == "--version":
        from edgemoe.cli.options import version_line

        return run_command("edgemoe", lambda: say(version_line("edgemoe")))
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, (*COMMANDS, *ALIASES), n=1)
        meant = _PEERS.get(name) or (near[0] if near else None)
        asked = f"; did you mean edgemoe {meant}?" if meant else ""
        note(f"edgemoe: no command {shortened(name, 40)!r}{asked}; edgemoe help lists the commands")
        return _USAGE_ERROR
    try:
        # Imported on use: one command's dependencies must not slow down or break another.
        module = importlib.import_module(COMMANDS[name][0])
        named = {"prog": f"edgemoe {arguments[0]}"} if name in ALIASES.values() else {}
        code: int = module.main(arguments[1:], **named)
    except KeyboardInterrupt:  # before the command began
        return _INTERRUPTED
    return code


def _help() -> list[str]:
    first = [name for names in _GROUPS.values() for name in names]
    groups = {**_GROUPS, "research": tuple(name for name in COMMANDS if name not in first)}
    lines = []
    for group, names in groups.items():
        lines += [f"{group}:", *(f"  {name:<16} {COMMANDS[name][1]}" for name in names), ""]
    return [
        "usage: edgemoe COMMAND [ARGUMENTS]",
        "",
        "Runs Mixture-of-Experts language models that are larger than memory.",
        "",
        "  edgemoe run                            chat with a small demo model",
        "  edgemoe pull allenai/OLMoE-1B-7B-0924  get a model",
        "  edgemoe run OLMoE-1B-7B-0924 --ram 4GiB   chat with it inside 4 GiB",
        "",
        *lines,
        "edgemoe COMMAND --help tells more.",
    ]

"""`edgemoe completion`: all commands as one parser, and the scripts by which shells complete them."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgemoe.cli.console import run_command, say
from edgemoe.cli.main import ALIASES, COMMANDS
from edgemoe.cli.parser import Parser, parser_of
from edgemoe.cli.values import CACHE_TYPES

__all__ = ["PROGRAMS", "SHELLS", "actions", "completion", "main", "program"]

SHELLS = ("bash", "zsh", "fish")
PROGRAMS = ("edgemoe", "edgemoe-run")

_PROG = "edgemoe completion"
_EPILOG = """\
For completion of edgemoe in every new shell (for edgemoe-run, add its name after the shell's):

    bash  edgemoe completion bash > ~/.local/share/bash-completion/completions/edgemoe
    zsh   edgemoe completion zsh > ~/.zfunc/_edgemoe    # a folder of fpath
    fish  edgemoe completion fish > ~/.config/fish/completions/edgemoe.fish

Only in the present shell: eval "$(edgemoe completion bash)"; in fish: edgemoe completion fish | source
"""

_CHOICES = {
    **dict.fromkeys(("--cache-type-k", "--cache-type-v", "-ctk", "-ctv"), (*CACHE_TYPES, "auto")),
    "--device": ("cpu", "cuda:0"), "--scheme": ("nested", "mwq", "mxfp4", "nvfp4"),
    "--stats": ("short", "full", "off"),
}  # fmt: skip
"""The values of flags that are checked only after parsing."""

_FILES = ("FILE", "MODEL", "SOURCE", "OUT")
"""How the metavar of an argument begins that is a file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0; 1 when stdout cannot be written.

    Raises:
        SystemExit: with code 2 at wrong usage.
    """
    parser = Parser(
        prog=_PROG, epilog=_EPILOG,
        description="Print the script by which a shell completes commands, flags and files.",
    )  # fmt: skip
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    parser.add_argument("program", nargs="?", choices=PROGRAMS, default=PROGRAMS[0], metavar="PROGRAM",
                        help="edgemoe or edgemoe-run (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    return run_command(_PROG, lambda: say(*completion(args.program, args.shell).split("\n")))


def program(name: str) -> Parser:
    """Returns the whole parser of a program, `edgemoe` or `edgemoe-run`."""
    if name == "edgemoe-run":
        return _command("run")
    parser = Parser(prog=name, description="Runs Mixture-of-Experts models inside a memory budget.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command, (_, line) in COMMANDS.items():
        parent = _command(command)
        others = [alias for alias, meant in ALIASES.items() if meant == command]
        commands.add_parser(
            command, aliases=others, help=line, parents=[parent], add_help=False,
            prog=f"edgemoe {command}", usage=parent.usage, description=parent.description,
        )  # fmt: skip
    told = commands.add_parser("help", help="show the help of a command")
    told.add_argument("of", nargs="?", choices=tuple(COMMANDS), metavar="COMMAND")
    return parser


def completion(name: str, shell: str) -> str:
    """Returns the script for one of `PROGRAMS` and one of `SHELLS`."""
    import shtab

    parser = program(name)
    _say_values(parser)
    text = str(shtab.complete(parser, shell)).rstrip("\n")
    # In fish, -s is for flags of one letter, and -o for those of several letters after one dash.
    if shell == "fish":
        text = re.sub(r"(?m)^complete .*?(?= -d |$)", _dashed_once, text)
    return text


def _dashed_once(flags: re.Match[str]) -> str:
    return re.sub(r" -s (?=\w{2,} )", " -o ", flags[0])


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yields the arguments that a parser and those of its commands take."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in {id(p): p for p in action.choices.values()}.values():
                yield from actions(below)
        elif action.help != argparse.SUPPRESS:
            yield action


def _command(name: str) -> Parser:
    return parser_of(importlib.import_module(COMMANDS[name][0]).main)


def _say_values(parser: Parser) -> None:
    """Tells shtab what the value of each argument is: a file, or one of a few words."""
    from shtab import FILE

    from edgemoe.scheduler import KINDS

    for action in actions(parser):
        name = next((n for n in action.option_strings if n in _CHOICES), None)
        if name is not None:
            action.choices = _CHOICES[name]
        elif "--scheduler" in action.option_strings:
            action.choices = tuple(KINDS)
        elif action.nargs != 0 and (action.type is Path or str(action.metavar).startswith(_FILES)):
            action.complete = FILE  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())

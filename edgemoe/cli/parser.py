"""The argument parser of every command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from edgemoe.cli.console import note, run_command, say
from edgemoe.errors import quoted

__all__ = ["NUMBERS", "Parser", "parser_of"]

_USAGE_ERROR = 2
NUMBERS: dict[Any, str] = {int: "a whole number", float: "a number"}
"""What is expected of a flag's value, by its type."""


class Parser(argparse.ArgumentParser):
    """A parser that answers wrong usage with one line instead of a screen of flags, and takes no abbreviations."""

    is_wanted: ClassVar[bool] = False
    """Whether `parser_of` wants the parser itself, so that no arguments are read."""

    def __init__(self, *, first: Sequence[str] = (), **kwargs: Any) -> None:
        """Takes what `ArgumentParser` takes.

        Args:
            first: the titles of the groups that --help shows, while --help-all shows all; empty for one full --help.
        """
        if first:
            kwargs["add_help"] = False
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs
        )
        self._first = tuple(first)
        if first:
            self.add_argument(
                "-h", "--help", action=_FirstHelp, help="show the most used flags and exit"
            )
            self.add_argument("--help-all", action="help", help="show all flags and exit")

    def format_first_help(self) -> str:
        """Returns the help of the first groups, and the titles of the others."""
        groups = self._action_groups
        shown = [
            g for g in groups if g.title in self._first or g in (self._positionals, self._optionals)
        ]
        others = [str(g.title) for g in groups if g not in shown]
        try:
            self._action_groups = shown
            text = self.format_help()
        finally:
            self._action_groups = groups
        return f"{text}\n{self.prog} --help-all lists the other flags: {'; '.join(others)}.\n"

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if Parser.is_wanted:
            raise _Taken(self)
        return super().parse_known_args(args, namespace)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Reads one argument. An empty path, often an unset variable, is refused: it would be the current folder."""
        words = str(action.metavar)
        is_name = (
            action.type is Path or "FILE" in words or "DIR" in words or not action.option_strings
        )
        if is_name and not arg_string:
            raise argparse.ArgumentError(action, "expected a value, got ''")
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            if action.type not in NUMBERS:
                raise
            message = f"expected {NUMBERS[action.type]}, got {quoted(arg_string)}"
            raise argparse.ArgumentError(action, message) from None

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE_ERROR, f"{self.prog}: {message}; {self.prog} --help lists the flags")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            note(message)
        sys.exit(status)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Writes help or the version; a stdout that is closed or full is an error, as with any other result."""
        code = run_command(self.prog, lambda: say(*message.rstrip("\n").split("\n")))
        if code:
            self.exit(code)


class _FirstHelp(argparse.Action):
    """The action of --help where there is --help-all: prints the first groups."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> NoReturn:
        assert isinstance(parser, Parser)
        parser._print_message(parser.format_first_help())
        parser.exit()


class _Taken(BaseException):  # commands turn every Exception into a line
    def __init__(self, parser: Parser) -> None:
        self.parser = parser


def parser_of(main: Callable[[Sequence[str]], int]) -> Parser:
    """Returns the parser that a command's `main` reads its arguments with: a new one, which the caller may change.

    Commands need no code for this, and shell completion and the manual cannot differ from what a command accepts.

    Raises:
        SystemExit: an environment variable has a value that its flag does not take.
    """
    Parser.is_wanted = True
    try:
        main([])
    except _Taken as taken:
        return taken.parser
    finally:
        Parser.is_wanted = False
    raise AssertionError(f"{main.__module__} parses no arguments")

"""The argument parser of every command."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from edgemoe.cli.console import note, run_command, say

__all__ = ["Parser"]

_USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """Ends with one line about wrong usage instead of a screen of flags; takes no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs
        )

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

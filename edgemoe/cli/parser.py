"""The argument parser of every command."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from edgemoe.cli.console import shown

__all__ = ["Parser"]

_USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """Ends with one line about wrong usage instead of a screen of flags; takes no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        line = f"{self.prog}: {message}; {self.prog} --help lists the flags"
        self.exit(_USAGE_ERROR, shown(line) + "\n")

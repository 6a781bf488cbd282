"""Runs a command of edgemoe in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from edgemoe import library

__all__ = ["run_apart"]


def run_apart(*arguments: str) -> int:
    """Runs `edgemoe ARGUMENTS` in another process, so that its memory is not this one's, and returns its exit code.

    It reads nothing from stdin. It starts where this package lies, or a folder of its name in the current one would be
    taken for it: paths among the arguments have to be absolute.
    """
    command = [sys.executable, "-m", "edgemoe", *arguments]
    folder = Path(__file__).parents[2]
    kept = {
        name: ":".join(map(str, library.folders()))
        for name in os.environ
        if name == "EDGEMOE_MODELS"
    }
    return subprocess.call(
        command, stdin=subprocess.DEVNULL, cwd=folder, env={**os.environ, **kept}
    )
